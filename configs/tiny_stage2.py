"""The model in the box as Mid: the pyramid of three resolutions, continued from the model of stage 1.

  python train.py --config configs/tiny_stage2.py --workdir runs/stage2
  python train.py --config configs/tiny_stage2.py:history --workdir runs/stage2_history

It starts from assets/helios-tiny; for another model of stage 1, --config.objective.init_from=runs/stage1/export. Data
as for configs/tiny_stage1.py. At 64x128 the latents are 8x16, so the levels are 2x4, 4x8 and 8x16 latents: 2, 8 and 32
tokens of 2x2 for each of a chunk's 9 frames; history is always seen at 8x16. Sides that are no multiples of 64 pixels
cannot have three levels.

After the first run a chunk moves as the caption says but begins anywhere: the two lower levels do not look where the
object was. Their part of the loss is small, and what history tells is a small part of that. The second run goes on
from the first (runs/stage2/export) with weights that make the levels' losses alike, and more and cleaner histories.

Hardware: any CPU of two cores with 4 GB of memory, or one GPU or TPU chip.
Time: 1.2 s per step on two cores of an Intel Xeon, with five noisy versions of each of 8 samples; history,
  with six, 1.35 s.
Result: runs/stage2_history/export, a Mid model for sample.py and for diffusers (HeliosPyramidPipeline with CFG-Zero*).

As in configs/tiny_stage1.py all parameters are trained, their average is kept and a tenth of the captions is empty.
In the first run the two lower levels count twice: most of what this model has to learn anew is there, and their tokens
are few.
"""

from ml_collections import ConfigDict

from helios_jax.errors import UserError


def get_config(part: str = "first") -> ConfigDict:
    if part not in ("first", "history"):
        raise UserError(f"--config: the part behind the colon is 'first' or 'history', got {part!r}")
    history = part == "history"
    return ConfigDict({
        "objective": {
            "name": "stage2",
            "data": "data/latents",
            "model": "assets/helios-tiny",
            "init_from": "runs/stage2/export" if history else "assets/helios-tiny",
            "transformer": {
                "num_attention_heads": 5, "attention_head_dim": 32, "rope_dim": (12, 10, 10), "num_layers": 6,
                "ffn_dim": 640, "text_dim": 64, "freq_dim": 128, "restrict_self_attn": False,
            },
            "lora": {"rank": 0, "alpha": 0.0, "targets": ("all-linear",), "full": (), "base_dtype": "float32"},
            "dtype": "float32",
            "unroll": 0,
            "threads": 1,
            "keep_first_frame": True,
            "task_mix": ({"t2v": 0.15, "i2v": 0.05, "v2v": 0.3} if history else
                         {"t2v": 0.4, "i2v": 0.1, "v2v": 0.4}),
            "corruption": {"mode": "noise", "clean_probability": 0.5 if history else 0.1},
            "timesteps": "uniform",
            "sample_ratios": (3, 2, 1) if history else (2, 2, 1),
            "level_weights": (8.0, 3.0, 1.0) if history else (1.0, 1.0, 1.0),
            "caption_dropout": 0.1,
            "sample": {
                "prompts": (
                    "a red circle moves to the right over a dark background",
                    "a blue square drifts up over a light background",
                    "a yellow triangle glides diagonally down left over a gradient background",
                    "a purple cross slides to the upper right over a striped background",
                ),
                "num_frames": 99, "steps": 10, "guidance": 5.0, "reader_prompts": 16, "reader_frames": 66,
            },
            "validation": {"data": "", "items": 64, "batch_size": 16},
            "export_dtype": "bfloat16",
        },
        "seed": 7 if history else 1,
        "batch_size": 8,
        "accumulate": 1,
        "mesh": {"data": 1, "fsdp": 1, "context": 1, "tensor": 1},
        "num_steps": 1000 if history else 1400,
        "log_every": 50,
        "checkpoint_every": 200,
        "keep_last": 2,
        "sample_every": 700,
        "tensorboard": True,
        "ema_decay": 0.995,
        "optimizer": {
            "name": "muon", "learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 30, "final_fraction": 0.02,
            "weight_decay": 0.01, "b2": 0.99, "clip_norm": 1.0,
        },
    })
