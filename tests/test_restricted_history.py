"""History that attends to history only: against PyTorch with a mask, and computed once per chunk."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.config import ModelIndex, SchedulerConfig, TransformerConfig
from helios_jax.convert.export import config_json, export_pipeline
from helios_jax.convert.rules import abstract_params
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.diffusion.noise import SeededNoise
from helios_jax.errors import UserError
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.pipeline.sampler import ChunkSampler, SamplingPlan
from helios_jax.training.flow import ModelConfig, as_stored, start_values
from helios_jax.training.weights import LoraConfig

LAYOUT = HistoryLayout()
PLAIN = TransformerConfig(num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, text_dim=6,
                          freq_dim=8, ffn_dim=16, num_layers=3, rope_dim=(4, 2, 2))
RESTRICTED = dataclasses.replace(PLAIN, restrict_self_attn=True)
AMPLIFIED = dataclasses.replace(RESTRICTED, is_amplify_history=True)


def variables_of(config: TransformerConfig) -> dict:
    rng = np.random.default_rng(2)
    return {"params": jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32),
                                   abstract_params("transformer", config))}


def inputs(size=(4, 8), history_size=(8, 16)):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    history = LAYOUT.split(normal(2, 19, *history_size, 3), normal(2, 1, *history_size, 3))
    return normal(2, 9, *size, 3), jnp.array([300.0, 700.0]), normal(2, 5, 6), history


@pytest.mark.parametrize("config", [RESTRICTED, AMPLIFIED], ids=["plain", "amplified"])
def test_keys_and_values_computed_once_give_the_same_velocity_as_the_whole_sequence(config):
    model, variables = HeliosTransformer(config), variables_of(config)
    latents, timestep, rows, history = inputs()
    text = model.text_context(variables, rows, np.array([5, 3]))
    whole = jax.jit(lambda v: model.apply(v, latents, timestep, text, history))(variables)
    context = jax.jit(lambda v: model.history_context(v, history))(variables)
    assert context.keys.shape == (3, 2, 8 + 8 + 64, 2, 8)
    once = jax.jit(lambda v, c: model.apply(v, latents, timestep, text, c))(variables, context)
    np.testing.assert_allclose(once, whole, atol=2e-5 * float(jnp.abs(whole).max()))
    free = dataclasses.replace(config, restrict_self_attn=False)
    unrestricted = jax.jit(lambda v: HeliosTransformer(free).apply(v, latents, timestep, text, history))(variables)
    assert float(jnp.abs(whole - unrestricted).max()) > 1e-3 * float(jnp.abs(whole).max())  # the option does something


def test_restricted_attention_equals_pytorch_with_a_mask(monkeypatch):
    torch = pytest.importorskip("torch")
    from diffusers.models.transformers import transformer_helios

    from tests.oracles import TINY_TRANSFORMER, relative_error
    from tests.test_transformer import run_jax, run_torch, torch_inputs

    original = transformer_helios.dispatch_attention_fn
    history_tokens = 8 + 6 + 48  # of 8 x 12 latents

    def masked(query, key, value, **options):
        if query.shape[1] == key.shape[1]:  # [B, S, N, D]; cross-attention has other numbers of rows
            allowed = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool)
            allowed[:history_tokens, history_tokens:] = False
            options["attn_mask"] = allowed
        return original(query, key, value, **options)

    monkeypatch.setattr(transformer_helios, "dispatch_attention_fn", masked)
    sizes = torch_inputs(size=(4, 6), history_size=(8, 12))
    want = run_torch(TINY_TRANSFORMER, sizes, [500.25])
    restricted = dataclasses.replace(TINY_TRANSFORMER, restrict_self_attn=True)
    assert relative_error(run_jax(restricted, sizes, [500.25]), want) < 1e-5
    assert relative_error(run_jax(TINY_TRANSFORMER, sizes, [500.25]), want) > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_a_chunk_with_kept_keys_equals_sampling_it_without(guidance, monkeypatch):
    model, variables = HeliosTransformer(RESTRICTED), variables_of(RESTRICTED)
    rng = np.random.default_rng(1)
    history, anchor = (jnp.asarray(rng.standard_normal((1, n, 8, 16, 3)), jnp.float32) for n in (19, 1))
    rows = rng.standard_normal((2 if guidance > 1 else 1, 5, 6)).astype(np.float32)
    text = model.text_context(variables, rows, np.full(len(rows), 5))
    plan = SamplingPlan(steps=(2, 1), guidance_scale=guidance)
    scheduler = SchedulerConfig(stages=2, stage_range=(0.0, 0.5, 1.0))

    def chunk(sampler: ChunkSampler):
        drawn = sampler.draw(SeededNoise([5]), 1, 1)
        return sampler.denoise(variables, drawn, 1, text, history, anchor)

    kept = ChunkSampler(model, scheduler, plan, 64, 128, 3)
    found = chunk(kept)
    assert kept.compiled_programs() == 4  # the history's and the noise's, and one per stage
    plain = ChunkSampler(model, scheduler, plan, 64, 128, 3)
    plain._history_program = None
    monkeypatch.setattr(plain, "_past", lambda v, h, a: (
        jnp.repeat(model.embed_history(v, LAYOUT.split(h, a)), len(rows), axis=0)))
    expected = chunk(plain)
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.abs(expected).max()))


def test_the_option_is_written_only_where_it_is_on_and_refused_where_it_makes_no_sense():
    assert "restrict_self_attn" not in config_json("transformer", PLAIN)
    assert config_json("transformer", RESTRICTED)["restrict_self_attn"] is True
    assert TransformerConfig.from_dict(config_json("transformer", RESTRICTED)) == RESTRICTED
    with pytest.raises(UserError, match="restrict_self_attn: needs zero_history_timestep"):
        dataclasses.replace(RESTRICTED, zero_history_timestep=False)
    model = HeliosTransformer(PLAIN)
    with pytest.raises(UserError, match="restrict_self_attn: must be true"):
        model.history_context(variables_of(PLAIN), inputs()[3])


def test_what_was_trained_with_it_is_not_trained_or_asked_without(tmp_path):
    """A run may restrict what its base did not. A teacher runs as it was trained, whatever the student does."""
    for name, config in (("free", PLAIN), ("bound", RESTRICTED)):
        export_pipeline(tmp_path / name, {"transformer": variables_of(config)["params"]}, {"transformer": config},
                        index=ModelIndex(), scheduler=SchedulerConfig())

    def start(folder: str, config: TransformerConfig):
        return start_values(str(tmp_path / folder), "objective.init_from", LoraConfig(), None, config, 0)

    assert all(start(*case)[1] for case in (("free", PLAIN), ("free", RESTRICTED), ("bound", RESTRICTED)))
    with pytest.raises(UserError, match="restrict_self_attn: .*bound was trained with it, got False"):
        start("bound", PLAIN)
    for student in (PLAIN, RESTRICTED):
        asked = ModelConfig(data="", transformer=student)
        assert not as_stored(asked, str(tmp_path / "free")).transformer.restrict_self_attn
        assert as_stored(asked, str(tmp_path / "bound")).transformer.restrict_self_attn
