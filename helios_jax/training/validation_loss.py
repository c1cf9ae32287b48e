"""The loss on a fixed set of examples: the same records, sections, noise and decisions in every round.

Unlike the training loss it does not scatter from one round to the next, so that small progress (and overfitting, on
held-out records) shows.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.data.pipeline import LatentFolder, MakeItem
from helios_jax.training.config import require

if TYPE_CHECKING:
    from helios_jax.training.flow import ErrorFunction

PyTree = Any


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """What the validation loss is measured on.

    Attributes:
      data: folder of latent records that are not trained on (``build_latents --split held_out``); empty takes the
        first records of the training data, a fixed slice that is trained on, too.
      items: examples; item i is made of record i, beginning again where there are fewer; 0 switches it off.
      batch_size: examples of one program call; divides ``items``.
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


class ValidationLoss:
    """Measures the loss of an objective on fixed examples.

    Args:
      config: which ones.
      training: the folder of the training data.
      item: makes a training item of a record.
      errors: of the objective.
      levels: pyramid level of every entry.
      frozen: what the errors are given besides the base.

    Raises:
      UserError: the validation data are missing or of another shape than the training data.
    """

    def __init__(self, config: ValidationConfig, training: LatentFolder, item: MakeItem, errors: ErrorFunction,
                 levels: tuple[int, ...], frozen: PyTree):
        folder = type(training).open(config.data) if config.data else training
        for field in ("frames", "height", "width", "channels", "text_dim"):
            require(getattr(folder, field) == getattr(training, field),
                    f"objective.validation.data: {config.data} has {field}={getattr(folder, field)}, the training data "
                    f"have {getattr(training, field)}")
        require(folder.text_rows <= training.text_rows,
                f"objective.validation.data: {config.data} has captions of {folder.text_rows} rows, the training data "
                f"have {training.text_rows} at most")
        self._config, self._item, self._levels, self._frozen = config, item, levels, frozen
        self._source = folder.source()
        self._errors = jax.jit(errors)

    def _example(self, index: int) -> dict[str, np.ndarray]:
        return self._item(self._source[index % len(self._source)], np.random.default_rng([self._config.seed, index]))

    def __call__(self, params: PyTree, base: PyTree = None) -> dict[str, float]:
        """The loss and its parts as training names them, over all items; independent of the batch size."""
        from helios_jax.training.flow import Errors, summarise

        frozen = self._frozen if base is None else {**self._frozen, "base": base}
        key, size, parts = jax.random.key(self._config.seed), self._config.batch_size, []
        for first in range(0, self._config.items, size):
            items = [self._example(index) for index in range(first, first + size)]
            batch = {name: np.stack([item[name] for item in items]) for name in items[0]}
            keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(first, first + size))
            parts.append(jax.device_get(self._errors(params, frozen, batch, keys)))
        loss, metrics = summarise(Errors(*(np.concatenate(column) for column in zip(*parts, strict=True))),
                                  self._levels)
        return {name: float(value) for name, value in {"loss": loss, **metrics}.items()}
