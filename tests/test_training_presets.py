"""The configurations of the original's runs hold the specification's values, for every size, without large arrays."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import pytest

import train
from helios_jax.config import TransformerConfig
from helios_jax.convert.rules import abstract_params
from helios_jax.errors import UserError
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.training.weights import trained_weights

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PATCHES = ("patch_short", "patch_mid", "patch_long")
EMBEDDED = ("all-linear", "patch_embedding")

# file: objective, seed, learning rate, warm-up, batch, rank, targets, whole modules, timesteps, ratios, solver steps,
# start values
TABLE = {
    "stage1_init": ("stage1", 43, 5e-5, 0, 128, 128, EMBEDDED, PATCHES, "logit_normal", None, 50, "models/start-14b"),
    "stage1_post": ("stage1", 44, 3e-5, 0, 128, 128, EMBEDDED, PATCHES, "logit_normal", None, 50,
                    "runs/stage1_init/export"),
    "stage1_correct": ("stage1", 44, 3e-5, 0, 128, 128, EMBEDDED, PATCHES, "logit_normal", None, 50,
                       "runs/stage1_init/export"),
    "stage2_init": ("stage2", 45, 1e-4, 1000, 64, 256, ("all-linear",), (), "uniform", (1, 2, 1), 20,
                    "runs/stage1_post/export"),
    "stage2_post": ("stage2", 46, 3e-5, 500, 64, 256, (*EMBEDDED, *PATCHES), (), "uniform", (1, 1, 1), 20,
                    "runs/stage2_init/export"),
}
# Parameters with adapters and in whole modules at 14B (specification 9.1).
TRAINED = {"stage1_init": 623_820_800 + 23_936_000, "stage1_post": 623_820_800 + 23_936_000,
           "stage1_correct": 623_820_800 + 23_936_000, "stage2_init": 1_246_314_496, "stage2_post": 1_252_769_792}
# Parameters of the transformer: the published 14B, and what "about 3B" and "about 1.3B" come to.
SIZES = {"14b": (14.2e9, 14.5e9), "3b": (2.9e9, 3.2e9), "1.3b": (1.3e9, 1.5e9)}


def parsed(file: str, size: str = "", *more: str):
    path = f"{CONFIGS / file}.py" + (f":{size}" if size else "")
    return train.parse_arguments(["train.py", "--config", path, "--workdir", "unused", *more])[0]


@pytest.mark.parametrize("file", TABLE)
def test_values_are_those_of_the_specification(file):
    run = parsed(file)
    objective, optimizer = run.objective, run.optimizer
    name, seed, rate, warmup, batch, rank, targets, full, timesteps, ratios, steps, start = TABLE[file]
    assert (run.objective_name, run.seed, run.batch_size) == (name, seed, batch)
    assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.schedule) == (rate, warmup, "constant")
    assert (optimizer.name, optimizer.b1, optimizer.b2, optimizer.eps) == ("adamw", 0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.weight_decay_on, optimizer.clip_norm) == (1e-4, "all", 1.0)
    assert (run.num_steps, run.checkpoint_every, run.keep_every, run.ema_decay) == (10**6, 500, 500, 0.0)
    lora = objective.lora
    assert (lora.rank, lora.scale, lora.targets, lora.full) == (rank, 1.0, targets, full)
    assert (objective.timesteps, objective.init_from, objective.dtype) == (timesteps, start, "bfloat16")
    assert objective.transformer == TransformerConfig()
    corruption, mix = objective.corruption, objective.task_mix
    assert (corruption.ratio_short, corruption.ratio_mid, corruption.ratio_long) == (1 / 3,) * 3
    assert corruption.clean_probability == 0.1 and corruption.frame_independent
    corrected = file == "stage1_correct"
    assert (mix.t2v, mix.i2v, mix.v2v) == (0.4, 0.1 if corrected else 0.0, 0.4)
    assert (corruption.mode, corruption.saturation) == (("random", True) if corrected else ("noise", False))
    assert objective.caption_dropout == 0
    assert (objective.sample.num_frames, objective.sample.steps, objective.sample.guidance) == (99, steps, 5.0)
    if name == "stage1":
        assert objective.timestep_shift == 1.0
    else:
        assert objective.sample_ratios == ratios
        assert (objective.gamma, objective.stage_range) == (1 / 3, (0.0, 1 / 3, 2 / 3, 1.0))
        assert objective.scheduler.time_shift_type == "exponential" and objective.scheduler.shift == 1.0


@pytest.mark.parametrize("file", TABLE)
def test_as_many_parameters_are_trained_as_in_the_original(file):
    objective = parsed(file).objective
    weights = trained_weights(objective.lora, HeliosTransformer(objective.transformer))
    shapes = jax.eval_shape(weights.init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == TRAINED[file]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("file", TABLE)
def test_every_size_is_selected_behind_a_colon(file, size):
    objective = parsed(file, size).objective
    low, high = SIZES[size]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(
        abstract_params("transformer", objective.transformer)))
    assert low < count < high
    from_scratch = (file, size) == ("stage1_init", "3b")  # nobody publishes weights of that size
    assert (objective.lora.rank == 0) == from_scratch and bool(objective.init_from) != from_scratch


def test_reading_the_configurations_allocates_nothing():
    before = len(jax.live_arrays())
    for file in TABLE:
        parsed(file, "14b")
    assert len(jax.live_arrays()) == before


def test_the_corrected_run_has_the_recommended_corruption():
    corruption = parsed("stage1_correct").objective.corruption
    assert (corruption.noise_probability, corruption.blur_min, corruption.blur_max) == (0.9, 0.9, 1.0)
    assert (corruption.saturation_clean_probability, corruption.saturation_min, corruption.saturation_max) == (
        0.1, 0.3, 1.7)


def test_flags_change_values_and_mistakes_are_named():
    run = parsed("stage2_init", "1.3b", "--config.objective.lora.rank=8", "--config.batch_size=4")
    assert run.objective.lora.rank == 8 and run.batch_size == 4
    with pytest.raises(UserError, match="size behind the colon is one of 14b, 3b, 1.3b, got '2b'"):
        parsed("stage1_init", "2b")
    with pytest.raises(UserError, match="no such file: .*stage9.py$"):
        parsed("stage9", "14b")
    with pytest.raises(UserError, match="did you mean 'rank'"):
        parsed("stage1_init", "14b", "--config.objective.lora.rnk=8")


def test_the_model_in_the_box_continues_as_mid():
    run = parsed("tiny_stage2")
    box = TransformerConfig.from_file(CONFIGS.parent / "assets/helios-tiny/transformer/config.json")
    assert run.objective.transformer == box and run.objective.init_from == "assets/helios-tiny"
    assert run.objective.scheduler.stages == 3 and run.objective.lora.rank == 0
    again = parsed("tiny_stage2", "history")
    assert again.objective.init_from == "runs/stage2/export" and again.objective.level_weights == (8.0, 3.0, 1.0)


@pytest.mark.parametrize("part", ["post", "gan"])
def test_distillation_has_the_values_of_the_specification(part):
    """Section 11.2 of the specification of stage 3; clipping at 1 is what its DeepSpeed configuration does."""
    run = parsed("stage3_dmd", part)
    objective, gan, corruption = run.objective, run.objective.gan, run.objective.corruption
    for optimizer, rate in ((run.optimizer, 2e-6), (objective.critic.optimizer, 4e-7)):
        assert (optimizer.name, optimizer.learning_rate) == ("adamw", rate)
        assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.0, 0.999, 1e-8)
        assert (optimizer.weight_decay, optimizer.weight_decay_on, optimizer.clip_norm) == (1e-3, "all", 1.0)
        assert (optimizer.schedule, optimizer.warmup_steps) == ("constant", 0)
    assert (run.seed, run.num_steps, run.checkpoint_every, run.ema_decay, run.ema_start_step) == (49, 10**6, 250, 0.99,
                                                                                                  750)
    assert (objective.lora.rank, objective.lora.targets) == (256, ("all-linear", *PATCHES))
    assert (objective.critic.lora.rank, objective.critic.lora.targets) == (256, ("all-linear",))
    for lora in (objective.lora, objective.critic.lora):
        assert (lora.scale, lora.full, lora.base_dtype) == (1.0, (), "bfloat16")
    assert (objective.dtype, objective.negative_prompt, run.batch_size, run.keep_every) == ("bfloat16", "", 128, 250)
    assert (objective.sample.steps, objective.sample.guidance) == (2, 1.0)
    for lora, millions in ((objective.lora, 1251.4), (objective.critic.lora, 1246.3)):
        weights = trained_weights(lora, HeliosTransformer(objective.transformer))
        trained = jax.tree.leaves(jax.eval_shape(weights.init, jax.random.key(0)))
        assert round(sum(leaf.size for leaf in trained) / 1e6, 1) == millions
    assert (objective.init_from, objective.teacher) == ("runs/stage3_ode/export", "runs/stage1_post/export")
    assert (objective.student_every, objective.guidance, objective.rollout.steps) == (5, 3.0, (2, 2, 2))
    assert objective.rollout.amplify_first_chunk and objective.rollout.shift_from == "own"
    renoise = objective.renoise
    assert (renoise.alpha, renoise.beta, renoise.decay_steps, renoise.lowest, renoise.highest) == (4.0, 1.5, 500, 20,
                                                                                                  980)
    mix = objective.task_mix
    assert (mix.t2v, mix.i2v, mix.v2v) == (0.4, 0.0, 0.5)
    assert corruption.mode == ("random" if part == "gan" else "noise") and corruption.noise_probability == 0.9
    assert corruption.clean_probability == corruption.saturation_clean_probability == 0.1
    assert corruption.ratio_long == corruption.ratio_mid == corruption.ratio_short == 1 / 3
    assert corruption.frame_independent
    assert corruption.saturation and (corruption.saturation_min, corruption.saturation_max) == (0.3, 1.7)
    assert (gan.width, gan.groups) == (768 if part == "gan" else 0, 32)
    assert (gan.blocks, gan.start_step, gan.crop) == ((5, 15, 25, 35), 1000, 2)
    assert (gan.student_weight, gan.head_weight, gan.r1_weight, gan.r1_sigma) == (0.05, 0.01, 100.0, 0.1)


@pytest.mark.parametrize(("file", "argument"), [("stage3_dmd", "gan-1.3b"), ("tiny_stage3_dmd", ""),
                                                ("tiny_stage3_dmd", "gan")])
def test_other_sizes_and_the_model_in_the_box_have_distillation_files(file, argument):
    assert parsed(file, argument).objective_name == "stage3_dmd"
