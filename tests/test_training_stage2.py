"""The stage-2 objective: levels, start and end points, timesteps and the loss against their formulas in float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.config import TransformerConfig
from helios_jax.convert.rules import abstract_params
from helios_jax.diffusion import pyramid
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.diffusion.schedules import stage_table
from helios_jax.errors import UserError
from helios_jax.models.inputs import FrameIndices
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.training import stage2
from helios_jax.training.flow import Randomness
from helios_jax.training.stage2 import Config, prepare
from tests.tiny_training import loss_of

LAYOUT = HistoryLayout()
H, W, C = 8, 8, 3  # latents: the smallest that have three levels
TINY = TransformerConfig(num_attention_heads=2, attention_head_dim=8, in_channels=C, out_channels=C, text_dim=6,
                         freq_dim=8, ffn_dim=16, num_layers=2, rope_dim=(4, 2, 2))
# The specification's constants, not read from the library: start, end, first and last nominal timestep of each level.
STAGES = ((0.999, 0.666333, 999.0, 743.256), (0.7997597118943213, 0.333666, 743.256, 385.614),
          (0.5003741566479163, 0.0, 385.614, 0.999))


def config_of(**changes) -> Config:
    return Config(data="", **({"transformer": TINY, "caption_dropout": 0.3} | changes))


def batch_of(size: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    history, anchor = normal(size, 19, H, W, C), normal(size, 1, H, W, C)
    history[0], history[1, :10], anchor[0] = 0, 0, 0  # sections 0 and 1
    return {"anchor": anchor, "history": history, "target": normal(size, 9, H, W, C), "text": normal(size, 4, 6),
            "text_length": np.arange(size, dtype=np.int32) % 4 + 1}


EMPTY = {"text": np.random.default_rng(9).standard_normal((4, 6)).astype(np.float32), "text_length": np.int32(1)}


def prepared(config: Config, key: jax.Array, batch: dict):
    """Random numbers and examples of a batch, as numpy, by the library."""
    draw = jax.jit(jax.vmap(lambda key: Randomness.draw(key, config, LAYOUT, (H, W, C))))
    random = draw(jax.random.split(key, len(batch["target"])))
    examples = jax.jit(jax.vmap(lambda r, item: prepare(config, LAYOUT, r, item, EMPTY)))(random, batch)
    return jax.device_get((random, examples))


def mean2x2(x: np.ndarray) -> np.ndarray:
    return (x[..., 0::2, 0::2, :] + x[..., 0::2, 1::2, :] + x[..., 1::2, 0::2, :] + x[..., 1::2, 1::2, :]) / 4


def reference_levels(x: np.ndarray, eps: np.ndarray, uniforms: np.ndarray, ratios: tuple[int, ...]) -> list[dict]:
    """Sections 6.1 to 6.3 of the specification, literally, in float64: one dict per entry."""
    clean, noise = [x.astype(np.float64)], [eps.astype(np.float64)]
    for _ in range(2):
        clean.insert(0, mean2x2(clean[0]))
        noise.insert(0, 2 * mean2x2(noise[0]))
    entries, u = [], iter(uniforms)
    for i, (s, e, high, low) in enumerate(STAGES):
        up = np.kron(clean[i - 1], np.ones((1, 2, 2, 1))) if i else None
        start = noise[0] if i == 0 else s * noise[i] + (1 - s) * up
        end = e * noise[i] + (1 - e) * clean[i]
        for _ in range(ratios[i]):
            k = min(int(np.floor(np.float32(1000) * np.float32(next(u)))), 999)
            sigma = 0.999 * (1 - k / 1000)
            entries.append({"level": i, "noisy": sigma * start + (1 - sigma) * end, "velocity": start - end,
                            "timestep": high - k / 1000 * (high - low), "sigma": sigma})
    return entries


def test_levels_have_the_specified_constants_and_timesteps():
    table = stage_table(config_of().scheduler)
    for stage, (start, end, _, _) in zip(table, STAGES, strict=True):
        np.testing.assert_allclose([stage.start, stage.end], [start, end], atol=5e-7)
    vectors = ((999, 935.064, 871.128, 807.192, 743.5117), (743.256, 653.8455, 564.435, 475.0245, 385.9716),
               (385.614, 289.4602, 193.3065, 97.1528, 1.3836))
    for stage, expected in zip(table, vectors, strict=True):
        np.testing.assert_allclose(stage.timesteps()[[0, 250, 500, 750, 999]], expected, atol=1e-4)
        np.testing.assert_allclose(stage.sigmas()[500], 0.4995, atol=1e-12)


def test_examples_equal_the_specification_in_float64():
    config = config_of()
    batch = batch_of(6)
    random, examples = prepared(config, jax.random.key(1), batch)
    for sample in range(6):
        reference = reference_levels(batch["target"][sample], random.noise[sample], random.timestep[sample],
                                     config.sample_ratios)
        ours = [(level, entry) for level, count in enumerate(config.sample_ratios) for entry in range(count)]
        for (level, entry), expected in zip(ours, reference, strict=True):
            got = examples.levels[level]
            np.testing.assert_allclose(got.noisy[sample, entry], expected["noisy"], atol=3e-6)
            np.testing.assert_allclose(got.velocity[sample], expected["velocity"], atol=3e-6)
            np.testing.assert_allclose(got.timestep[sample, entry], expected["timestep"], rtol=1e-6)
            np.testing.assert_allclose(got.sigma[sample, entry], expected["sigma"], rtol=1e-6)
    # the two entries of the middle level share everything but u
    assert (examples.levels[1].timestep[:, 0] != examples.levels[1].timestep[:, 1]).all()


def test_targets_have_the_specified_scale():
    """Section 6.5: the coefficients of noise, the level below and the level itself in every target."""
    config = config_of()
    table = stage_table(config.scheduler)
    noise = pyramid.noise_pyramid(jax.random.normal(jax.random.key(0), (1, 1, H, W, C)), 3)
    clean = pyramid.clean_pyramid(jax.random.normal(jax.random.key(1), (1, 1, H, W, C)), 3)
    points = pyramid.flow_points(table, noise, clean)
    expected = [0.333667 * (noise[0] - clean[0]),
                0.466094 * noise[1] + 0.200240 * pyramid.upsample(clean[0]) - 0.666334 * clean[1],
                0.500374 * noise[2] + 0.499626 * pyramid.upsample(clean[1]) - clean[2]]
    for (start, end), velocity in zip(points, expected, strict=True):
        np.testing.assert_allclose(start - end, velocity, atol=5e-6)


def test_noise_has_unit_variance_on_every_level():
    levels = pyramid.noise_pyramid(jax.random.normal(jax.random.key(0), (4, 9, 64, 64, 4)), 3)
    for level in levels:
        assert abs(float(jnp.var(level)) - 1) < 4 * np.sqrt(2 / level.size)
        assert abs(float(jnp.mean(level))) < 4 / np.sqrt(level.size)


@pytest.mark.parametrize("level", [1, 2])
def test_sampling_enters_a_level_with_the_distribution_of_its_training_start(level):
    """The transition of a perfect sample of the level below has the start point's mean and white covariance."""
    table = stage_table(config_of().scheduler)
    stage, below = table[level], table[level - 1]
    clean = jnp.full((1, 1, 2, 2, 1), 3.0)
    draws = 40_000
    noise = jax.random.normal(jax.random.key(0), (draws, 1, 2, 2, 1))
    end = below.end * noise + (1 - below.end) * clean
    z = jax.random.normal(jax.random.key(1), pyramid.block_noise_shape(draws, 1, 4, 4, 1))
    entered = np.asarray(pyramid.transition(end, z, stage)).reshape(draws, 16)
    start = stage.start * np.random.default_rng(0).standard_normal((draws, 16)) + (1 - stage.start) * 3.0
    np.testing.assert_allclose(entered.mean(0), start.mean(0), atol=5 * stage.start / np.sqrt(draws) * 2**0.5)
    np.testing.assert_allclose(np.cov(entered.T), stage.start**2 * np.eye(16), atol=6 * stage.start**2 / np.sqrt(draws))


@pytest.mark.parametrize(("timesteps", "mean"), [("uniform", 0.5 * 0.999), ("logit_normal", 0.5 * 0.999)])
def test_every_entry_draws_its_own_timestep(timesteps, mean):
    config = config_of(timesteps=timesteps)
    draw = jax.jit(jax.vmap(lambda key: Randomness.draw(key, config, LAYOUT, (2, 2, 1)).timestep))
    numbers = np.asarray(draw(jax.random.split(jax.random.key(0), 8000)))
    assert numbers.shape == (8000, 4) and np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.05
    rows = np.asarray(stage2.flow.timestep_index(jnp.asarray(numbers), timesteps))
    sigma = 0.999 * (1 - rows / 1000)
    np.testing.assert_allclose(sigma.mean(0), mean, atol=0.015)
    assert rows.min() >= 0 and rows.max() <= 999
    if timesteps == "uniform":
        np.testing.assert_allclose(np.quantile(rows, [0.1, 0.5, 0.9]), [100, 500, 900], atol=15)


# --- The loss --------------------------------------------------------------------------------------------------------


@functools.cache
def model_and_params(dtype: str = "float32"):
    rng = np.random.default_rng(2)  # nothing is zero, which would hide what stands behind it
    params = jax.tree.map(lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32),
                          abstract_params("transformer", TINY))
    return HeliosTransformer(TINY, dtype=jnp.dtype(dtype)), params


def test_loss_equals_the_formulas_in_float64():
    """One pass of the model per entry, as the original without packing, and the mean over entries in NumPy."""
    config, size = config_of(), 6
    model, params = model_and_params()
    batch, key = batch_of(size), jax.random.key(5)
    loss, metrics = jax.jit(loss_of(stage2, config, model))(params, {"empty": EMPTY}, batch, key)

    random, examples = prepared(config, key, batch)
    apply = jax.jit(lambda noisy, timestep: model.apply(
        {"params": params}, noisy, timestep, model.text_rows({"params": params}, examples.text, examples.text_length),
        LAYOUT.split(jnp.asarray(examples.frames[:, 1:]), jnp.asarray(examples.frames[:, :1])),
        indices=FrameIndices.for_history()))
    references = [reference_levels(batch["target"][i], random.noise[i], random.timestep[i], config.sample_ratios)
                  for i in range(size)]
    squared, low = np.zeros((size, 4)), np.zeros((size, 4), bool)
    for entry in range(4):
        rows = [reference[entry] for reference in references]
        predicted = apply(np.stack([r["noisy"] for r in rows]).astype(np.float32),
                          np.array([r["timestep"] for r in rows], np.float32))
        difference = np.asarray(predicted, np.float64) - np.stack([r["velocity"] for r in rows])
        squared[:, entry] = np.square(difference).mean((1, 2, 3, 4))
        low[:, entry] = [r["sigma"] < 0.5 for r in rows]
    levels = np.array([0, 1, 1, 2])
    np.testing.assert_allclose(loss, np.mean([squared[:, entry].mean() for entry in range(4)]), rtol=3e-6)
    for level in range(3):
        np.testing.assert_allclose(metrics[f"loss_level_{level}"], squared[:, levels == level].mean(), rtol=3e-6)
    np.testing.assert_allclose(metrics["loss_low_noise"], squared[low].mean(), rtol=3e-6)
    has_history = examples.frames.any((1, 2, 3, 4))
    np.testing.assert_allclose(metrics["loss_with_history"], squared[has_history].mean(), rtol=3e-6)
    assert 0 < has_history.sum() < size


def test_post_ratios_weigh_every_level_by_a_third():
    config = config_of(sample_ratios=(1, 1, 1))
    model, params = model_and_params()
    loss, metrics = jax.jit(loss_of(stage2, config, model))(params, {"empty": EMPTY}, batch_of(3),
                                                                     jax.random.key(0))
    np.testing.assert_allclose(loss, np.mean([metrics[f"loss_level_{i}"] for i in range(3)]), rtol=1e-6)


def test_level_weights_weigh_the_errors_of_their_level():
    model, params = model_and_params()
    plain, weighted = (jax.jit(loss_of(stage2, config_of(level_weights=weights), model))(
        params, {"empty": EMPTY}, batch_of(3), jax.random.key(0)) for weights in ((), (8.0, 3.0, 0.5)))
    for level, weight in enumerate((8.0, 3.0, 0.5)):
        np.testing.assert_allclose(weighted[1][f"loss_level_{level}"], weight * plain[1][f"loss_level_{level}"],
                                   rtol=1e-6)
    expected = (8 * plain[1]["loss_level_0"] + 2 * 3 * plain[1]["loss_level_1"] + 0.5 * plain[1]["loss_level_2"]) / 4
    np.testing.assert_allclose(weighted[0], expected, rtol=1e-6)  # one, two and one noisy versions


@pytest.mark.slow
def test_bfloat16_gradients_are_finite_at_every_level_and_reach_every_parameter():
    config = config_of(dtype="bfloat16", sample_ratios=(1, 1, 1))
    model, params = model_and_params("bfloat16")
    loss = loss_of(stage2, config, model)

    def level_loss(params, level):
        _, metrics = loss(params, {"empty": EMPTY}, batch_of(4), jax.random.key(0))
        return jnp.stack([metrics[f"loss_level_{i}"] for i in range(3)])[level]

    gradient = jax.jit(jax.grad(level_loss))
    for level in range(3):
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params, level)):
            name = f"level {level}, {jax.tree_util.keystr(path)}"
            assert np.isfinite(np.asarray(leaf)).all(), name
            assert np.asarray(leaf).any(), name


@pytest.mark.parametrize(("change", "message"), [
    ({"sample_ratios": (1,)}, "objective.sample_ratios"), ({"sample_ratios": (1, 0, 1)}, "objective.sample_ratios"),
    ({"sample_ratios": (1, 1)}, "objective.stage_range: 3 borders"), ({"gamma": 0.5}, "gamma"),
    ({"stage_range": (0.0, 0.7, 0.5, 1.0)}, "stage_range"),
    ({"level_weights": (1.0, 2.0)}, "objective.level_weights: one positive number for each of the 3 levels"),
    ({"level_weights": (1.0, 0.0, 1.0)}, "objective.level_weights"),
])
def test_wrong_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config_of(), **change)


def test_sizes_that_cannot_be_halved_are_refused():
    stage2.check_size(3, 8, 16)  # 64x128: levels of 2x4, 4x8 and 8x16 latents
    with pytest.raises(UserError, match="latents of 4x8 cannot have 3 levels.*multiples of 8, which is 64 pixels"):
        stage2.check_size(3, 4, 8)
