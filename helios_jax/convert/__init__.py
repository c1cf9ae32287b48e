"""Checkpoint conversion between the published PyTorch layout and our parameter trees."""

from helios_jax.convert.folder import ModelFolder, read_model_folder, resolve_model
from helios_jax.convert.load import load_component, load_pipeline_params, load_wan_transformer
from helios_jax.convert.rules import COMPONENTS, abstract_params, leaves, param_dtype, tensor_rules
from helios_jax.convert.state_dict import params_from_torch_state_dict, params_to_torch_state_dict
from helios_jax.convert.wan import init_history_patches

__all__ = [
    "COMPONENTS",
    "ModelFolder",
    "abstract_params",
    "init_history_patches",
    "leaves",
    "load_component",
    "load_pipeline_params",
    "load_wan_transformer",
    "param_dtype",
    "params_from_torch_state_dict",
    "params_to_torch_state_dict",
    "read_model_folder",
    "resolve_model",
    "tensor_rules",
]
