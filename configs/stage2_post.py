"""Stage 2, second run: every level once, a lower learning rate, with the original's values; its result is Helios-Mid.

  python train.py --config configs/stage2_post.py:14b --workdir runs/stage2_post

It continues from runs/stage2_init/export with fresh adapters, a fresh optimizer and step 0.
Sizes: 14b (default), 3b, 1.3b.
Data, hardware and deliberate differences: see configs/stage2_init.py. Global batch 64.
Time: not measured here; a step has one pass of the middle level less than one of configs/stage2_init.py. Ended as in
configs/stage1_init.py.
Result: runs/stage2_post/export after the last step.

LoRA of rank 256 on every Linear layer and on all four patch convolutions, warm-up of 500 steps.
"""

from ml_collections import ConfigDict

from helios_jax.training.presets import original_run


def get_config(size: str = "14b") -> ConfigDict:
    return original_run(size, {
        "objective": {
            "name": "stage2",
            "init_from": "runs/stage2_init/export",
            "lora": {"rank": 256,
                     "targets": ("all-linear", "patch_embedding", "patch_short", "patch_mid", "patch_long")},
            "timesteps": "uniform",
            "sample_ratios": (1, 1, 1), "stage_range": (0.0, 1 / 3, 2 / 3, 1.0), "gamma": 1 / 3,
            "sample": {"steps": 20},
        },
        "seed": 46,
        "batch_size": 64,
        "optimizer": {"learning_rate": 3e-5, "warmup_steps": 500},
    })
