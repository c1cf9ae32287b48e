"""Stage 2, first run: from Helios-Base to the pyramid of three resolutions, with the original's values.

  python train.py --config configs/stage2_init.py:14b --workdir runs/stage2_init

It continues from runs/stage1_post/export; for the published model, --config.objective.init_from=PATH/Helios-Base and
--config.objective.model likewise. Every step trains all levels, the middle one twice.
Sizes: 14b (default), 3b, 1.3b.
Data: data/latents, 384x640 (levels of 12x20, 24x40 and 48x80 latents).
Hardware: the original used 64 accelerators of 80 GB with one sample each; the global batch is 64.
Time: not measured here (its authors: 3 to 4 days for both runs of stage 2). Modelled for 64 chips of v5p: 8.7 s per
step, with matrix products at 0.6 of the peak and communication behind them; 28 hours for 11500 steps, at which the
original's schedule was changed by hand. Ended as in configs/stage1_init.py.
Result: runs/stage2_init/export after the last step, a Mid model (pyramid pipeline with CFG-Zero*).

LoRA of rank 256 on every Linear layer, warm-up of 1000 steps. In the first hundreds of steps samples show meaningless
colours: the velocities change their scale. Deliberate differences from the original: see configs/stage1_init.py; and
the warm-up's first update has a rate above zero.
"""

from ml_collections import ConfigDict

from helios_jax.training.presets import original_run


def get_config(size: str = "14b") -> ConfigDict:
    return original_run(size, {
        "objective": {
            "name": "stage2",
            "init_from": "runs/stage1_post/export",
            "lora": {"rank": 256, "targets": ("all-linear",)},
            "timesteps": "uniform",
            "sample_ratios": (1, 2, 1), "stage_range": (0.0, 1 / 3, 2 / 3, 1.0), "gamma": 1 / 3,
            "sample": {"steps": 20},
        },
        "seed": 45,
        "batch_size": 64,
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 1000},
    })
