"""Training of a small UMT5 encoder on captions of the procedural clips, as an objective of the general loop.

The encoder has to make the four attributes of a caption (colour, shape, direction, background) easy to read for
cross-attention. So one linear map, thrown away afterwards, must read all four from every single row, and from the mean
of the rows; the loss is the cross-entropy of both. The last RMS norm bounds the scale of the rows.

Half of the captions are those of the clips, the other half is freer English (:mod:`helios_jax.data.phrases`). Only
combinations of the training split occur; the evaluation reads the held-out combinations.

The tokeniser is made first, from the same captions, and exported beside the encoder.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from helios_jax.config import TextEncoderConfig
from helios_jax.convert.export import atomic_folder, config_json, write_safetensors_component
from helios_jax.convert.folder import write_json
from helios_jax.convert.sources import TreeSource
from helios_jax.data import phrases, shapes
from helios_jax.models.umt5 import UMT5Encoder
from helios_jax.text import Tokenizer, pad_ids, prompt_clean
from helios_jax.training.config import RunConfig, require
from helios_jax.training.objective import Objective
from helios_jax.training.tokenizer import save_tokenizer, train_tokenizer

PyTree = Any
Array = jax.Array

CLASSES = tuple(len(names) for names in shapes.ATTRIBUTE_VALUES.values())
_CAPTIONS_PER_SEED = 2**31
# Streams of captions that must not overlap with those of the training.
_TOKENIZER_STREAM, _EVALUATION_STREAM = 1, 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the objective.

    Attributes:
      encoder: sizes of the network; ``vocab_size`` is also the size of the tokeniser.
      max_tokens: length of the training sequences; longer captions are cut.
      free_share: of the captions that :mod:`helios_jax.data.phrases` writes.
      noise_share: of the captions that get words of random letters.
      row_weight: weight of the cross-entropy of single rows; that of the mean row has 1.
      tokenizer_captions: captions from which the tokeniser is made.
      eval_captions: held-out captions of one evaluation, of each kind.
      export_dtype: of the exported weights.
    """

    encoder: TextEncoderConfig = TextEncoderConfig(vocab_size=1024, d_model=64, d_kv=16, d_ff=128, num_layers=2,
                                                   num_heads=4)
    max_tokens: int = 48
    free_share: float = 0.5
    noise_share: float = 0.15
    row_weight: float = 1.0
    tokenizer_captions: int = 20000
    eval_captions: int = 1000
    export_dtype: str = "bfloat16"

    def __post_init__(self):
        for field in ("max_tokens", "tokenizer_captions", "eval_captions"):
            require(getattr(self, field) > 0, f"objective.{field}: must be positive, got {getattr(self, field)}")
        for field in ("free_share", "noise_share"):
            require(0 <= getattr(self, field) <= 1, f"objective.{field}: in [0, 1], got {getattr(self, field)}")
        require(self.row_weight >= 0, f"objective.row_weight: must be 0 or more, got {self.row_weight}")
        require(self.export_dtype in ("float32", "float16", "bfloat16"),
                f"objective.export_dtype: 'float32', 'float16' or 'bfloat16', got {self.export_dtype!r}")


# --- Captions --------------------------------------------------------------------------------------------------------


def labels(attributes: shapes.Attributes) -> np.ndarray:
    """Index of each attribute's value, int32 [4], in the order of ``shapes.ATTRIBUTE_VALUES``."""
    values = dataclasses.asdict(attributes)
    return np.array([names.index(values[field]) for field, names in shapes.ATTRIBUTE_VALUES.items()], np.int32)


def sample_caption(index: int, seed: int, stream: int, split: str, free_share: float,
                   noise_share: float) -> tuple[str, np.ndarray]:
    """Caption number ``index`` of a stream and its labels, a function of the arguments alone."""
    rng = np.random.RandomState([seed, stream, index])
    combinations = shapes.train_combinations() if split == "train" else shapes.held_out_combinations()
    attributes = combinations[rng.randint(len(combinations))]
    write = phrases.free_caption if rng.random_sample() < free_share else shapes.caption
    text = write(attributes, rng)
    if rng.random_sample() < noise_share:
        text = phrases.with_noise_words(text, rng)
    return text, labels(attributes)


def make_tokenizer(config: Config, seed: int = 0) -> tokenizers.Tokenizer:
    """The tokeniser for the captions of both kinds, without noise words."""
    captions = (sample_caption(i, seed, _TOKENIZER_STREAM, "train", config.free_share, 0.0)[0]
                for i in range(config.tokenizer_captions))
    return train_tokenizer(captions, config.encoder.vocab_size)


def caption_dataset(config: Config, tokenizer: Tokenizer, batch_size: int, seed: int) -> grain.IterDataset:
    """Training captions; none comes twice.

    Yields: ``{"ids": int32 [B, S], "mask": bool [B, S], "labels": int32 [B, 4]}``.
    """
    def tokenized(index: int) -> dict[str, np.ndarray]:
        text, wanted = sample_caption(index, seed, 0, "train", config.free_share, config.noise_share)
        ids, mask = pad_ids(tokenizer.encode([prompt_clean(text)], config.max_tokens), config.max_tokens)
        return {"ids": ids[0], "mask": mask[0], "labels": wanted}

    return (grain.MapDataset.range(_CAPTIONS_PER_SEED).map(tokenized).batch(batch_size, drop_remainder=True)
            .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=512)))


# --- Loss ------------------------------------------------------------------------------------------------------------


def read_rows(params: PyTree, config: Config, ids: Array, mask: Array) -> tuple[Array, Array]:
    """Logits of the reader: of every row [B, S, sum(CLASSES)] and of the mean of the real rows [B, sum(CLASSES)]."""
    rows = UMT5Encoder(config.encoder, unroll=config.encoder.num_layers).apply({"params": params["encoder"]}, ids, mask)
    logits = rows @ params["reader"]["kernel"] + params["reader"]["bias"]  # [B,S,D] -> [B,S,K]
    weight = mask / mask.sum(1, keepdims=True)  # [B,S]
    return logits, jnp.einsum("BSK,BS->BK", logits, weight)


def _split(logits: Array) -> list[Array]:
    """[..., sum(CLASSES)] -> one [..., n] per attribute."""
    return jnp.split(logits, np.cumsum(CLASSES)[:-1].tolist(), axis=-1)


def cross_entropy(logits: Array, wanted: Array) -> Array:
    """Sum over the attributes; logits [..., sum(CLASSES)], wanted int32 [..., 4] -> [...]."""
    parts = [jnp.take_along_axis(jax.nn.log_softmax(part), wanted[..., i, None], axis=-1)[..., 0]
             for i, part in enumerate(_split(logits))]
    return -sum(parts)


def correct(logits: Array, wanted: Array) -> Array:
    """Which attributes are read rightly, bool [..., 4]."""
    return jnp.stack([part.argmax(-1) for part in _split(logits)], axis=-1) == wanted


def accuracy(params: PyTree, config: Config, tokenizer: Tokenizer, captions: Sequence[str], wanted: np.ndarray,
             batch_size: int = 250) -> dict[str, float]:
    """Shares of captions (and of their single rows) from which the reader gets the attributes right.

    Args:
      captions: N texts.
      wanted: their labels, int32 [N, 4].
    Returns: one share per attribute and ``all`` from the mean row; ``rows`` is the share of rows with all four right.
    """
    run = jax.jit(lambda ids, mask: read_rows(params, config, ids, mask))
    mean_right, row_right = [], []
    ids, mask = pad_ids(tokenizer.encode([prompt_clean(c) for c in captions], 2 * config.max_tokens),
                        2 * config.max_tokens)
    for first in range(0, len(captions), batch_size):
        part = slice(first, first + batch_size)
        of_rows, of_mean = run(ids[part], mask[part])
        mean_right.append(np.asarray(correct(of_mean, wanted[part])))
        row_right.append(np.asarray(correct(of_rows, wanted[part][:, None])).all(-1)[mask[part]])
    right = np.concatenate(mean_right)
    return {**{name: float(right[:, i].mean()) for i, name in enumerate(shapes.ATTRIBUTE_VALUES)},
            "all": float(right.all(-1).mean()), "rows": float(np.concatenate(row_right).mean())}


# --- Export ----------------------------------------------------------------------------------------------------------


def export(params: PyTree, config: Config, tokenizer: tokenizers.Tokenizer, folder: str | Path) -> None:
    """Writes ``text_encoder`` and ``tokenizer`` below ``folder``, as transformers reads them; the reader is dropped."""
    folder = Path(folder)
    if (folder / "text_encoder" / "config.json").is_file():  # an earlier export of this run
        shutil.rmtree(folder)
    dtype = jnp.dtype(config.export_dtype)
    encoder = jax.tree.map(lambda p: np.asarray(p).astype(dtype), params["encoder"])
    with atomic_folder(folder) as building:
        write_json(building / "text_encoder" / "config.json",
                   {**config_json("text_encoder", config.encoder), "torch_dtype": config.export_dtype})
        write_safetensors_component(building / "text_encoder", TreeSource("text_encoder", config.encoder, encoder,
                                                                          None))
        save_tokenizer(tokenizer, building / "tokenizer")


# --- The objective ---------------------------------------------------------------------------------------------------


def build(run: RunConfig) -> Objective:
    """The objective of a run, see :class:`~helios_jax.training.objective.Objective`."""
    config: Config = run.objective
    backend = make_tokenizer(config, run.seed)
    tokenizer = Tokenizer(backend)
    encoder = UMT5Encoder(config.encoder)

    def init_params(key: Array) -> PyTree:
        width, classes = config.encoder.d_model, sum(CLASSES)
        return {"encoder": encoder.init_params(key),
                "reader": {"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}}

    def loss(params: PyTree, frozen: PyTree, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        del frozen, key
        of_rows, of_mean = read_rows(params, config, batch["ids"], batch["mask"])
        weight = batch["mask"] / batch["mask"].sum()
        single = (cross_entropy(of_rows, jnp.broadcast_to(batch["labels"][:, None], (*batch["ids"].shape, 4)))
                  * weight).sum()
        pooled = cross_entropy(of_mean, batch["labels"]).mean()
        right = correct(of_mean, batch["labels"]).all(-1).mean()
        return pooled + config.row_weight * single, {"pooled": pooled, "single": single, "right": right}

    def evaluate(params: PyTree, step: int) -> dict[str, float]:
        del step
        rounded = {**params, "encoder": jax.tree.map(
            lambda p: jnp.asarray(p, config.export_dtype).astype(jnp.float32), params["encoder"])}
        values = {}
        for kind, free, noise in (("clip", 0.0, 0.0), ("free", 1.0, 0.0), ("noise", 1.0, 1.0)):
            samples = [sample_caption(i, run.seed, _EVALUATION_STREAM, "held_out", free, noise)
                       for i in range(config.eval_captions)]
            captions, wanted = zip(*samples)
            found = accuracy(rounded, config, tokenizer, captions, np.stack(wanted))
            values |= {f"{kind}/{name}": value for name, value in found.items()}
        return values

    return Objective(init_params, loss, caption_dataset(config, tokenizer, run.batch_size, run.seed),
                     evaluate=evaluate,
                     export=lambda params, folder: export(params, config, backend, folder))
