"""Checkpoint conversion between the published PyTorch layout and our parameter trees."""

from helios_jax.convert.rules import abstract_params, leaves, param_dtype, tensor_rules
from helios_jax.convert.state_dict import params_from_torch_state_dict, params_to_torch_state_dict

__all__ = [
    "abstract_params",
    "leaves",
    "param_dtype",
    "params_from_torch_state_dict",
    "params_to_torch_state_dict",
    "tensor_rules",
]
