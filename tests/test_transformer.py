"""The transformer equals the original: recorded numbers, live comparison with diffusers, and its own other paths."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.convert.rules import abstract_params, flatten
from helios_jax.models.inputs import FrameIndices, History
from helios_jax.models.partition import unbox
from helios_jax.models.rope import rotary_tables
from helios_jax.models.transformer import HeliosTransformer
from tests.golden import check, data
from tests.oracles import TINY_TRANSFORMER, channel_first, channel_last, converted, relative_error, torch_transformer

torch = pytest.importorskip("torch")

CONFIGS = {
    "published": {},
    "amplified_per_head": {"is_amplify_history": True},
    "amplified_scalar": {"is_amplify_history": True, "history_scale_mode": "scalar"},
    "history_shares_timestep": {"zero_history_timestep": False},
    "all_tokens_read_prompt": {"guidance_cross_attn": False},
    "no_norm2": {"cross_attn_norm": False},
    "unused_added_projections": {"added_kv_proj_dim": 12},
}


def config_of(name: str):
    return dataclasses.replace(TINY_TRANSFORMER, **CONFIGS[name])


def torch_inputs(batch=1, size=(8, 12), history_size=None, text="text", text_rows=7):
    h, w = size
    H, W = history_size or size
    return {
        "hidden_states": data("x", batch, 16, 9, h, w),
        "encoder_hidden_states": data(text, batch, text_rows, 24),
        "latents_history_short": data("short", batch, 16, 2, H, W),
        "latents_history_mid": data("mid", batch, 16, 2, H, W),
        "latents_history_long": data("long", batch, 16, 16, H, W),
    }


def run_torch(config, inputs, timestep, history=True, dtype=None):
    module = torch_transformer(config)
    if dtype is not None:
        import copy
        module = copy.deepcopy(module)
        keep = ("time_embedder", "scale_shift_table", "norm2", "history_key_scale")
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data if any(k in name for k in keep) else parameter.data.to(dtype)
    tensors = {k: torch.from_numpy(v).to(dtype or torch.float32) for k, v in inputs.items()
               if history or "history" not in k}
    if history:
        batch = inputs["hidden_states"].shape[0]
        line = FrameIndices.for_history()
        for name, frames in (("indices_hidden_states", line.current), ("indices_latents_history_short", line.short),
                             ("indices_latents_history_mid", line.mid), ("indices_latents_history_long", line.long)):
            tensors[name] = torch.tensor([frames] * batch)
    with torch.no_grad():
        return module(timestep=torch.as_tensor(timestep), return_dict=False, **tensors)[0].float().numpy()


def run_jax(config, inputs, timestep, history=True, dtype=jnp.float32, **options):
    model = HeliosTransformer(config, dtype, **options)
    variables = {"params": converted("transformer", config, torch_transformer(config),
                                     None if dtype == jnp.float32 else np.dtype(dtype))}
    cast = {k: jnp.asarray(channel_last(v) if v.ndim == 5 else v, dtype) for k, v in inputs.items()}

    @jax.jit
    def forward(variables, cast, timestep):
        rows = cast["encoder_hidden_states"]
        lengths = jnp.full(rows.shape[0], rows.shape[1])
        text = model.text_context(variables, rows, lengths, total=rows.shape[1])
        past = History(cast["latents_history_short"], cast["latents_history_mid"], cast["latents_history_long"])
        return model.apply(variables, cast["hidden_states"], timestep, text, past if history else None)

    return channel_first(forward(variables, cast, jnp.asarray(timestep, jnp.float32)))


GOLDEN = {
    "T1": (dict(), {}, [500.25], True, dict(mean=-0.0704792, std=1.1929195, probe=+0.724913,
           first=[+2.720156, -1.071020, +1.193779, -0.444836], last=[+0.243917, +1.101336])),
    "T2": (dict(), dict(size=(4, 6), history_size=(8, 12)), [500.25], True, dict(mean=-0.0687679, std=1.2331022,
           probe=+0.005847, first=[+0.993546, -2.057796, +3.353055, +0.101155], last=[-0.517224, -0.390337])),
    "T3": (dict(), dict(size=(10, 14)), [500.25], True, dict(mean=-0.0867442, std=1.2257656, probe=-0.122329,
           first=[+0.629336, -0.669229, +1.402424, +1.937425], last=[-0.551866, -1.028115])),
    "T4": (dict(), {}, [500.25], False, dict(mean=-0.0783851, std=1.1878487, probe=+0.708380,
           first=[+2.715496, -1.032121, +1.194789, -0.374610], last=[+0.206463, +1.088214])),
    "T5": (CONFIGS["amplified_per_head"], {}, [500.25], True, dict(mean=-0.0433891, std=1.2101595, probe=+0.732062,
           first=[+2.992505, -0.726996, +1.012295, -0.852064], last=[+0.753304, +1.280143])),
    "T6": (CONFIGS["amplified_scalar"], {}, [500.25], True, dict(mean=-0.0488505, std=1.2107554, probe=+0.861506,
           first=[+3.342974, -0.505968, +0.780727, -0.951047], last=[+0.635195, +1.421368])),
    "T7": (CONFIGS["history_shares_timestep"], {}, [500.25], True, dict(mean=-0.0745806, std=1.1896102,
           probe=+0.710239, first=[+2.692106, -1.033098, +1.178149, -0.413885], last=[+0.217413, +1.104388])),
    "T8": (CONFIGS["all_tokens_read_prompt"], {}, [500.25], True, dict(mean=-0.0722949, std=1.1897381, probe=+0.716612,
           first=[+2.695023, -1.053581, +1.166107, -0.437078], last=[+0.226639, +1.121770])),
    "T9": (dict(), dict(batch=2, text="text2"), [900.0, 100.0], True, dict(mean=-0.1560647, std=1.4556520,
           probe=-0.570431, first=[+0.783311, -0.708221, +0.131817, -0.870010], last=[+3.084679, -0.663338])),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_output_equals_the_recorded_numbers(case):
    overrides, inputs, timestep, history, want = GOLDEN[case]
    config = dataclasses.replace(TINY_TRANSFORMER, **overrides)
    check(run_jax(config, torch_inputs(**inputs), timestep, history), atol=2e-5, **want)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [dict(), dict(size=(4, 6), history_size=(10, 14), batch=2, text_rows=512)],
                         ids=["one_chunk", "low_stage_odd_history_batch_2"])
def test_output_equals_diffusers_for_every_option(name, shape):
    inputs = torch_inputs(**shape)
    timestep = [731.0, 4.5][: inputs["hidden_states"].shape[0]]
    want = run_torch(config_of(name), inputs, timestep)
    assert relative_error(run_jax(config_of(name), inputs, timestep), want) < 1e-5


def test_without_memory_patches_and_history_output_equals_diffusers():
    config = dataclasses.replace(TINY_TRANSFORMER, has_multi_term_memory_patch=False)
    inputs = torch_inputs(size=(6, 10))
    want = run_torch(config, inputs, [333.0], history=False)
    assert relative_error(run_jax(config, inputs, [333.0], history=False), want) < 1e-5


def test_bfloat16_error_is_no_larger_than_pytorchs():
    inputs = torch_inputs()
    exact = run_torch(TINY_TRANSFORMER, inputs, [500.25])
    theirs = run_torch(TINY_TRANSFORMER, inputs, [500.25], dtype=torch.bfloat16) - exact
    ours = run_jax(TINY_TRANSFORMER, inputs, [500.25], dtype=jnp.bfloat16) - exact
    assert np.sqrt(np.mean(ours**2)) <= 1.05 * np.sqrt(np.mean(theirs**2))


@pytest.mark.parametrize("options", [dict(unroll=0), dict(unroll=2), dict(remat="nothing_saveable"),
                                     dict(attention="xla"), dict(attention="per_head")], ids=str)
def test_every_way_to_run_the_layers_gives_the_same_output(options):
    inputs = torch_inputs()
    plain = run_jax(TINY_TRANSFORMER, inputs, [500.25])
    assert relative_error(run_jax(TINY_TRANSFORMER, inputs, [500.25], **options), plain) < 2e-6


def test_one_padded_row_stands_for_all_padded_rows_exactly():
    """Prompts of 3 and 7 rows, zero-padded to 512 in the original."""
    inputs = torch_inputs(batch=2, text="text2", text_rows=7)
    rows, lengths = inputs["encoder_hidden_states"], np.array([3, 7])
    padded = np.zeros((2, 512, 24), np.float32)
    for i, n in enumerate(lengths):
        padded[i, :n] = rows[i, :n]
    want = run_torch(TINY_TRANSFORMER, inputs | {"encoder_hidden_states": padded}, [500.0, 20.0])
    model = HeliosTransformer(TINY_TRANSFORMER)
    variables = {"params": converted("transformer", TINY_TRANSFORMER, torch_transformer())}
    past = History(*(jnp.asarray(channel_last(inputs[f"latents_history_{t}"])) for t in ("short", "mid", "long")))
    latents = jnp.asarray(channel_last(inputs["hidden_states"]))
    for make in (model.text_context, model.text_rows):
        got = jax.jit(lambda variables, make=make: model.apply(
            variables, latents, jnp.array([500.0, 20.0]), make(variables, rows, lengths), past))(variables)
        assert relative_error(channel_first(got), want) < 1e-5


def test_history_tokens_made_once_equal_history_latents():
    inputs = torch_inputs(size=(4, 6), history_size=(8, 12))
    model = HeliosTransformer(TINY_TRANSFORMER)
    variables = {"params": converted("transformer", TINY_TRANSFORMER, torch_transformer())}
    past = History(*(jnp.asarray(channel_last(inputs[f"latents_history_{t}"])) for t in ("short", "mid", "long")))
    text = model.text_context(variables, inputs["encoder_hidden_states"], np.array([7]))
    latents = jnp.asarray(channel_last(inputs["hidden_states"]))
    whole = model.apply(variables, latents, jnp.array([500.0]), text, past)
    tokens = model.embed_history(variables, past)
    assert tokens.shape == (1, 8 + 6 + 48, 32)
    split = model.apply(variables, latents, jnp.array([500.0]), text, tokens, history_size=(8, 12))
    np.testing.assert_array_equal(whole, split)


def test_low_rank_adapters_equal_merged_weights():
    model = HeliosTransformer(TINY_TRANSFORMER)
    params = converted("transformer", TINY_TRANSFORMER, torch_transformer())
    rng = np.random.default_rng(0)

    def adapter(*shape_in_out):
        *lead, n_in, n_out = shape_in_out
        return {"a": rng.normal(size=(*lead, n_in, 3)).astype(np.float32) * 0.1,
                "b": rng.normal(size=(lead[0], 3, n_out) if len(lead) == 1 else (3, n_out)).astype(np.float32)}

    lora = {"blocks": {"attn1": {"to_q": adapter(2, 32, 32)}, "attn2": {"to_v": adapter(2, 32, 32)},
                       "ffn": {"net_0": {"proj": adapter(2, 32, 48)}}},
            "patch_long": adapter(4, 8, 8, 16, 32), "proj_out": adapter(32, 64),
            "condition_embedder": {"text_embedder": {"linear_1": adapter(24, 32)},
                                   "time_embedder": {"linear_2": adapter(32, 32)}}}

    def merge(p, a):
        if "a" in a:
            return p | {"kernel": p["kernel"] + a["a"] @ (a["b"] if a["a"].ndim != 5 else a["b"])}
        return {k: merge(v, a[k]) if k in a else v for k, v in p.items()}

    inputs = torch_inputs()
    latents = jnp.asarray(channel_last(inputs["hidden_states"]))
    past = History(*(jnp.asarray(channel_last(inputs[f"latents_history_{t}"])) for t in ("short", "mid", "long")))

    @jax.jit
    def forward(variables):
        text = model.text_context(variables, inputs["encoder_hidden_states"], np.array([7]))
        return model.apply(variables, latents, jnp.array([500.0]), text, past)

    apart, merged, without = (forward(variables) for variables in (
        {"params": params, "lora": lora}, {"params": merge(params, lora)}, {"params": params}))
    assert relative_error(apart, merged) < 1e-5
    assert relative_error(apart, without) > 1e-2


def test_fresh_parameters_have_the_names_and_shapes_of_the_checkpoint():
    for name in CONFIGS:
        config = config_of(name)
        made = jax.eval_shape(lambda config=config: unbox(HeliosTransformer(config).init(jax.random.key(0))))
        want = {path: leaf.shape for path, leaf in flatten(abstract_params("transformer", config))}
        assert {path: leaf.shape for path, leaf in flatten(made)} == want


@pytest.mark.parametrize("frames, grid, pool, want", [
    ("R1", (2, 2), None, dict(mean=+0.4131200, std=0.5738744, probe=-0.450546, last=[0.0, +0.002154],
                              first=[-0.989992] * 4)),
    ("R2", (5, 7), 2, dict(mean=+0.2984744, std=0.6133082, probe=-2.018521, last=[+0.009695, +0.012926],
                           first=[+0.192577] * 4)),
    ("R3", (5, 7), 4, dict(mean=+0.3177636, std=0.5342813, probe=-1.423845, last=[+0.003232, +0.011311],
                           first=[-0.379870] * 4)),
])
def test_rotary_tables_equal_the_recorded_numbers(frames, grid, pool, want):
    indices = {"R1": FrameIndices(current=(3,)), "R2": FrameIndices((), mid=(17, 18)),
               "R3": FrameIndices((), long=tuple(range(1, 17)))}[frames]
    cos, sin = rotary_tables(indices, grid, grid, (4, 6, 6), 10000.0)
    t, h, w = {"R1": (1, 2, 2), "R2": (1, 3, 4), "R3": (4, 2, 2)}[frames]
    table = np.concatenate([np.repeat(cos, 2, axis=1), np.repeat(sin, 2, axis=1)], axis=1)  # [S, 2 D]
    check(table.T.reshape(1, 32, t, h, w), atol=2e-6, **want)
