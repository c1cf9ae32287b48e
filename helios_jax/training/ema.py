"""Exponential moving average of the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def decay_at(step: jax.Array, decay: float) -> jax.Array:
    """The decay used at the update of a given step: min(decay, (1 + s) / (10 + s)).

    The warm-up keeps the random start values from weighing on the average: with a constant 0.9995 they would still
    be 8 % of it after 5000 steps.

    Args:
      step: int32 scalar, the number of updates done before this one (s = 0 at the first).
      decay: the value that is reached in the end.
    Returns: float32 scalar.
    """
    s = jnp.asarray(step, jnp.float32)
    return jnp.minimum(jnp.float32(decay), (1.0 + s) / (10.0 + s))


def update(average: PyTree, params: PyTree, step: jax.Array, decay: float) -> PyTree:
    """average <- d average + (1 - d) params with d = ``decay_at(step, decay)``, in float32, leaf by leaf."""
    d = decay_at(step, decay)
    return jax.tree.map(lambda a, p: (a + (1.0 - d) * (p.astype(jnp.float32) - a)).astype(a.dtype), average, params)
