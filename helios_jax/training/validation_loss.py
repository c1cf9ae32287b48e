"""The loss on a fixed set of examples: the same records, sections, noise and decisions in every round.

Unlike the training loss it does not scatter from one round to the next, so that small progress (and overfitting, on
held-out records) shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from helios_jax import sharding
from helios_jax.data.buckets import latent_folders
from helios_jax.data.pipeline import LatentFolder, MakeItem
from helios_jax.training.config import require

if TYPE_CHECKING:
    from helios_jax.training.flow import ErrorFunction, Errors

PyTree = Any


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """What the validation loss is measured on.

    Attributes:
      data: latent records that are not trained on (``build_latents --split held_out``), of the most frequent size of
        the training data; empty takes the first ones of these, a fixed slice that is trained on, too.
      items: examples; item i is made of record i, beginning again where there are fewer; 0 switches it off.
      batch_size: examples of one program call; divides ``items``. On a mesh they are divided over its data and fsdp
        axes where that is possible, so that a multiple of these is quickest.
      seed: of sections, noise and decisions.
    """

    data: str = ""
    items: int = 0
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self):
        require(self.items >= 0, f"objective.validation.items: 0 or more, got {self.items}")
        require(self.seed >= 0, f"objective.validation.seed: 0 or more, got {self.seed}")
        require(self.batch_size > 0 and self.items % self.batch_size == 0,
                f"objective.validation.batch_size: must divide the {self.items} items, got {self.batch_size}")


def _same_size(data: str, training: LatentFolder) -> LatentFolder:
    """The records of the training data's size.

    Raises:
      UserError: there are none, or they are of another model.
    """
    folders = latent_folders(data, type(training)).values()
    folder = next((folder for folder in folders if folder.latents == training.latents), None)
    require(folder is not None, f"objective.validation.data: {data} has latents of "
            f"{', '.join(str(folder.latents) for folder in folders)} (frames, height, width, channels), the training "
            f"data of {training.latents}")
    require(folder.text_dim == training.text_dim, f"objective.validation.data: {data} has text_dim={folder.text_dim}, "
            f"the training data have {training.text_dim}")
    return folder


class ValidationLoss:
    """Measures the loss of an objective on fixed examples, on the mesh that is in use when it is made.

    Args:
      config: which ones.
      training: the most frequent size of the training data.
      text_rows: of the training data's longest caption.
      items: of a folder, what makes a training item of one of its records.
      errors: of the objective.
      levels: pyramid level of every entry.
      frozen: what the errors are given besides the base.

    Raises:
      UserError: the validation data are missing or of another shape than the training data.
    """

    def __init__(self, config: ValidationConfig, training: LatentFolder, text_rows: int,
                 items: Callable[[LatentFolder], MakeItem], errors: ErrorFunction, levels: tuple[int, ...],
                 frozen: PyTree):
        folder = _same_size(config.data, training) if config.data else training
        require(folder.text_rows <= text_rows, f"objective.validation.data: {config.data} has captions of "
                f"{folder.text_rows} rows, the training data have {text_rows} at most")
        self._config, self._item, self._levels, self._frozen = config, items(folder), levels, frozen
        self._source, self._partition = folder.source(), sharding.current()

        def run(params: PyTree, frozen: PyTree, batch: dict[str, jax.Array], indices: jax.Array) -> Errors:
            keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(config.seed), index))(indices)
            return errors(params, frozen, batch, keys)

        self._errors = sharding.jit(self._partition, run)

    def _example(self, index: int) -> dict[str, np.ndarray]:
        return self._item(self._source[index % len(self._source)], np.random.default_rng([self._config.seed, index]))

    def __call__(self, params: PyTree, base: PyTree = None) -> dict[str, float]:
        """The loss and its parts as training names them, over all items; independent of the batch size."""
        from helios_jax.training.flow import Errors, summarise

        frozen = self._frozen if base is None else {**self._frozen, "base": base}
        size, parts = self._config.batch_size, []
        for first in range(0, self._config.items, size):
            items = [self._example(index) for index in range(first, first + size)]
            batch = {name: np.stack([item[name] for item in items]) for name in items[0]}
            if self._partition is not None:
                batch = sharding.place_batch(self._partition, batch, size)
            parts.append(jax.device_get(self._errors(params, frozen, batch, np.arange(first, first + size))))
        loss, metrics = summarise(Errors(*(np.concatenate(column) for column in zip(*parts, strict=True))),
                                  self._levels)
        return {name: float(value) for name, value in {"loss": loss, **metrics}.items()}
