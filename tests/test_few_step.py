"""The student's few-step grids equal the specification's tables, with the shift from either resolution."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.config import SchedulerConfig
from helios_jax.diffusion import few_step, solvers
from helios_jax.diffusion.schedules import dynamic_shift_mu, pyramid_schedules, shift_tokens
from helios_jax.errors import UserError

CONFIG = few_step.student_scheduler()
SIZE = {"frames": 9, "height": 48, "width": 80}

# Section 2.3, the shift of training: (level, N) -> timesteps, sigmas (six decimals of the specification).
OWN = {
    (0, 1): ((998.5342,), (0.998177,)),
    (1, 1): ((742.8216,), (0.998784,)),
    (2, 1): ((385.4137,), (0.999479,)),
    (0, 2): ((998.5342, 833.9636), (0.998177, 0.354035)),
    (1, 2): ((742.8216, 547.1926), (0.998784, 0.451240)),
    (2, 2): ((385.4137, 253.9905), (0.999479, 0.657436)),
    (0, 4): ((998.5342, 902.2183, 833.9636, 783.0660), (0.998177, 0.621189, 0.354035, 0.154818)),
    (1, 4): ((742.8216, 640.0038, 547.1926, 462.9951), (0.998784, 0.711008, 0.451240, 0.215580)),
    (2, 4): ((385.4137, 328.6249, 253.9905, 151.5308), (0.999479, 0.851680, 0.657436, 0.390774)),
}
# Section 12.5, the shift of sampling; level 0 is as above.
PREVIOUS = {
    (1, 2): ((742.6046, 512.4629), (0.998177, 0.354035)),
    (2, 2): ((385.1468, 174.7637), (0.998784, 0.451240)),
    (1, 4): ((742.6046, 607.9129, 512.4629, 441.2859), (0.998177, 0.621189, 0.354035, 0.154818)),
    (2, 4): ((385.1468, 274.5746, 174.7637, 84.2161), (0.998784, 0.711008, 0.451240, 0.215580)),
}


@pytest.mark.parametrize(("shift_from", "table"), [("own", OWN), ("previous", PREVIOUS)])
def test_grids_equal_the_tables(shift_from, table):
    for (stage, steps), (timesteps, sigmas) in table.items():
        grid = few_step.level_grid(CONFIG, steps, stage=stage, shift_from=shift_from, **SIZE)
        np.testing.assert_allclose(grid.timesteps, timesteps, atol=6e-5)  # four decimals are printed
        np.testing.assert_allclose(grid.sigmas, [*sigmas, 0], atol=6e-7)  # six decimals are printed


def test_shifts_equal_the_specification():
    for stage, mu in enumerate((0.5480729, 0.8222917, 1.9191667)):
        own = shift_tokens(CONFIG, stage, shift_from="own", **SIZE)
        np.testing.assert_allclose(dynamic_shift_mu(CONFIG, own), mu, atol=5e-8)
    with pytest.raises(UserError, match="shift_from: 'own' or 'previous', got 'next'"):
        shift_tokens(CONFIG, 1, shift_from="next", **SIZE)


def test_the_grid_from_the_previous_level_is_the_one_that_is_sampled():
    for stage, sampled in enumerate(pyramid_schedules(CONFIG, (2, 2, 2), **SIZE, amplify=True)):
        grid = few_step.level_grid(CONFIG, 4, stage=stage, shift_from="previous", **SIZE)
        for name in ("sigmas", "timesteps", "model_timesteps"):
            np.testing.assert_array_equal(getattr(grid, name), getattr(sampled, name))


def test_only_the_sampled_grid_truncates_timesteps():
    own, sampled = (few_step.level_grid(CONFIG, 2, stage=1, shift_from=name, **SIZE) for name in ("own", "previous"))
    np.testing.assert_array_equal(own.model_timesteps, own.timesteps)
    np.testing.assert_array_equal(sampled.model_timesteps, [742, 512])


def test_nearest_entries_are_the_ones_of_the_specification():
    for stage, expected in enumerate(((0, 500), (0, 500), (0, 499))):
        table = few_step.level_table(CONFIG, stage=stage, **SIZE)
        grid = few_step.level_grid(CONFIG, 2, stage=stage, **SIZE)
        assert table.num_steps == 1000
        sigma = few_step.sigma_at(table, grid.timesteps)
        found = [int(np.flatnonzero(table.sigmas == s)[0]) for s in sigma]
        assert found[0] == expected[0] and found[1] in (499, 500)  # 499.5 up to rounding: either is the nearest
        assert np.abs(sigma - grid.sigmas[:-1]).max() < 5e-4
        on_device = few_step.sigma_at(table, jnp.asarray(grid.timesteps, jnp.float32))
        assert np.abs(np.asarray(on_device) - grid.sigmas[:-1]).max() < 5e-4


def test_a_student_step_is_the_dmd_solvers_step():
    rng = np.random.default_rng(0)
    start, x, velocity = (jnp.asarray(rng.standard_normal((2, 1, 2, 2, 3)), jnp.float32) for _ in range(3))
    grid = few_step.level_grid(CONFIG, 2, stage=1, **SIZE)
    state = solvers.init_state(start, 1)._replace(sample=x)
    stepped = solvers.step(solvers.row(solvers.solver_coefficients(CONFIG, grid), 0), state, velocity).sample
    clean = few_step.x0(velocity, x, grid.sigmas[0])
    np.testing.assert_allclose(few_step.renoise(clean, start, grid.sigmas[1]), stepped, atol=1e-6)
    per_sample = few_step.renoise(clean, start, jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(per_sample[0], clean[0])
    np.testing.assert_array_equal(per_sample[1], start[1])


TEACHER = SchedulerConfig(use_dynamic_shifting=True, time_shift_type="linear")


@pytest.mark.parametrize(("few", "steps"), [(4, 23), (2, 21)])
def test_a_teachers_schedule_passes_through_the_few_step_grid(few, steps):
    for stage in range(3):
        schedule, kept = few_step.trajectory_schedule(TEACHER, 20, few, stage=stage, **SIZE)
        assert schedule.num_steps == steps and (np.diff(schedule.sigmas) < 0).all()
        grid = few_step.level_grid(CONFIG, few, stage=stage, **SIZE)
        assert np.abs(schedule.sigmas[kept] - grid.sigmas[:-1]).max() < 5e-4
        table = few_step.level_table(CONFIG, stage=stage, **SIZE)
        np.testing.assert_allclose(few_step.sigma_at(table, schedule.timesteps[kept]), schedule.sigmas[kept],
                                   atol=1e-12)


def test_stored_points_are_the_ones_of_the_specification():
    """The middle point lies exactly between two entries of the table: either one may be the nearest."""
    for stage, specified in ((0, 834.0803), (2, 253.8176)):
        schedule, kept = few_step.trajectory_schedule(TEACHER, 20, 2, stage=stage, **SIZE)
        candidates = few_step.level_table(CONFIG, stage=stage, **SIZE).timesteps[499:501]
        assert np.abs(candidates - specified).min() < 6e-5
        assert np.abs(candidates - schedule.timesteps[kept[1]]).min() < 1e-9
    unshifted = SchedulerConfig()
    for stage, points in enumerate(((999, 935.1279, 871.2559, 807.3838), (743.2560, 653.9349, 564.6138, 475.2927),
                                    (385.6140, 289.5564, 193.4988, 97.4412))):
        schedule, kept = few_step.trajectory_schedule(unshifted, 20, 4, stage=stage, **SIZE)
        np.testing.assert_allclose(schedule.timesteps[kept], points, atol=6e-5)
