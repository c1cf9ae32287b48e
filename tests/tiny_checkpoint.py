"""Tiny checkpoints in the published layout, for tests that start from a folder as a user does. No PyTorch needed.

The weights are the fillers of ``tests/golden.py``, so numbers have the magnitudes of a real model, every prompt, seed
and history frame shows in the result, and two processes write the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from helios_jax.config import ModelIndex, SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from helios_jax.convert import params_from_torch_state_dict, tensor_rules
from helios_jax.convert.export import export_pipeline
from helios_jax.training.tokenizer import save_tokenizer, train_tokenizer
from tests.golden import fill

VOCAB_SIZE = 256
CONFIGS = {
    "transformer": TransformerConfig(num_attention_heads=2, attention_head_dim=16, rope_dim=(4, 6, 6), text_dim=24,
                                     freq_dim=32, ffn_dim=48, num_layers=2),
    "vae": VAEConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1),
    "text_encoder": TextEncoderConfig(vocab_size=VOCAB_SIZE, d_model=24, d_kv=8, d_ff=40, num_layers=1, num_heads=3),
}
# The text encoder of the recorded run from text; its vocabulary is too small for a real tokenizer.
TEXT_OF_RECORDED_RUNS = TextEncoderConfig(vocab_size=64, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3)
INDEX = {
    "base": ModelIndex(native_size=(64, 64)),
    "mid": ModelIndex("HeliosPyramidPipeline", is_cfg_zero_star=True, native_size=(64, 64)),
    "distilled": ModelIndex("HeliosPyramidPipeline", "HeliosDMDScheduler", is_distilled=True, native_size=(64, 64)),
}
SCHEDULER = {
    "base": SchedulerConfig(stages=1, use_dynamic_shifting=True, time_shift_type="exponential"),
    "mid": SchedulerConfig(use_dynamic_shifting=True, time_shift_type="exponential"),
    "distilled": SchedulerConfig("HeliosDMDScheduler", use_dynamic_shifting=True, time_shift_type="linear"),
}
_CAPTIONS = ("a red circle moving right on a dark background", "a blue square moves up on a white background",
             "the green triangle drifts left", "a yellow star moving down on a grey background")


def tiny_params(component: str, config=None) -> dict:
    """The filled parameters of a component."""
    config = config or CONFIGS[component]
    names = {"shared.weight": "encoder.embed_tokens.weight"}
    return params_from_torch_state_dict(component, config, {
        rule.name: fill(names.get(rule.name, rule.name), rule.shape) for rule in tensor_rules(component, config)})


def write_tiny_checkpoint(folder: str | Path, variant: str = "base", **options) -> Path:
    """Writes a complete model folder.

    Args:
      folder: to be created.
      variant: 'base', 'mid' or 'distilled'.
      options: of :func:`helios_jax.convert.export.export_pipeline`.
    """
    folder = Path(folder)
    tokenizer = folder.parent / f"{folder.name}_tokenizer"
    save_tokenizer(train_tokenizer(_CAPTIONS, VOCAB_SIZE), tokenizer)
    export_pipeline(folder, {c: tiny_params(c) for c in CONFIGS}, CONFIGS, index=INDEX[variant],
                    scheduler=SCHEDULER[variant], tokenizer=tokenizer, **options)
    return folder
