"""The way from a prompt to its embedding: cleaning, token ids, encoding, caching and mixing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.errors import UserError
from helios_jax.models.umt5 import UMT5Encoder
from helios_jax.text import (
    PromptEmbedding,
    PromptEncoder,
    Tokenizer,
    blend,
    concatenate,
    encode_prompts,
    pad_ids,
    prompt_clean,
)
from tests import golden
from tests.test_umt5 import ODD, TINY, golden_params, relative_error, torch_model
from tests.text_samples import two_hundred

BOX = Path(__file__).resolve().parents[1] / "assets" / "helios-tiny" / "tokenizer"


class ToyTokenizer:
    """Per character 2 + codepoint mod 60, then </s>: the tokeniser of the golden numbers."""

    vocab_size, eos_id = 64, 1

    def encode(self, texts, max_tokens=512):
        return [[2 + ord(c) % 60 for c in text][:max_tokens - 1] + [1] for text in texts]


class CountingTokenizer(ToyTokenizer):
    """One id per distinct word, so that ids follow the text."""

    vocab_size = ODD.vocab_size

    def encode(self, texts, max_tokens=512):
        return [[2 + hash_(word) % 49 for word in text.split()][:max_tokens - 1] + [1] for text in texts]


def hash_(word: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(word))


def odd_encoder(**options) -> PromptEncoder:
    return PromptEncoder(UMT5Encoder(ODD), golden_params(ODD), CountingTokenizer(), **options)


# --- Cleaning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text,clean", [
    ("  A  cat\n\tsits&amp;amp;stays &lt;b&gt; ", "A cat sits&stays <b>"), ("ﬁ “x” — cafÃ©", 'fi "x" — café'),
    ("a\u00a0\u2003b", "a b"), ("zero\u200bwidth", "zero\u200bwidth"), ("\x1b[31mred\x1b[0m", "red"),
    ("ｗｉｄｅ　ｘ", "wide x"), ("&nbsp;lead", "lead"), ("&amp;amp;amp;", "&"),
    # ftfy leaves entities alone beside a real tag: here the two passes of unescaping show.
    ("<i> &amp;lt; &amp;amp;amp;", "<i> < &amp;"), ("", ""), (" \n ", "")])
def test_cleaning_of_measured_examples(text, clean):
    assert prompt_clean(text) == clean


def test_cleaning_equals_the_original_on_200_strings():
    module = pytest.importorskip("diffusers.pipelines.helios.pipeline_helios")
    for text in [*two_hundred(), *(f"a{chr(code)}b" for code in range(0x3100) if not 0xD800 <= code < 0xE000)]:
        assert prompt_clean(text) == module.prompt_clean(text), repr(text)


# --- Tokeniser -------------------------------------------------------------------------------------------------


def transformers_ids(folder: Path, texts: list[str], length: int = 512) -> np.ndarray:
    tokenizer = pytest.importorskip("transformers").T5TokenizerFast.from_pretrained(folder)
    out = tokenizer(texts, padding="max_length", max_length=length, truncation=True, add_special_tokens=True,
                    return_attention_mask=True)
    return np.array(out.input_ids), np.array(out.attention_mask)


@pytest.mark.parametrize("length", [512, 7, 1])
def test_ids_of_the_tokenizer_in_the_box_equal_transformers_on_200_strings(length):
    texts = two_hundred()
    assert len(texts) == 200
    want_ids, want_mask = transformers_ids(BOX, texts, length)
    ids, mask = pad_ids(Tokenizer.from_folder(BOX).encode(texts, length), length)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_array_equal(mask, want_mask)


def test_truncation_keeps_the_end_token_last():
    ids = Tokenizer.from_folder(BOX).encode(["a " * 600, "a " * 511, "a " * 3], 512)
    assert [len(i) for i in ids] == [512, 512, 4] and all(i[-1] == 1 for i in ids)


def test_a_file_with_stored_padding_and_truncation_gives_the_same_ids(tmp_path):
    shutil.copytree(BOX, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    values = json.loads(file.read_text())
    values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {"strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                         "pad_type_id": 0, "pad_token": "<pad>"}
    values["post_processor"] = None
    file.write_text(json.dumps(values))
    assert Tokenizer.from_folder(file.parent).encode(two_hundred()) == Tokenizer.from_folder(BOX).encode(two_hundred())


def test_a_folder_with_spiece_model_alone_gives_the_ids_of_transformers(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    texts = two_hundred()
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(t for t in texts if "\x00" not in t and len(t) < 500), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "spiece"), vocab_size=1000, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, model_type="unigram", user_defined_symbols=["[cut]"], hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "spiece.vocab").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 20}))
    texts = [*texts, "a [cut] b[cut]c"]
    # The class of this file is not stated in it; reading it with the class itself is what the pipeline does.
    want, _ = transformers_ids(tmp_path, texts)
    ids, _ = pad_ids(Tokenizer.from_folder(tmp_path).encode(texts), 512)
    np.testing.assert_array_equal(ids, want)


@pytest.mark.parametrize("name,content,message", [
    ("tokenizer.json", b"{", "not valid JSON"), ("tokenizer.json", b"{}", "not a tokenizer"),
    ("tokenizer.json", b"\x80\x04", "cannot be read"), ("spiece.model", b"\x00garbage", "SentencePiece"),
    ("spiece.model", b"", "SentencePiece"), ("readme.txt", b"", "no tokenizer.json and no spiece.model")])
def test_damaged_tokenizer_folders_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_tokenizer_of_another_family_is_refused(tmp_path):
    import tokenizers

    words = tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="<pad>"):
        Tokenizer.from_folder(tmp_path)


def test_a_truncated_spiece_model_is_refused_at_every_length(tmp_path):
    from helios_jax.spiece import tokenizer_from_spiece

    piece = b"\x0a\x05<pad>\x15\x00\x00\x00\x00\x18\x03"
    model = (b"\x0a" + bytes([len(piece)]) + piece) * 3
    for cut in [c for c in range(1, len(model)) if c % (len(piece) + 2)]:
        (tmp_path / "spiece.model").write_bytes(model[:cut])
        with pytest.raises(UserError, match="damaged"):
            tokenizer_from_spiece(tmp_path / "spiece.model")


# --- Encoding --------------------------------------------------------------------------------------------------


def test_golden_text_path_with_the_toy_tokenizer():
    encoder = PromptEncoder(UMT5Encoder(TINY), golden_params(TINY), ToyTokenizer())
    golden.check(encoder("a cat").padded(), mean=-0.0020293, std=0.1091796, probe=0.046121, last=(0.0, 0.0),
                 first=(-0.189328, -0.832536, -0.357250, 1.022203), atol=2e-6)  # W1
    golden.check(encoder("").padded(), mean=0.0002774, std=0.0469259, probe=0.033610, last=(0.0, 0.0),
                 first=(-0.112691, -0.003928, -0.263306, -0.756801), atol=2e-6)  # W2


@pytest.mark.parametrize("max_tokens", [512, 16])
def test_embeddings_equal_the_original_pipeline(max_tokens):
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.pipelines.helios.pipeline_helios")
    from transformers import T5TokenizerFast

    config = dataclasses.replace(ODD, vocab_size=1024)
    model = torch_model(config)
    prompts = [two_hundred()[i] for i in (0, 15, 48, 60, 70, 120)]
    stub = SimpleNamespace(tokenizer=T5TokenizerFast.from_pretrained(BOX), text_encoder=model, _execution_device="cpu")
    with torch.no_grad():
        want, want_mask = module.HeliosPipeline._get_t5_prompt_embeds(
            stub, prompts, max_sequence_length=max_tokens, dtype=torch.float32)
    got = encode_prompts(prompts, UMT5Encoder(config), golden_params(config), Tokenizer.from_folder(BOX),
                         max_tokens=max_tokens)
    assert got.padded().shape == want.shape
    np.testing.assert_array_equal(got.lengths, want_mask.sum(1))
    assert relative_error(got.padded(), want.numpy()) <= 1e-5
    np.testing.assert_array_equal(np.asarray(got.padded() == 0).all(-1), (want == 0).all(-1).numpy())


def test_encoding_the_rounded_length_equals_encoding_512_rows():
    prompts = ["", "one two three", "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 3]
    short = odd_encoder(rows_multiple=8)(prompts)
    full = odd_encoder(rows_multiple=512)(prompts)
    assert short.rows.shape[1] == 80 and full.rows.shape[1] == 512
    np.testing.assert_array_equal(short.lengths, full.lengths)
    assert relative_error(short.padded(), full.padded()) <= 1e-6
    assert not np.asarray(full.rows)[:, 79:].any()


def test_a_prompt_is_embedded_the_same_to_the_bit_in_any_company():
    encoder = odd_encoder(cache_size=0)
    prompts = ["red circle", "a " * 60, "", "blue square moves to the left"]
    together = encoder(prompts)
    for index, prompt in enumerate(prompts):
        alone = encoder(prompt)
        np.testing.assert_array_equal(alone.padded()[0], together.padded()[index])
        np.testing.assert_array_equal(alone.lengths[0], together.lengths[index])
    reordered = encoder(prompts[::-1])
    np.testing.assert_array_equal(reordered.rows[::-1], together.rows)


def test_batched_encoding_equals_one_by_one():
    prompts = [f"word{i} " * (1 + 7 * i % 50) for i in range(11)]
    one, many = odd_encoder()(prompts), odd_encoder(batch_size=4)(prompts)
    np.testing.assert_array_equal(one.lengths, many.lengths)
    assert relative_error(many.rows, one.rows) <= 1e-6


def test_known_prompts_are_not_encoded_again():
    encoder = odd_encoder(cache_size=2)
    runs = []
    encoder._run = lambda ids, mask, run=encoder._run: runs.append(len(ids)) or run(ids, mask)
    first = encoder(["a b", "c", "a b"])
    assert len(runs) == 2
    second = encoder(["c", "  a \n b "])  # cleaning makes it the same prompt
    assert len(runs) == 2
    np.testing.assert_array_equal(second.rows, first.rows[jnp.array([1, 0])])
    encoder("d")  # pushes out "c", the least recently used
    encoder(["d", "a b"])
    assert len(runs) == 3
    encoder("c")
    assert len(runs) == 4


def test_the_cache_belongs_to_its_weights():
    params = golden_params(ODD)
    encoder = PromptEncoder(UMT5Encoder(ODD), params, CountingTokenizer())
    before = encoder("red circle").rows
    params["shared"]["weight"] = params["shared"]["weight"] + 1  # the caller's tree, not the encoder's
    assert relative_error(encoder("red square").rows, PromptEncoder(
        UMT5Encoder(ODD), golden_params(ODD), CountingTokenizer())("red square").rows) == 0
    after = PromptEncoder(UMT5Encoder(ODD), params, CountingTokenizer())("red circle").rows
    assert relative_error(after, before) > 1e-3


@pytest.mark.parametrize("prompts,message", [
    ([], "at least one"), ([None], r"prompt\[0\]: a string expected, got NoneType"),
    (["a", 3], r"prompt\[1\]: a string expected, got int")])
def test_wrong_prompts_are_refused(prompts, message):
    with pytest.raises(UserError, match=message):
        odd_encoder()(prompts)


@pytest.mark.parametrize("options,message", [
    ({"max_tokens": 0}, "max_tokens: must be at least 1, got 0"), ({"batch_size": 0}, "batch_size"),
    ({"rows_multiple": 0}, "rows_multiple"), ({"cache_size": -1}, "cache_size")])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        odd_encoder(**options)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused():
    with pytest.raises(UserError, match="1024 ids, but the text encoder embeds only 51"):
        PromptEncoder(UMT5Encoder(ODD), golden_params(ODD), Tokenizer.from_folder(BOX))


# --- Embeddings ------------------------------------------------------------------------------------------------


def embedding(tag: str, lengths: tuple[int, ...], rows: int, total: int = 20, dtype=jnp.float32) -> PromptEmbedding:
    values = golden.data(tag, len(lengths), rows, 6)
    values[np.arange(rows) >= np.array(lengths)[:, None]] = 0
    return PromptEmbedding(jnp.asarray(values, dtype), jnp.array(lengths, jnp.int32), total)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 2 / 3, 1.0])
def test_blending_equals_torch_lerp_of_the_padded_forms(weight, dtype):
    torch = pytest.importorskip("torch")
    a, b = embedding("a", (3, 8), 8, dtype=jnp.dtype(dtype)), embedding("b", (12, 1), 12, dtype=jnp.dtype(dtype))
    start, end = (torch.from_numpy(np.array(e.padded(), np.float32)).to(getattr(torch, dtype)) for e in (a, b))
    want = torch.lerp(start, end, weight).float().numpy()
    got = blend(a, b, weight)
    assert got.rows.dtype == jnp.dtype(dtype) and got.rows.shape[1] == 12
    # One rounding may fall differently, because torch fuses the multiplication and the addition.
    tolerance = float(jnp.finfo(dtype).eps) if dtype == "bfloat16" else 3e-7
    np.testing.assert_allclose(np.asarray(got.padded(), np.float32), want, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(got.lengths, [12, 8])


def test_blending_is_exact_at_both_ends():
    a, b = embedding("a", (3, 8), 8), embedding("b", (12, 1), 12)
    np.testing.assert_array_equal(blend(a, b, 0.0).padded(), a.padded())
    np.testing.assert_array_equal(blend(a, b, 1.0).padded(), b.padded())


def test_concatenation_and_selection_keep_the_padded_forms():
    a, b = embedding("a", (3, 8), 8), embedding("b", (12,), 12)
    joined = concatenate([a, b])
    np.testing.assert_array_equal(joined.padded(), np.concatenate([a.padded(), b.padded()]))
    np.testing.assert_array_equal(joined.lengths, [3, 8, 12])
    np.testing.assert_array_equal(joined[-1].padded(), b.padded())
    np.testing.assert_array_equal(joined[:2].padded(), a.padded())
    assert [len(part) for part in joined] == [1, 1, 1] and len(joined) == 3


def test_an_embedding_passes_through_jit_with_its_total():
    a = embedding("a", (3,), 8)
    out = jax.jit(lambda e: e.astype(jnp.bfloat16))(a)
    assert out.total_rows == 20 and out.rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.lengths, a.lengths)


def test_the_padded_form_comes_back_from_its_padded_form():
    a = embedding("a", (3, 8), 10)
    back = PromptEmbedding.from_padded(a.padded())
    assert back.rows.shape == (2, 8, 6) and back.total_rows == 20
    np.testing.assert_array_equal(back.lengths, [3, 8])
    np.testing.assert_array_equal(back.padded(), a.padded())
    np.testing.assert_array_equal(PromptEmbedding.from_padded(np.zeros((2, 5, 3))).lengths, [1, 1])


@pytest.mark.parametrize("action,message", [
    (lambda a, b: blend(a, b, 1.5), "weight: 0 to 1 allowed, got 1.5"), (lambda a, b: blend(a, b, 0.5), "batches"),
    (lambda a, b: concatenate([]), "at least one"), (lambda a, b: a.with_rows(7), "rows: 8 to 20 allowed, got 7"),
    (lambda a, b: a.with_rows(21), "got 21"), (lambda a, b: PromptEmbedding.from_padded(np.zeros((3, 4))), r"\[3, 4\]"),
    (lambda a, b: concatenate([a, embedding("c", (2,), 4, total=9)]), "cannot be combined")])
def test_embeddings_that_do_not_fit_are_refused(action, message):
    with pytest.raises(UserError, match=message):
        action(embedding("a", (3, 8), 8), embedding("b", (12,), 12))
