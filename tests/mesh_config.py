"""Stage 1 of a transformer with four heads on random latents: what the tests of sharding train."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({
        "objective": {
            "name": "stage1", "data": "",
            "transformer": {"num_attention_heads": 4, "attention_head_dim": 8, "rope_dim": (4, 2, 2), "in_channels": 4,
                            "out_channels": 4, "text_dim": 6, "freq_dim": 8, "ffn_dim": 64, "num_layers": 2},
            "remat": None,
        },
        "batch_size": 8, "accumulate": 1, "num_steps": 5, "log_every": 1, "checkpoint_every": 100, "seed": 3,
        "ema_decay": 0.9, "tensorboard": False,
        "optimizer": {"name": "adamw", "learning_rate": 3e-3, "schedule": "constant"},
        "mesh": {"data": 1, "fsdp": 1, "context": 1, "tensor": 1},
    })
