"""The small tokeniser and text encoder: made reproducibly, readable by transformers, and fit for their purpose."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helios_jax.config import TextEncoderConfig
from helios_jax.convert.load import load_component
from helios_jax.data import phrases, shapes
from helios_jax.errors import UserError
from helios_jax.models.umt5 import UMT5Encoder
from helios_jax.text import PromptEncoder, Tokenizer, pad_ids
from helios_jax.training import text_encoder
from helios_jax.training.config import run_config
from helios_jax.training.loop import train
from helios_jax.training.tokenizer import save_tokenizer, train_tokenizer
from tests.test_text import transformers_ids
from tests.test_umt5 import relative_error
from tests.text_samples import two_hundred

ROOT = Path(__file__).resolve().parents[1]
BOX = ROOT / "assets" / "helios-tiny"
SMALL = TextEncoderConfig(vocab_size=768, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)


def small_run(**changes):
    objective = {"name": "helios_jax.training.text_encoder", "encoder": SMALL.to_dict(), "max_tokens": 24,
                 "free_share": 0.0, "noise_share": 0.0, "tokenizer_captions": 3000, "eval_captions": 205}
    values = {"objective": objective, "batch_size": 32, "num_steps": 250, "log_every": 50, "checkpoint_every": 1000,
              "sample_every": 250, "ema_decay": 0.9, "tensorboard": False,
              "optimizer": {"learning_rate": 1e-2, "warmup_steps": 10}}
    return run_config({**values, **changes})


# --- Captions --------------------------------------------------------------------------------------------------


def test_training_never_names_a_held_out_combination():
    trained = {tuple(text_encoder.labels(a)) for a in shapes.train_combinations()}
    for free, noise in ((0.0, 0.0), (1.0, 1.0)):
        seen = {tuple(text_encoder.sample_caption(i, 3, 0, "train", free, noise)[1]) for i in range(2000)}
        held_out = {tuple(text_encoder.sample_caption(i, 3, 1, "held_out", free, noise)[1]) for i in range(2000)}
        assert len(seen) > 500 and seen <= trained
        assert len(held_out) > 200 and not held_out & trained


def test_free_captions_of_different_attributes_are_never_the_same_sentence():
    owner: dict[str, shapes.Attributes] = {}
    combinations = shapes.train_combinations() + shapes.held_out_combinations()
    rng = np.random.RandomState(0)
    for attributes in itertools.islice(itertools.cycle(combinations), 6000):
        text = phrases.free_caption(attributes, rng).lower()
        assert owner.setdefault(text, attributes) == attributes, text


def test_captions_depend_on_their_number_alone():
    first = [text_encoder.sample_caption(i, 5, 0, "train", 0.5, 0.5)[0] for i in range(20)]
    assert [text_encoder.sample_caption(i, 5, 0, "train", 0.5, 0.5)[0] for i in reversed(range(20))] == first[::-1]
    assert [text_encoder.sample_caption(i, 6, 0, "train", 0.5, 0.5)[0] for i in range(20)] != first


# --- Tokeniser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh_tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    config = text_encoder.Config(tokenizer_captions=4000)
    save_tokenizer(text_encoder.make_tokenizer(config), folder)
    return folder


def test_a_fresh_tokenizer_gives_the_ids_of_transformers_on_200_strings(fresh_tokenizer):
    texts = two_hundred()
    want_ids, want_mask = transformers_ids(fresh_tokenizer, texts)
    ids, mask = pad_ids(Tokenizer.from_folder(fresh_tokenizer).encode(texts), 512)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_array_equal(mask, want_mask)


def test_words_of_clip_captions_are_single_pieces_and_keyboards_are_covered(fresh_tokenizer):
    tokenizer = Tokenizer.from_folder(fresh_tokenizer)
    assert tokenizer.vocab_size == 1024
    assert [tokenizer.backend.token_to_id(t) for t in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    rng = np.random.RandomState(1)
    for attributes in shapes.held_out_combinations():
        text = shapes.caption(attributes, rng)
        pieces = len(re.findall(r"[A-Za-z]+|[^A-Za-z ]", text))
        assert len(tokenizer.encode([text])[0]) == pieces + 1, text
    keyboard = "".join(map(chr, range(0x21, 0x7F))) + "äéñçøßÅ£—“”"
    assert 2 not in tokenizer.encode([" ".join(keyboard), keyboard, "Zwölf Boxkämpfer jagen Viktor quer"])[0]
    assert 2 in tokenizer.encode(["红"])[0]


def test_the_tokenizer_file_does_not_depend_on_the_process(fresh_tokenizer):
    program = ("from helios_jax.training import text_encoder as t; import sys; "
               "sys.stdout.write(t.make_tokenizer(t.Config(tokenizer_captions=4000)).to_str())")
    outputs = [subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"}).stdout
               for seed in ("1", "2")]
    assert outputs[0] == outputs[1] == (fresh_tokenizer / "tokenizer.json").read_text(encoding="utf-8").rstrip("\n")


@pytest.mark.parametrize("size,message", [(100, r"vocab_size: at least \d+ for the alphabet, got 100"),
                                          (5000, r"vocab_size: the captions offer \d+ pieces, got 5000")])
def test_impossible_vocabulary_sizes_are_refused(size, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(["a red circle", "a blue square"], size)


# --- Training --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    train(small_run(), workdir, print_line=lambda line: None)
    return workdir


@pytest.mark.slow
def test_a_short_run_learns_to_read_held_out_combinations(short_run):
    rows = [json.loads(line) for line in (short_run / "metrics.jsonl").read_text().splitlines()]
    scores = next(row for row in rows if "eval/clip/all" in row)
    assert scores["eval/clip/all"] > 0.5  # chance is 1 in 1024
    assert scores["eval/clip/rows"] > 0.5


@pytest.mark.slow
def test_the_export_is_what_transformers_reads(short_run):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = short_run / "export"
    model = transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    assert model.dtype == torch.bfloat16
    model = model.float()
    config = TextEncoderConfig.from_file(folder / "text_encoder" / "config.json")
    assert config == SMALL
    params = load_component(folder / "text_encoder", "text_encoder", config, np.dtype("float32"))
    tokenizer = Tokenizer.from_folder(folder / "tokenizer")
    texts = [shapes.caption(a, np.random.RandomState(0)) for a in shapes.held_out_combinations()[:3]]
    ids, mask = pad_ids(tokenizer.encode(texts), 30)
    np.testing.assert_array_equal(ids, transformers_ids(folder / "tokenizer", texts, 30)[0])
    with torch.no_grad():
        want = model(torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).last_hidden_state.numpy()
    got = np.asarray(UMT5Encoder(config).apply({"params": params}, ids, mask))
    assert relative_error(got, want) <= 1e-5


@pytest.mark.parametrize("field,value", [("max_tokens", 0), ("free_share", 1.5), ("row_weight", -1.0),
                                         ("export_dtype", "int8"), ("eval_captions", 0)])
def test_wrong_settings_are_refused(field, value):
    with pytest.raises(UserError, match=f"objective.{field}: .*{value}"):
        text_encoder.Config(**{field: value})


# --- The files in the box --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def box() -> PromptEncoder:
    config = TextEncoderConfig.from_file(BOX / "text_encoder" / "config.json")
    params = load_component(BOX / "text_encoder", "text_encoder", config, np.dtype("float32"))
    return PromptEncoder(UMT5Encoder(config), params, Tokenizer.from_folder(BOX / "tokenizer"), batch_size=50,
                         cache_size=0)


def encoded(encoder: PromptEncoder, count: int, stream: int, split: str, free: float, noise: float = 0.0):
    """Rows [N,S,D], their mask [N,S] and one-hot labels [N,24] of ``count`` captions."""
    captions, wanted = zip(*(text_encoder.sample_caption(i, 11, stream, split, free, noise) for i in range(count)))
    out = encoder(captions)
    mask = np.arange(out.rows.shape[1]) < np.asarray(out.lengths)[:, None]
    one_hot = np.concatenate([np.eye(n)[np.array(wanted)[:, i]] for i, n in enumerate(text_encoder.CLASSES)], axis=1)
    return np.asarray(out.rows, np.float64), mask, one_hot


def all_right(scores: np.ndarray, one_hot: np.ndarray) -> np.ndarray:
    borders = np.cumsum(text_encoder.CLASSES)[:-1]
    return np.all([s.argmax(-1) == w.argmax(-1) for s, w in
                   zip(np.split(scores, borders, -1), np.split(one_hot, borders, -1), strict=True)], axis=0)


def test_attributes_of_held_out_captions_are_linear_in_the_rows_of_the_box(box):
    """A least-squares probe, fitted here on training combinations only: the reader of the training plays no part."""
    rows, mask, wanted = encoded(box, 1000, 0, "train", 0.5)
    mean = (rows * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    of_mean = np.linalg.lstsq(np.c_[mean, np.ones(len(mean))], wanted, rcond=None)[0]
    single, owner = rows[mask], np.repeat(np.arange(len(rows)), mask.sum(1))
    of_rows = np.linalg.lstsq(np.c_[single, np.ones(len(single))], wanted[owner], rcond=None)[0]
    for free, noise, least in ((0.0, 0.0, 0.99), (1.0, 0.0, 0.97), (1.0, 1.0, 0.95)):
        rows, mask, wanted = encoded(box, 500, 1, "held_out", free, noise)
        mean = (rows * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        assert all_right(np.c_[mean, np.ones(len(mean))] @ of_mean, wanted).mean() >= least
        single, owner = rows[mask], np.repeat(np.arange(len(rows)), mask.sum(1))
        assert all_right(np.c_[single, np.ones(len(single))] @ of_rows, wanted[owner]).mean() >= least


def test_rows_of_the_box_have_a_bounded_scale(box):
    rows, mask, _ = encoded(box, 200, 0, "train", 0.5)
    scale = np.sqrt(np.square(rows[mask]).mean(-1))
    assert scale.min() > 0.5 and scale.max() < 2


def test_the_box_is_small_and_half_precision():
    weights = BOX / "text_encoder" / "model.safetensors"
    header = json.loads(weights.read_bytes()[8:8 + int.from_bytes(weights.read_bytes()[:8], "little")])
    assert {v["dtype"] for k, v in header.items() if k != "__metadata__"} == {"BF16"}
    sizes = {k: int(np.prod(v["shape"])) for k, v in header.items() if k != "__metadata__"}
    assert sum(size for name, size in sizes.items() if name != "shared.weight") < 300_000
    assert sum(f.stat().st_size for f in (*weights.parent.iterdir(), *(BOX / "tokenizer").iterdir())) < 1_000_000


def test_the_tokenizer_of_the_box_is_the_one_that_the_training_makes():
    config = text_encoder.Config(encoder=dataclasses.replace(
        text_encoder.Config().encoder, vocab_size=Tokenizer.from_folder(BOX / "tokenizer").vocab_size))
    want = (BOX / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8").rstrip("\n")
    assert text_encoder.make_tokenizer(config).to_str() == want
