"""What every attention variant must satisfy, stated once: cases, a float64 oracle and the comparison.

``check_core`` is the whole contract of a core attention function; a variant that needs a device or an interpreter
of its own calls it from its own test file.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """q [batch, queries, heads, size], k and v [batch, keys, heads, size]; ``scale`` multiplies q, so the logits."""

    batch: int = 2
    queries: int = 37
    keys: int = 53
    heads: int = 2
    size: int = 32
    with_bias: bool = False
    dtype: type = jnp.float32
    scale: float = 1.0

    def __str__(self) -> str:
        bias = "-bias" if self.with_bias else ""
        scale = f"-x{self.scale:g}" if self.scale != 1 else ""
        return f"{self.batch}x{self.queries}x{self.keys}x{self.heads}x{self.size}{bias}-{self.dtype.__name__}{scale}"


def inputs(case: Case):
    """(q, k, v, bias, weights of the output, weights of the lse); half of the biased keys are masked out.

    Whatever a variant gets in the case's dtype, the output's gradient included, is rounded to it here: the float64
    oracle starts from the same numbers.
    """
    rng = np.random.default_rng(case.queries * 1000 + case.keys)
    shapes = [(case.batch, rows, case.heads, case.size) for rows in (case.queries, case.keys, case.keys, case.queries)]
    q, k, v, w = (rng.standard_normal(shape) for shape in shapes)
    w_lse = rng.standard_normal((case.batch, case.heads, case.queries))
    bias = None
    if case.with_bias:
        bias = np.where(rng.random((case.batch, case.keys)) < 0.5, -1e30, np.log(300.0))
        bias[:, 0] = 0.0
        bias = jnp.asarray(bias, jnp.float32)
    q, k, v, w = (jnp.asarray(x, jnp.float32).astype(case.dtype) for x in (q * case.scale, k, v, w))
    return q, k, v, bias, w.astype(jnp.float32), jnp.asarray(w_lse, jnp.float32)


def exact(q, k, v, bias, w, w_lse) -> dict[str, np.ndarray]:
    """Forward and gradients of sum(w * out) + sum(w_lse * lse) in float64, from the formulas."""
    q, k, v, w, w_lse = (np.asarray(x, np.float64) for x in (q, k, v, w, w_lse))
    scale = q.shape[-1] ** -0.5
    logits = np.einsum("bqnd,bknd->bnqk", q, k) * scale
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)[:, None, None, :]
    top = logits.max(-1, keepdims=True)
    lse = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    p = np.exp(logits - lse)
    out = np.einsum("bnqk,bknd->bqnd", p, v)
    d_p = np.einsum("bqnd,bknd->bnqk", w, v)
    d_logits = p * (d_p - (d_p * p).sum(-1, keepdims=True) + w_lse[..., None]) * scale
    return {"out": out, "lse": lse[..., 0], "d_q": np.einsum("bnqk,bknd->bqnd", d_logits, k),
            "d_k": np.einsum("bnqk,bqnd->bknd", d_logits, q), "d_v": np.einsum("bnqk,bqnd->bknd", p, w)}


def computed(attention, case: Case, with_lse: bool = True) -> dict[str, jax.Array]:
    """The same quantities from a variant; under ``jit``, as in use, with every rounding that the program states."""
    q, k, v, bias, w, w_lse = inputs(case)

    def loss(q, k, v):
        out, lse = attention(q, k, v, bias, return_lse=True) if with_lse else (attention(q, k, v, bias), None)
        value = (out.astype(jnp.float32) * w).sum() + ((lse * w_lse).sum() if with_lse else 0.0)
        return value, (out, lse)

    options = {"xla_allow_excess_precision": False}  # on a CPU XLA would leave out roundings to 16 bits and back
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=options)
    (_, (out, lse)), gradients = run(q, k, v)
    results = {"out": out, "lse": lse, **dict(zip(("d_q", "d_k", "d_v"), gradients, strict=True))}
    return results if with_lse else {name: x for name, x in results.items() if name != "lse"}


def relative_errors(got: dict, want: dict) -> dict[str, float]:
    """Largest deviation of each result relative to the largest entry of the exact one."""
    return {name: float(np.abs(np.asarray(x, np.float64) - want[name]).max() / np.abs(want[name]).max())
            for name, x in got.items()}


def wanted(case: Case, with_lse: bool = True) -> dict[str, np.ndarray]:
    """What ``computed`` must give, in float64."""
    *operands, w_lse = inputs(case)
    return exact(*operands, w_lse if with_lse else jnp.zeros_like(w_lse))


def error_ratios(got: dict, reference: dict, want: dict) -> dict[str, float]:
    """Root mean square error of each result over that of another computation, the median over the heads.

    Heads are independent draws; the log-sum-exp is left out.
    """

    def errors(results: dict, name: str) -> np.ndarray:
        return np.sqrt(np.square(np.asarray(results[name], np.float64) - want[name]).mean((0, 1, 3)))

    return {name: float(np.median(errors(got, name) / errors(reference, name))) for name in want if name != "lse"}


def bound(case: Case) -> float:
    """Largest allowed deviation relative to the largest entry of the exact result.

    float32: a logit of size x carries an error of x * 2^-24 from each rounding on its way, which becomes the relative
    error of its weight; sums over a row of keys add their own. bfloat16: a kernel rounds the weights and, backward, the
    logits' gradients to 8 bits before a product, and its result once more.
    """
    if case.dtype == jnp.bfloat16:
        return 2.0**-6
    q, k, *_ = inputs(case)
    largest = float(jnp.abs(jnp.einsum("bqnd,bknd->bnqk", q, k)).max()) * case.size**-0.5
    return 2.0**-24 * (64 + 4 * largest)


def check_core(attention, case: Case, with_lse: bool = True) -> None:
    """Dtypes, shapes, forward, log-sum-exp and the gradients of q, k and v of one variant on one case."""
    got = computed(attention, case, with_lse)
    want = wanted(case, with_lse)
    for name, x in got.items():
        assert x.shape == want[name].shape, name
        assert x.dtype == (jnp.float32 if name == "lse" else case.dtype), name
    errors = relative_errors(got, want)
    assert max(errors.values()) < bound(case), f"{errors} must stay below {bound(case)}"
