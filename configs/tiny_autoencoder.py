"""The VAE of the model in the box (assets/helios-tiny/vae): Wan's architecture at base width 8, 0.92 M parameters.

Two stages. Single frames first: they are cheap, so that thousands of different ones are seen and colour and shape are
learned in minutes. Then clips of 9 frames, from the first stage's export: the same network learns motion.

    python train.py --config configs/tiny_autoencoder.py:images --workdir runs/vae/images
    python train.py --config configs/tiny_autoencoder.py:clips --workdir runs/vae/clips

Hardware: any CPU of two cores.
Time: 9 and 14 minutes on two cores of an AMD Zen 5 that others used too.
Result: runs/vae/clips/export; 32.8 dB on held-out clips of 33 frames, all attributes readable in all of them
(docs/model_card.md).
"""

from ml_collections import ConfigDict

from helios_jax.errors import UserError


def get_config(stage: str = "images") -> ConfigDict:
    if stage not in ("images", "clips"):
        raise UserError(f"--config: the stage behind the colon is 'images' or 'clips', got {stage!r}")
    images = stage == "images"
    return ConfigDict({
        "objective": {
            "name": "autoencoder",
            "frames": 1 if images else 9, "height": 64, "width": 64,
            "l1_weight": 1.0, "l2_weight": 2.0, "gradient_weight": 0.5, "kl_weight": 1e-5,
            "latent_noise": 0.1,
            "invert_channels": 0.5 if images else 0.2,
            "init_from": "" if images else "runs/vae/images/export",
            "eval_clips": 4, "stat_clips": 8 if images else 32,
        },
        "seed": 0 if images else 1,
        "batch_size": 8 if images else 4,
        "num_steps": 2000 if images else 700,
        "log_every": 50 if images else 20,
        "checkpoint_every": 500 if images else 100,
        "sample_every": 0 if images else 200,
        "ema_decay": 0.99,
        "optimizer": {"name": "muon", "learning_rate": 3e-3 if images else 2e-3, "warmup_steps": 20,
                      "schedule": "cosine", "final_fraction": 0.1, "weight_decay": 0.0},
    })
