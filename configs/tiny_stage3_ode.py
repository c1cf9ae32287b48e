"""The model in the box takes its Mid model's trajectories in few steps: the first part of its distillation.

  python -m helios_jax.tools.ode_pairs --model runs/stage2_history/export --prompts data/latents --output data/ode \
      --shift-from previous --batch 8 --sections 3 --steps 10 --limit 480
  python train.py --config configs/tiny_stage3_ode.py --workdir runs/stage3_ode

It starts from the result of configs/tiny_stage2.py:history; for another Mid model, --config.objective.init_from and
--config.objective.model. Prompts are the first captions of the latent records. --shift-from previous makes the grid
that samplers use (the original trains on another one, see docs/training.md).

Hardware: any CPU of two cores with 4 GB of memory, or one GPU or TPU chip.
Time: 14 minutes of two processor cores for the pairs; 1.3 s per step, 27 minutes, for the training.
Result: runs/stage3_ode/export, a distilled model for sample.py and for diffusers (HeliosPyramidPipeline).

All parameters are trained and their average is kept. The levels' weights make their losses alike, as in
configs/tiny_stage2.py. Of the 200 held-out prompts 189 are right in every attribute, with one step a level as with two.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({
        "objective": {
            "name": "stage3_ode",
            "data": "data/ode",
            "model": "runs/stage2_history/export",
            "init_from": "runs/stage2_history/export",
            "transformer": {
                "num_attention_heads": 5, "attention_head_dim": 32, "rope_dim": (12, 10, 10), "num_layers": 6,
                "ffn_dim": 640, "text_dim": 64, "freq_dim": 128, "restrict_self_attn": False,
            },
            "lora": {"rank": 0, "alpha": 0.0, "targets": ("all-linear",), "full": (), "base_dtype": "float32"},
            "dtype": "float32",
            "unroll": 0,
            "threads": 1,
            "sections": 3,
            "weight": 80.0,
            "levels": 3,
            "level_weights": (8.0, 2.0, 1.0),
            "sample": {
                "prompts": (
                    "a red circle moves to the right over a dark background",
                    "a blue square drifts up over a light background",
                    "a yellow triangle glides diagonally down left over a gradient background",
                    "a purple cross slides to the upper right over a striped background",
                ),
                "num_frames": 99, "steps": 2, "guidance": 1.0, "reader_prompts": 16, "reader_frames": 66,
            },
            "validation": {"data": "", "items": 16, "batch_size": 4},
            "export_dtype": "bfloat16",
        },
        "seed": 2,
        "batch_size": 4,
        "accumulate": 1,
        "mesh": {"data": 1, "fsdp": 1, "context": 1, "tensor": 1},
        "num_steps": 1200,
        "log_every": 50,
        "checkpoint_every": 250,
        "keep_last": 2,
        "sample_every": 500,
        "tensorboard": True,
        "ema_decay": 0.99,
        "ema_start_step": 100,
        "optimizer": {
            "name": "muon", "learning_rate": 8e-4, "schedule": "cosine", "warmup_steps": 50, "final_fraction": 0.02,
            "weight_decay": 0.01, "b2": 0.99, "clip_norm": 1.0,
        },
    })
