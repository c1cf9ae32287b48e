"""The PyTorch modules that this library is compared with, at tiny sizes, and array layout helpers.

Every module is filled with the deterministic weights of ``tests/golden.py``; the JAX side gets the same weights
through the real converter.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from helios_jax.config import TextEncoderConfig, TransformerConfig, VAEConfig
from helios_jax.convert.state_dict import params_from_torch_state_dict
from tests import golden

TINY_TRANSFORMER = TransformerConfig(num_attention_heads=2, attention_head_dim=16, rope_dim=(4, 6, 6), text_dim=24,
                                     freq_dim=32, ffn_dim=48, num_layers=2)
TINY_VAE = VAEConfig(base_dim=8)
TINY_TEXT = TextEncoderConfig(vocab_size=64, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3)


def channel_last(array) -> np.ndarray:
    """[B, C, ...] -> [B, ..., C]."""
    return np.moveaxis(np.asarray(array), 1, -1)


def channel_first(array) -> np.ndarray:
    """[B, ..., C] -> [B, C, ...]."""
    return np.moveaxis(np.asarray(array, np.float32), -1, 1)


def relative_error(got, want) -> float:
    """Largest absolute error over the range (largest minus smallest value) of the wanted output."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / (want.max() - want.min()))


def filled(module):
    """Fills a PyTorch module with golden weights, in place, and returns it in evaluation mode."""
    import torch

    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            source = "encoder.embed_tokens.weight" if name == "shared.weight" else name
            tensor.copy_(torch.from_numpy(golden.fill(source, tuple(tensor.shape))))
    return module.eval()


@functools.lru_cache(maxsize=16)
def torch_transformer(config: TransformerConfig = TINY_TRANSFORMER):
    from diffusers import HeliosTransformer3DModel

    known = {name: value for name, value in dataclasses.asdict(config).items() if name != "restrict_self_attn"}
    return filled(HeliosTransformer3DModel(**known))


@functools.lru_cache(maxsize=4)
def torch_vae(config: VAEConfig = TINY_VAE):
    from diffusers import AutoencoderKLWan

    return filled(AutoencoderKLWan(**{k: list(v) if isinstance(v, tuple) else v
                                      for k, v in dataclasses.asdict(config).items()}))


@functools.lru_cache(maxsize=4)
def torch_text_encoder(config: TextEncoderConfig = TINY_TEXT):
    from transformers import UMT5Config, UMT5EncoderModel

    return filled(UMT5EncoderModel(UMT5Config(**dataclasses.asdict(config))))


def converted(component: str, config, module, dtype=None):
    """The parameters of a PyTorch module as this library's tree."""
    import torch

    state = {name: tensor.detach().to(torch.float32).numpy() for name, tensor in module.state_dict().items()}
    return params_from_torch_state_dict(component, config, state, dtype)


def with_block_noise(pipe):
    """The original's pyramid pipeline with its block noise factorised in float64 (in float32 a CPU may refuse)."""
    import torch

    def block_noise(batch, channels, frames, height, width, patch_size=(1, 2, 2), device=None, generator=None):
        gamma = 1 / 3
        covariance = torch.eye(4, dtype=torch.float64) * (1 + gamma) - gamma + 1e-8 * torch.eye(4, dtype=torch.float64)
        factor = torch.linalg.cholesky(covariance).float()
        z = torch.randn(batch * channels * frames * (height // 2) * (width // 2), 4, generator=generator)
        noise = (z @ factor.T).view(batch, channels, frames, height // 2, width // 2, 2, 2)
        return noise.permute(0, 1, 2, 3, 5, 4, 6).reshape(batch, channels, frames, height, width)

    pipe.sample_block_noise = block_noise
    return pipe
