"""Every attention variant equals the float64 formulas, forward and backward, with every option."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_base import Case, check_core, computed, inputs

from helios_jax.errors import UserError
from kernels.attention import compacted_attention, dispatch, explain, pack, per_head, prepare_history
from kernels.attention.dispatch import attend, variant

VARIANTS = ["per_head", "xla"]
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


def options_of(name):
    entries, restrict = OPTIONS[name]
    if len(entries) == 1:
        return {"history_length": entries[0][0], "restrict_self_attn": restrict}
    return pack(entries, restrict_self_attn=restrict)._asdict()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("option", OPTIONS)
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
    np.testing.assert_allclose(got, want, atol=3e-6)
    for key, gradient in gradients.items():
        scale = np.abs(want_gradients[key]).max()
        np.testing.assert_allclose(gradient / scale, want_gradients[key] / scale, atol=1e-5, err_msg=key)


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
    np.testing.assert_allclose(current, whole[:, history:], atol=2e-6)


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
    monkeypatch.setattr(dispatch, "ORDERS", (dispatch.Order("cpu", "", ("cudnn", "unregistered", "xla"), None),))
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


def test_every_device_has_an_order_that_ends_in_a_variant_for_everything():
    for platform in ("cpu", "tpu", "gpu", "unheard-of"):
        assert dispatch.order_for(dispatch.Device(platform, "any"))[-1] == "xla"


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

