"""The UMT5 encoder equals transformers ``UMT5EncoderModel``, and the recorded golden numbers hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.config import TextEncoderConfig
from helios_jax.convert import abstract_params, params_from_torch_state_dict
from helios_jax.convert.rules import tensor_rules
from helios_jax.models.umt5 import UMT5Encoder, relative_buckets
from tests import golden

TINY = TextEncoderConfig(vocab_size=64, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3)
# Inner width different from the model width, heads that do not divide it, other buckets.
ODD = TextEncoderConfig(vocab_size=51, d_model=20, d_kv=6, d_ff=33, num_layers=3, num_heads=5,
                        relative_attention_num_buckets=16, relative_attention_max_distance=40)


def golden_params(config: TextEncoderConfig) -> dict:
    """Parameters from the filler; the embedding has the value of its tied alias."""
    state = {}
    for rule in tensor_rules("text_encoder", config):
        name = "encoder.embed_tokens.weight" if rule.name == "shared.weight" else rule.name
        state[rule.name] = golden.fill(name, rule.shape)
    return params_from_torch_state_dict("text_encoder", config, state)


def torch_model(config: TextEncoderConfig, dtype=None):
    torch = pytest.importorskip("torch")
    from transformers import UMT5Config, UMT5EncoderModel

    model = UMT5EncoderModel(UMT5Config(**config.to_dict(), dropout_rate=0.1)).eval()
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.from_numpy(golden.fill(name.replace("shared", "encoder.embed_tokens"), tensor.shape)))
    return model if dtype is None else model.to(getattr(torch, dtype))


def torch_encode(model, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).last_hidden_state
    return out.float().numpy()


def batch(length: int, lengths: tuple[int, ...], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    ids = golden.rs(f"ids{length}").randint(2, vocab_size, (len(lengths), length)).astype(np.int32)
    mask = np.arange(length) < np.asarray(lengths)[:, None]
    ids[~mask] = 0
    return ids, mask


def encode(config: TextEncoderConfig, params, ids, mask, **options) -> np.ndarray:
    return np.asarray(jax.jit(UMT5Encoder(config, **options).apply)({"params": params}, ids, mask))


def relative_error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / (want.max() - want.min()))


@pytest.mark.parametrize("config,length,lengths", [
    (TINY, 7, (7, 3)), (TINY, 301, (301, 157)), (ODD, 1, (1, 1)), (ODD, 33, (1, 33)), (ODD, 301, (157, 301))])
def test_equals_transformers_at_odd_lengths_in_a_padded_batch(config, length, lengths):
    ids, mask = batch(length, lengths, config.vocab_size)
    want = torch_encode(torch_model(config), ids, mask)
    params = params_from_torch_state_dict(
        "text_encoder", config, {k: v.numpy() for k, v in torch_model(config).state_dict().items()})
    got = encode(config, params, ids, mask)
    assert got.shape == want.shape
    assert relative_error(got, want) <= 1e-5  # rows of padding included: they are computed alike


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_accurate_as_torch_half_precision(dtype):
    exact_model, half_model = torch_model(ODD), torch_model(ODD, dtype)
    if dtype == "float16":  # what from_pretrained does in float16 (_keep_in_fp32_modules)
        for half, exact in zip(half_model.modules(), exact_model.modules(), strict=True):
            if hasattr(half, "wo"):
                half.wo = exact.wo
    params = params_from_torch_state_dict(
        "text_encoder", ODD, {k: v.numpy() for k, v in exact_model.state_dict().items()}, dtype=jnp.dtype(dtype))
    ours, theirs = [], []
    for length, lengths in [(93, (93, 41)), (31, (31, 20)), (200, (200, 120))]:
        ids, mask = batch(length, lengths, ODD.vocab_size)
        exact = torch_encode(exact_model, ids, mask)[mask]
        theirs.append(torch_encode(half_model, ids, mask)[mask] - exact)
        got = encode(ODD, params, ids, mask, dtype=jnp.dtype(dtype))
        assert got.dtype == jnp.dtype(dtype)
        ours.append(got.astype(np.float32)[mask] - exact)
    assert np.square(np.concatenate(ours)).mean() <= np.square(np.concatenate(theirs)).mean()


def test_float16_does_not_overflow_where_the_residual_exceeds_its_range():
    params = golden_params(TINY)
    wo = params["encoder"]["block"]["layer_1"]["DenseReluDense"]["wo"]
    wo["kernel"] = wo["kernel"] * 1e6
    ids, mask = batch(9, (9,), TINY.vocab_size)
    half = encode(TINY, params, ids, mask, dtype=jnp.float16)
    full = encode(TINY, params, ids, mask)
    assert relative_error(half, full) < 5e-3


def test_golden_hidden_state_of_a_padded_batch():
    ids = np.array([[5, 9, 33, 2, 1, 0, 0, 0], [7, 1, 0, 0, 0, 0, 0, 0]], np.int32)
    got = encode(TINY, golden_params(TINY), ids, ids > 0)
    golden.check(got, mean=0.1961168, std=0.9974059, first=(-0.310933, -1.892842, 2.360670, -0.282709),
                 last=(-1.865734, 2.513010), probe=0.363038, atol=2e-6)  # U1
    got = got * (ids > 0)[..., None]
    golden.check(got, mean=0.0668199, std=0.6466968, first=(-0.310933, -1.892842, 2.360670, -0.282709),
                 last=(0.0, 0.0), probe=0.358014, atol=2e-6)  # U2


def test_golden_hidden_state_of_300_tokens():
    ids = (np.arange(300) % 61 + 2).astype(np.int32)[None]
    ids[:, 249], ids[:, 250:] = 1, 0
    got = encode(TINY, golden_params(TINY), ids, ids > 0) * (ids > 0)[..., None]
    golden.check(got, mean=-0.0003902, std=0.9197003, first=(-0.661927, 0.242197, 0.411244, 0.747469),
                 last=(0.0, 0.0), probe=0.176533, atol=2e-6)  # U3


def test_bucket_table_has_the_published_borders():
    table = relative_buckets(200)
    borders = {8: 8, 12: 9, 16: 10, 23: 11, 32: 12, 46: 13, 64: 14, 91: 15}
    want = [max([i for i in range(8) if i <= r], default=0) for r in range(200)]
    want = [max([want[r], *(b for start, b in borders.items() if r >= start)]) for r in range(200)]
    np.testing.assert_array_equal(table[0], [w + (16 if r else 0) for r, w in enumerate(want)])  # keys after the query
    np.testing.assert_array_equal(table[:, 0], want)  # keys before the query


def test_bucket_table_equals_transformers_for_512_tokens_and_other_bucket_counts():
    torch = pytest.importorskip("torch")
    from transformers import UMT5Config
    from transformers.models.umt5.modeling_umt5 import UMT5Attention

    for buckets, distance in [(32, 128), (16, 40), (64, 200)]:
        attention = UMT5Attention(UMT5Config(d_model=8, d_kv=4, num_heads=2, relative_attention_num_buckets=buckets,
                                             relative_attention_max_distance=distance))
        positions = torch.arange(512)
        want = attention._relative_position_bucket(positions[None] - positions[:, None]).numpy()
        np.testing.assert_array_equal(relative_buckets(512, buckets, distance), want)


def test_every_layer_uses_its_own_relative_bias():
    params = golden_params(TINY)
    ids, mask = batch(12, (12,), TINY.vocab_size)
    before = encode(TINY, params, ids, mask)
    for layer in range(TINY.num_layers):
        changed = jax.tree.map(np.array, params)
        bias = changed["encoder"]["block"]["layer_0"]["SelfAttention"]["relative_attention_bias"]["weight"]
        bias[layer, 16:] += 1.0  # a constant over all buckets would cancel in the softmax
        after = encode(TINY, changed, ids, mask)
        assert np.abs(before - after).max() > 1e-2


def test_padding_does_not_change_real_rows():
    params = golden_params(ODD)
    ids, mask = batch(96, (41,), ODD.vocab_size)
    long = encode(ODD, params, ids, mask)[:, :41]
    short = encode(ODD, params, ids[:, :41], mask[:, :41])
    assert relative_error(long, short) <= 1e-5


def test_unrolling_the_layers_changes_nothing():
    params = golden_params(ODD)
    ids, mask = batch(19, (19, 5), ODD.vocab_size)
    scanned = encode(ODD, params, ids, mask)
    for unroll in (2, 3, 8):
        unrolled = encode(ODD, params, ids, mask, unroll=unroll)
        assert relative_error(unrolled, scanned) <= 1e-6


def test_fresh_parameters_have_the_checkpoint_layout():
    for config in (TINY, ODD, TextEncoderConfig()):  # the last one is the published size
        params = jax.eval_shape(UMT5Encoder(config, param_dtype=jnp.bfloat16).init_params, jax.random.key(0))
        want = abstract_params("text_encoder", config, jnp.bfloat16)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), want)


def test_fresh_layers_differ_and_keep_the_residual_in_scale():
    config = TextEncoderConfig(vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=4, num_heads=4)
    params = UMT5Encoder(config).init_params(jax.random.key(0))
    kernel = params["encoder"]["block"]["layer_0"]["SelfAttention"]["q"]["kernel"]
    assert np.abs(np.asarray(kernel[0] - kernel[1])).max() > 1e-2
    ids, mask = batch(20, (20,), 300)
    out = encode(config, params, ids, mask)
    np.testing.assert_allclose(np.sqrt(np.square(out).mean(-1)), 1, atol=1e-3)
    embedded = np.asarray(params["shared"]["weight"])[ids]
    cosine = (out * embedded).sum(-1) / np.linalg.norm(out, axis=-1) / np.linalg.norm(embedded, axis=-1)
    assert cosine.min() > 0.1  # no layer drowns the residual
