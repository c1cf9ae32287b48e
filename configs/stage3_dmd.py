"""Stage 3, later runs: the student matches Helios-Base's distribution, with the original's values.

  python train.py --config configs/stage3_dmd.py:post --workdir runs/stage3_post
  python train.py --config configs/stage3_dmd.py:gan --workdir runs/stage3_gan

post: distribution matching alone. gan: heads judge, too, from step 1000 on, and a tenth of the damaged histories is
blurred instead of noised. Both start from runs/stage3_ode/export (configs/stage3_ode.py), as the original's files do;
its example of merging hints at gan starting from post instead: --config.objective.init_from=runs/stage3_post/export.
Teacher and critic are runs/stage1_post/export. Other sizes than 14b: post-3b, post-1.3b, gan-3b, gan-1.3b; their heads
stand behind blocks 5, 15 and 25.
Data: as for configs/stage1_init.py; only gan looks at the chunk itself, post at history and caption.
Hardware: as for configs/stage1_init.py; two frozen transformers, their adapters, and 1 G parameters of heads.
Time: not measured here. Modelled for 64 chips of v5p (docs/pods.md): 18.1 s for the critic's turn, which every step
has, 26.6 s for the student's, which every fifth has besides. The original's example names 2500 steps of post and 2000
of gan. Ended as in configs/stage1_init.py.
Result: the student, runs/stage3_gan/export after the last step, a model that is sampled as Distilled.

Differences from the original: the global batch is 128, the number of devices that its authors are said to have used
with one sample each; gradients are clipped at 1, which is what its DeepSpeed configuration does (10 in its own file);
the negative prompt is empty (the original has a long list, which --config.objective.negative_prompt takes); and those
that helios_jax/training/stage3_dmd.py lists.
"""

from ml_collections import ConfigDict

from helios_jax.errors import UserError
from helios_jax.training.presets import original_run, transformer


def get_config(which: str = "post") -> ConfigDict:
    part, _, size = which.partition("-")
    if part not in ("post", "gan"):
        raise UserError(f"--config: the part behind the colon is 'post' or 'gan', got {part!r}")
    size = size or "14b"
    layers = transformer(size)["num_layers"]
    optimizer = {"name": "adamw", "learning_rate": 2e-6, "b1": 0.0, "b2": 0.999, "eps": 1e-8, "weight_decay": 1e-3,
                 "weight_decay_on": "all", "clip_norm": 1.0, "schedule": "constant", "warmup_steps": 0}
    return original_run(size, {
        "objective": {
            "name": "stage3_dmd",
            "init_from": "runs/stage3_ode/export",
            "teacher": "runs/stage1_post/export",
            "lora": {"rank": 256, "targets": ("all-linear", "patch_short", "patch_mid", "patch_long")},
            "critic": {
                "lora": {"rank": 256, "alpha": 0.0, "targets": ("all-linear",), "full": (), "base_dtype": "bfloat16"},
                "optimizer": optimizer | {"learning_rate": 4e-7},
            },
            "student_every": 5,
            "guidance": 3.0,
            "negative_prompt": "",
            "rollout": {"steps": (2, 2, 2), "amplify_first_chunk": True, "shift_from": "own"},
            "renoise": {
                "alpha": 4.0, "beta": 1.5, "decay_steps": 500, "lowest": 20, "highest": 980, "shift": 0.0,
            },
            "gan": {
                "width": 768 if part == "gan" else 0, "groups": 32, "blocks": tuple(range(5, layers, 10)),
                "start_step": 1000, "crop": 2, "student_weight": 0.05, "head_weight": 0.01, "r1_weight": 100.0,
                "r1_sigma": 0.1,
            },
            "task_mix": {"t2v": 0.4, "i2v": 0.0, "v2v": 0.5},
            "corruption": {
                "mode": "random" if part == "gan" else "noise", "noise_probability": 0.9, "clean_probability": 0.1,
                "saturation": True, "saturation_clean_probability": 0.1, "saturation_min": 0.3, "saturation_max": 1.7,
            },
            "timesteps": "uniform",
            "stage_range": (0.0, 1 / 3, 2 / 3, 1.0), "gamma": 1 / 3,
            "sample": {"steps": 2, "guidance": 1.0},
            "validation": {"items": 0},
        },
        "seed": 49,
        "batch_size": 128,
        "checkpoint_every": 250,
        "keep_every": 250,
        "sample_every": 250,
        "ema_decay": 0.99,
        "ema_start_step": 750,
        "optimizer": optimizer,
    })
