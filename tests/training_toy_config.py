"""Configuration of the toy problem, in the form of the files in configs/."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({
        "objective": {"name": "training_toy", "width": 8, "step_sleep": 0.0, "poison_from": -1},
        "batch_size": 4, "num_steps": 40, "log_every": 1, "checkpoint_every": 10, "sample_every": 0, "seed": 3,
        "ema_decay": 0.9, "tensorboard": False,
        "mesh": {"data": 1, "fsdp": 1, "context": 1, "tensor": 1},
        "optimizer": {"name": "adamw", "learning_rate": 0.01, "warmup_steps": 5, "schedule": "cosine"},
    })
