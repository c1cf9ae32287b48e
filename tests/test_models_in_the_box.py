"""The models in the box: each is what its folder says, and what they share is stored once."""

from __future__ import annotations

from pathlib import Path

import pytest

import sample
from helios_jax.pipeline.pipeline import HeliosPipeline

ASSETS = Path(__file__).resolve().parents[1] / "assets"
BASE, MID, DISTILLED, RESTRICTED = (ASSETS / f"helios-tiny{variant}" for variant in ("", "-mid", "-distilled",
                                                                                      "-restricted"))


@pytest.mark.parametrize("folder", [BASE, MID, DISTILLED], ids=["base", "mid", "distilled"])
def test_each_variant_loads_and_names_itself(folder, request):
    pipe = HeliosPipeline.from_pretrained(folder)
    assert pipe.index.variant == request.node.callspec.id and pipe.index.native_size == (64, 128)


def test_the_restricted_model_is_a_distilled_one_and_restricted():
    pipe = HeliosPipeline.from_pretrained(RESTRICTED)
    assert pipe.index.variant == "distilled" and pipe.folder.transformer.restrict_self_attn


def test_the_default_of_sampling_is_distilled():
    assert sample.BOX == DISTILLED


def test_what_the_variants_share_is_stored_once_and_all_of_it_is_small():
    folders = (BASE, MID, DISTILLED, RESTRICTED)
    stored = {path.resolve() for folder in folders for path in folder.rglob("*") if path.is_file()}
    sizes = {path: path.stat().st_size for path in stored}
    assert sum(sizes.values()) <= 35e6
    assert sum(size for path, size in sizes.items() if path.is_relative_to(BASE)) <= 12e6
    for name in ("vae", "text_encoder", "tokenizer"):
        assert {(folder / name).resolve() for folder in (MID, DISTILLED, RESTRICTED)} == {BASE / name}
