"""A small regression problem that tests drive through the real loop: y = x A with noisy inputs."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import grain
import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.data.pipeline import batches
from helios_jax.training.config import RunConfig, require
from helios_jax.training.objective import Objective


@dataclasses.dataclass(frozen=True)
class Config:
    HARMLESS_ON_RESUME: ClassVar[tuple[str, ...]] = ("step_sleep",)

    width: int = 8
    noise: float = 0.1
    poison_from: int = -1  # items from this index on are not-a-number
    step_sleep: float = 0.0

    def __post_init__(self):
        require(self.width > 0, f"objective.width: must be positive, got {self.width}")


class _Source:
    def __init__(self, config: Config):
        self.config = config

    def __len__(self) -> int:
        return 37  # not a multiple of the batch, so that epochs do not align with steps

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(index)
        x = rng.standard_normal(self.config.width).astype(np.float32)
        if 0 <= self.config.poison_from <= index:
            x[:] = np.nan
        return {"x": x}


def build(run: RunConfig) -> Objective:
    config: Config = run.objective

    def jitter(item: dict, rng: np.random.Generator) -> dict:
        import time

        time.sleep(config.step_sleep / run.batch_size)
        return {"x": item["x"] + 0.01 * rng.standard_normal(config.width).astype(np.float32)}

    items = grain.MapDataset.source(_Source(config)).seed(run.seed).shuffle().repeat().random_map(jitter)
    dataset = batches(items, run.batch_size, threads=2)
    truth = np.random.default_rng(7).standard_normal((config.width, config.width)).astype(np.float32)

    def init_params(key: jax.Array) -> dict:
        return {"layer": {"kernel": 0.1 * jax.random.normal(key, (config.width, config.width)),
                          "bias": jnp.zeros(config.width)}, "fixed": {"kernel": jnp.ones((config.width, 2))}}

    def loss(params: dict, frozen: dict, batch: dict, key: jax.Array):
        x = batch["x"] + config.noise * jax.random.normal(key, batch["x"].shape)
        error = x @ params["layer"]["kernel"] + params["layer"]["bias"] - batch["x"] @ frozen["truth"]
        return jnp.mean(error**2), {"first_error": error[0, 0]}

    def trainable(params: dict) -> dict:
        return {"layer": jax.tree.map(lambda _: True, params["layer"]), "fixed": {"kernel": False}}

    def sample(params: dict, step: int) -> dict[str, np.ndarray]:
        shade = np.clip(np.asarray(params["layer"]["kernel"]) * 50 + 128, 0, 255).astype(np.uint8)
        return {"kernel": np.repeat(np.broadcast_to(shade[None, :, :, None], (3, *shade.shape, 3)), 2, axis=1)}

    return Objective(init_params, loss, dataset, frozen={"truth": truth}, trainable=trainable, sample=sample,
                     evaluate=lambda params, step: {"kernel_norm": float(jnp.linalg.norm(params["layer"]["kernel"]))})
