"""Layers of a stack are read by several threads at once, into the same bytes, and a damaged file is still one line."""

from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest

from helios_jax.convert.folder import read_component_config
from helios_jax.convert.rules import leaves
from helios_jax.convert.sources import SafetensorsSource
from helios_jax.errors import UserError
from tests.convert_folders import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("model") / "m"
    write_model(root, ml_dtypes.bfloat16)
    return root / "transformer"


def test_two_layers_are_read_at_the_same_time_and_stand_in_their_order(folder, monkeypatch):
    config = read_component_config(folder, "transformer")
    stack = next(leaf for leaf in leaves("transformer", config) if leaf.stacked and len(leaf.shape) == 3)
    together, read = threading.Barrier(2), SafetensorsSource._read_tensor

    def waiting(self, rule, bounds, out):
        together.wait(timeout=20)  # until another thread reads, too
        read(self, rule, bounds, out)

    with SafetensorsSource(folder, "transformer", config) as source:
        one_by_one = [source.read(stack, (slice(i, i + 1), slice(None), slice(None)))[0] for i in range(2)]
        monkeypatch.setattr(SafetensorsSource, "_read_tensor", waiting)
        np.testing.assert_array_equal(source.read(stack)[:2], one_by_one)


def test_an_error_in_a_thread_reaches_the_caller(folder, monkeypatch):
    config = read_component_config(folder, "transformer")
    stack = next(leaf for leaf in leaves("transformer", config) if leaf.stacked)

    def damaged(self, rule, bounds, out):
        raise UserError("truncated while reading")

    monkeypatch.setattr(SafetensorsSource, "_read_tensor", damaged)
    with SafetensorsSource(folder, "transformer", config) as source, pytest.raises(UserError, match="truncated"):
        source.read(stack)
