"""Helios in JAX: an autoregressive video diffusion model for TPU pods and single accelerators."""

__version__ = "0.1.0"
