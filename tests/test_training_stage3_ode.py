"""The ODE regression of stage 3: loss and gradient against their formulas in float64, and the original's settings."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from helios_jax.config import TransformerConfig
from helios_jax.convert.rules import abstract_params
from helios_jax.data.pipeline import DATASET_FILE
from helios_jax.data.random_latents import write_random_ode_pairs
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.errors import UserError
from helios_jax.models.inputs import History
from helios_jax.models.transformer import HeliosTransformer, TextRows
from helios_jax.training import stage3_ode
from helios_jax.training.config import run_config
from helios_jax.training.flow import SampleConfig
from helios_jax.training.stage3_ode import Config
from helios_jax.training.weights import trained_weights
from tests.tiny_training import loss_of

LAYOUT = HistoryLayout()
B, K, H, W, C, ROWS, D = 2, 3, 8, 8, 3, 4, 5
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def batch_of(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    frames = normal(B, K, 20, H, W, C)
    frames[:, 0] = 0  # the first section of every record has no past
    levels = {f"{name}_{i}": normal(B, K, 9, H >> 2 - i, W >> 2 - i, C) for i in range(3) for name in ("noisy", "end")}
    return {**levels, "frames": frames, "timestep": rng.uniform(1, 999, (B, K, 3)).astype(np.float32),
            "sigma": rng.uniform(0.1, 1, (B, K, 3)).astype(np.float32), "text": normal(B, ROWS, D),
            "text_length": np.full(B, ROWS, np.int32)}


class Toy:
    """A network of one layer, tanh(x A + t b / 1000 + (history) c + (text) W), with the transformer's interface."""

    dtype = jnp.float32

    def embed_history(self, variables, tiers: History) -> jax.Array:
        return tiers.short.mean((1, 2, 3, 4)) + 3 * tiers.long.mean((1, 2, 3, 4))  # [B]

    def text_rows(self, variables, rows, lengths) -> TextRows:
        return TextRows(rows, jnp.zeros(rows.shape[:2]))

    def apply(self, variables, x, timestep, text, past, *, history_size, **options) -> jax.Array:
        p = variables["params"]
        assert history_size == (H, W)
        constant = timestep[:, None] / 1000 * p["b"] + past[:, None] * p["c"] + text.rows.mean(1) @ p["w"]
        return jnp.tanh(x @ p["a"] + constant[:, None, None, None])


def toy_params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(np.float32)
            for name, shape in (("a", (C, C)), ("b", C), ("c", C), ("w", (D, C)))}


def reference(batch: dict, params: dict, weight: float) -> tuple[float, dict[str, np.ndarray], np.ndarray]:
    """Section 3.2, term by term in float64: loss, gradient by hand, and the mean per level."""
    p = {name: value.astype(np.float64) for name, value in params.items()}
    gradient, terms = {name: np.zeros_like(value) for name, value in p.items()}, np.zeros((B, K, 3))
    for i, k, level in np.ndindex(B, K, 3):
        x, y = (batch[f"{name}_{level}"][i, k].astype(np.float64) for name in ("noisy", "end"))
        sigma, t = np.float64(batch["sigma"][i, k, level]), np.float64(batch["timestep"][i, k, level]) / 1000
        frames = batch["frames"][i, k].astype(np.float64)  # anchor, 16 long, 2 mid, newest
        past = frames[[0, 19]].mean() + 3 * frames[1:17].mean()
        text = batch["text"][i].astype(np.float64).mean(0)
        v = np.tanh(x @ p["a"] + t * p["b"] + past * p["c"] + text @ p["w"])
        error = x - sigma * v - y
        terms[i, k, level] = weight * 0.5 * np.mean(error**2)
        before_tanh = weight * error * -sigma / error.size * (1 - v**2) / terms.size
        total = before_tanh.sum((0, 1, 2))
        gradient["a"] += np.einsum("thwc,thwd->cd", x, before_tanh)
        gradient["b"] += t * total
        gradient["c"] += past * total
        gradient["w"] += np.outer(text, total)
    return terms.mean(), gradient, terms.mean((0, 1))


def test_loss_and_gradient_equal_the_formulas_in_float64():
    config, batch, params = Config(data=""), batch_of(), toy_params()
    assert config.weight == 80 and config.sections == 3
    loss = loss_of(stage3_ode, config, Toy())
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, {}, batch, jax.random.key(0))
    expected, expected_gradient, per_level = reference(batch, params, 80.0)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    for name, leaf in expected_gradient.items():
        np.testing.assert_allclose(gradient[name], leaf, rtol=2e-5, atol=1e-5 * np.abs(leaf).max(), err_msg=name)
    for level, mean in enumerate(per_level):
        np.testing.assert_allclose(metrics[f"loss_level_{level}"], mean, rtol=2e-6)
    again, _ = loss(params, {}, batch, jax.random.key(1))
    np.testing.assert_allclose(again, value, rtol=1e-6)  # every random choice is in the batch


def test_level_weights_weigh_the_errors_of_their_level():
    batch, params = batch_of(), toy_params()
    loss = loss_of(stage3_ode, Config(data="", level_weights=(8.0, 3.0, 0.5)), Toy())
    value, metrics = jax.jit(loss)(params, {}, batch, jax.random.key(0))
    per_level = reference(batch, params, 80.0)[2] * (8.0, 3.0, 0.5)
    np.testing.assert_allclose(value, per_level.mean(), rtol=2e-6)
    np.testing.assert_allclose([metrics[f"loss_level_{level}"] for level in range(3)], per_level, rtol=2e-6)


def test_the_loss_vanishes_where_one_step_hits_the_end():
    config, batch = Config(data=""), batch_of()
    straight = {f"end_{i}": batch[f"noisy_{i}"] - batch["sigma"][..., i, None, None, None, None] for i in range(3)}

    class One(Toy):
        def apply(self, variables, x, *arguments, **options):
            return jnp.ones_like(x)

    value, _ = jax.jit(loss_of(stage3_ode, config, One()))({}, {}, batch | straight, jax.random.key(0))
    assert value < 1e-10


def test_gradients_reach_every_parameter_of_the_transformer():
    shape = TransformerConfig(num_attention_heads=2, attention_head_dim=8, in_channels=C, out_channels=C, text_dim=D,
                              freq_dim=8, ffn_dim=16, num_layers=1, rope_dim=(4, 2, 2))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32),
                          abstract_params("transformer", shape))
    loss = loss_of(stage3_ode, Config(data=""), HeliosTransformer(shape))
    gradient = jax.jit(jax.grad(lambda p: loss(p, {}, batch_of(), jax.random.key(0))[0]))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(np.asarray(leaf)).all() and np.asarray(leaf).any(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(("change", "message"), [
    ({"sections": 0}, "objective.sections: must be positive"),
    ({"level_weights": (1.0,)}, "objective.level_weights"), ({"weight": 0.0}, "objective.weight"),
    ({"sample": SampleConfig(guidance=5.0)}, "objective.sample.guidance: a distilled model is sampled without"),
])
def test_wrong_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        Config(data="", **change)


def test_held_out_trajectories_of_another_kind_are_refused_at_the_start(tmp_path):
    sizes = {"clips": 1, "height": 8, "width": 8, "channels": C, "text_rows": ROWS, "text_dim": D}
    write_random_ode_pairs(tmp_path / "data", sections=2, **sizes)

    def refusal(folder: str) -> str:
        transformer = {"num_attention_heads": 1, "attention_head_dim": 8, "rope_dim": (4, 2, 2), "in_channels": C,
                       "out_channels": C, "text_dim": D, "freq_dim": 8, "ffn_dim": 8, "num_layers": 1}
        run = run_config({"batch_size": 1, "objective": {
            "name": "stage3_ode", "data": str(tmp_path / "data"), "sections": 2, "transformer": transformer,
            "validation": {"items": 1, "batch_size": 1, "data": str(tmp_path / folder)}}})
        with pytest.raises(UserError) as error:
            stage3_ode.build(run)
        return str(error.value)

    write_random_ode_pairs(tmp_path / "short", sections=1, **sizes)
    assert refusal("short").startswith("objective.sections: at most the 1 of ")
    for field, value in (("shift_from", "previous"), ("gamma", 0.5), ("stage_range", [0.0, 0.5, 1.0])):
        write_random_ode_pairs(tmp_path / field, sections=2, **sizes)
        described = tmp_path / field / DATASET_FILE
        described.write_text(json.dumps(json.loads(described.read_text()) | {field: value}))
        line = refusal(field)
        assert line.startswith("objective.validation.data: ") and f"was sampled with {field}=" in line


# --- Configurations --------------------------------------------------------------------------------------------------


def parsed(file: str):
    return train.parse_arguments(["train.py", "--config", f"{CONFIGS / file}", "--workdir", "unused"])[0]


def test_the_originals_run_has_the_specified_values():
    """Sections 10, 11.1 and 11.2 of the specification of stage 3."""
    run = parsed("stage3_ode.py:14b")
    objective, optimizer = run.objective, run.optimizer
    assert (run.objective_name, run.seed, run.num_steps, run.checkpoint_every) == ("stage3_ode", 47, 10**6, 250)
    assert (run.ema_decay, run.ema_start_step) == (0.99, 250)
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps) == (2e-6, "constant", 0)
    assert (optimizer.name, optimizer.b1, optimizer.b2, optimizer.eps) == ("adamw", 0.0, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.weight_decay_on, optimizer.clip_norm) == (1e-3, "all", 1.0)
    assert (objective.sections, objective.weight, objective.levels) == (3, 80.0, 3)
    assert (objective.lora.rank, objective.lora.scale, objective.lora.base_dtype) == (256, 1.0, "bfloat16")
    assert objective.transformer == TransformerConfig() and objective.init_from == "runs/stage2_post/export"
    weights = trained_weights(objective.lora, HeliosTransformer(objective.transformer))
    trained = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(weights.init, jax.random.key(0))))
    assert round(trained / 1e6, 1) == 1251.4


def test_the_model_in_the_box_is_distilled_from_its_mid():
    run = parsed("tiny_stage3_ode.py")
    box = TransformerConfig.from_file(CONFIGS.parent / "assets/helios-tiny/transformer/config.json")
    assert run.objective.transformer == box and run.objective.lora.rank == 0 and run.objective.sample.guidance == 1
