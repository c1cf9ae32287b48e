"""Stage 1, first run: from Wan 2.1 to a model that continues a history, with the original's values.

  python -m helios_jax.convert --from Wan-AI/Wan2.1-T2V-14B-Diffusers --from-wan --to models/start-14b \
      --format diffusers
  python train.py --config configs/stage1_init.py:14b --workdir runs/stage1_init

Sizes: 14b (default), 1.3b (start from Wan-AI/Wan2.1-T2V-1.3B-Diffusers), 3b. There are no weights of 3b to start from,
so that run trains every parameter from random ones, with a tenth of the captions empty; models/start-3b then needs no
transformer, only vae/, text_encoder/ and tokenizer/.
Data: data/latents, 384x640 (latents 48x80), sections of 33 frames.
Hardware: the original used 64 accelerators of 80 GB with two samples each; the global batch is 128. 64 chips of v5p
hold the 14b run as it stands; other slices and meshes: docs/pods.md.
Time: not measured here (its authors: 2 to 3 days for both runs of stage 1). Modelled for 64 chips of v5p: 9.3 s per
step, with matrix products at 0.6 of the peak and communication behind them; 14 hours for the 5500 steps that a user of
the original reports. End it when the validation loss no longer falls: stop it with SIGTERM and start it again with
--config.num_steps=N, N being the step that it reached, which writes the export.
Result: runs/stage1_init/export after the last step.

LoRA of rank 128 on every Linear layer and on patch_embedding; the history convolutions are trained whole. Different
from the original on purpose, because it does not do what its authors intended there:
  * the history convolutions start from Wan's patch embedding (theirs start at random: the copy precedes the loading);
  * every epoch shows another section of a clip (theirs keeps one section per clip for ever);
  * noise levels and decisions are drawn per sample (theirs: per device batch, the same on all devices);
  * frames that hold nothing are never corrupted (theirs tests the whole batch).
As in the original there is no warm-up: its schedule ignores the 500 steps that its file asks for.
"""

from ml_collections import ConfigDict

from helios_jax.training.presets import original_run


def get_config(size: str = "14b") -> ConfigDict:
    objective = {"name": "stage1", "timesteps": "logit_normal"}
    if size == "3b":
        objective |= {"caption_dropout": 0.1}
    else:
        objective |= {
            "init_from": f"models/start-{size}",
            "lora": {"rank": 128, "targets": ("all-linear", "patch_embedding"),
                     "full": ("patch_short", "patch_mid", "patch_long")},
        }
    return original_run(size, {"objective": objective, "optimizer": {"learning_rate": 5e-5}, "seed": 43,
                               "batch_size": 128})
