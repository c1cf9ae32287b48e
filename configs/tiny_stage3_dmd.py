"""The model in the box as Distilled: its few-step student matches the distribution of its Base model.

  python train.py --config configs/tiny_stage3_dmd.py --workdir runs/stage3_dmd
  python train.py --config configs/tiny_stage3_dmd.py:gan --workdir runs/stage3_gan

The first starts from the result of configs/tiny_stage3_ode.py, gan from the first; teacher and critic are
assets/helios-tiny. Data as for configs/tiny_stage1.py. The student is trained on the grid that samplers use
(shift_from previous).

Hardware: any CPU of two cores with 4 GB of memory, or one GPU or TPU chip.
Time: 3.4 to 4.7 s per step on one core of an Intel Xeon, 23 minutes in all. gan: 13.6 s a step with another training
  beside it, 59 minutes in all.
Result: runs/stage3_dmd/export, a distilled model for sample.py and for diffusers (HeliosPyramidPipeline).

All parameters of the student are trained and their average is kept; the critic has adapters. gan adds small heads
behind three blocks; latents of 8x16 are too small for a window, so the heads see them whole. The noise of the scores is
shifted by 3 as in the training of Base, because the shift of this resolution (0.5) would leave out the noise levels at
which background, place and direction are decided. A level takes one step in training, so that the gradient always
reaches the lowest one, but two where there is no history, as in sampling. Longer is not better: earlier runs from a
weaker student (rate 4e-4, w = 4, which is the guidance of 5 that Base is sampled with) gained up to step 300 and had
lost it all by step 700.
"""

from ml_collections import ConfigDict

from helios_jax.errors import UserError


def get_config(part: str = "dmd") -> ConfigDict:
    if part not in ("dmd", "gan"):
        raise UserError(f"--config: the part behind the colon is 'dmd' or 'gan', got {part!r}")
    gan = part == "gan"
    optimizer = {
        "name": "adamw", "learning_rate": 5e-4, "schedule": "constant", "warmup_steps": 20, "b1": 0.0, "b2": 0.999,
        "weight_decay": 1e-3, "clip_norm": 1.0,
    }
    return ConfigDict({
        "objective": {
            "name": "stage3_dmd",
            "data": "data/latents",
            "model": "assets/helios-tiny",
            "init_from": "runs/stage3_dmd/export" if gan else "runs/stage3_ode/export",
            "teacher": "assets/helios-tiny",
            "transformer": {
                "num_attention_heads": 5, "attention_head_dim": 32, "rope_dim": (12, 10, 10), "num_layers": 6,
                "ffn_dim": 640, "text_dim": 64, "freq_dim": 128, "restrict_self_attn": False,
            },
            "lora": {"rank": 0, "alpha": 0.0, "targets": ("all-linear",), "full": (), "base_dtype": "float32"},
            "critic": {
                "lora": {"rank": 32, "alpha": 0.0, "targets": ("all-linear",), "full": (), "base_dtype": "float32"},
                "optimizer": optimizer,
            },
            "dtype": "float32",
            "unroll": 0,
            "threads": 1,
            "student_every": 2,
            "guidance": 2.5,
            "negative_prompt": "",
            "rollout": {"steps": (1, 1, 1), "amplify_first_chunk": True, "shift_from": "previous"},
            "renoise": {
                "alpha": 4.0, "beta": 1.5, "decay_steps": 1 if gan else 500, "lowest": 20, "highest": 980, "shift": 3.0,
            },
            "gan": {
                "width": 64 if gan else 0, "groups": 8, "blocks": (1, 3, 5), "start_step": 20, "crop": 1,
                "student_weight": 0.05, "head_weight": 0.01, "r1_weight": 100.0, "r1_sigma": 0.1,
            },
            "task_mix": {"t2v": 0.25, "i2v": 0.05, "v2v": 0.3},
            "corruption": {"mode": "noise", "clean_probability": 0.5, "saturation": True},
            "sample": {
                "prompts": (
                    "a red circle moves to the right over a dark background",
                    "a blue square drifts up over a light background",
                    "a yellow triangle glides diagonally down left over a gradient background",
                    "a purple cross slides to the upper right over a striped background",
                ),
                "num_frames": 99, "steps": 2, "guidance": 1.0, "reader_prompts": 16, "reader_frames": 66,
            },
            "export_dtype": "bfloat16",
        },
        "seed": 3,
        "batch_size": 8,
        "accumulate": 1,
        "mesh": {"data": 1, "fsdp": 1, "context": 1, "tensor": 1},
        "num_steps": 220 if gan else 300,
        "log_every": 50,
        "checkpoint_every": 100,
        "keep_last": 2,
        "sample_every": 500,
        "tensorboard": True,
        "ema_decay": 0.98,
        "ema_start_step": 50,
        "optimizer": optimizer | {
            "name": "muon", "learning_rate": 1e-4 if gan else 2e-4, "schedule": "cosine", "warmup_steps": 30,
            "final_fraction": 0.1,
        },
    })
