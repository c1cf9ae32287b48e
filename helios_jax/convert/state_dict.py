"""The parameter tree of a component from a PyTorch state dict in memory, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from helios_jax.convert.rules import (
    Config,
    Leaf,
    Path,
    as_float_array,
    common_dtype,
    flatten,
    leaves,
    listing,
    match_names,
    param_dtype,
    unflatten,
)
from helios_jax.errors import UserError
from helios_jax.models.quantize import is_quantised


def params_from_torch_state_dict(component: str, config: Config, state_dict: Mapping[str, Any],
                                 dtype: Any = None) -> dict[str, Any]:
    """Converts a PyTorch state dict to our parameter tree.

    Args:
      component: 'transformer', 'vae' or 'text_encoder'.
      config: its configuration.
      state_dict: PyTorch name -> array (anything ``numpy.asarray`` takes), float dtypes only.
      dtype: the dtype the component will compute in, see :func:`~helios_jax.convert.rules.param_dtype`; None keeps
        every tensor's own dtype.

    Returns: nested dicts of numpy arrays; stacked layers share one array with the layer as leading axis.

    Raises:
      UserError: tensors are missing, unexpected or misshapen (all listed), or not of a float dtype.
    """
    stored = match_names(component, config, {n: np.shape(a) for n, a in state_dict.items()}, "state dict")

    def fill(leaf: Leaf) -> np.ndarray:
        arrays = [as_float_array(rule.name, state_dict[stored[rule.name]]) for rule in leaf.tensors]
        leaf_dtype = common_dtype([a.dtype for a in arrays]) if dtype is None else param_dtype(
            component, leaf.path, dtype)
        out = np.empty(leaf.shape, leaf_dtype)
        for i, (rule, array) in enumerate(zip(leaf.tensors, arrays, strict=True)):
            out[i if leaf.stacked else ...] = rule.layout.to_tree(array)
        return out

    return unflatten([(leaf.path, fill(leaf)) for leaf in leaves(component, config)])


def params_to_torch_state_dict(component: str, config: Config, params: Mapping[str, Any],
                               dtype: Any = None) -> dict[str, np.ndarray]:
    """Converts our parameter tree to a PyTorch state dict of contiguous numpy arrays.

    Args:
      params: nested dicts of arrays, as :func:`params_from_torch_state_dict` returns.
      dtype: cast everything to it; None keeps every leaf's dtype.

    Raises:
      UserError: leaves are missing, unexpected or misshapen (all listed).
    """
    by_path = match_leaves(component, config, params)
    state_dict = {}
    for leaf in leaves(component, config):
        array = np.asarray(by_path[leaf.path])
        for i, rule in enumerate(leaf.tensors):
            tensor = rule.layout.to_torch(array[i] if leaf.stacked else array, rule.shape)
            state_dict[rule.name] = np.ascontiguousarray(tensor, dtype or array.dtype).reshape(rule.shape)
    return state_dict


def match_leaves(component: str, config: Config, params: Mapping[str, Any], where: str = "params",
                 precision: str = "none") -> dict[Path, Any]:
    """The leaves of a parameter tree by path, strictly checked against the rules.

    Args:
      params: nested dicts; quantised kernels as dicts of their two arrays.
      where: how the error calls the tree.
      precision: of the kernels.

    Raises:
      UserError: leaves are missing, unexpected or misshapen (all listed); or the tree holds quantised kernels, which
        are made while a model is loaded or converted and never written from memory.
    """
    expected = {leaf.path: leaf for leaf in leaves(component, config, precision)}
    found = dict(flatten(params))
    if any(is_quantised(leaf) for leaf in found.values()):
        raise UserError(f"{where}: quantised parameters of a {component} in memory cannot be written; convert the "
                        "model with python -m helios_jax.convert --precision")
    problems = [listing(kind, names) for kind, names in (
        ("missing", [leaf.key for path, leaf in expected.items() if path not in found]),
        ("unexpected", ["/".join(path) for path in found if path not in expected]),
        ("misshapen", [f"{leaf.key} is {list(_shape(found[path]))}, expected {list(leaf.shape)}"
                       for path, leaf in expected.items() if path in found and _shape(found[path]) != leaf.shape]),
    ) if names]
    if problems:
        raise UserError(f"{where}: not the parameters of this {component}: {'; '.join(problems)}")
    return found


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape) if hasattr(leaf, "shape") else np.shape(leaf)
