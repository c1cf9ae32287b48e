"""Makes a small T5 tokeniser for a closed world of captions.

The Unigram trainer of the ``tokenizers`` library cannot serve here: it seeds its pieces with strings that recur in
several different words, so that with a few hundred words no whole word becomes a piece, and its result differs from
run to run in the last digits. This one is a plain count: every frequent word is one piece, parts of words and single
characters are there for the rest, and the same captions give the same file.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models

from helios_jax.errors import UserError
from helios_jax.spiece import ends_with, word_splitter

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as in T5; transformers 5 fixes the unknown token at 2
_MARK = "▁"  # stands for the space before a word
# What can be typed on a Western keyboard. Other characters become the unknown token.
_CHARACTERS = (*map(chr, range(0x21, 0x7F)), *map(chr, range(0xA1, 0xAD)), *map(chr, range(0xAE, 0x100)),
               *"–—‘’“”„…€")
_WORD = re.compile(r"[a-z]+")
_LONGEST_PART = 6
# Log probabilities. Every part costs less than its letters, every word less than its parts.
_PART_SCORE, _CHARACTER_SCORE, _RANK_STEP = -14.0, -18.0, 1e-3


def train_tokenizer(captions: Iterable[str], vocab_size: int = 1024) -> tokenizers.Tokenizer:
    """Builds the tokeniser.

    The vocabulary holds, in this order: the special tokens; words in small letters with the mark of a preceding
    space, the most frequent first; the same with a capital letter; the same without the mark; parts of words; single
    characters. Where the size does not suffice for all words, the rarest are left to be spelt out.

    Args:
      captions: representative texts.
      vocab_size: exact number of pieces.

    Returns: a tokeniser that appends ``</s>`` and neither pads nor cuts.

    Raises:
      UserError: ``vocab_size`` is smaller than the alphabet, or larger than all that the captions offer.
    """
    counts = collections.Counter(word for caption in captions for word in _WORD.findall(caption.lower()))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    room = vocab_size - len(SPECIAL_TOKENS) - 1 - len(_CHARACTERS)
    if room < 0:
        raise UserError(f"vocab_size: at least {vocab_size - room} for the alphabet, got {vocab_size}")
    total = max(sum(counts.values()), 1)
    pieces: dict[str, float] = {}
    for form, malus in ((lambda w: _MARK + w, 0.0), (lambda w: _MARK + w.capitalize(), 1.0), (lambda w: w, 2.0)):
        for word in words:
            if len(form(word)) > 1:
                pieces.setdefault(form(word), max(math.log(counts[word] / total), _PART_SCORE + 3) - malus)
    for rank, part in enumerate(_parts(words)):
        pieces.setdefault(part, _PART_SCORE - _RANK_STEP * min(rank, 1000))
    chosen = list(itertools.islice(pieces.items(), room))
    if len(chosen) < room:
        raise UserError(f"vocab_size: the captions offer {vocab_size - room + len(chosen)} pieces, got {vocab_size}")
    letters = [(c, _CHARACTER_SCORE - _RANK_STEP * i) for i, c in enumerate((_MARK, *_CHARACTERS))]

    vocab = [*((token, 0.0) for token in SPECIAL_TOKENS), *chosen, *letters]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    # Exactly what transformers rebuilds from the file; a normaliser (lower case, say) would be lost there.
    tokenizer.pre_tokenizer = word_splitter()
    tokenizer.decoder = decoders.Metaspace(replacement=_MARK, prepend_scheme="always", split=True)
    tokenizer.post_processor = ends_with(1)
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS])
    return tokenizer


def _parts(words: Iterable[str]) -> Iterator[str]:
    """Strings of at least two letters that several words share, those first that save the most letters."""
    shared: collections.Counter[str] = collections.Counter()
    for word in words:
        marked = _MARK + word
        shared.update({marked[i:j] for i in range(len(marked)) for j in range(i + 2, i + _LONGEST_PART + 1)
                       if j <= len(marked)})
    yield from sorted(shared, key=lambda part: (-(shared[part] - 1) * (len(part) - 1), part))


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: str | Path, max_tokens: int = 512) -> None:
    """Writes the three files that transformers' ``T5TokenizerFast`` and :mod:`helios_jax.text` read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pad, eos, unk = SPECIAL_TOKENS
    special = {"eos_token": eos, "pad_token": pad, "unk_token": unk}
    # No sentinels (<extra_id_0> ...): the class would append 100 of them by default.
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": [],
              "model_max_length": max_tokens, "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
    for name, values in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
