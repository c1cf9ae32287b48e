"""Every attention variant equals the float64 formulas, forward and backward, with every option."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_base import Case, check_core, computed, exact, inputs
from jax.experimental.pallas import tpu as pltpu

from helios_jax.errors import UserError
from kernels.attention import (
    compacted_attention,
    dispatch,
    explain,
    pack,
    per_head,
    prepare_history,
    prologue,
    tpu,
    tpu_forward,
    tpu_tiles,
)
from kernels.attention.dispatch import attend, variant

VARIANTS = ["per_head", "xla", "mosaic_tpu_interpret"]
CASES = [
    Case(),
    Case(with_bias=True),
    Case(batch=1, queries=1, keys=300, heads=3, size=64),
    Case(queries=131, keys=29, size=64, dtype=jnp.bfloat16, with_bias=True),
    Case(batch=1, queries=45, keys=270, size=128, dtype=jnp.bfloat16),
    Case(queries=17, keys=40, scale=40.0),
]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_variant_equals_the_float64_formulas(name, case):
    check_core(variant(name), case)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_output_alone_is_the_same_as_with_the_log_sum_exp(name):
    check_core(variant(name), Case(), with_lse=False)


@pytest.mark.parametrize("name", VARIANTS)
def test_twice_the_same_call_gives_the_same_bits(name):
    case = Case(queries=70, keys=90, dtype=jnp.bfloat16)
    for first, second in zip(*(computed(variant(name), case).values() for _ in range(2)), strict=True):
        np.testing.assert_array_equal(first, second)


def test_per_head_in_blocks_of_queries_equals_the_formulas(monkeypatch):
    monkeypatch.setattr(per_head, "MAX_LOGITS", 300)
    check_core(per_head.attention, Case(with_bias=True))


# -- the TPU kernels, interpreted -------------------------------------------------------------------------------------


def test_tpu_kernels_in_parts_that_fit_the_memory_equal_the_formulas():
    """Keys in two parts forward, queries in two parts backward, neither of whole tiles."""
    case = Case(batch=1, queries=150, keys=70)

    def attention(q, k, v, bias, return_lse):
        settings = tpu.settings_for(tpu_tiles.INTERPRETED, case.keys, 4, False, interpret=True)
        return tpu._attention(settings._replace(max_keys=48, max_queries=128), q, k, v, bias)

    check_core(attention, case)


def test_tpu_kernels_read_nothing_undefined_and_race_nowhere():
    """The detailed interpreter fills what nothing has written with NaN and raises on a read outside a buffer."""
    detailed = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise", detect_races=True)
    check_core(functools.partial(tpu.interpreted, interpret=detailed), Case(batch=1, queries=150, keys=45, heads=1))


def opposed(gap):
    """Queries whose bound lies ``gap`` powers of two above the mean logit: one long key points away from all of them.

    The other keys are nearly orthogonal to the queries, so the true maximum is close to the mean.
    """
    rng = np.random.default_rng(3)
    size, keys = 32, 40
    length = np.sqrt(gap / (1 + 1 / keys) * size**0.5 / tpu_forward.LOG2_E)
    q, k = 0.01 * rng.standard_normal((1, 140, 1, size)), rng.standard_normal((1, keys, 1, size)) / length
    q[..., 0], k[..., 0], k[:, 0] = length, 0.0, 0.0
    k[:, 0, :, 0] = -length
    v = rng.standard_normal(k.shape)
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


@pytest.mark.parametrize("gap", [tpu_forward.LARGEST_GAP - 2, tpu_forward.LARGEST_GAP + 2, 400.0])
def test_softmax_by_a_bound_equals_the_formulas_on_both_sides_of_its_limit(gap):
    q, k, v = opposed(gap)
    _, measured = tpu_forward.bound_and_gap(q[0, :, 0], tpu_forward.keys_summary(k[:, :, 0], 32)[0])
    assert abs(float(measured.max()) - gap) < 1.5
    want = exact(q, k, v, None, q, jnp.zeros((1, 1, 140)))
    out, lse = jax.jit(functools.partial(tpu.interpreted, return_lse=True))(q, k, v)
    np.testing.assert_allclose(out, want["out"], atol=2.0**-24 * (64 + 4 * gap))
    np.testing.assert_allclose(lse, want["lse"], atol=2.0**-24 * (64 + 4 * gap))


def test_beyond_its_limit_the_bound_alone_would_lose_every_weight(monkeypatch):
    monkeypatch.setattr(tpu_forward, "LARGEST_GAP", 1e9)
    assert not np.isfinite(jax.jit(lambda *qkv: tpu.interpreted(*qkv))(*opposed(400.0))).any()


def test_no_logit_exceeds_the_bound_and_no_maximum_lies_further_below_it_than_the_gap():
    q, k, *_ = inputs(Case(batch=1, queries=300, keys=200, heads=1, size=64, scale=3.0))
    q, k = q[0, :, 0], k[0, :, 0]
    bound, gap = tpu_forward.bound_and_gap(q, tpu_forward.keys_summary(k[None], 64)[0])
    top = (np.float64(q) @ np.float64(k).T).max(1) * 64**-0.5 * tpu_forward.LOG2_E
    assert (top <= bound[0]).all() and (top >= (bound - gap)[0] - 1e-4).all()


def test_tpu_tiles_cover_a_length_evenly():
    for length in (1, 15, 16, 17, 513, 2940, 4560, 11040):
        for largest, multiple in ((512, 16), (768, 16), (1024, 128), (2048, 128)):
            tile = tpu_tiles.split(length, largest, multiple)
            count = -(-length // tile)
            assert tile <= largest and count == -(-length // largest)
            assert tile == length or tile % multiple == 0
            assert length - (count - 1) * tile > tile - count * multiple  # the last one is shorter by rounding alone


@pytest.mark.parametrize("chip", tpu_tiles.CHIPS)
@pytest.mark.parametrize("length", [11040, 4560, 2940])
def test_production_lengths_stay_resident_on_every_chip(chip, length):
    settings = tpu.settings_for(tpu_tiles.CHIPS[chip], length, itemsize=2, with_bias=False)
    assert settings.max_keys >= length and settings.max_queries >= length


@pytest.mark.parametrize("size, dtype, reason", [(48, jnp.float32, "head size"), (32, jnp.float16, "bfloat16")])
def test_tpu_kernels_refuse_what_they_cannot_serve(size, dtype, reason):
    x = jnp.zeros((1, 4, 1, size), dtype)
    with pytest.raises(NotImplementedError, match=reason):
        tpu.interpreted(x, x, x)
    with pytest.raises(NotImplementedError, match="for TPUs, the device is cpu"):
        tpu.attention(x, x, x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_by_a_product_equals_rotation_of_pairs(dtype):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 9, 3, 32)), dtype)
    cos, sin = (jnp.asarray(rng.standard_normal((9, 16)), jnp.float32) for _ in range(2))
    got, want = (np.float32(f(x, cos, sin)) for f in (prologue.rotate_by_product, prologue.rotate_pairs))
    # Fused multiply-adds may round one product less; one unit in the last place of the largest entry.
    np.testing.assert_allclose(got, want, atol=float(jnp.finfo(dtype).eps) * np.abs(want).max())


# Two programs of queries, the second ragged, and keys of a ragged last step.
RAW_ROWS, RAW_HEADS = 150, 2


def raw_inputs(dtype):
    rng = np.random.default_rng(2)
    width = RAW_HEADS * 128
    q, k, v = (jnp.asarray(rng.standard_normal((2, RAW_ROWS, width)) * scale, dtype) for scale in (0.1, 1, 1))
    norm_q, norm_k = (jnp.asarray(1 + 0.3 * rng.standard_normal(width), jnp.float32) for _ in range(2))
    angle = rng.uniform(0, 6, (RAW_ROWS, 64))
    tables = {name: jnp.asarray(0.9 * f(angle), jnp.float32) for name, f in (("cos", np.cos), ("sin", np.sin))}
    return (q, k, v), {"norm_q": norm_q, "norm_k": norm_k, **tables, "num_heads": RAW_HEADS, "return_lse": True}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_queries_prepared_in_the_tpu_kernel_give_what_those_prepared_outside_give(dtype, monkeypatch):
    operands, options = raw_inputs(dtype)

    def computed_by(name):
        return compacted_attention(*operands, implementation=name, **options)

    wide = (x.astype(jnp.float32) for x in operands)
    exact_out, exact_lse = compacted_attention(*wide, implementation="xla", **options)
    outside, _ = jax.jit(lambda: computed_by(functools.partial(attend, implementation="mosaic_tpu_interpret")))()
    # Nothing but the kernel prepares queries now.
    monkeypatch.setattr(prologue, "prepare_queries", None)
    inside, lse = jax.jit(lambda: computed_by("mosaic_tpu_interpret"))()
    assert inside.dtype == dtype and inside.shape == outside.shape
    error, allowed = (float(jnp.sqrt(jnp.square(x.astype(jnp.float32) - exact_out).mean())) for x in (inside, outside))
    assert error <= 1.02 * allowed  # the same roundings: multiplications and additions may be fused here and not there
    np.testing.assert_allclose(lse, exact_lse, atol=1e-5 if dtype == jnp.float32 else 0.03)


def test_gradients_of_queries_that_the_tpu_kernel_prepares_are_those_of_the_xla_variant():
    operands, options = raw_inputs(jnp.float32)
    w = np.float32(np.random.default_rng(5).standard_normal(operands[0].shape))

    def gradients(name):
        def loss(operands, norms):
            out, lse = compacted_attention(*operands, **{**options, **norms}, implementation=name)
            return (out * w).sum() + lse.sum()

        norms = {key: options[key] for key in ("norm_q", "norm_k")}
        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(operands, norms))

    for got, want in zip(gradients("mosaic_tpu_interpret"), gradients("xla"), strict=True):
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


# -- the public function, against one dense masked computation in float64 ---------------------------------------------

LENGTH, HEADS, SIZE = 41, 2, 32
WIDTH = HEADS * SIZE


def layer_inputs(seed=0, dtype=np.float32):
    """q, k, v [2, S, C], norm weights, rotary tables that are not of unit norm, and a scale per head."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, LENGTH, WIDTH)).astype(dtype) for _ in range(3))
    norm_q, norm_k = (1 + 0.3 * rng.standard_normal(WIDTH).astype(dtype) for _ in range(2))
    angle = rng.uniform(0, 6, (LENGTH, SIZE // 2))
    cos, sin = (f(angle).astype(np.float32) * 0.9 for f in (np.cos, np.sin))
    return {"q": q, "k": k, "v": v, "norm_q": norm_q, "norm_k": norm_k,
            "history_key_scale": rng.uniform(1, 4, HEADS).astype(dtype)}, cos, sin


def masked(arrays, cos, sin, visible, is_history):
    """The whole layer with complex rotation and an explicit S x S mask."""

    def prepare(x, weight):
        x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight
        pairs = x.reshape(2, LENGTH, HEADS, SIZE // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (cos + 1j * sin)[None, :, None]
        return jnp.stack([turned.real, turned.imag], -1).reshape(2, LENGTH, HEADS, SIZE)

    q, k = prepare(arrays["q"], arrays["norm_q"]), prepare(arrays["k"], arrays["norm_k"])
    k = jnp.where(is_history[None, :, None, None], k * arrays["history_key_scale"][None, None, :, None], k)
    logits = jnp.where(visible, jnp.einsum("bqnd,bknd->bnqk", q, k) / SIZE**0.5, -jnp.inf)
    out = jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(logits), arrays["v"].reshape(2, LENGTH, HEADS, SIZE))
    return out.reshape(2, LENGTH, WIDTH), jax.nn.logsumexp(logits, -1)


def visible_rows(entries, restrict):
    visible, is_history = np.zeros((LENGTH, LENGTH), bool), np.zeros(LENGTH, bool)
    start = 0
    for history, current in entries:
        middle, stop = start + history, start + history + current
        visible[start:stop, start:stop] = True
        if restrict:
            visible[start:middle, middle:stop] = False
        is_history[start:middle] = True
        start = stop
    return visible, is_history


OPTIONS = {
    "dense": ([(17, 24)], False),
    "restricted": ([(17, 24)], True),
    "packed": ([(9, 12), (5, 7), (0, 8)], False),
    "packed-restricted": ([(9, 12), (5, 7), (0, 8)], True),
}


def layer_bound(name):
    """Largest allowed deviation, relative to the range of a result.

    The largest logit of these inputs is 7. Norm, rotation, product and scale each round it by 2^-24 of its size, which
    is 4 * 7 * 2^-24 in the exponent of its weight, and the sums add some 4 * 2^-24: 2e-6 (seen: 0.7e-6). The
    interpreted TPU kernel goes by a bound: its exponents are logits plus up to 2^8, twice rounded to 2^-17, which is
    2 * ln 2 * 2^-17 in a weight: 1e-5 (seen: 6e-6).
    """
    return 1e-5 if name == "mosaic_tpu_interpret" else 2e-6


def options_of(name):
    entries, restrict = OPTIONS[name]
    if len(entries) == 1:
        return {"history_length": entries[0][0], "restrict_self_attn": restrict}
    return pack(entries, restrict_self_attn=restrict)._asdict()


@pytest.mark.parametrize("option, name", [
    *((option, name) for option in OPTIONS for name in ("per_head", "xla")),
    ("packed-restricted", "mosaic_tpu_interpret"),
])
def test_layer_equals_a_masked_float64_computation_with_all_its_gradients(name, option):
    arrays, cos, sin = layer_inputs()
    rng = np.random.default_rng(7)
    w, w_lse = (np.float32(rng.standard_normal(shape)) for shape in ((2, LENGTH, WIDTH), (2, HEADS, LENGTH)))

    def loss(layer, arrays):
        out, lse = layer(arrays)
        return (out * w).sum() + (lse * w_lse).sum(), out

    with jax.enable_x64(True):
        visible, is_history = visible_rows(*OPTIONS[option])
        wide = {key: jnp.asarray(x, jnp.float64) for key, x in arrays.items()}
        (_, want), want_gradients = jax.value_and_grad(
            lambda a: loss(lambda a: masked(a, jnp.float64(cos), jnp.float64(sin), visible, is_history), a),
            has_aux=True)(wide)

    def layer(arrays):
        arrays = dict(arrays)
        q, k, v = (arrays.pop(key) for key in "qkv")
        return compacted_attention(q, k, v, cos=cos, sin=sin, num_heads=HEADS, return_lse=True, implementation=name,
                                   **options_of(option), **arrays)

    (_, got), gradients = jax.jit(jax.value_and_grad(lambda a: loss(layer, a), has_aux=True))(arrays)
    for key, value, true in (("out", got, want), *((key, gradients[key], want_gradients[key]) for key in gradients)):
        scale = np.abs(true).max()
        np.testing.assert_allclose(value / scale, true / scale, atol=layer_bound(name), err_msg=key)


@pytest.mark.parametrize("name", VARIANTS)
def test_current_rows_with_cached_history_equal_the_restricted_whole(name):
    arrays, cos, sin = layer_inputs()
    q, k, v, norm_q = (arrays.pop(key) for key in ("q", "k", "v", "norm_q"))
    history, shared = 17, {"num_heads": HEADS, "implementation": name}
    whole = compacted_attention(q, k, v, norm_q=norm_q, cos=cos, sin=sin, history_length=history,
                                restrict_self_attn=True, **arrays, **shared)
    cache = prepare_history(k[:, :history], v[:, :history], cos=cos[:history], sin=sin[:history], num_heads=HEADS,
                            **arrays)
    current = compacted_attention(q[:, history:], k[:, history:], v[:, history:], norm_q=norm_q,
                                  norm_k=arrays["norm_k"], cos=cos[history:], sin=sin[history:], history=cache,
                                  **shared)
    assert np.abs(current - whole[:, history:]).max() <= layer_bound(name) * np.ptp(whole)


# -- transformations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_scan_and_remat_give_the_gradient_of_the_plain_loop(name):
    q, k, v, _, w, _ = inputs(Case(queries=24, keys=24))
    core = variant(name)

    def layer(x, scale):
        return x + core(x * scale, k, v), None

    def looped(q):
        for scale in (0.5, 2.0, 1.5):
            q, _ = layer(q, scale)
        return (q * w).sum()

    def scanned(q):
        remat = jax.checkpoint(layer, prevent_cse=False)
        return (jax.lax.scan(remat, q, jnp.asarray([0.5, 2.0, 1.5]))[0] * w).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(q), jax.jit(jax.grad(looped))(q), atol=1e-5)


# -- dispatch ---------------------------------------------------------------------------------------------------------


def test_explain_names_the_chosen_variant_and_every_refusal(monkeypatch):
    q, k, v, bias, _, _ = inputs(Case(with_bias=True))
    monkeypatch.setattr(dispatch, "ORDERS", (dispatch.Order("cpu", "", ("cudnn", "xla"), None),))
    explanation = explain(jax.ShapeDtypeStruct(q.shape, q.dtype), k, v, bias)
    assert explanation.chosen == "xla"
    assert list(explanation.refused) == ["cudnn"] and "cpu" in explanation.refused["cudnn"]
    np.testing.assert_array_equal(attend(q, k, v, bias), variant("xla")(q, k, v, bias))


def test_a_call_that_every_variant_refuses_lists_their_reasons(monkeypatch):
    q, k, v, _, _, _ = inputs(Case())
    monkeypatch.setattr(dispatch, "ORDERS", (dispatch.Order("cpu", "", ("cudnn",), None),))
    assert explain(q, k, v).chosen is None
    with pytest.raises(NotImplementedError, match="cudnn: cuDNN runs on NVIDIA GPUs, the device is cpu"):
        attend(q, k, v)


def test_a_variant_asked_for_by_name_fails_loudly():
    q, k, v, _, _, _ = inputs(Case())
    with pytest.raises(NotImplementedError, match="NVIDIA GPUs"):
        attend(q, k, v, implementation="cudnn")
    with pytest.raises(UserError, match="per_head, .*got 'cuda'"):
        attend(q, k, v, implementation="cuda")


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu", "unheard-of"])
def test_every_device_serves_a_long_sequence_without_a_kernel_in_bounded_memory(platform):
    """In float32 at 384x640 the logits of a layer would take 20 GB."""
    last = [name for name in dispatch.order_for(dispatch.Device(platform, "any")) if name in ("xla", "per_head")]
    long = jax.ShapeDtypeStruct((1, 11040, 40, 128), jnp.float32)
    with pytest.raises(NotImplementedError, match="logits would take 18.2 GiB"):
        jax.eval_shape(dispatch.variant("xla"), long, long, long)
    assert "per_head" in last
    compiled = jax.jit(dispatch.variant("per_head")).lower(long, long, long).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2e9  # 230 MB for each of the arrays put in order of heads


def test_arguments_that_do_not_fit_are_named():
    q, k, v, bias, _, _ = inputs(Case(with_bias=True))
    with pytest.raises(UserError, match=r"\(2, 53, 2, 32\)"):
        attend(q, k, v[:, 1:])
    with pytest.raises(UserError, match="bias"):
        attend(q, k, v, bias[:, 1:])
    arrays, cos, sin = layer_inputs()
    layer = {**{key: arrays[key] for key in ("norm_q", "norm_k")}, "cos": cos, "sin": sin, "num_heads": HEADS}
    packing = pack([(9, 12), (5, 15)])
    with pytest.raises(UserError, match="restrict_self_attn"):
        compacted_attention(*(arrays[key] for key in "qkv"), **layer, restrict_self_attn=True, **packing._asdict())
    gap = (packing.segments[0], ((22, 41), (21, 41)))
    for segments in (packing.segments[:1], gap, (((0, 41), (0, 42)),)):
        with pytest.raises(UserError, match="segments"):
            compacted_attention(*(arrays[key] for key in "qkv"), **layer, segments=segments)
    with pytest.raises(UserError, match="rows"):
        pack([(3, -1)])

