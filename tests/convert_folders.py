"""Tiny models for the conversion tests, written without PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from helios_jax.config import ModelIndex, SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from helios_jax.convert import params_from_torch_state_dict, tensor_rules
from helios_jax.convert.export import export_pipeline
from helios_jax.convert.rules import flatten

TRANSFORMER = TransformerConfig(
    num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=16, freq_dim=8, ffn_dim=20,
    num_layers=2, rope_dim=(4, 4, 4))
VAE = VAEConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
TEXT_ENCODER = TextEncoderConfig(vocab_size=64, d_model=16, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
CONFIGS = {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": TEXT_ENCODER}
SCHEDULER = SchedulerConfig(stages=1, use_dynamic_shifting=True)


def state_dict(component, config, dtype=np.float32, seed=0):
    """Random tensors under the checkpoint's names."""
    rng = np.random.default_rng(seed)
    return {r.name: (0.05 * rng.standard_normal(r.shape)).astype(dtype) for r in tensor_rules(component, config)}


def random_params(component, config, dtype=np.float32, seed=0):
    return params_from_torch_state_dict(component, config, state_dict(component, config, dtype, seed))


def write_tokenizer(folder: Path) -> Path:
    """A word-level tokenizer with the special tokens of T5."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True)
    words = ["<pad>", "</s>", "<unk>", "a", "red", "circle", "moves", "left"]
    tokenizer = Tokenizer(models.Unigram([(w, -float(i)) for i, w in enumerate(words)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "T5TokenizerFast", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
         "extra_ids": 0}))
    return folder


def write_model(folder: Path, dtype=np.float32, index: ModelIndex | None = None, scheduler=SCHEDULER, **options):
    """A complete tiny model folder; returns component -> parameters."""
    tokenizer = write_tokenizer(folder.parent / f"{folder.name}-tokenizer" / "tokenizer")
    params = {c: random_params(c, config, dtype, seed=i) for i, (c, config) in enumerate(CONFIGS.items())}
    export_pipeline(folder, params, CONFIGS, index=index or ModelIndex(), scheduler=scheduler,
                    tokenizer=tokenizer, **options)
    return params


def assert_trees_equal(actual, expected):
    """Same paths, dtypes and bits."""
    actual, expected = dict(flatten(actual)), dict(flatten(expected))
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        a, b = np.asarray(actual[path]), np.asarray(value)
        assert a.dtype == b.dtype, path
        assert a.shape == b.shape, path
        assert a.tobytes() == b.tobytes(), path
