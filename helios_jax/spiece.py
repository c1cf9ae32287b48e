"""Reads a SentencePiece model file into a ``tokenizers.Tokenizer``, without the sentencepiece package or protobuf.

Only what a Unigram tokeniser of the T5 family needs. Like every fast T5 tokeniser, the result has no byte fallback:
unknown characters become the unknown token.

The file is a protocol buffer: a sequence of (field number, wire type) tags, each followed by a value.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from helios_jax.errors import UserError

# Field numbers of sentencepiece_model.proto.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3  # ModelProto
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3  # ModelProto.SentencePiece
_TRAINER_MODEL_TYPE, _TRAINER_UNK_ID = 3, 40  # TrainerSpec
_CHARSMAP = 2  # NormalizerSpec
_UNIGRAM = 1
_CONTROL, _USER_DEFINED = 3, 4  # types of pieces that match as a whole, before the text is split


def tokenizer_from_spiece(path: str | Path, extra_ids: int = 100) -> tokenizers.Tokenizer:
    """Converts ``spiece.model``.

    Args:
      extra_ids: number of sentinel tokens ``<extra_id_N>`` behind the pieces, in falling order of N.

    Raises:
      UserError: the file cannot be read, is damaged, or is not a Unigram model.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    vocab: list[tuple[str, float]] = []
    added: list[tuple[str, bool]] = []
    model_type, unk_id, charsmap = _UNIGRAM, 0, b""
    try:
        for field, value in _fields(content):
            if field == _PIECE:
                piece = dict(_fields(value))
                text = piece.get(_PIECE_TEXT, b"").decode("utf-8")
                vocab.append((text, struct.unpack("<f", piece.get(_PIECE_SCORE, bytes(4)))[0]))
                if piece.get(_PIECE_TYPE) in (_CONTROL, _USER_DEFINED):
                    added.append((text, piece[_PIECE_TYPE] == _CONTROL))
            elif field == _TRAINER:
                trainer = dict(_fields(value))
                model_type = trainer.get(_TRAINER_MODEL_TYPE, _UNIGRAM)
                unk_id = trainer.get(_TRAINER_UNK_ID, 0)
            elif field == _NORMALIZER:
                charsmap = dict(_fields(value)).get(_CHARSMAP, b"")
    except (ValueError, IndexError, AttributeError, TypeError, struct.error):
        raise UserError(f"{path}: damaged, or not a SentencePiece model") from None
    if model_type != _UNIGRAM or not 0 <= unk_id < len(vocab):
        raise UserError(f"{path}: not a SentencePiece Unigram model")

    sentinels = [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]
    vocab += [(token, 0.0) for token in sentinels]
    added += [(token, True) for token in (vocab[unk_id][0], *sentinels)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=unk_id, byte_fallback=False))
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = word_splitter()
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False, special=special) for text, special in added])
    eos = tokenizer.token_to_id("</s>")
    if eos is not None:
        tokenizer.post_processor = ends_with(eos)
    return tokenizer


def word_splitter() -> pre_tokenizers.PreTokenizer:
    """How T5 tokenisers split text: at white space, each word marked with a leading U+2581."""
    return pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
    ])


def ends_with(eos_id: int) -> processors.PostProcessor:
    """Appends ``</s>`` to every text."""
    return processors.TemplateProcessing(single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"],
                                         special_tokens=[("</s>", eos_id)])


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer message: integers for wire type 0, raw bytes otherwise."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        wire_type = tag & 7
        if wire_type == 0:
            value, position = _varint(message, position)
        else:
            if wire_type == 2:
                length, position = _varint(message, position)
            elif wire_type in (1, 5):
                length = 8 if wire_type == 1 else 4
            else:
                raise ValueError(f"wire type {wire_type}")
            value = message[position:position + length]
            if len(value) != length:
                raise ValueError("truncated")
            position += length
        yield tag >> 3, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
