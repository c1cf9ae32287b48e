"""Optimizers and learning-rate schedules.

AdamW is the original's optimizer. Muon orthogonalises the momentum of every weight matrix and is often twice as
quick from scratch; what is no hidden matrix (norms, biases, tables, embeddings, the first and the last layer) stays
with AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from helios_jax.training.config import OptimizerConfig

PyTree = Any

# Input and output layers, where orthogonal updates do harm: their rows are frequencies or pixels, not features.
_NOT_FOR_MUON = ("patch_", "proj_out", "conv_in", "conv_out", "shared", "lora")
# Name of the leaf in a decayed matrix: Linear and convolution kernels, LoRA factors, the embedding table.
_MATRIX_LEAVES = ("kernel", "a", "b")


def _names(path: tuple) -> list[str]:
    return [str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path]


def schedule(config: OptimizerConfig, num_steps: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate of step n = 0, 1, ...: linear warm-up over ``warmup_steps``, then constant or cosine.

    The warm-up is lr (n + 1) / (W + 1), so that no update is wasted on a rate of zero (the original's
    ``constant_with_warmup`` makes its first update with 0).
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    else:
        main = optax.cosine_decay_schedule(peak, max(num_steps - warmup, 1), alpha=config.final_fraction)
    if warmup == 0:
        return main
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([ramp, main], [warmup])


def muon_dimension_numbers(params: PyTree) -> PyTree:
    """Which axes of each parameter form the matrix that Muon orthogonalises; ``None`` where AdamW is used.

    A Linear kernel is [in, out]; a stack of them [L, in, out] is L separate matrices (the layer axis is named in
    neither list and so becomes a batch axis); a convolution kernel [k..., in, out] is one matrix [k... in, out].
    """

    def numbers(path: tuple, leaf: jax.Array) -> MuonDimensionNumbers | None:
        names = _names(path)
        if names[-1] != "kernel" or any(name.startswith(_NOT_FOR_MUON) for name in names):
            return None
        if leaf.ndim in (2, 3):
            return MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)
        if leaf.ndim in (4, 5):
            return MuonDimensionNumbers(reduction_axis=tuple(range(leaf.ndim - 1)), output_axis=leaf.ndim - 1)
        return None

    return jax.tree_util.tree_map_with_path(numbers, params)


def _muon_labels(params: PyTree) -> PyTree:
    numbers = muon_dimension_numbers(params)
    return jax.tree.map(lambda _, n: "other" if n is None else "matrix", params, numbers)


def decay_mask(params: PyTree, which: str) -> PyTree:
    """True where weight decay applies: everywhere ('all') or on matrices, not on norms, biases and tables."""
    if which == "all":
        return jax.tree.map(lambda _: True, params)

    def is_matrix(path: tuple, leaf: jax.Array) -> bool:
        names = _names(path)
        return leaf.ndim >= 2 and (names[-1] in _MATRIX_LEAVES or "shared" in names)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(config: OptimizerConfig, num_steps: int, trainable: PyTree | None = None,
                   starts: Mapping[str, int] | None = None) -> optax.GradientTransformation:
    """The whole update rule: clipping by global norm, then AdamW or Muon with the schedule.

    Args:
      config: the optimizer's settings.
      num_steps: length of the run, where the cosine ends.
      trainable: tree of bool like the parameters; parameters with False get no state and no update, and do not count
        in the global norm. ``None``: all are trained.
      starts: the first update of some of the parameters' outermost groups. Until then they have no gradient: Adam's
        count of their updates must not run ahead, or its correction of the second moment's start is spent on zeros.
    """
    rate = schedule(config, num_steps)

    def mask(tree: PyTree) -> PyTree:
        return decay_mask(tree, config.weight_decay_on)

    rule = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=mask)
    if config.name == "muon":
        # consistent_rms = 0.2 gives Muon's updates the size of AdamW's, so that one learning rate and one weight
        # decay serve both groups (arXiv 2502.16982).
        orthogonal = muon(rate, ns_steps=config.muon_newton_schulz_steps, beta=config.muon_momentum, eps=config.eps,
                          weight_decay=config.weight_decay, weight_decay_mask=mask,
                          muon_weight_dimension_numbers=muon_dimension_numbers, consistent_rms=0.2)
        rule = optax.partition({"matrix": orthogonal, "other": rule}, _muon_labels)
    if starts:
        waiting = {name: optax.conditionally_mask(rule, lambda update, start=start: update >= start)
                   for name, start in starts.items()}
        rule = optax.partition({"": rule, **waiting}, lambda params: {
            name: jax.tree.map(lambda _: name if name in waiting else "", group)  # noqa: B023
            for name, group in params.items()})
    if config.clip_norm > 0:
        rule = optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)
    if trainable is None:
        return rule
    labels = jax.tree.map(lambda train: "trained" if train else "fixed", trainable)
    return optax.partition({"trained": rule, "fixed": optax.set_to_zero()}, labels)
