"""What an objective gives to the training loop.

A module that defines an objective has two names: ``Config``, a frozen dataclass with the objective's settings, and
``build(run: RunConfig) -> Objective``. It is chosen by ``config.objective.name``, either from :data:`OBJECTIVES` or as
the import path of any module, so that an experiment needs no change of this library.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from helios_jax.errors import UserError
from helios_jax.training.work import Work

if TYPE_CHECKING:
    from helios_jax.training.config import OptimizerConfig

PyTree = Any

OBJECTIVES = {
    "autoencoder": "helios_jax.training.autoencoder",
    "stage1": "helios_jax.training.stage1",
    "stage2": "helios_jax.training.stage2",
    "stage3_dmd": "helios_jax.training.stage3_dmd",
    "stage3_ode": "helios_jax.training.stage3_ode",
    "text_encoder": "helios_jax.training.text_encoder",
}


class BaseParams:
    """Parameters that nobody trains and that are too large to be made before they are needed (a LoRA run's base).

    Args:
      abstract: the tree of ``jax.ShapeDtypeStruct``.
      load: ``load(sharding) -> tree of jax.Array``; ``sharding`` as in :func:`helios_jax.convert.load.load_component`.
    """

    def __init__(self, abstract: PyTree, load: Callable[[Any], PyTree]):
        self.abstract, self._load, self._loaded = abstract, load, None

    def load(self, sharding: Any = None) -> PyTree:
        """The parameters; read at the first call, the same arrays afterwards."""
        if self._loaded is None:
            self._loaded = self._load(sharding)
        return self._loaded


class Turn(NamedTuple):
    """What all samples of a player's turn share: the step's number, int32 [], and a random key."""

    step: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Player:
    """One of several that train, each its own parameters with its own loss and optimizer.

    Attributes:
      name: in front of its metrics, and of its part of the optimizer's state.
      parts: keys of the parameters that it trains; no other player has them.
      loss: ``loss(params, frozen, batch, keys, turn) -> (loss, metrics)``: as :attr:`Objective.loss`, with all players'
        parameters (the gradient is taken in its own parts), one key per sample, and a :class:`Turn`.
      optimizer: settings; clipping, schedule and learning rate are its own. The schedule counts turns.
      every: it plays in the steps 0, every, 2 every, ...; in others its loss is not computed.
      averaged: whether the moving average follows its parts. It does so once per turn.
      starts: parts that have no gradient before a step, with that step; their optimizer rests until then.
    """

    name: str
    parts: tuple[str, ...]
    loss: Callable[[PyTree, PyTree, dict[str, jax.Array], jax.Array, Turn], tuple[jax.Array, dict[str, jax.Array]]]
    optimizer: OptimizerConfig
    every: int = 1
    averaged: bool = False
    starts: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Objective:
    """One training objective.

    Attributes:
      init_params: ``init_params(key) -> params``: traceable by JAX (the loop jits it, and later shards its outputs), a
        nested dict of unboxed float32 arrays.
      loss: ``loss(params, frozen, batch, key) -> (loss, metrics)``: float32 scalar, the mean over the batch, and a
        flat dict of float32 scalars, pure and traceable. ``key`` is unique to (seed, step); draw per sample from it.
        None where there are players.
      dataset: a ``grain.IterDataset`` (or anything whose iterator has ``get_state`` and ``set_state``) that yields
        dicts of numpy arrays with the batch as leading axis, without end. With several processes each yields only its
        own rows of the batch; :func:`helios_jax.data.pipeline.batches` does that. The iterator's state must be the
        same in every process, and for every number of processes.
      frozen: arrays that the loss needs but nobody trains (a frozen model, tables of embeddings). They are arguments
        of the compiled step, never constants in it, and are not saved.
      base: further frozen parameters, loaded when the run begins; the loss finds them in ``frozen["base"]``.
      trainable: ``trainable(params) -> tree of bool`` of the same structure; ``None`` trains everything. Parameters
        outside it have no optimizer state and never change.
      load_params: ``load_params(abstract_params) -> params``: start values from elsewhere (a converted checkpoint, an
        earlier stage) instead of ``init_params``; called only when the run starts afresh. The leaves' ``.sharding``
        says where each parameter shall lie. The loop gives the arrays away: nobody else may hold them.
      per_sample_keys: the loss also takes one key per sample in place of ``key`` (see :func:`sample_keys`), so that a
        batch computed in parts draws the same numbers as a whole one.
      sample: ``sample(params, step) -> {name: uint8 [F, H, W, 3]}``: videos to look at, from the EMA parameters if
        there are any.
      fps: frames per second of these videos.
      players: several that take turns in every step, in this order, each seeing what those before it changed; instead
        of ``loss``. The params are then a dict with the parts of all. ``sample``, ``evaluate`` and ``export`` receive
        the averaged parts, or all without an average.
      evaluate: ``evaluate(params, step) -> {name: float}``: validation numbers, logged with the samples.
      export: ``export(params, folder) -> None``: writes the final (EMA) parameters in the published layout.
      work: ``work(batch) -> Work``: tokens and operations of a step on a batch, of which only the shapes are read.
      on_mesh: every process calls ``sample``, ``evaluate`` and ``export``, with the parameters where they lie on the
        mesh; the first one's results count, and only it may write. Otherwise the first process alone calls them, with
        whole copies.
    """

    init_params: Callable[[jax.Array], PyTree]
    loss: Callable[[PyTree, PyTree, dict[str, jax.Array], jax.Array], tuple[jax.Array, dict[str, jax.Array]]] | None
    dataset: Any
    frozen: PyTree = dataclasses.field(default_factory=dict)
    base: BaseParams | None = None
    per_sample_keys: bool = False
    trainable: Callable[[PyTree], PyTree] | None = None
    load_params: Callable[[PyTree], PyTree] | None = None
    sample: Callable[[PyTree, int], dict[str, np.ndarray]] | None = None
    fps: int = 24
    evaluate: Callable[[PyTree, int], dict[str, float]] | None = None
    export: Callable[[PyTree, str], None] | None = None
    work: Callable[[dict[str, jax.Array]], Work] | None = None
    on_mesh: bool = False
    players: tuple[Player, ...] = ()


def sample_keys(key: jax.Array, batch_size: int) -> jax.Array:
    """One random key per sample [B]: those given, or as many made of a single one."""
    return key if key.ndim else jax.random.split(key, batch_size)


def objective_module(name: str) -> ModuleType:
    """The module of an objective by its name or import path.

    Raises:
      UserError: no such objective, or the module lacks ``Config`` or ``build``.
    """
    path = OBJECTIVES.get(name, name)
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        # A missing dependency inside an existing objective is a different problem and keeps its traceback.
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise
        raise UserError(f"config.objective.name: one of {', '.join(OBJECTIVES)} or the import path of a module, "
                        f"got {name!r}") from None
    except (TypeError, ValueError):  # an empty name, or one that begins with a dot
        raise UserError(f"config.objective.name: one of {', '.join(OBJECTIVES)}, got {name!r}") from None
    for attribute in ("Config", "build"):
        if not hasattr(module, attribute):
            raise UserError(f"config.objective.name: the module {path} has no {attribute!r}")
    return module
