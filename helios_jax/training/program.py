"""What one training run computes: its state, where the state lies, and the compiled step.

Everything here is traced or abstract until :meth:`Program.initial_state` or :meth:`Program.load_frozen` is called, so
the same program is trained, restored from a checkpoint, and compiled for machines that are not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from helios_jax import sharding
from helios_jax.errors import UserError
from helios_jax.sharding import Partition
from helios_jax.training import ema as ema_lib
from helios_jax.training.config import RunConfig
from helios_jax.training.objective import Objective, objective_module, sample_keys
from helios_jax.training.optim import make_optimizer, schedule

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, number of steps done.
      params: trained parameters (and fixed ones, where the objective's ``trainable`` says so).
      ema: their moving average, or None.
      optimizer: the optax state.
      skipped: int32 scalar, consecutive steps without an update because the gradient was not finite.
    """

    step: jax.Array
    params: PyTree
    ema: PyTree
    optimizer: PyTree
    skipped: jax.Array

    def items(self) -> dict[str, PyTree]:
        """The parts as the checkpoint stores them."""
        items = {"params": self.params,
                 "optimizer": {"state": self.optimizer, "step": self.step, "skipped": self.skipped}}
        return items if self.ema is None else {**items, "ema": self.ema}

    @classmethod
    def from_items(cls, items: dict[str, PyTree]) -> TrainState:
        rest = items["optimizer"]
        return cls(rest["step"], items["params"], items.get("ema"), rest["state"], rest["skipped"])

    def best_params(self) -> PyTree:
        """The averaged parameters if there are any: what sampling and exporting use."""
        return self.params if self.ema is None else self.ema


def initial_state(params: PyTree, optimizer: optax.GradientTransformation, use_ema: bool) -> TrainState:
    """Step 0; traceable. The average starts as a copy (donated buffers must not be shared)."""
    average = jax.tree.map(lambda p: jnp.array(p, copy=True), params) if use_ema else None
    return TrainState(jnp.int32(0), params, average, optimizer.init(params), jnp.int32(0))


def _gradient_in_parts(run: RunConfig, objective: Objective, params: PyTree, frozen: PyTree,
                       batch: dict[str, jax.Array], key: jax.Array):
    """Loss, metrics and gradient as means over ``run.accumulate`` parts of the batch, computed one after the other.

    Part i takes the rows i, i + n, i + 2n, ...: then every device finds its share of each part among its own rows.
    """
    parts = run.accumulate
    keys = sample_keys(key, run.batch_size) if objective.per_sample_keys else jax.random.split(key, parts)

    def divide(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)  # [B, ...] -> [n, B/n, ...]
        return x

    def constrained(x: jax.Array) -> jax.Array:
        x = divide(x)
        return sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2))

    def value_and_grad(part: dict[str, jax.Array], key: jax.Array):
        return jax.value_and_grad(objective.loss, has_aux=True)(params, frozen, part, key)

    def add(total: PyTree, part: tuple) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(*part)), None

    stacked = jax.tree.map(constrained, batch), divide(keys) if objective.per_sample_keys else keys
    first = jax.tree.map(lambda x: x[0], stacked)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(value_and_grad, *first))
    total, _ = jax.lax.scan(add, zeros, stacked)
    return jax.tree.map(lambda x: x / parts, total)


def make_step(run: RunConfig, objective: Objective, optimizer: optax.GradientTransformation,
              trainable: PyTree | None = None, param_shardings: PyTree | None = None,
              ) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The pure function of one step: ``step(state, frozen, batch) -> (state, metrics)``.

    A step whose loss or gradient is not finite changes nothing but the counters.

    Args:
      run: the configuration.
      objective: what is minimised.
      optimizer: of :func:`helios_jax.training.optim.make_optimizer`.
      trainable: tree of bool like the parameters, or None for all.
      param_shardings: where parameters lie, and so their gradients; None on one device.
    """
    rate = schedule(run.optimizer, run.num_steps)

    def step(state: TrainState, frozen: PyTree, batch: dict[str, jax.Array]):
        key = jax.random.fold_in(jax.random.key(run.seed), state.step)
        if run.accumulate == 1:
            (loss, metrics), grads = jax.value_and_grad(objective.loss, has_aux=True)(state.params, frozen, batch, key)
        else:
            (loss, metrics), grads = _gradient_in_parts(run, objective, state.params, frozen, batch, key)
        if param_shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, param_shardings)
        if trainable is not None:  # a fixed parameter's gradient must not count in the norm
            grads = jax.tree.map(lambda g, train: g if train else jnp.zeros_like(g), grads, trainable)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = None if state.ema is None else ema_lib.update(state.ema, params, state.step, run.ema_decay,
                                                                run.ema_start_step)

        def keep(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        metrics = {"loss": loss, **metrics, "grad_norm": grad_norm, "learning_rate": jnp.float32(rate(state.step)),
                   "skipped": 1.0 - finite.astype(jnp.float32)}
        state = TrainState(state.step + 1, keep(params, state.params), keep(average, state.ema),
                           keep(optimizer_state, state.optimizer), jnp.where(finite, 0, state.skipped + 1))
        return state, metrics

    return step


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's computation on a mesh.

    Attributes:
      run: the configuration.
      partition: mesh and rules.
      objective: what is minimised.
      optimizer: the update rule.
      trainable: tree of bool like the parameters, or None for all.
      abstract_state: :class:`TrainState` of ``jax.ShapeDtypeStruct``, which know their place.
      abstract_frozen: the same for the objective's frozen arrays.
    """

    run: RunConfig
    partition: Partition
    objective: Objective
    optimizer: optax.GradientTransformation
    trainable: PyTree | None
    abstract_state: TrainState
    abstract_frozen: PyTree

    @classmethod
    def build(cls, run: RunConfig, devices: Sequence[Any] | None = None) -> Program:
        """From a configuration.

        Args:
          run: the configuration.
          devices: of the mesh; all devices by default. Those of a topology description do as well.

        Raises:
          UserError: mesh, batch or heads do not divide; whatever the objective finds wrong.
        """
        partition = Partition.create(run.mesh, devices)
        partition.check_batch(run.batch_size, run.accumulate)
        heads = getattr(getattr(run.objective, "transformer", None), "num_attention_heads", 0)
        if heads % partition.size("attention_heads"):
            raise UserError(f"mesh: {heads} attention heads do not divide by {partition.size('attention_heads')} "
                            f"(mesh.context {partition.mesh.shape['context']} x mesh.tensor "
                            f"{partition.mesh.shape['tensor']})")
        with sharding.use(partition):
            objective = objective_module(run.objective_name).build(run)
            abstract_params = jax.eval_shape(objective.init_params, jax.random.key(0))
        trainable = None if objective.trainable is None else objective.trainable(abstract_params)
        optimizer = make_optimizer(run.optimizer, run.num_steps, trainable)
        abstract_state = jax.eval_shape(lambda params: initial_state(params, optimizer, run.ema_decay > 0),
                                        abstract_params)
        places = sharding.following_shardings(partition, abstract_state, abstract_params,
                                              sharding.param_shardings(partition, abstract_params))
        frozen = objective.frozen if objective.base is None else {**objective.frozen, "base": objective.base.abstract}
        frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(
            leaf.dtype)), frozen)
        return cls(run, partition, objective, optimizer, trainable, sharding.with_shardings(abstract_state, places),
                   sharding.with_shardings(frozen, sharding.param_shardings(partition, frozen)))

    @property
    def state_shardings(self) -> TrainState:
        """Where every part of the state lies."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def initial_state(self) -> TrainState:
        """The state of step 0, every device making or reading its own part."""
        places = self.state_shardings

        def make_params(seed: jax.Array) -> PyTree:
            # A key that no step uses: steps fold in 0, 1, 2, ...
            return self.objective.init_params(jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1)))

        def make_state(params: PyTree) -> TrainState:
            return initial_state(params, self.optimizer, self.run.ema_decay > 0)

        if self.objective.load_params is None:
            with sharding.use(self.partition):
                params = jax.jit(make_params, out_shardings=places.params)(np.uint32(self.run.seed))
        else:
            params = sharding.place(self.objective.load_params(self.abstract_state.params), places.params)
        return jax.jit(make_state, out_shardings=places, donate_argnums=0)(params)

    def load_frozen(self) -> PyTree:
        """The frozen arrays on the mesh."""
        objective, places = self.objective, jax.tree.map(lambda leaf: leaf.sharding, self.abstract_frozen)
        frozen = objective.frozen if objective.base is None else {
            **objective.frozen, "base": objective.base.load(places["base"])}
        return sharding.place(frozen, places)

    def lower(self, batch: PyTree) -> jax.stages.Lowered:
        """The step, traced for a batch of global arrays or ``jax.ShapeDtypeStruct``; its state is donated."""
        places = self.state_shardings
        step = make_step(self.run, self.objective, self.optimizer, self.trainable,
                         places.params if self.partition.mesh.size > 1 else None)
        with sharding.use(self.partition):
            return jax.jit(step, donate_argnums=0, out_shardings=(places, self.partition.replicated)).lower(
                self.abstract_state, self.abstract_frozen, batch)
