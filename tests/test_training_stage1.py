"""The stage-1 objective: what is dropped and corrupted how often, and the loss against its formulas in float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.config import TransformerConfig
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.errors import UserError
from helios_jax.models.inputs import FrameIndices
from helios_jax.models.partition import unbox
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.training import stage1
from helios_jax.training.corruption import (
    CorruptionConfig,
    CorruptionRandomness,
    blur_matrices,
    corrupt,
    frame_segments,
    resize_matrix,
)
from helios_jax.training.flow import Randomness, TaskMix, kept_frames, make_context, timestep_index
from helios_jax.training.stage1 import Config, prepare
from tests.tiny_training import loss_of

LAYOUT = HistoryLayout()
DRAWS = 20_000


def draws_of(config: Config, size: tuple[int, int, int]):
    return jax.jit(jax.vmap(lambda key: Randomness.draw(key, config, LAYOUT, size)))


def near(share: float, expected: float, draws: int = DRAWS) -> bool:
    """Within four standard errors of a binomial."""
    return abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws) + 1e-9


@pytest.mark.parametrize(("mix", "table"), [
    # keys: (anchor stays, history frames that stay); the rows of the specification's table
    (TaskMix(0.4, 0.0, 0.4), {(0, 0): 0.40, (1, 0): 0.08, (1, 9): 0.08, (1, 18): 0.08, (1, 19): 0.36}),
    (TaskMix(0.4, 0.1, 0.4), {(0, 0): 0.40, (1, 0): 0.072, (1, 1): 0.06, (1, 9): 0.072, (1, 18): 0.072,
                              (1, 19): 0.324}),
])
def test_tasks_are_mixed_as_the_specification_tabulates(mix, table):
    uniforms = jax.random.uniform(jax.random.key(0), (DRAWS, 4))
    kept = np.asarray(jax.jit(jax.vmap(lambda u: kept_frames(u, mix, LAYOUT)))(uniforms))
    anchor, history = kept[:, 0], kept[:, 1:]
    assert (history == (np.arange(19) >= 19 - history.sum(1, keepdims=True))).all()  # what stays is the newest
    pairs, counts = np.unique(np.stack([anchor, history.sum(1)], 1), axis=0, return_counts=True)
    shares = {tuple(pair): count / DRAWS for pair, count in zip(pairs.tolist(), counts, strict=True)}
    assert shares.keys() == table.keys()
    assert all(near(shares[key], table[key]) for key in table), shares


def test_every_sample_of_a_batch_is_decided_by_itself():
    config = Config(data="")
    draw = draws_of(config, (2, 2, 3))
    keys = jax.random.split(jax.random.key(0), 64)
    random = draw(keys)
    for leaf in jax.tree.leaves(random):
        flat = np.asarray(leaf).reshape(64, -1)
        assert len(np.unique(flat[:, 0])) > 60
    again = draw(keys[61:])  # and does not depend on its neighbours, so micro-batches see the same examples
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[61:]), again, random)


def test_timesteps_are_the_logit_normal_table():
    normal = jax.random.normal(jax.random.key(0), (DRAWS,))
    sigma = 1 - np.asarray(timestep_index(normal, "logit_normal")) / 1000
    assert abs(sigma.mean() - 0.5) < 0.01
    low, high = np.quantile(sigma, [0.05, 0.95])
    assert abs(low - 0.16) < 0.01 and abs(high - 0.84) < 0.01
    index = timestep_index(jnp.array([0.0, -50.0, 50.0]), "logit_normal")
    assert index.tolist() == [500, 0, 999]  # the far end stays inside the table
    uniform = np.asarray(timestep_index(jax.random.uniform(jax.random.key(0), (DRAWS,)), "uniform"))
    assert abs(uniform.mean() - 499.5) < 10 and uniform.min() < 3 and uniform.max() > 996


def test_a_shift_moves_the_noise_levels_as_the_schedulers_time_shift_does():
    item = {"target": jnp.ones((9, 2, 2, 1)), "anchor": jnp.zeros((1, 2, 2, 1)), "history": jnp.zeros((19, 2, 2, 1)),
            "text": jnp.zeros((1, 1)), "text_length": jnp.int32(1)}
    timesteps = {}
    for shift in (1.0, 3.0):
        config = Config(data="", timesteps="uniform", timestep_shift=shift)
        random = Randomness.draw(jax.random.key(3), config, LAYOUT, (2, 2, 1))
        example = prepare(config, LAYOUT, random, item, {"text": item["text"], "text_length": item["text_length"]})
        timesteps[shift] = float(example.timestep)
        sigma = timesteps[shift] / 1000
        np.testing.assert_allclose(example.noisy, (1 - sigma) + sigma * random.noise, rtol=1e-6)
    expected = 3.0 / (3.0 + 1000 / timesteps[1.0] - 1)  # the original's form of the time shift
    np.testing.assert_allclose(timesteps[3.0] / 1000, expected, rtol=1e-6)


def frames_of(kept: list[int], seed: int = 0, size=(4, 6, 2)) -> np.ndarray:
    """[anchor, history] with content in the frames ``kept`` and zeros elsewhere."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((20, *size), np.float32)
    frames[kept] = 2 + rng.standard_normal((len(kept), *size))
    return frames


def corrupted(config: CorruptionConfig, frames: np.ndarray, draws: int, seed: int = 0):
    """Many corruptions of one history: frames [N, 20, h, w, C] and their random numbers."""
    random = jax.jit(jax.vmap(lambda key: CorruptionRandomness.draw(key, frames.shape)))(
        jax.random.split(jax.random.key(seed), draws))
    out = jax.jit(jax.vmap(lambda r: corrupt(jnp.asarray(frames), r, config, LAYOUT)))(random)
    return np.asarray(out), random


def test_noise_levels_have_the_specified_distribution_per_sample_and_frame():
    frames = frames_of(list(range(20)), size=(4, 4, 2))
    out, random = corrupted(CorruptionConfig(), frames, 4000)
    noise = np.asarray(random.noise)
    # out = x + s (noise - x): solve for s by least squares, frame by frame.
    direction = noise - frames
    levels = ((out - frames) * direction).sum((2, 3, 4)) / (direction**2).sum((2, 3, 4))  # [N, 20]
    residual = out - frames - levels[:, :, None, None, None] * direction
    assert np.abs(residual).max() < 1e-4
    clean = (np.abs(levels) < 1e-6).all(1)
    assert near(clean.mean(), 0.1, 4000)
    used = levels[~clean]
    assert used.min() >= -1e-5 and used.max() < 1 / 3
    for frame in (0, 1, 5, 13, 18, 19):  # uniform on [0, 1/3) in every segment
        np.testing.assert_allclose(np.quantile(used[:, frame], [0.1, 0.5, 0.9]), [1 / 30, 1 / 6, 0.3], atol=0.02)
    correlation = np.corrcoef(used.T) - np.eye(20)
    assert np.abs(correlation).max() < 0.1  # independent from frame to frame


def test_ratios_of_the_segments_are_the_originals_and_may_follow_the_tiers():
    ratios = {"ratio_long": 0.4, "ratio_mid": 0.2, "ratio_short": 0.1}
    original = frame_segments(CorruptionConfig(**ratios), LAYOUT).ratios
    np.testing.assert_allclose(original, [0.1] + [0.4] * 12 + [0.2] * 7, rtol=1e-6)
    tiers = frame_segments(CorruptionConfig(**ratios, segments="tier"), LAYOUT).ratios
    np.testing.assert_allclose(tiers, [0.1] + [0.4] * 16 + [0.2] * 2 + [0.1], rtol=1e-6)
    segments = frame_segments(CorruptionConfig(), LAYOUT)
    assert segments.noise.tolist() == [0, 1] + [2] * 9 + [3] * 2 + [4] * 7
    assert segments.blur.tolist() == [0, 1] + [2] * 9 + [3] * 9


def test_levels_per_segment_are_shared_inside_it_only():
    config = CorruptionConfig(frame_independent=False, clean_probability=0.0)
    frames = frames_of(list(range(20)))
    out, random = corrupted(config, frames, 50)
    direction = np.asarray(random.noise) - frames
    levels = ((out - frames) * direction).sum((2, 3, 4)) / (direction**2).sum((2, 3, 4))
    segments = frame_segments(config, LAYOUT).noise
    for sample in levels:
        assert len(np.unique(sample.round(4))) == 5
        for segment in range(5):
            assert np.ptp(sample[segments == segment]) < 1e-4


@pytest.mark.parametrize("kept", [[], [0], [0, 19], [0, *range(11, 20)], [0, *range(2, 20)]])
@pytest.mark.parametrize("config", [CorruptionConfig(), CorruptionConfig(mode="blur", blur_min=0.5),
                                    CorruptionConfig(mode="random", saturation=True)])
def test_frames_that_hold_nothing_stay_exactly_zero(kept, config):
    frames = frames_of(kept)
    out, _ = corrupted(config, frames, 40)
    empty = np.setdiff1d(np.arange(20), kept)
    assert not out[:, empty].any()
    if kept:
        assert (np.abs(out[:, kept] - frames[kept]).max((1, 2, 3, 4)) > 1e-4).mean() > 0.7


def test_without_the_first_frame_its_place_is_zero_and_the_history_is_what_it_was():
    config = Config(data="unused")
    item = {"anchor": np.ones((1, 4, 6, 16), np.float32), "history": np.ones((19, 4, 6, 16), np.float32),
            "text": np.ones((2, 8), np.float32), "text_length": 2}
    random = draws_of(config, (4, 6, 16))(jax.random.split(jax.random.key(1), 64))

    def frames(config: Config) -> np.ndarray:
        return np.asarray(jax.jit(jax.vmap(lambda r: make_context(config, LAYOUT, r, item, item).frames))(random))

    kept, left_out = frames(config), frames(dataclasses.replace(config, keep_first_frame=False))
    assert not left_out[:, 0].any() and kept[:, 0].any((1, 2, 3)).sum() > 20
    np.testing.assert_array_equal(left_out[:, 1:], kept[:, 1:])


def test_random_mode_blurs_a_tenth():
    frames = frames_of(list(range(20)))
    out, random = corrupted(CorruptionConfig(mode="random", clean_probability=0.0), frames, 3000)
    expected = np.asarray(random.noise) * np.asarray(random.level)[:, :, None, None, None] / 3 + frames * (
        1 - np.asarray(random.level)[:, :, None, None, None] / 3)
    is_noise = np.abs(out - expected).max((1, 2, 3, 4)) < 1e-4
    assert near(is_noise.mean(), 0.9, 3000)


def test_blur_equals_pytorchs_antialiased_resize_down_and_up():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    for size, new in ((8, 7), (16, 15), (16, 8), (7, 16), (48, 43), (5, 1)):
        x = np.random.default_rng(size).standard_normal((1, 1, size, size))
        ours = resize_matrix(size, new) @ x[0, 0] @ resize_matrix(size, new).T
        theirs = functional.interpolate(torch.from_numpy(x), (new, new), mode="bilinear", align_corners=False,
                                        antialias=True)[0, 0].numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-12)

    config = CorruptionConfig(mode="blur", blur_min=0.5, blur_max=1.0, clean_probability=0.0)
    frames = frames_of(list(range(20)), size=(8, 12, 3))
    out, random = corrupted(config, frames, 6)
    starts = {0: 0, 1: 1, 2: 2, 3: 11}  # first frame of every segment
    segments = frame_segments(config, LAYOUT).blur
    for sample in range(6):
        for frame in range(20):
            factor = 0.5 + 0.5 * float(random.blur[sample, starts[int(segments[frame])]])
            size = [max(1, round(n * factor)) for n in (8, 12)]
            plane = torch.from_numpy(frames[frame].transpose(2, 0, 1)[None])
            down = functional.interpolate(plane, size, mode="bilinear", align_corners=False, antialias=True)
            back = functional.interpolate(down, (8, 12), mode="bilinear", align_corners=False, antialias=True)
            np.testing.assert_allclose(out[sample, frame], back[0].numpy().transpose(1, 2, 0), atol=1e-5)


def test_a_blur_factor_of_one_changes_nothing():
    matrices, smallest = blur_matrices(8, 1.0, 1.0)
    assert smallest == 8
    np.testing.assert_allclose(matrices, np.eye(8)[None], atol=1e-7)


def test_saturation_stretches_around_the_channel_mean_but_never_the_anchor():
    config = CorruptionConfig(saturation=True, clean_probability=1.0)
    frames = frames_of(list(range(20)), size=(4, 4, 16))
    out, _ = corrupted(config, frames, 2000)
    mean = frames.mean(-1, keepdims=True)
    factors = ((out - mean) * (frames - mean)).sum((2, 3, 4)) / ((frames - mean) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(out, mean + factors[:, :, None, None, None] * (frames - mean), atol=1e-3)
    np.testing.assert_allclose(factors[:, 0], 1, atol=1e-5)
    segments = frame_segments(config, LAYOUT).noise
    for segment in range(1, 5):
        values = factors[:, segments == segment]
        assert np.ptp(values, axis=1).max() < 1e-3  # one factor per segment and sample
        value = values[:, 0]
        same = np.abs(value - 1) < 5e-4
        assert near(same.mean(), 0.1, 2000) and near((value > 1.0005).mean(), 0.45, 2000)
        assert value.min() >= 0.2999 and value.max() <= 1.7001
        assert near((value[~same] < 0.65).sum() / 2000, 0.45 * 0.35 / 0.699, 2000)


# --- The loss --------------------------------------------------------------------------------------------------------

TINY = TransformerConfig(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=6,
                         freq_dim=8, ffn_dim=24, num_layers=2, rope_dim=(4, 2, 2))


@functools.cache
def random_params() -> dict:
    params = jax.jit(lambda key: unbox(HeliosTransformer(TINY).init(key)))(jax.random.key(1))
    shape = params["proj_out"]["kernel"].shape  # zero at the start, which would hide everything behind it
    kernel = 0.2 * np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    return {**params, "proj_out": {**params["proj_out"], "kernel": kernel}}


def prepared(config: Config, key: jax.Array, batch: dict, empty: dict):
    """Random numbers and examples of a batch, as numpy, by the library."""
    size = batch["target"].shape[2:]
    random = draws_of(config, size)(jax.random.split(key, len(batch["target"])))
    examples = jax.jit(jax.vmap(lambda r, item: prepare(config, LAYOUT, r, item, empty)))(random, batch)
    return jax.device_get((random, examples))


def batch_of(size: int, seed: int = 0, rows: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    history = normal(size, 19, 4, 8, 4)
    history[0], history[1, :10] = 0, 0  # sections 0 and 1
    anchor = normal(size, 1, 4, 8, 4)
    anchor[0] = 0
    return {"anchor": anchor, "history": history, "target": normal(size, 9, 4, 8, 4),
            "section": np.arange(size, dtype=np.int32), "text": normal(size, rows, 6),
            "text_length": np.arange(2, 2 + size, dtype=np.int32) % rows + 1}


def reference_example(config: Config, random: Randomness, item: dict, empty: dict) -> dict[str, np.ndarray]:
    """The recommended form of the specification (10.1b), literally, in float64."""
    u = np.asarray(random.task, np.float64)
    anchor, history = item["anchor"].astype(np.float64), item["history"].astype(np.float64)
    if u[0] < config.task_mix.t2v:
        anchor, history = 0 * anchor, 0 * history
    elif u[1] < config.task_mix.i2v:
        history = np.concatenate([0 * history[:18], history[18:]])
    elif u[2] < config.task_mix.v2v:
        n = int(np.floor(u[3] * 3))
        history = np.concatenate([0 * history[:1 + 9 * n], history[1 + 9 * n:]])
    if random.corruption.clean >= 0.1:
        for f in range(20):
            frame, index = (anchor, 0) if f == 0 else (history, f - 1)
            if frame[index].any():
                s = np.float64(random.corruption.level[f]) / 3
                frame[index] = (1 - s) * frame[index] + s * np.asarray(random.corruption.noise[f], np.float64)
    sg = 1 / (1 + np.exp(-np.float64(random.timestep)))
    sigma = 1 - min(np.floor(1000 * sg), 999) / 1000
    eps = np.asarray(random.noise, np.float64)
    x = item["target"].astype(np.float64)
    dropped = random.caption < config.caption_dropout
    return {"noisy": (1 - sigma) * x + sigma * eps, "velocity": eps - x, "timestep": 1000 * sigma,
            "frames": np.concatenate([anchor, history]),
            "text": empty["text"] if dropped else item["text"],
            "text_length": empty["text_length"] if dropped else item["text_length"]}


def test_loss_equals_the_formulas_in_float64():
    config = Config(data="", transformer=TINY, caption_dropout=0.3)
    model = HeliosTransformer(TINY, unroll=0)
    params = random_params()
    batch, key = batch_of(48), jax.random.key(5)
    empty = {"text": np.random.default_rng(9).standard_normal((5, 6)).astype(np.float32), "text_length": np.int32(1)}
    loss, metrics = jax.jit(loss_of(stage1, config, model))(params, {"empty": empty}, batch, key)

    randoms, examples = prepared(config, key, batch, empty)
    reference = [reference_example(config, jax.tree.map(lambda leaf, i=i: leaf[i], randoms),
                                   {name: array[i] for name, array in batch.items()}, empty) for i in range(48)]
    stacked = {name: np.stack([example[name] for example in reference]) for name in reference[0]}
    for name, value in stacked.items():
        np.testing.assert_allclose(getattr(examples, name), value, rtol=1e-5, atol=2e-5, err_msg=name)
    tasks = {tuple(example["frames"].any((1, 2, 3)).tolist()) for example in reference}
    dropped = sum(example["text"] is empty["text"] for example in reference)
    assert len(tasks) >= 6 and 5 < dropped < 25  # the case is not trivial: most branches occur

    frames = jnp.asarray(stacked["frames"], jnp.float32)
    predicted = jax.jit(lambda p: model.apply(
        {"params": p}, jnp.asarray(stacked["noisy"], jnp.float32), jnp.asarray(stacked["timestep"], jnp.float32),
        model.text_rows({"params": p}, stacked["text"], stacked["text_length"]),
        LAYOUT.split(frames[:, 1:], frames[:, :1]), indices=FrameIndices.for_history()))(params)
    errors = np.mean((np.asarray(predicted, np.float64) - stacked["velocity"]) ** 2, axis=(1, 2, 3, 4))
    np.testing.assert_allclose(loss, errors.mean(), rtol=2e-6)
    has_history, low_noise = stacked["frames"].any((1, 2, 3, 4)), stacked["timestep"] < 500
    for name, mask in {"loss_with_history": has_history, "loss_without_history": ~has_history,
                       "loss_low_noise": low_noise, "loss_high_noise": ~low_noise}.items():
        np.testing.assert_allclose(metrics[name], errors[mask].mean(), rtol=2e-6, err_msg=name)


def test_a_perfect_prediction_has_loss_zero_and_a_constant_offset_its_square():
    """Replaces the network: the loss must vanish for v = eps - x and for nothing else."""
    config = Config(data="", transformer=TINY)
    batch, key = batch_of(4), jax.random.key(3)
    empty = {"text": np.zeros((5, 6), np.float32), "text_length": np.int32(1)}
    class Oracle:
        dtype = jnp.float32
        offset = 0.0

        def text_rows(self, variables, rows, lengths):
            return rows

        def apply(self, variables, latents, timestep, text, history, indices):
            # x_t carries the answer: v = (x_t - x) / sigma
            sigma = timestep[:, None, None, None, None] / 1000
            return (latents - batch["target"]) / sigma + self.offset

    loss, _ = jax.jit(loss_of(stage1, config, Oracle()))({}, {"empty": empty}, batch, key)
    assert loss < 1e-8
    Oracle.offset = 0.5
    loss, _ = jax.jit(loss_of(stage1, config, Oracle()))({}, {"empty": empty}, batch, key)
    np.testing.assert_allclose(loss, 0.25, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_finite_and_reach_every_parameter(dtype):
    config = Config(data="", transformer=TINY, dtype=dtype)
    model = HeliosTransformer(TINY, dtype=jnp.dtype(dtype), unroll=0)
    params = random_params()
    empty = {"text": np.zeros((5, 6), np.float32), "text_length": np.int32(1)}
    grads = jax.jit(jax.grad(lambda p: loss_of(stage1, config, model)(
        p, {"empty": empty}, batch_of(8), jax.random.key(0))[0]))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(np.asarray(leaf, np.float32)).all(), name
        assert np.asarray(leaf, np.float32).any(), name


@pytest.mark.parametrize(("change", "message"), [
    ({"timestep_shift": 0.0}, "objective.timestep_shift"),
    ({"dtype": "float16"}, "objective.dtype"), ({"timesteps": "cosmap"}, "objective.timesteps"),
    ({"caption_dropout": 1.5}, "objective.caption_dropout"), ({"remat": "everything"}, "objective.remat"),
    ({"data": "/nowhere"}, "holds neither buckets.json nor dataset.json"),
])
def test_wrong_settings_are_named(change, message):
    from helios_jax.training.config import RunConfig

    with pytest.raises(UserError, match=message):
        config = dataclasses.replace(Config(data="/nowhere"), **change)
        stage1.build(RunConfig(objective=config, objective_name="stage1"))
    with pytest.raises(UserError, match="corruption.mode"):
        CorruptionConfig(mode="downsample")
    with pytest.raises(UserError, match="task_mix.i2v"):
        TaskMix(i2v=2.0)
