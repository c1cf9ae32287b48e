"""UniPC, Euler and DMD steps are those of the original schedulers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_schedules import KINDS, original_scheduler, scheduler_config

from helios_jax.config import SchedulerConfig
from helios_jax.diffusion.schedules import Schedule, dynamic_shift_mu, make_schedule
from helios_jax.diffusion.solvers import SolverState, init_state, row, solver_coefficients, step
from helios_jax.errors import UserError

X0 = np.array([0.5, -1.0, 2.0, 0.25], np.float32).reshape(1, 1, 2, 2, 1)


def trajectory(config: SchedulerConfig, schedule: Schedule, velocity_of) -> list[np.ndarray]:
    """The samples after each step; ``velocity_of(sample, i)``."""
    coefficients = solver_coefficients(config, schedule)
    state, samples = init_state(jnp.asarray(X0), coefficients.memory), []
    for i in range(schedule.num_steps):
        state = step(row(coefficients, i), state, velocity_of(state.sample, i))
        samples.append(np.asarray(state.sample).reshape(-1))
    return samples


def sine_velocity(x, i):
    return jnp.sin(x) + 0.1 * i


# --- recorded numbers: velocity sin(x) + 0.1 i from x = (0.5, -1, 2, 0.25) -------------------------------------------

RECORDED = 1.5e-6  # 1e-6, and half a unit of the sixth decimal that the numbers were recorded with

FIVE_STEPS = {
    "bh2": [(+0.483024, -0.970205, +1.967803, +0.241240), (+0.450908, -0.933667, +1.910499, +0.221112),
            (+0.388558, -0.885873, +1.798795, +0.177975), (+0.254686, -0.813058, +1.539959, +0.080342),
            (-0.155947, -0.607476, +0.658452, -0.222153)],
    "euler": [(+0.483024, -0.970205, +1.967803, +0.241240), (+0.452684, -0.931235, +1.912858, +0.223023),
              (+0.394471, -0.876221, +1.808552, +0.184556), (+0.264792, -0.787473, +1.567531, +0.092931),
              (-0.151993, -0.593115, +0.685728, -0.217463)],
    "bh1": [(+0.483024, -0.970205, +1.967803, +0.241240), (+0.444443, -0.942523, +1.901913, +0.214155),
            (+0.381457, -0.896479, +1.787099, +0.170360), (+0.246565, -0.829875, +1.520054, +0.070949),
            (-0.159112, -0.617078, +0.639059, -0.225646)],
}
FINAL = [
    ({"disable_corrector": (1, 2)}, (-0.155561, -0.605345, +0.662906, -0.221637)),
    ({"solver_order": 1}, (-0.153527, -0.597756, +0.676672, -0.219182)),
    ({"solver_order": 3}, (-0.155996, -0.607663, +0.657663, -0.222194)),
    ({"lower_order_final": False}, (-0.042637, -1.674196, -0.273072, -0.311668)),
]


def one_stage_five_steps(**options) -> list[np.ndarray]:
    config = scheduler_config("exponential", stages=1, **options)
    return trajectory(config, make_schedule(config, 5, tokens=8640), sine_velocity)


@pytest.mark.parametrize("name,options", [("bh2", {}), ("euler", {"scheduler_type": "euler"}),
                                          ("bh1", {"solver_type": "bh1"})])
def test_one_stage_trajectories_are_the_recorded_ones(name, options):
    np.testing.assert_allclose(one_stage_five_steps(**options), FIVE_STEPS[name], rtol=0, atol=RECORDED)


@pytest.mark.parametrize("options,final", FINAL)
def test_unipc_variants_end_as_recorded(options, final):
    np.testing.assert_allclose(one_stage_five_steps(**options)[-1], final, rtol=0, atol=RECORDED)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_pyramid_trajectory_is_the_recorded_one_in_every_stage(stage):
    config = scheduler_config()
    samples = trajectory(config, make_schedule(config, 3, tokens=540, stage=stage), sine_velocity)
    np.testing.assert_allclose(samples[-1], (+0.112276, -0.454514, +0.948938, +0.018743), rtol=0, atol=RECORDED)


def test_dmd_trajectory_is_the_recorded_one():
    config = scheduler_config("linear", dmd=True)
    schedule = make_schedule(config, 2, tokens=540, stage=1, amplify=True)
    recorded = [(+0.318720, -0.681823, +1.656176, +0.156452), (+0.217035, -0.581714, +1.337971, +0.086921),
                (+0.136565, -0.541906, +1.089470, +0.026348), (+0.069042, -0.508501, +0.905796, -0.024176)]
    np.testing.assert_allclose(trajectory(config, schedule, sine_velocity), recorded, rtol=0, atol=RECORDED)


# --- equality with diffusers on random velocities --------------------------------------------------------------------


def largest_difference(config: SchedulerConfig, steps: int, *, tokens: int = 2160, stage: int = 0,
                       amplify: bool = False, sigmas=None, seed: int = 0) -> float:
    """Runs both solvers on the same velocities and returns the largest difference of any sample, relative to the
    largest value."""
    torch = pytest.importorskip("torch")
    random = np.random.RandomState(seed)
    start = random.standard_normal((2, 3, 4, 4, 5)).astype(np.float32)  # [B, T, h, w, C]
    schedule = make_schedule(config, steps, tokens=tokens, stage=stage, amplify=amplify, sigmas=sigmas)
    original = original_scheduler(config)
    options = {"sigmas": np.asarray(sigmas if sigmas is not None else np.linspace(0.999, 0, steps + 1)[:-1])}
    if config.stages > 1:
        options = {"stage_index": stage, "is_amplify_first_chunk": amplify}
    original.set_timesteps(steps, mu=dynamic_shift_mu(config, tokens), **options)

    coefficients = solver_coefficients(config, schedule)
    state = init_state(jnp.asarray(start), coefficients.memory)
    jitted = jax.jit(step)
    theirs = torch.from_numpy(start)
    worst = 0.0
    for i, t in enumerate(original.timesteps):
        velocity = random.standard_normal(start.shape).astype(np.float32)
        state = jitted(row(coefficients, i), state, jnp.asarray(velocity))
        extra = {}
        if config.is_dmd:
            extra = {"cur_sampling_step": i, "dmd_noisy_tensor": torch.from_numpy(start),
                     "dmd_sigmas": original.sigmas, "dmd_timesteps": original.timesteps,
                     "all_timesteps": original.timesteps}
        theirs = original.step(torch.from_numpy(velocity), t, theirs, return_dict=False, **extra)[0]
        want = theirs.numpy()
        worst = max(worst, float(np.abs(np.asarray(state.sample) - want).max() / np.abs(want).max()))
    assert i + 1 == schedule.num_steps
    return worst


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 10, 20, 50])
@pytest.mark.parametrize("options", [{}, {"scheduler_type": "euler"}, {"stages": 1},
                                     {"stages": 1, "scheduler_type": "euler"}])
def test_multistep_scheduler_equals_diffusers(kind, steps, options):
    assert largest_difference(scheduler_config(kind, **options), steps, seed=steps) < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("options", [
    {"solver_type": "bh1"}, {"solver_order": 1}, {"solver_order": 3}, {"solver_order": 3, "solver_type": "bh1"},
    {"lower_order_final": False}, {"disable_corrector": (0,)}, {"disable_corrector": (1, 2, 5)},
    {"use_flow_sigmas": False}])
def test_unipc_variants_equal_diffusers(steps, options):
    assert largest_difference(scheduler_config("exponential", stages=1, **options), steps, seed=steps) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amplify", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4, 10, 50])
def test_dmd_equals_diffusers(kind, amplify, steps):
    config = scheduler_config(kind, dmd=True)
    for stage, tokens in enumerate((540, 540, 2160)):
        assert largest_difference(config, steps, tokens=tokens, stage=stage, amplify=amplify, seed=steps) < 1e-6


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_first_sigma_of_one_equals_diffusers(order):
    config = scheduler_config(stages=1, solver_order=order)
    for steps in (1, 2, 3, 6):
        assert largest_difference(config, steps, sigmas=np.linspace(1, 0.1, steps)) < 1e-6


# --- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"scheduler_type": "euler"}, {"solver_order": 3}])
def test_zero_velocity_leaves_the_sample(options):
    config = scheduler_config("exponential", **options)
    for sample in trajectory(config, make_schedule(config, 6, tokens=540), lambda x, i: jnp.zeros_like(x)):
        np.testing.assert_allclose(sample, X0.reshape(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"scheduler_type": "euler"}, {"solver_order": 3}, {"dmd": True}])
def test_a_perfect_velocity_leads_to_the_clean_sample(options):
    """Along x = sigma * noise + (1 - sigma) * clean the velocity is constant and every solver is exact."""
    config = scheduler_config("linear", stages=3, **options)
    schedule = make_schedule(config, 5, tokens=540)
    clean = jnp.float32(0.3)
    noise = (jnp.asarray(X0) - (1 - schedule.sigmas[0]) * clean) / schedule.sigmas[0]
    if config.is_dmd:  # mixes with the start point, so only the clean prediction is exact
        final = trajectory(config, schedule, lambda x, i: (x - clean) / schedule.sigmas[i])[-1]
    else:
        final = trajectory(config, schedule, lambda x, i: noise - clean)[-1]
    np.testing.assert_allclose(final, 0.3, rtol=0, atol=1e-5)


def test_one_compiled_scan_serves_every_schedule_of_the_same_length():
    compilations = []

    @jax.jit
    def run(coefficients, sample, velocities):
        compilations.append(None)
        state = init_state(sample, coefficients.memory)
        return jax.lax.scan(lambda s, xs: (step(xs[0], s, xs[1]), None), state, (coefficients, velocities))[0]

    velocities = np.random.RandomState(0).standard_normal((4, *X0.shape)).astype(np.float32)
    for kind, order_final in (("linear", True), ("exponential", True), ("exponential", False)):
        config = scheduler_config(kind, lower_order_final=order_final)
        schedule = make_schedule(config, 4, tokens=540, stage=2)
        scanned = run(solver_coefficients(config, schedule), X0, velocities).sample
        unrolled = trajectory(config, schedule, lambda x, i: velocities[i])[-1]
        np.testing.assert_allclose(np.asarray(scanned).reshape(-1), unrolled, rtol=0, atol=1e-6)
    assert len(compilations) == 1


def test_bfloat16_velocities_keep_a_float32_state():
    config = scheduler_config("linear", dmd=True)
    coefficients = solver_coefficients(config, make_schedule(config, 2, tokens=540))
    state = init_state(jnp.asarray(X0, jnp.bfloat16), coefficients.memory)
    state = step(row(coefficients, 0), state, jnp.ones(X0.shape, jnp.bfloat16))
    assert isinstance(state, SolverState) and all(leaf.dtype == jnp.float32 for leaf in state)


def test_an_impossible_order_is_named():
    config = scheduler_config(solver_order=0)
    with pytest.raises(UserError, match="solver_order"):
        solver_coefficients(config, make_schedule(config, 3, tokens=540))
