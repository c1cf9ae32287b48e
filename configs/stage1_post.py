"""Stage 1, second run: as the first with a lower learning rate, with the original's values; its result is Helios-Base.

  python train.py --config configs/stage1_post.py:14b --workdir runs/stage1_post

It continues from runs/stage1_init/export with fresh adapters, a fresh optimizer and step 0.
Sizes: 14b (default), 3b, 1.3b.
Data, hardware and deliberate differences: see configs/stage1_init.py. Global batch 128.
Time: not measured here; per step modelled as in configs/stage1_init.py, and ended as there; the original does not say
how long it ran.
Result: runs/stage1_post/export after the last step, the adapters by themselves in its folder lora/.
"""

from ml_collections import ConfigDict

from helios_jax.training.presets import original_run


def get_config(size: str = "14b") -> ConfigDict:
    return original_run(size, {
        "objective": {
            "name": "stage1",
            "init_from": "runs/stage1_init/export",
            "lora": {"rank": 128, "targets": ("all-linear", "patch_embedding"),
                     "full": ("patch_short", "patch_mid", "patch_long")},
            "timesteps": "logit_normal",
        },
        "seed": 44,
        "batch_size": 128,
        "optimizer": {"learning_rate": 3e-5},
    })
