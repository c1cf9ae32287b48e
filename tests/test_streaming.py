"""Weights that stay in the host's memory give the numbers of weights on the device, and what they need is counted."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sample
from helios_jax.convert.folder import read_model_folder
from helios_jax.errors import UserError
from helios_jax.models import streaming
from helios_jax.models.streaming import scan_layers, split_layers
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.pipeline.placement import Placement
from helios_jax.sharding import MeshConfig
from tests.tiny_checkpoint import write_tiny_checkpoint

SMALL = dict(num_frames=66, height=64, width=64, seed=3)


@pytest.fixture(scope="module", params=["base", "distilled"])
def checkpoint(request, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def stream_all(monkeypatch):
    """Lets the small weights of a tiny model stream, too."""
    monkeypatch.setattr(streaming, "SMALL_WEIGHT", 1)


@pytest.mark.parametrize("precision", ["none", "int8_weights"])
def test_a_streamed_video_is_the_one_of_weights_on_the_device(checkpoint, stream_all, precision):
    options = SMALL | (dict(steps=2, guidance_scale=3.0) if "base" in str(checkpoint) else dict(steps=1))
    plain = HeliosPipeline.from_pretrained(checkpoint, unroll=1, precision=precision)
    streamed = HeliosPipeline.from_pretrained(checkpoint, unroll=1, precision=precision, stream_weights=True)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(streamed.params["transformer"]["blocks"])}
    assert kinds == {"pinned_host"}
    assert streamed.params["text_encoder"]["shared"]["weight"].sharding.memory_kind == "pinned_host"
    assert streamed.params["transformer"]["proj_out"]["kernel"].sharding.memory_kind == "device"
    want, got = plain("a red circle", **options), streamed("a red circle", **options)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("in_place", [False, True])
def test_layers_taken_apart_lie_where_their_stack_lay_which_is_given_up_on_request(in_place):
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "tensor"))
    given = {"divided": jax.device_put(jnp.arange(24.0).reshape(4, 2, 3), divided), "bound_to_none": jnp.arange(4)}
    want = jax.tree.map(np.array, given)
    layers = split_layers(given | {"on_host": np.arange(4)}, in_place)
    assert len(layers) == 4 and all(leaf.is_deleted() == in_place for leaf in given.values())
    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(layer["divided"], want["divided"][i])
        assert layer["divided"].sharding.spec == jax.sharding.PartitionSpec(None, "tensor")
        assert layer["bound_to_none"] == layer["on_host"] == i
        assert not layer["bound_to_none"].committed and not layer["on_host"].committed


def test_small_weights_stay_on_the_device(checkpoint):
    blocks = HeliosPipeline.from_pretrained(checkpoint, stream_weights=True).params["transformer"]["blocks"]
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(blocks)} == {"device"}


@pytest.mark.parametrize("form", ["stacked", "streamed", "apart"])
@pytest.mark.parametrize("with_last", [False, True])
@pytest.mark.parametrize(("layers", "unroll"), [(1, 1), (2, 5), (5, 1), (5, 2)])
def test_the_loop_is_a_loop_in_python(form, with_last, layers, unroll):
    weights = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(layers, 3, 3)).astype(np.float32))}
    others = jnp.arange(layers, dtype=jnp.float32)

    def body(x, layer, other):
        x = jnp.tanh(x @ layer["w"]) + other
        return x, x.sum()

    def last(x, layer, other):
        return x @ layer["w"] - other, None

    x, sums = jnp.ones((2, 3)), []
    for i in range(layers):
        if with_last and i == layers - 1:
            x, _ = last(x, {"w": weights["w"][i]}, others[i])
        else:
            x, total = body(x, {"w": weights["w"][i]}, others[i])
            sums.append(total)
    weights = split_layers(weights) if form == "apart" else weights
    got, outs = jax.jit(lambda w: scan_layers(body, jnp.ones((2, 3)), w, others, last=last if with_last else None,
                                              unroll=unroll, streamed=form == "streamed"))(weights)
    np.testing.assert_allclose(got, x, rtol=1e-6)
    assert (outs is None) == (not sums)
    np.testing.assert_allclose([] if outs is None else outs, sums, rtol=1e-6)


def test_layers_apart_are_traced_and_lowered_once_however_many_there_are():
    traced = []

    def body(x, layer, _):
        traced.append(x)
        return jnp.tanh(x @ layer["w"]), None

    def lowered(layers):
        weights = split_layers({"w": jnp.ones((layers, 3, 3))})
        return jax.jit(lambda w: scan_layers(body, jnp.ones((2, 3)), w)[0]).lower(weights).as_text()

    text = lowered(7)
    assert len(traced) == 1
    assert text.count("stablehlo.tanh") == 1 and len(re.findall(r"\bcall @body\b", text)) == 7


def test_bytes_are_those_of_the_loaded_arrays(checkpoint, stream_all):
    folder = read_model_folder(checkpoint)
    dtypes = {"transformer": jnp.bfloat16, "text_encoder": jnp.bfloat16, "vae": jnp.float32}
    params = HeliosPipeline.from_pretrained(checkpoint, dtype="bfloat16", vae_dtype="float32",
                                            stream_weights=True).params
    counted = Placement(folder, dtypes, streamed=True).bytes()
    for kind, expected in (("device", counted.device), ("pinned_host", counted.host)):
        assert sum(x.nbytes for x in jax.tree.leaves(params) if x.sharding.memory_kind == kind) == expected
    blocks = jax.tree.leaves(params["transformer"]["blocks"])
    table = params["text_encoder"]["shared"]["weight"].nbytes
    text_blocks = jax.tree.leaves(params["text_encoder"]["encoder"]["block"])
    two = [sum(2 * x.nbytes // x.shape[0] for x in leaves if x.sharding.memory_kind == "pinned_host")
           for leaves in (blocks, text_blocks)]
    assert counted.visiting == max(*two, table)
    whole = Placement(folder, dtypes).bytes()
    assert whole.device == counted.device + counted.host and whole.host == whole.visiting == 0


def test_streaming_goes_with_one_device(checkpoint, tmp_path, capsys):
    with pytest.raises(UserError, match="stream_weights: goes with one device, not with a mesh"):
        HeliosPipeline.from_pretrained(checkpoint, mesh=MeshConfig(), stream_weights=True)
    config = tmp_path / "options.json"
    config.write_text(json.dumps({"prompt": "a red circle", "mesh": {"fsdp": 1}, "stream_weights": True,
                                  "model": str(checkpoint), "output": str(tmp_path / "video.mp4"), "quiet": True}))
    with pytest.raises(SystemExit) as end:
        sample.main(["--config", str(config)])
    assert end.value.code == 2 and "stream_weights: goes with one device" in capsys.readouterr().err
    assert not (tmp_path / "video.mp4").exists()
