"""Sigmas, timesteps and stage constants are those of the original schedulers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from schedule_tables import (
    DMD,
    ONE_STAGE_TIMESTEPS,
    PYRAMID_MODEL_TIMESTEPS,
    PYRAMID_SIGMAS,
    PYRAMID_TIMESTEPS,
)

from helios_jax.config import SchedulerConfig
from helios_jax.diffusion import schedules
from helios_jax.diffusion.schedules import make_schedule, pyramid_schedules, stage_table
from helios_jax.errors import UserError

KINDS = ("none", "linear", "exponential")
SIX_DECIMALS = 5.1e-7
CHUNK_384x640 = {"frames": 9, "height": 48, "width": 80}


def scheduler_config(kind: str = "none", *, dmd: bool = False, stages: int = 3, **options) -> SchedulerConfig:
    """A scheduler with the given dynamic shift; 'none' switches it off."""
    return SchedulerConfig(class_name="HeliosDMDScheduler" if dmd else "HeliosScheduler", stages=stages,
                           use_dynamic_shifting=kind != "none", time_shift_type=None if kind == "none" else kind,
                           **options)


def original_scheduler(config: SchedulerConfig):
    """The diffusers scheduler of a configuration."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    values = config.to_dict() | {"stage_range": list(config.stage_range),
                                 "disable_corrector": list(config.disable_corrector)}
    names = ["num_train_timesteps", "shift", "stages", "stage_range", "gamma", "use_dynamic_shifting",
             "time_shift_type"]
    if not config.is_dmd:
        names += ["scheduler_type", "solver_order", "solver_type", "lower_order_final", "disable_corrector",
                  "use_flow_sigmas"]
    return getattr(diffusers, config.class_name)(**{name: values[name] for name in names})


# --- recorded numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_one_stage_timesteps_are_the_recorded_ones(kind):
    schedule = make_schedule(scheduler_config(kind, stages=1), 50, tokens=8640)
    np.testing.assert_allclose(schedule.timesteps, ONE_STAGE_TIMESTEPS[kind], rtol=0, atol=SIX_DECIMALS)
    np.testing.assert_allclose(schedule.sigmas, np.append(schedule.timesteps / 1000, 0), rtol=0, atol=1e-15)
    np.testing.assert_array_equal(schedule.model_timesteps, schedule.timesteps)  # fractional in the one-stage mode


def test_one_stage_without_shift_is_a_straight_line():
    schedule = make_schedule(scheduler_config(stages=1), 50, tokens=8640)
    np.testing.assert_allclose(schedule.sigmas, 0.999 * (1 - np.arange(51) / 50), rtol=0, atol=1e-15)
    np.testing.assert_allclose(schedule.timesteps[[0, 1, 49]], [999, 979.02, 19.98], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_pyramid_of_20_steps_is_the_recorded_one(kind):
    for stage, schedule in enumerate(pyramid_schedules(scheduler_config(kind), [20, 20, 20], **CHUNK_384x640)):
        np.testing.assert_allclose(schedule.sigmas, PYRAMID_SIGMAS[kind, stage], rtol=0, atol=SIX_DECIMALS)
        np.testing.assert_allclose(schedule.timesteps, PYRAMID_TIMESTEPS[kind, stage], rtol=0, atol=SIX_DECIMALS)
        if kind != "none":
            truncated = [int(t) for t in PYRAMID_MODEL_TIMESTEPS[kind, stage]]
            np.testing.assert_array_equal(schedule.model_timesteps, truncated)


@pytest.mark.parametrize("steps,amplify", [(1, False), (1, True), (2, False), (2, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_dmd_tables_are_the_recorded_ones(kind, steps, amplify):
    config = scheduler_config(kind, dmd=True)
    for stage, schedule in enumerate(pyramid_schedules(config, [steps] * 3, amplify=amplify, **CHUNK_384x640)):
        sigmas, timesteps, truncated = np.split(np.asarray(DMD[steps, amplify, stage, kind], np.float64), 3)
        np.testing.assert_allclose(schedule.sigmas, np.append(sigmas, 0), rtol=0, atol=SIX_DECIMALS)
        np.testing.assert_allclose(schedule.timesteps, timesteps, rtol=0, atol=SIX_DECIMALS)
        np.testing.assert_array_equal(schedule.model_timesteps, truncated)


def test_few_steps_of_the_multistep_scheduler_are_the_recorded_ones():
    first = {"none": 0.999, "exponential": 0.999422, "linear": 0.998177}
    second = {"none": 0.000999, "exponential": 0.001727, "linear": 0.000548}
    for kind in KINDS:
        config = scheduler_config(kind)
        two = make_schedule(config, 2, tokens=540)
        one = make_schedule(config, 1, tokens=540)
        np.testing.assert_allclose(two.sigmas, [first[kind], second[kind], 0], rtol=0, atol=SIX_DECIMALS)
        np.testing.assert_allclose(one.sigmas, [first[kind], 0], rtol=0, atol=SIX_DECIMALS)


def test_shift_parameter_of_the_recorded_token_counts():
    config = scheduler_config("linear")
    got = [schedules.dynamic_shift_mu(config, tokens) for tokens in (540, 2160, 8640)]
    np.testing.assert_allclose(got, [0.548073, 0.822292, 1.919167], rtol=0, atol=SIX_DECIMALS)
    assert schedules.latent_tokens(9, 48, 80) == 8640


def test_stage_constants_are_the_recorded_ones():
    low, mid, high = stage_table(scheduler_config())
    np.testing.assert_allclose([low.raw_start, mid.raw_start, high.raw_start], [0.999, 0.666333, 0.333666], atol=1e-12)
    np.testing.assert_allclose([mid.start, high.start], [0.7997597118943213, 0.5003741566479163], rtol=0, atol=1e-15)
    np.testing.assert_allclose([low.end, mid.end, high.end], [0.666333, 0.333666, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose([mid.alpha, mid.beta], [0.600120144, 0.692612227], rtol=0, atol=5.1e-10)
    np.testing.assert_allclose([high.alpha, high.beta], [0.749812922, 0.433336731], rtol=0, atol=5.1e-10)
    assert (low.alpha, low.beta) == (1, 0)
    for stage in (low, mid, high):
        assert abs(stage.sigmas()[-1] - 0.0009989999999998611) < 1e-15 and stage.sigmas()[0] == 0.999


def test_training_timesteps_at_the_recorded_grid_points():
    recorded = ([999, 935.064, 871.128, 807.192, 743.5117], [743.256, 653.8455, 564.435, 475.0245, 385.9716],
                [385.614, 289.4602, 193.3065, 97.1528, 1.3836])
    borders = [(999, 743.256), (743.256, 385.614), (385.614, 0.999)]
    for stage, values, (high, low) in zip(stage_table(scheduler_config()), recorded, borders, strict=True):
        points = np.array([0, 250, 500, 750, 999])
        np.testing.assert_allclose(stage.timesteps()[points], values, rtol=0, atol=5.1e-5)
        np.testing.assert_allclose([stage.timestep_high, stage.timestep_low], [high, low], rtol=0, atol=1e-9)
        assert abs(stage.sigmas()[500] - 0.4995) < 1e-15


def test_static_shift_moves_the_stages_as_recorded():
    table = stage_table(scheduler_config(shift=3.0))
    np.testing.assert_allclose([s.raw_start for s in table], [0.999666444, 0.856958947, 0.600359137], atol=5.1e-10)
    ends = [(s.timesteps()[0], s.timesteps()[-1]) for s in table]
    recorded = [(999, 957.395835), (957.354189, 828.916751), (828.788185, 3.816821)]
    np.testing.assert_allclose(ends, recorded, rtol=0, atol=SIX_DECIMALS)


def test_amplified_one_step_equals_two_steps():
    config = scheduler_config("linear", dmd=True)
    doubled = make_schedule(config, 1, tokens=540, stage=1, amplify=True)
    np.testing.assert_array_equal(doubled.sigmas, make_schedule(config, 2, tokens=540, stage=1).sigmas)


# --- equality with diffusers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dmd", [False, True])
def test_pyramid_equals_diffusers_for_1_to_50_steps(kind, dmd):
    config = scheduler_config(kind, dmd=dmd)
    original = original_scheduler(config)
    for stage, tokens in enumerate((540, 1200, 8640)):  # mu below, around and above 1
        mu = schedules.dynamic_shift_mu(config, tokens)
        for steps in range(1, 51):
            for amplify in (False, True):
                original.set_timesteps(steps, stage, mu=mu, is_amplify_first_chunk=amplify)
                ours = make_schedule(config, steps, tokens=tokens, stage=stage, amplify=amplify)
                np.testing.assert_allclose(ours.sigmas, original.sigmas.numpy(), rtol=0, atol=1e-12)
                np.testing.assert_allclose(ours.timesteps, original.timesteps.numpy(), rtol=0, atol=1e-9)
                np.testing.assert_array_equal(ours.model_timesteps, original.timesteps.long().numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dmd", [False, True])
def test_one_stage_equals_diffusers_for_1_to_50_steps(kind, dmd):
    config = scheduler_config(kind, dmd=dmd, stages=1)
    original = original_scheduler(config)
    mu = schedules.dynamic_shift_mu(config, 2160)
    for steps in range(1, 51):
        points = steps + 1 if dmd else steps
        pipelines = np.linspace(0.999, 0, points + 1)[:-1]
        for sigmas, own in ((pipelines, None), (np.linspace(1, 0.3, points), np.linspace(1, 0.3, points).tolist())):
            original.set_timesteps(steps, sigmas=sigmas, mu=mu)
            ours = make_schedule(config, steps, tokens=2160, sigmas=own)
            np.testing.assert_allclose(ours.sigmas, original.sigmas.numpy(), rtol=0, atol=1e-12)
            np.testing.assert_allclose(ours.timesteps, original.timesteps.numpy(), rtol=0, atol=1e-9)
            np.testing.assert_array_equal(ours.model_timesteps, ours.timesteps)


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"gamma": 0.2}, {"stages": 2, "stage_range": (0.0, 0.5, 1.0)},
                                     {"stages": 4, "stage_range": (0.0, 0.2, 0.45, 0.8, 1.0)},
                                     {"num_train_timesteps": 500}])
def test_stage_table_equals_diffusers(options):
    config = scheduler_config(**options)
    original = original_scheduler(config)
    for i, stage in enumerate(stage_table(config)):
        assert stage.raw_start == original.ori_start_sigmas[i]
        assert abs(stage.start - original.start_sigmas[i]) < 1e-15 and stage.end == original.end_sigmas[i]
        np.testing.assert_allclose(stage.timesteps(), original.timesteps_per_stage[i].numpy(), rtol=0, atol=1e-9)
        np.testing.assert_allclose(stage.sigmas(), original.sigmas_per_stage[i].numpy(), rtol=0, atol=1e-15)


def test_pyramid_shift_follows_the_latents_before_upsampling(monkeypatch):
    seen = []
    monkeypatch.setattr(schedules, "make_schedule", lambda config, steps, *, tokens, **_: seen.append(tokens))
    pyramid_schedules(scheduler_config("linear"), [1, 1, 1], **CHUNK_384x640)
    assert seen == [540, 540, 2160]


# --- properties ------------------------------------------------------------------------------------------------------


def test_sigma_zero_stays_zero_and_small_videos_shift_toward_clean():
    for kind in ("linear", "exponential"):
        shifted = schedules.time_shift(1.9, np.array([0.5, 0.0]), kind)
        assert shifted[1] == 0 and shifted[0] > 0.5
    assert schedules.time_shift(0.5, np.array([0.5]), "linear")[0] < 0.5
    assert math.isclose(schedules.time_shift(math.log(3), np.array([0.5]), "exponential")[0], 0.75)


def test_training_and_sampling_use_the_same_stage_borders():
    config = scheduler_config("exponential")
    for stage in stage_table(config):
        schedule = make_schedule(config, 5, tokens=540, stage=stage.index)
        grid = stage.timesteps()
        expected = grid[-1] + schedule.sigmas[:-1] * (grid[0] - grid[-1])
        np.testing.assert_array_equal(schedule.timesteps, expected)


# --- user mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "5"])
def test_a_wrong_number_of_steps_is_named(steps):
    with pytest.raises(UserError, match="num_inference_steps"):
        make_schedule(scheduler_config(), steps, tokens=540)


@pytest.mark.parametrize("sigmas", [[0.9, 0.5], [0.5, 0.7, 0.2], [1.2, 0.5, 0.1], [0.9, float("nan"), 0.1],
                                    [0.9, 0.5, 0.0], ["a", "b", "c"], [0.9, 0.9, 0.1]])
def test_wrong_sigmas_are_named(sigmas):
    with pytest.raises(UserError, match="sigmas"):
        make_schedule(scheduler_config(stages=1), 3, tokens=540, sigmas=sigmas)


def test_own_sigmas_need_one_stage():
    with pytest.raises(UserError, match="stages=3"):
        make_schedule(scheduler_config(), 2, tokens=540, sigmas=[0.9, 0.5])


@pytest.mark.parametrize("steps", [[2, 2], [2, 2, 2, 2], []])
def test_a_step_list_of_the_wrong_length_is_named(steps):
    with pytest.raises(UserError, match="3 entries expected"):
        pyramid_schedules(scheduler_config(), steps, **CHUNK_384x640)


@pytest.mark.parametrize("stage", [-1, 3])
def test_a_missing_stage_is_named(stage):
    with pytest.raises(UserError, match="stage: must be 0...2"):
        make_schedule(scheduler_config(), 2, tokens=540, stage=stage)


@pytest.mark.parametrize("options", [{"gamma": 0.5}, {"gamma": 0.0}, {"shift": 0.0}, {"num_train_timesteps": 0},
                                     {"stage_range": (0.0, 0.6, 0.3, 1.0)}])
def test_impossible_stage_constants_are_named(options):
    with pytest.raises(UserError, match=next(iter(options))):
        stage_table(scheduler_config(**options))
