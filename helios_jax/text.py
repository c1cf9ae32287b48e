"""From prompts to text embeddings: cleaning, tokenising, encoding, and mixing of embeddings.

The transformer sees every prompt as ``total_rows`` (512) rows: the encoder's output at the real tokens and exact zeros
behind them, unmasked. Only the real rows carry information, so :class:`PromptEmbedding` keeps those (rounded up, so
that few shapes are compiled) and :meth:`PromptEmbedding.padded` restores the full form.

Source: diffusers ``HeliosPipeline._get_t5_prompt_embeds``.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ftfy
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from helios_jax.config import read_json
from helios_jax.errors import UserError
from helios_jax.models.umt5 import UMT5Encoder
from helios_jax.spiece import ends_with, tokenizer_from_spiece

Array = jax.Array

MAX_TOKENS = 512
ROWS_MULTIPLE = 32  # granularity of the lengths for which the encoder is compiled

# Unicode white space. Python's own \s also takes the separators U+001C to U+001F, the original's does not.
_WHITE_SPACE = re.compile(r"[\t-\r\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")


def prompt_clean(text: str) -> str:
    """Repairs mojibake and HTML entities (twice, for doubly escaped ones) and collapses white space.

    Source: ``prompt_clean`` of the diffusers Helios pipelines.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _WHITE_SPACE.sub(" ", text.strip()).strip()


# --- Tokeniser -------------------------------------------------------------------------------------------------


class TokenEncoder(Protocol):
    """What :func:`encode_prompts` needs of a tokeniser; :class:`Tokenizer` is the one for published checkpoints."""

    vocab_size: int
    eos_id: int

    def encode(self, texts: Sequence[str], max_tokens: int = MAX_TOKENS) -> list[list[int]]: ...


class Tokenizer:
    """The T5 tokeniser of a checkpoint's ``tokenizer`` folder, without PyTorch or transformers.

    Its ids are those of the folder's ``tokenizer.json``; unknown characters get the id that this file states (the
    T5 class of transformers 5 overrides it with 2, transformers 4 does not).
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        """Takes over a ``tokenizers.Tokenizer``.

        Raises:
          UserError: it has no ``</s>`` and ``<pad>``.
        """
        backend.no_padding()
        backend.no_truncation()  # done in encode(), so that a tokeniser carries no state between calls
        for token in ("<pad>", "</s>"):
            if backend.token_to_id(token) is None:
                raise UserError(f"tokenizer: no {token} token, so it is not of the T5 family")
        self.pad_id: int = backend.token_to_id("<pad>")
        self.eos_id: int = backend.token_to_id("</s>")
        if backend.post_processor is None:  # files from other tools may lack it
            backend.post_processor = ends_with(self.eos_id)
        if backend.encode("").ids != [self.eos_id]:
            raise UserError("tokenizer: does not put exactly one </s> behind a text, so it is not of the T5 family")
        self.backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Reads ``tokenizer.json``, or converts ``spiece.model`` where that is all there is.

        Raises:
          UserError: the folder holds neither, or the file is damaged.
        """
        folder = Path(folder)
        file, spiece = folder / "tokenizer.json", folder / "spiece.model"
        if file.is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:  # the library raises plain Exception
                read_json(file)  # has the clearer message for a file that is not even JSON
                raise UserError(f"{file}: not a tokenizer ({error})") from None
        elif spiece.is_file():
            config = folder / "tokenizer_config.json"
            extra_ids = read_json(config).get("extra_ids", 100) if config.is_file() else 100
            if not isinstance(extra_ids, int) or extra_ids < 0:
                raise UserError(f"{config}: extra_ids: a number of tokens expected, got {extra_ids!r}")
            backend = tokenizer_from_spiece(spiece, extra_ids)
        else:
            raise UserError(f"{folder}: no tokenizer.json and no spiece.model")
        try:
            return cls(backend)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None

    def encode(self, texts: Sequence[str], max_tokens: int = MAX_TOKENS) -> list[list[int]]:
        """Token ids of each text as it stands (uncleaned), at most ``max_tokens``, the last always ``</s>``."""
        if max_tokens < 1:
            raise UserError(f"max_tokens: must be at least 1, got {max_tokens}")
        ids = [encoding.ids for encoding in self.backend.encode_batch(list(texts))]
        return [i if len(i) <= max_tokens else [*i[:max_tokens - 1], self.eos_id] for i in ids]


def pad_ids(ids: Sequence[Sequence[int]], length: int, pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ragged token ids as int32 [B, length] and their mask, bool [B, length]."""
    out = np.full((len(ids), length), pad_id, np.int32)
    mask = np.zeros((len(ids), length), bool)
    for row, entry in enumerate(ids):
        out[row, :len(entry)] = entry
        mask[row, :len(entry)] = True
    return out, mask


# --- Embeddings ------------------------------------------------------------------------------------------------


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows", "lengths"], meta_fields=["total_rows"])
@dataclasses.dataclass(frozen=True)
class PromptEmbedding:
    """Encoded prompts without most of their zero padding; a pytree.

    Attributes:
      rows: [B, S, D]; exact zeros from each prompt's length on.
      lengths: int32 [B], number of real rows, at least 1 and at most S.
      total_rows: rows of the form that the transformer sees, S <= total_rows. The missing ones are zeros.
    """

    rows: Array
    lengths: Array
    total_rows: int = MAX_TOKENS

    @classmethod
    def from_padded(cls, embedding: Any) -> PromptEmbedding:
        """Takes the form with all rows, [B, total_rows, D]; keeps what lies before the last non-zero row.

        Raises:
          UserError: not three axes, or no row at all.
        """
        array = np.asarray(embedding)
        if array.ndim != 3 or 0 in array.shape:
            raise UserError(f"prompt embedding: shape [batch, rows, features] expected, got {list(array.shape)}")
        used = np.any(array != 0, axis=-1)  # [B, total]
        lengths = np.maximum(array.shape[1] - np.argmax(used[:, ::-1], axis=1), 1)
        lengths = np.where(used.any(axis=1), lengths, 1).astype(np.int32)
        return cls(jnp.asarray(embedding)[:, :lengths.max()], jnp.asarray(lengths), array.shape[1])

    def with_rows(self, count: int) -> PromptEmbedding:
        """The same embedding with ``count`` stored rows; ``lengths`` does not change.

        Raises:
          UserError: more rows than ``total_rows``, or fewer than are stored (rows in use could be lost).
        """
        stored = self.rows.shape[1]
        if not stored <= count <= self.total_rows:
            raise UserError(f"rows: {stored} to {self.total_rows} allowed, got {count}")
        return dataclasses.replace(self, rows=jnp.pad(self.rows, ((0, 0), (0, count - stored), (0, 0))))

    def padded(self) -> Array:
        """[B, total_rows, D] as the original passes it to the transformer."""
        return self.with_rows(self.total_rows).rows

    def astype(self, dtype: Any) -> PromptEmbedding:
        return dataclasses.replace(self, rows=self.rows.astype(dtype))

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, index: int | slice) -> PromptEmbedding:
        """Some of the prompts; an integer keeps the batch axis."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"prompt {index} of {len(self)}")
            index = slice(index % len(self), index % len(self) + 1)
        return dataclasses.replace(self, rows=self.rows[index], lengths=self.lengths[index])

    def __iter__(self) -> Iterator[PromptEmbedding]:
        return (self[i] for i in range(len(self)))


def _same_rows(*embeddings: PromptEmbedding) -> list[PromptEmbedding]:
    first = embeddings[0]
    for other in embeddings[1:]:
        if (other.total_rows, other.rows.shape[-1]) != (first.total_rows, first.rows.shape[-1]):
            raise UserError(f"prompt embeddings: {first.total_rows} rows of {first.rows.shape[-1]} and "
                            f"{other.total_rows} rows of {other.rows.shape[-1]} cannot be combined")
    count = max(e.rows.shape[1] for e in embeddings)
    return [e.with_rows(count) for e in embeddings]


def concatenate(embeddings: Sequence[PromptEmbedding]) -> PromptEmbedding:
    """One batch of several.

    Raises:
      UserError: none given, or their ``total_rows`` or widths differ.
    """
    if not embeddings:
        raise UserError("prompt embeddings: at least one expected, got none")
    parts = _same_rows(*embeddings)
    return PromptEmbedding(jnp.concatenate([p.rows for p in parts]), jnp.concatenate([p.lengths for p in parts]),
                           parts[0].total_rows)


def blend(a: PromptEmbedding, b: PromptEmbedding, weight: float) -> PromptEmbedding:
    """Linear interpolation of the padded forms, in the type of ``a``: exactly ``a`` at 0 and exactly ``b`` at 1.

    Computed in float32 from the nearer end, as ``torch.lerp`` does. Rows that only one of the two has fade to or
    from zero.

    Raises:
      UserError: the batches, ``total_rows`` or widths differ, or the weight is outside [0, 1].
    """
    if not 0 <= weight <= 1:
        raise UserError(f"weight: 0 to 1 allowed, got {weight}")
    if len(a) != len(b):
        raise UserError(f"prompt embeddings: batches of {len(a)} and {len(b)} cannot be blended")
    a, b = _same_rows(a, b)
    start, end = a.rows.astype(jnp.float32), b.rows.astype(jnp.float32)
    step = end - start
    rows = start + weight * step if weight < 0.5 else end - (1 - weight) * step
    return PromptEmbedding(rows.astype(a.rows.dtype), jnp.maximum(a.lengths, b.lengths), a.total_rows)


# --- Encoding --------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="encoder")
def _encode_ids(params: Mapping[str, Any], ids: Array, mask: Array, *, encoder: UMT5Encoder) -> Array:
    """[B,S] ids and mask to [B,S,D] with exact zeros at padding."""
    return jnp.where(mask[..., None], encoder.apply({"params": params}, ids, mask), 0)


def token_ids(tokenizer: TokenEncoder, prompts: Sequence[str], max_tokens: int = MAX_TOKENS
              ) -> list[tuple[int, ...]]:
    """Ids of the cleaned prompts, without padding.

    Raises:
      UserError: there is no prompt, or one is not a string.
    """
    if not prompts:
        raise UserError("prompt: at least one expected, got none")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError(f"prompt[{index}]: a string expected, got {type(prompt).__name__}")
    return [tuple(ids) for ids in tokenizer.encode([prompt_clean(prompt) for prompt in prompts], max_tokens)]


def stored_rows(tokens: int, multiple: int = ROWS_MULTIPLE, max_tokens: int = MAX_TOKENS) -> int:
    """The number of rows with which the encoder runs on a prompt of so many tokens."""
    return min(-(-tokens // multiple) * multiple, max_tokens)


def lower_encoder(encoder: UMT5Encoder, params: Mapping[str, Any], rows: int) -> jax.stages.Lowered:
    """What :class:`PromptEncoder` runs on one prompt of so many rows, traced; ``params`` may be abstract."""
    return _encode_ids.lower(params, *pad_ids([(0,)], rows), encoder=encoder)


class PromptEncoder:
    """Cleans, tokenises and encodes prompts, and remembers the results.

    A prompt's embedding does not depend on the prompts beside it: with the default ``batch_size`` of 1 not in a
    single bit, since every prompt runs the same program alone.

    The encoder runs on the prompt's length rounded up to a multiple of ``rows_multiple``, not on ``max_tokens``
    rows. That is exact, because positions enter only as differences and padding is masked.
    """

    def __init__(self, encoder: UMT5Encoder, params: Mapping[str, Any], tokenizer: TokenEncoder, *,
                 max_tokens: int = MAX_TOKENS, rows_multiple: int = ROWS_MULTIPLE, batch_size: int = 1,
                 cache_size: int = 128):
        """Binds an encoder to its tokeniser.

        Args:
          encoder, params: the text encoder; its ``dtype`` is that of the embeddings.
          tokenizer: gives the token ids.
          max_tokens: prompts are cut to this many tokens; also the ``total_rows`` of the embeddings.
          rows_multiple: granularity of the compiled lengths.
          batch_size: prompts of similar length that run together; larger is faster for many captions.
          cache_size: how many prompts are remembered (least recently used go first); 0 turns it off.

        Raises:
          UserError: a number out of range, or a tokeniser with more ids than the encoder has embeddings.
        """
        for name, value, least in (("max_tokens", max_tokens, 1), ("rows_multiple", rows_multiple, 1),
                                   ("batch_size", batch_size, 1), ("cache_size", cache_size, 0)):
            if value < least:
                raise UserError(f"{name}: must be at least {least}, got {value}")
        if tokenizer.vocab_size > encoder.config.vocab_size:
            raise UserError(f"tokenizer: {tokenizer.vocab_size} ids, but the text encoder embeds only "
                            f"{encoder.config.vocab_size} (vocab_size)")
        # Own containers: a weight that the caller exchanges in his tree later does not reach the cache.
        params = jax.tree.map(jnp.asarray, dict(params))
        self._run = functools.partial(_encode_ids, params, encoder=encoder)
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._rows_multiple = rows_multiple
        self._batch_size = batch_size
        self._cache_size = cache_size
        self._cache: collections.OrderedDict[tuple[int, ...], Array] = collections.OrderedDict()

    def token_ids(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """Ids of the cleaned prompts, without padding.

        Raises:
          UserError: there is no prompt, or one is not a string.
        """
        return token_ids(self._tokenizer, prompts, self._max_tokens)

    def __call__(self, prompts: str | Sequence[str]) -> PromptEmbedding:
        """Encodes prompts.

        Args:
          prompts: one string (a batch of one) or several; the empty string is a prompt too.
        Returns: embeddings in the order of the prompts; S is the longest one rounded up.
        Raises:
          UserError: there is no prompt, or one is not a string.
        """
        keys = self.token_ids([prompts] if isinstance(prompts, str) else prompts)
        # Prompts with equal ids have equal embeddings, so the ids are the key.
        known = {key: self._cache[key] for key in keys if key in self._cache}
        known |= self._encode_new([key for key in dict.fromkeys(keys) if key not in known])
        for key in keys:
            self._cache[key] = known[key]
            self._cache.move_to_end(key)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        count = max(len(known[key]) for key in keys)
        rows = jnp.stack([jnp.pad(known[key], ((0, count - len(known[key])), (0, 0))) for key in keys])  # [B,S,D]
        return PromptEmbedding(rows, jnp.array([len(key) for key in keys], jnp.int32), self._max_tokens)

    def _encode_new(self, keys: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Array]:
        """Rows [S,D] of each prompt, S its own rounded length."""
        groups: dict[int, list[tuple[int, ...]]] = {}
        for key in keys:
            rows = stored_rows(len(key), self._rows_multiple, self._max_tokens)
            groups.setdefault(rows, []).append(key)
        found = {}
        for rows, group in sorted(groups.items()):
            for first in range(0, len(group), self._batch_size):
                part = group[first:first + self._batch_size]
                # A short last batch is filled up, so that each length has one program.
                filler = [(self._tokenizer.eos_id,)] * (self._batch_size - len(part))
                found |= dict(zip(part, self._run(*pad_ids([*part, *filler], rows))))
        return found


def encode_prompts(prompts: str | Sequence[str], encoder: UMT5Encoder, params: Mapping[str, Any],
                   tokenizer: TokenEncoder, **options: Any) -> PromptEmbedding:
    """Encodes prompts once, without a cache; options and errors as :class:`PromptEncoder`."""
    return PromptEncoder(encoder, params, tokenizer, **{**options, "cache_size": 0})(prompts)
