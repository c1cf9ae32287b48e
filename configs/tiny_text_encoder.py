"""The text encoder and the tokeniser of the model in the box.

  python train.py --config configs/tiny_text_encoder.py --workdir runs/text_encoder
  cp -r runs/text_encoder/export/* assets/helios-tiny/

Hardware: any CPU of two cores.
Time: 37 minutes on two cores of an AMD Zen 5 that others used too, of them 6 of processor time.
Result: runs/text_encoder/export, which holds text_encoder/ and tokenizer/.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({
        "objective": {"name": "text_encoder", "max_tokens": 48, "free_share": 0.5, "noise_share": 0.15,
                      "row_weight": 1.0},
        "batch_size": 128, "num_steps": 2000, "log_every": 100, "checkpoint_every": 1000, "sample_every": 500,
        "seed": 0, "ema_decay": 0.99,
        "optimizer": {"name": "adamw", "learning_rate": 3e-3, "warmup_steps": 100, "schedule": "cosine",
                      "weight_decay": 1e-2},
    })
