"""Stage 3, first run: the student learns to take its teacher's trajectories in few steps (ODE initialisation).

  python -m helios_jax.tools.ode_pairs --model runs/stage2_post/export --prompts prompts.txt --output data/ode \
      --dtype bfloat16 --worker i/n
  python train.py --config configs/stage3_ode.py:14b --workdir runs/stage3_ode

Teacher and start values are the Mid model of configs/stage2_post.py.
Sizes: 14b (default), 3b, 1.3b.
Data: one record of 47 MiB per prompt at 384x640; the authors name about 100 000. The tool runs the transformer 321
times for the five sections of a prompt, each time with and without the prompt.
Hardware: as for configs/stage2_init.py; a step holds nine passes of the model per record.
Time: not measured here. Ended as in configs/stage1_init.py.
Result: runs/stage3_ode/export after the last step, a model that is sampled as Distilled.

LoRA of rank 256 on every Linear layer and on the three history convolutions. Differences from the original: the global
batch is 128 records, the number of devices that its authors are said to have used with one record each; gradients are
clipped at 1, which is what its DeepSpeed configuration does (10 in its own file); every prompt has noise of its own
(the original: one seed for all); noise and choices differ from device to device; samples during training are made with
the student's solver (the original: the teacher's).
"""

from ml_collections import ConfigDict

from helios_jax.training.presets import original_run


def get_config(size: str = "14b") -> ConfigDict:
    config = original_run(size, {
        "objective": {
            "name": "stage3_ode",
            "data": "data/ode",
            "init_from": "runs/stage2_post/export",
            "lora": {"rank": 256, "targets": ("all-linear", "patch_short", "patch_mid", "patch_long")},
            "sections": 3, "weight": 80.0, "levels": 3,
            "sample": {"steps": 2, "guidance": 1.0},
        },
        "seed": 47,
        "batch_size": 128,
        "checkpoint_every": 250,
        "keep_every": 250,
        "ema_decay": 0.99,
        "ema_start_step": 250,
        "optimizer": {"learning_rate": 2e-6, "b1": 0.0, "weight_decay": 1e-3},
    })
    for key in ("task_mix", "corruption", "caption_dropout"):  # of stages 1 and 2
        del config.objective[key]
    return config
