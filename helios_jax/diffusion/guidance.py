"""Classifier-free guidance, its CFG-Zero* form and zero init.

Velocities are [B, T, h, w, C] in the model's dtype, which the results keep.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def classifier_free_guidance(conditional: jax.Array, unconditional: jax.Array, scale: float | jax.Array) -> jax.Array:
    """v_u + scale * (v_c - v_u)."""
    return unconditional + _cast(scale, conditional) * (conditional - unconditional)


def cfg_zero_star(conditional: jax.Array, unconditional: jax.Array, scale: float | jax.Array) -> jax.Array:
    """Guidance after the unconditional velocity is fitted to the conditional one (CFG-Zero*).

    The fit is one factor per sample, <v_c, v_u> / (|v_u|^2 + 1e-8), in float32 over all elements of the sample.
    """
    factor = zero_star_factor(conditional, unconditional).astype(conditional.dtype)
    return classifier_free_guidance(conditional, factor * unconditional, scale)


def zero_star_factor(conditional: jax.Array, unconditional: jax.Array) -> jax.Array:
    """The factor of CFG-Zero*, float32 [B, 1, 1, 1, 1] (called alpha in the original, not a stage's alpha)."""
    c, u = conditional.astype(jnp.float32), unconditional.astype(jnp.float32)
    axes = tuple(range(1, c.ndim))
    return (c * u).sum(axes, keepdims=True) / ((u * u).sum(axes, keepdims=True) + 1e-8)


def is_zero_init_step(stage: int, step: int, zero_steps: int) -> bool:
    """Whether zero init replaces the velocity of this step by 0.

    Only in stage 0 and for step <= zero_steps, so the usual ``zero_steps=1`` means two steps. The original applies
    it only with CFG-Zero* and a guidance scale above 1. The networks need not run for such a step.
    """
    return stage == 0 and step <= zero_steps


def _cast(scale: float | jax.Array, like: jax.Array) -> jax.Array:
    return jnp.asarray(scale, like.dtype)
