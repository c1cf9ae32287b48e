"""Optimizers, schedules, moving average and configuration of the trainer."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_toy_config

from helios_jax.errors import UserError
from helios_jax.training import ema
from helios_jax.training.config import OptimizerConfig, RunConfig, from_mapping, run_config
from helios_jax.training.metrics import JsonlWriter, duration
from helios_jax.training.optim import decay_mask, make_optimizer, muon_dimension_numbers, schedule


def tree(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {
        "blocks": {"attn1": {"to_q": {"kernel": normal(3, 6, 8), "bias": normal(3, 8)},
                             "norm_q": {"weight": normal(3, 8)}}, "scale_shift_table": normal(3, 6, 8)},
        "condition_embedder": {"time_proj": {"kernel": normal(8, 4)}},
        "conv": {"kernel": normal(3, 3, 2, 5)},
        "patch_short": {"kernel": normal(1, 2, 2, 4, 8)}, "proj_out": {"kernel": normal(8, 4)},
        "shared": {"weight": normal(7, 8)},
    }


def first_update(config: OptimizerConfig, params: dict, grads: dict) -> dict:
    optimizer = make_optimizer(config, 10)
    return jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(params, grads)


def test_average_follows_the_formula_with_its_warm_up():
    params = [np.float64(v) for v in (1.0, 3.0, -2.0, 0.5)]
    average, expected = {"w": jnp.float32(0.0)}, 0.0
    for step, value in enumerate(params):
        average = ema.update(average, {"w": jnp.float32(value)}, jnp.int32(step), 0.15)
        decay = min(0.15, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        np.testing.assert_allclose(average["w"], expected, rtol=1e-6)
    assert float(ema.decay_at(jnp.int32(0), 0.999)) == pytest.approx(0.1)
    assert float(ema.decay_at(jnp.int32(10**6), 0.999)) == pytest.approx(0.999)


def test_average_is_a_copy_until_its_start_step_and_then_warms_up():
    """Section 10 of the specification of stage 3: the decay of update n for a start at 250, cap 0.99."""
    for n, decay in ((1, 0.0), (250, 0.0), (251, 0.0), (252, 2 / 11), (253, 3 / 12), (250 + 890, 890 / 899),
                     (250 + 891, 0.99), (10**6, 0.99)):
        assert float(ema.decay_at(jnp.int32(n - 1), 0.99, 250)) == pytest.approx(decay), n
    old, new = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32)
    average = ema.update({"w": old}, {"w": new}, jnp.int32(250), 0.99, 250)
    np.testing.assert_array_equal(average["w"], new)  # old + (new - old) is not always new


def test_warm_up_rises_to_the_peak_and_the_cosine_ends_at_its_fraction():
    rate = schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.1), num_steps=24)
    np.testing.assert_allclose([rate(n) for n in range(5)], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rate(14), 2.0 * (0.1 + 0.9 * 0.5), rtol=1e-6)  # half way down the cosine
    np.testing.assert_allclose(rate(24), 0.2, rtol=1e-6)
    constant = schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4, schedule="constant"), num_steps=24)
    np.testing.assert_allclose([constant(3), constant(4), constant(99)], [1.6, 2.0, 2.0], rtol=1e-6)


def test_adamw_step_equals_the_formula_with_clipping_and_masked_decay():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5, clip_norm=1.0)
    params, grads = tree(0), tree(1)
    updates = first_update(config, params, grads)
    norm = np.sqrt(sum(float(np.sum(np.float64(g) ** 2)) for g in jax.tree.leaves(grads)))

    def expected(param, grad, decayed):
        grad = np.float64(grad) / max(norm, 1.0)
        # After one step the bias-corrected moments are g and g^2.
        return -0.1 * (grad / (np.sqrt(grad**2) + 1e-8) + (0.5 * np.float64(param) if decayed else 0.0))

    mask = decay_mask(params, "matrices")
    assert mask["blocks"]["attn1"]["to_q"] == {"kernel": True, "bias": False}
    assert not mask["blocks"]["scale_shift_table"] and not mask["blocks"]["attn1"]["norm_q"]["weight"]
    assert mask["shared"]["weight"] and all(jax.tree.leaves(decay_mask(params, "all")))
    jax.tree.map(lambda u, p, g, d: np.testing.assert_allclose(u, expected(p, g, d), rtol=2e-5, atol=1e-6),
                 updates, params, grads, mask)


def test_muon_orthogonalises_every_layer_of_a_stack_by_itself():
    numbers = muon_dimension_numbers(tree())
    assert numbers["shared"]["weight"] is None and numbers["patch_short"]["kernel"] is None
    assert numbers["proj_out"]["kernel"] is None and numbers["blocks"]["scale_shift_table"] is None
    config = OptimizerConfig(name="muon", learning_rate=1.0, schedule="constant", weight_decay=0.0, clip_norm=0.0,
                             muon_newton_schulz_steps=5)
    params, grads = tree(0), tree(1)
    updates = first_update(config, params, grads)
    stacked = np.asarray(updates["blocks"]["attn1"]["to_q"]["kernel"])
    for layer in range(3):
        # Singular values near 1 (the quintic's range), times sqrt(max(in, out)) 0.2.
        values = np.linalg.svd(stacked[layer], compute_uv=False) / (0.2 * np.sqrt(8))
        assert values.min() > 0.6 and values.max() < 1.3, values
        alone = {"lonely": {"kernel": params["blocks"]["attn1"]["to_q"]["kernel"][layer]}}
        grad = {"lonely": {"kernel": grads["blocks"]["attn1"]["to_q"]["kernel"][layer]}}
        other = first_update(config, alone, grad)
        np.testing.assert_allclose(stacked[layer], other["lonely"]["kernel"], atol=1e-5)
    convolution = np.asarray(updates["conv"]["kernel"]).reshape(18, 5)
    values = np.linalg.svd(convolution, compute_uv=False) / (0.2 * np.sqrt(18))
    assert values.min() > 0.6 and values.max() < 1.3, values
    # What is no hidden matrix takes Adam's step: the sign of the gradient, in the first one.
    np.testing.assert_allclose(np.abs(updates["blocks"]["scale_shift_table"]), 1.0, atol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_either_optimizer_solves_a_regression(name):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 8)), jnp.float32)
    truth = jnp.asarray(rng.standard_normal((8, 8)), jnp.float32)
    params = {"net": {"kernel": jnp.zeros((8, 8)), "bias": jnp.ones(8)}}
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=10, weight_decay=0.0)
    optimizer = make_optimizer(config, 300)

    def loss(p):
        return jnp.mean((x @ p["net"]["kernel"] + p["net"]["bias"] - x @ truth) ** 2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for _ in range(300):
        params, state, value = step(params, state)
    assert value < 1e-3


def toy(**changes):
    values = training_toy_config.get_config().to_dict()
    values.update(changes)
    return values


@pytest.mark.parametrize(("values", "message"), [
    (toy(bach_size=3), "config.bach_size: unknown key; did you mean 'batch_size'"),
    (toy(batch_size=2.5), "config.batch_size: int expected, got 2.5"),
    (toy(batch_size=True), "config.batch_size: int expected, got True"),
    (toy(ema_decay=1.0), "ema_decay: in .0, 1., got 1.0"),
    (toy(optimizer=3), "config.optimizer: a group of keys expected, got 3"),
    (toy(optimizer={"learning_rate": "fast"}), "config.optimizer.learning_rate: float expected, got 'fast'"),
    (toy(optimizer={"schedule": "linear"}), "optimizer.schedule: 'cosine' or 'constant', got 'linear'"),
    (toy(objective={"width": 3}), "config.objective.name: required key is missing"),
    (toy(objective={"name": "training_toy", "widht": 3}), "config.objective.widht: unknown key; did you mean 'width'"),
    (toy(objective={"name": "json"}), "the module json has no 'Config'"),
])
def test_a_wrong_configuration_names_key_value_and_what_is_allowed(values, message):
    with pytest.raises(UserError, match=message):
        run_config(values)


def test_configuration_is_frozen_hashable_and_survives_json():
    run = run_config(training_toy_config.get_config())
    assert isinstance(run, RunConfig) and hash(run) == hash(run_config(training_toy_config.get_config()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.batch_size = 3
    assert json.loads(json.dumps(run.to_dict()))["objective"]["width"] == 8

    @dataclasses.dataclass(frozen=True)
    class Shapes:
        sizes: tuple[int, ...] = (1,)
        scale: float | None = None

    assert from_mapping(Shapes, {"sizes": [1, 2], "scale": 2}) == Shapes((1, 2), 2.0)
    with pytest.raises(UserError, match=r"config.sizes\[1\]: int expected, got 'x'"):
        from_mapping(Shapes, {"sizes": [1, "x"]})


def test_metric_lines_after_the_resumed_step_and_broken_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 3.0}\n{"step": 4, "lo')
    writer = JsonlWriter(tmp_path, resume_step=2)
    writer.scalars(3, {"loss": float("nan")})
    writer.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[2]["loss"] is None


def test_durations_are_readable():
    assert [duration(s) for s in (0.2, 59.4, 60, 725, 11525)] == ["0 s", "59 s", "1:00", "12:05", "3:12:05"]


def test_logical_axes_name_every_axis_of_every_parameter():
    from helios_jax.config import TransformerConfig
    from helios_jax.models.partition import logical_axes, unbox
    from helios_jax.models.transformer import HeliosTransformer

    config = TransformerConfig(num_attention_heads=2, attention_head_dim=8, text_dim=6, freq_dim=8, ffn_dim=24,
                               num_layers=3, rope_dim=(4, 2, 2))
    boxed = jax.eval_shape(HeliosTransformer(config).init, jax.random.key(0))
    plain, axes = unbox(boxed), logical_axes(boxed)
    assert axes["blocks"]["attn1"]["to_q"]["kernel"] == ("layers", "embed", "heads")
    assert axes["patch_embedding"]["bias"] == ("embed",)
    flat = jax.tree_util.tree_leaves_with_path(plain)
    names = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    assert [path for path, _ in flat] == [path for path, _ in names]
    assert all(len(name) == leaf.ndim for (_, leaf), (_, name) in zip(flat, names, strict=True))
    assert logical_axes({"w": jnp.zeros((2, 3))}) == {"w": (None, None)}
