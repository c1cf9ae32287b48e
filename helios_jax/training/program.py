"""What one training run computes: its state, where the state lies, and the compiled step.

Everything here is traced or abstract until :meth:`Program.initial_state` or :meth:`Program.load_frozen` is called, so
the same program is trained, restored from a checkpoint, and compiled for machines that are not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from helios_jax import sharding
from helios_jax.sharding import Partition
from helios_jax.training import ema as ema_lib
from helios_jax.training.config import RunConfig
from helios_jax.training.objective import Objective, Player, Turn, objective_module, sample_keys
from helios_jax.training.optim import make_optimizer, schedule

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, number of steps done.
      params: trained parameters (and fixed ones, where the objective's ``trainable`` says so), of all players.
      ema: their moving average (of several players only the averaged parts), or None.
      optimizer: the optax state; of several players a dict by name.
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


def initial_state(params: PyTree, optimizer: optax.GradientTransformation | Optimizers, use_ema: bool,
                  players: Sequence[Player] = ()) -> TrainState:
    """Step 0; traceable. The average starts as a copy (donated buffers must not be shared)."""
    averaged = params
    if players:
        averaged = {name: params[name] for player in players if player.averaged for name in player.parts}
    average = jax.tree.map(lambda p: jnp.array(p, copy=True), averaged) if use_ema else None
    return TrainState(jnp.int32(0), params, average, optimizer.init(params), jnp.int32(0))


# -- one step ---------------------------------------------------------------------------------------------------------


def players_of(run: RunConfig, objective: Objective) -> tuple[Player, ...]:
    """The objective's players; a single loss is a player without a name that trains everything."""
    if objective.players:
        return objective.players

    def loss(params: PyTree, frozen: PyTree, batch: dict[str, jax.Array], key: jax.Array, turn: Turn):
        del turn
        return objective.loss(params, frozen, batch, key)

    return (Player("", (), loss, run.optimizer, averaged=True),)


def _share(player: Player, tree: PyTree) -> PyTree:
    """What belongs to a player of a tree laid out like the parameters."""
    return {name: tree[name] for name in player.parts} if player.parts else tree


def _with_share(player: Player, tree: PyTree, share: PyTree) -> PyTree:
    return {**tree, **share} if player.parts else share


class Optimizers:
    """The update rules of all players. Their states are one dict by name; that of a nameless player stands alone."""

    def __init__(self, run: RunConfig, players: Sequence[Player], trainable: PyTree | None):
        self.players = players
        self.rules = [make_optimizer(player.optimizer, _turns(run.num_steps, player),
                                     None if trainable is None else _share(player, trainable),
                                     {part: _turns(step, player) for part, step in player.starts.items()})
                      for player in players]

    def init(self, params: PyTree) -> PyTree:
        states = {player.name: rule.init(_share(player, params))
                  for player, rule in zip(self.players, self.rules, strict=True)}
        return states.get("", states)


def _turns(steps: int, player: Player) -> int:
    """How many turns a player has in so many steps, or before a step of that number."""
    return -(-steps // player.every)


def _gradient_in_parts(run: RunConfig, per_sample: bool, loss: Callable, params: PyTree, batch: dict[str, jax.Array],
                       key: jax.Array):
    """Loss, metrics and gradient as means over ``run.accumulate`` parts of the batch, computed one after the other.

    Part i takes the rows i, i + n, i + 2n, ...: then every device finds its share of each part among its own rows.
    ``per_sample``: one key per sample, else one per part.
    """
    parts = run.accumulate
    keys = sample_keys(key, run.batch_size) if per_sample else jax.random.split(key, parts)

    def divide(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)  # [B, ...] -> [n, B/n, ...]
        return x

    def constrained(x: jax.Array) -> jax.Array:
        x = divide(x)
        return sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2))

    def value_and_grad(part: dict[str, jax.Array], key: jax.Array):
        return jax.value_and_grad(loss, has_aux=True)(params, part, key)

    def add(total: PyTree, part: tuple) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(*part)), None

    stacked = jax.tree.map(constrained, batch), divide(keys) if per_sample else keys
    first = jax.tree.map(lambda x: x[0], stacked)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(value_and_grad, *first))
    total, _ = jax.lax.scan(add, zeros, stacked)
    return jax.tree.map(lambda x: x / parts, total)


class Seat(NamedTuple):
    """What a player's turn changes: its parameters, its optimizer's state, and their average or None."""

    params: PyTree
    optimizer: PyTree
    average: PyTree


def _make_turn(run: RunConfig, objective: Objective, player: Player, rule: optax.GradientTransformation,
               trainable: PyTree | None, param_shardings: PyTree | None):
    """``play(seat, params, frozen, batch, key, turn) -> (seat, metrics, finite)``: one player's update."""
    rate = schedule(player.optimizer, _turns(run.num_steps, player))
    per_sample = objective.per_sample_keys or bool(objective.players)

    def play(seat: Seat, params: PyTree, frozen: PyTree, batch: dict[str, jax.Array], key: jax.Array, turn: Turn):
        def own_loss(own: PyTree, batch: dict[str, jax.Array], key: jax.Array):
            return player.loss(_with_share(player, params, own), frozen, batch, key, turn)

        if run.accumulate == 1:
            (loss, metrics), grads = jax.value_and_grad(own_loss, has_aux=True)(seat.params, batch, key)
        else:
            (loss, metrics), grads = _gradient_in_parts(run, per_sample, own_loss, seat.params, batch, key)
        if param_shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, _share(player, param_shardings))
        if trainable is not None:  # a fixed parameter's gradient must not count in the norm
            grads = jax.tree.map(lambda g, train: g if train else jnp.zeros_like(g), grads, _share(player, trainable))
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, optimizer_state = rule.update(grads, seat.optimizer, seat.params)
        updated = optax.apply_updates(seat.params, updates)
        count = turn.step // player.every if player.every > 1 else turn.step
        average = None if seat.average is None else ema_lib.update(
            seat.average, updated, count, run.ema_decay, _turns(run.ema_start_step, player))
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), Seat(updated, optimizer_state, average), seat)
        metrics = {"loss": loss, **metrics, "grad_norm": grad_norm, "learning_rate": jnp.float32(rate(count)),
                   "skipped": 1.0 - finite.astype(jnp.float32)}
        return new, metrics, finite

    return play


def _maybe(play: Callable, plays: jax.Array, seat: Seat, *inputs: Any):
    """The player's turn where ``plays``, else its seat as it is, with metrics of 0."""
    abstract = jax.eval_shape(play, seat, *inputs)[1]

    def pause(seat: Seat, *inputs: Any):
        del inputs
        return seat, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract), jnp.bool_(True)

    return jax.lax.cond(plays, play, pause, seat, *inputs)


def make_step(run: RunConfig, objective: Objective, optimizer: Optimizers, trainable: PyTree | None = None,
              param_shardings: PyTree | None = None, only: str | None = None
              ) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The pure function of one step: ``step(state, frozen, batch) -> (state, metrics)``.

    A turn whose loss or gradient is not finite changes nothing but the counters.

    Args:
      run: the configuration.
      objective: what is minimised.
      optimizer: of all its players.
      trainable: tree of bool like the parameters, or None for all.
      param_shardings: where parameters lie, and so their gradients; None on one device.
      only: name of the one player that shall have its turn, to look at it alone; None lets all play.
    """
    turns = [(player, _make_turn(run, objective, player, rule, trainable, param_shardings))
             for player, rule in zip(players_of(run, objective), optimizer.rules, strict=True)
             if only in (None, player.name)]

    def step(state: TrainState, frozen: PyTree, batch: dict[str, jax.Array]):
        key = jax.random.fold_in(jax.random.key(run.seed), state.step)
        params, average, optimizers = state.params, state.ema, state.optimizer
        metrics, all_finite, all_play = {}, jnp.bool_(True), jnp.bool_(True)
        for index, (player, play) in enumerate(turns):
            own_key, turn = key, Turn(state.step, key)
            if player.name:
                own_key = sample_keys(jax.random.fold_in(key, 2 * index), run.batch_size)
                turn = Turn(state.step, jax.random.fold_in(key, 2 * index + 1))
            has_average = average is not None and player.averaged
            seat = Seat(_share(player, params), optimizers[player.name] if player.name else optimizers,
                        _share(player, average) if has_average else None)
            inputs = (params, frozen, batch, own_key, turn)
            if player.every == 1:
                seat, values, finite = play(seat, *inputs)
            else:
                plays = state.step % player.every == 0
                seat, values, finite = _maybe(play, plays, seat, *inputs)
                all_play &= plays
            params = _with_share(player, params, seat.params)
            optimizers = {**optimizers, player.name: seat.optimizer} if player.name else seat.optimizer
            average = _with_share(player, average, seat.average) if has_average else average
            metrics |= {metric_name(player, name): value for name, value in values.items()}
            all_finite &= finite
        # A player that fails in its rare turns must not be forgotten in between.
        skipped = jnp.where(all_finite, jnp.where(all_play, 0, state.skipped), state.skipped + 1)
        return TrainState(state.step + 1, params, average, optimizers, skipped), metrics

    return step


def metric_name(player: Player, name: str) -> str:
    """A player's metric among those of all."""
    return f"{player.name}/{name}" if player.name else name


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's computation on a mesh.

    Attributes:
      run: the configuration.
      partition: mesh and rules.
      objective: what is minimised.
      optimizer: the update rules.
      trainable: tree of bool like the parameters, or None for all.
      abstract_state: :class:`TrainState` of ``jax.ShapeDtypeStruct``, which know their place.
      abstract_frozen: the same for the objective's frozen arrays.
    """

    run: RunConfig
    partition: Partition
    objective: Objective
    optimizer: Optimizers
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
          UserError: mesh, batch, heads or heads times samples do not divide; whatever the objective finds wrong.
        """
        partition = Partition.create(run.mesh, devices)
        partition.check_batch(run.batch_size, run.accumulate)
        heads = getattr(getattr(run.objective, "transformer", None), "num_attention_heads", 0)
        partition.attention.check(run.batch_size // run.accumulate, heads)
        with sharding.use(partition):
            objective = objective_module(run.objective_name).build(run)
            abstract_params = jax.eval_shape(objective.init_params, jax.random.key(0))
        trainable = None if objective.trainable is None else objective.trainable(abstract_params)
        optimizer = Optimizers(run, players_of(run, objective), trainable)
        abstract_state = jax.eval_shape(
            lambda params: initial_state(params, optimizer, run.ema_decay > 0, objective.players), abstract_params)
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
            return initial_state(params, self.optimizer, self.run.ema_decay > 0, self.objective.players)

        if self.objective.load_params is None:
            with sharding.use(self.partition):
                params = jax.jit(make_params, out_shardings=places.params)(np.uint32(self.run.seed))
        else:
            params = sharding.place(self.objective.load_params(self.abstract_state.params), places.params)
        return jax.jit(make_state, out_shardings=places, donate_argnums=0)(params)

    def made_metrics(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Those of a step's metrics whose player had its turn in it; ``step`` counts from 0."""
        resting = tuple(f"{player.name}/" for player in self.optimizer.players if step % player.every)
        return {name: value for name, value in metrics.items() if not name.startswith(resting)}

    def load_frozen(self) -> PyTree:
        """The frozen arrays on the mesh."""
        objective, places = self.objective, jax.tree.map(lambda leaf: leaf.sharding, self.abstract_frozen)
        frozen = objective.frozen if objective.base is None else {
            **objective.frozen, "base": objective.base.load(places["base"])}
        return sharding.place(frozen, places)

    def lower(self, batch: PyTree, only: str | None = None) -> jax.stages.Lowered:
        """The step, traced for a batch of global arrays or ``jax.ShapeDtypeStruct``; its state is donated.

        ``only`` is that of :func:`make_step`.
        """
        places = self.state_shardings
        step = make_step(self.run, self.objective, self.optimizer, self.trainable,
                         places.params if self.partition.mesh.size > 1 else None, only)
        with sharding.use(self.partition):
            return jax.jit(step, donate_argnums=0, out_shardings=(places, self.partition.replicated)).lower(
                self.abstract_state, self.abstract_frozen, batch)
