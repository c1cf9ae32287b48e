"""Many devices compute what one does; whatever belongs to a parameter lies where it lies; meshes that do not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from helios_jax.data import pipeline
from helios_jax.data.buckets import bucketed_dataset, folder_buckets
from helios_jax.data.pipeline import clip_dataset
from helios_jax.data.random_latents import write_random_latents, write_random_ode_pairs
from helios_jax.errors import UserError
from helios_jax.models.embedders import PatchEmbedding
from helios_jax.models.partition import declared_axes
from helios_jax.sharding import DEFAULT_RULES, MeshConfig, Partition, constrain, param_shardings, use
from helios_jax.training.config import run_config

ROOT = Path(__file__).resolve().parents[1]


def losses(workdir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def run_cases(folder: Path, *cases: str, write=write_random_latents) -> Path:
    """Trains the cases of mesh_worker.py in a process of its own, on random data."""
    write(folder / "latents", clips=12, sections=3, height=8, width=8, channels=4, text_rows=5, text_dim=6)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "tests/mesh_worker.py", str(folder), *cases], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def assert_equal_losses(folder: Path, reference: str, case: str) -> None:
    expected, found = losses(folder / reference), losses(folder / case)
    np.testing.assert_allclose([found[step] for step in range(1, 6)], [expected[step] for step in range(1, 6)],
                               rtol=0, atol=1e-5)
    assert expected[1] != expected[5]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return run_cases(tmp_path_factory.mktemp("meshes"), "one", "mixed", "context")


@pytest.mark.parametrize("case", ["mixed", "context"])
def test_losses_on_a_mesh_are_those_of_one_device(trained, case):
    assert_equal_losses(trained, "one", case)


@pytest.mark.slow
def test_eight_whole_copies_and_batches_in_parts_give_the_losses_of_one_device(tmp_path):
    run_cases(tmp_path, "one", "data", "parts")
    for case in ("data", "parts"):
        assert_equal_losses(tmp_path, "one", case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stage1_lora", "stage2", "stage2_lora"])
def test_losses_on_four_meshes_are_those_of_one_device(kind, tmp_path):
    """Stage 1 with all parameters stands above."""
    meshes = ("data", "fsdp", "mixed", "context")
    run_cases(tmp_path, f"{kind}:one", *(f"{kind}:{mesh}" for mesh in meshes))
    for mesh in meshes:
        assert_equal_losses(tmp_path, f"{kind}-one", f"{kind}-{mesh}")


@pytest.mark.slow
def test_muon_on_a_mesh_gives_the_losses_of_one_device(tmp_path):
    assert_equal_losses(run_cases(tmp_path, "one_muon", "fsdp_muon"), "one_muon", "fsdp_muon")


@pytest.mark.slow
def test_ode_regression_on_a_mesh_gives_the_losses_of_one_device(tmp_path):
    run_cases(tmp_path, "ode", "ode_mixed", "ode_context", write=write_random_ode_pairs)
    for case in ("ode_mixed", "ode_context"):
        assert_equal_losses(tmp_path, "ode", case)


def test_a_checkpoint_is_continued_on_another_mesh(trained):
    expected, found = losses(trained / "one"), losses(trained / "context")
    assert sorted(found) == list(range(1, 8))
    np.testing.assert_allclose([found[6], found[7]], [expected[6], expected[7]], rtol=0, atol=1e-5)


def test_average_and_optimizer_state_lie_where_their_parameter_lies(trained):
    shards = json.loads((trained / "shards.json").read_text())
    kernel = "['blocks']['attn1']['to_q']['kernel']"
    whole, part = shards[f".params{kernel}"]
    assert whole == [2, 32, 32] and part == [2, 16, 16]  # embed over fsdp, heads over tensor
    followers = [name for name in shards if name.endswith(kernel)]
    assert len(followers) == 3  # the parameter, its average, Muon's momentum
    assert all(shards[name][1] == part for name in followers)
    norm = [shards[name] for name in shards if name.endswith("['norm_q']['weight']") and "attn1" in name]
    assert norm == [[[2, 32], [2, 16]]] * 4  # parameter, average, and Adam's two moments


def test_adapters_are_divided_like_their_kernels():
    assert declared_axes(("lora", "blocks", "attn1", "to_q", "a"), 3) == ("layers", "embed", None)
    assert declared_axes(("blocks", "ffn", "net_0", "proj", "b"), 3) == ("layers", None, "mlp")
    assert declared_axes(("lora", "patch_long", "a"), 5) == (None,) * 5
    assert declared_axes(("proj_out", "b"), 2) == (None, None)
    assert declared_axes(("layer", "kernel"), 2) is None


def test_large_adapters_are_divided_over_fsdp_on_whichever_side_is_free():
    mesh = jax.sharding.AbstractMesh((1, 8, 1, 2), ("data", "fsdp", "context", "tensor"))
    layout = Partition(mesh, dict(DEFAULT_RULES))

    def spec(path: tuple[str, ...], *shape: int) -> PartitionSpec:
        tree = jax.ShapeDtypeStruct(shape, np.float32)
        for name in reversed(path):
            tree = {name: tree}
        return jax.tree.leaves(param_shardings(layout, tree))[0].spec

    to_q, to_out = ("lora", "blocks", "attn1", "to_q"), ("lora", "blocks", "attn1", "to_out_0")
    assert spec((*to_q, "a"), 40, 5120, 128) == PartitionSpec(None, "fsdp", None)
    assert spec((*to_q, "b"), 40, 128, 5120) == PartitionSpec(None, "fsdp", "tensor")  # the rank: nothing else is free
    assert spec((*to_out, "a"), 40, 5120, 128) == PartitionSpec(None, "tensor", "fsdp")
    assert spec((*to_out, "b"), 40, 128, 5120) == PartitionSpec(None, None, "fsdp")
    assert spec((*to_q, "b"), 40, 4, 5120) == PartitionSpec(None, None, "tensor")  # small, per layer
    assert spec((*to_q[1:], "bias"), 40, 5120) == PartitionSpec(None, "tensor")


def partition(**sizes) -> Partition:
    devices = [FakeDevice(i) for i in range(8)]
    config = MeshConfig(**sizes)
    shape = tuple(config.resolve(8).values())
    mesh = jax.sharding.Mesh(np.array(devices, object).reshape(shape), ("data", "fsdp", "context", "tensor"))
    return Partition(mesh, dict(Partition.create(MeshConfig(rules=config.rules)).rules))


class FakeDevice:
    def __init__(self, number: int):
        self.id, self.process_index, self.platform, self.device_kind = number, 0, "cpu", "cpu"

    def __repr__(self) -> str:
        return f"device {self.id}"


def test_an_axis_that_does_not_divide_stays_whole():
    layout = partition(fsdp=4, tensor=2)
    assert layout.spec(("layers", "embed", "heads"), (3, 8, 6)) == PartitionSpec(None, "fsdp", "tensor")
    assert layout.spec(("layers", "embed", "heads"), (3, 6, 5)) == PartitionSpec(None, None, None)
    with pytest.raises(ValueError, match="2 axis names"):
        layout.spec(("embed", "heads"), (3, 8, 6))


def test_rules_are_data_of_the_configuration():
    layout = partition(fsdp=4, tensor=2, rules=(("embed", ("tensor",)), ("mlp", ())))
    assert layout.spec(("embed", "mlp"), (8, 8)) == PartitionSpec("tensor", None)
    with pytest.raises(UserError, match="divided twice over tensor"):
        layout.spec(("embed", "heads"), (8, 8))
    mesh = {"rules": [["embed", ["fsdp", "tensor"]]]}
    config = run_config({"objective": {"name": "stage1", "data": ""}, "mesh": mesh})
    assert config.mesh.rules == (("embed", ("fsdp", "tensor")),)


@pytest.mark.parametrize(("values", "message"), [
    ({"mesh": {"fsdp": -2}}, "mesh.fsdp: a positive number or -1"),
    ({"mesh": {"fsdp": -1, "data": -1}}, "mesh: only one axis may be -1"),
    ({"mesh": {"fdsp": 2}}, "config.mesh.fdsp: unknown key; did you mean 'fsdp'"),
    ({"mesh": {"rules": [["embed", ["model"]]]}}, "'embed' names the mesh axis 'model'"),
    ({"accumulate": 0}, "accumulate: must be positive, got 0"),
])
def test_a_mesh_that_makes_no_sense_is_one_clear_line(values, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")) as caught:
        run_config({"objective": {"name": "stage1", "data": ""}, **values})
    assert "\n" not in str(caught.value)


def test_a_mesh_that_does_not_divide_is_one_clear_line():
    with pytest.raises(UserError, match="8 devices do not divide by 3, the product of the given sizes .* 1, 2, 4, 8$"):
        MeshConfig(fsdp=-1, tensor=3).resolve(8)
    with pytest.raises(UserError, match="data 4 x fsdp 4 x context 1 x tensor 1 needs 16 devices, there are 8"):
        MeshConfig(data=4, fsdp=4).resolve(8)
    with pytest.raises(UserError, match=r"batch_size: 6 does not divide by 8 \(mesh.data 2 x mesh.fsdp 2 x acc"):
        partition(data=2, fsdp=2, tensor=2).check_batch(6, 2)
    attention = partition(data=2, context=2, tensor=2).attention
    attention.check(4, 6)  # three heads of two samples on a device: six, over two
    with pytest.raises(UserError, match=r"5 attention heads do not divide by 2 \(mesh.tensor 2\)"):
        attention.check(4, 5)
    with pytest.raises(UserError, match=r"heads times samples of one device, here 3, do not divide by 2 \(mesh.con"):
        attention.check(2, 6)


def test_patches_are_whole_along_context_with_their_adapter():
    """The sum of both products is constrained: libtpu stops at a gradient of either that is a sum over context."""
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 1), ("data", "fsdp", "context", "tensor"),
                                     axis_types=(jax.sharding.AxisType.Auto,) * 4)
    layout = Partition(mesh, dict(DEFAULT_RULES))
    embedding = PatchEmbedding((2, 4, 4), 6, jax.numpy.float32)
    params = {"kernel": np.ones((2, 4, 4, 3, 6)), "bias": np.ones(6)}
    adapter = {"a": np.ones((2, 4, 4, 3, 2)), "b": np.ones((2, 6))}
    with use(layout):
        traced = jax.make_jaxpr(embedding.apply)({"params": params, "lora": adapter}, np.ones((2, 2, 8, 8, 3)))
    operations = [equation.primitive.name for equation in traced.eqns]
    constrained = operations.index("sharding_constraint")
    assert operations.count("dot_general") == 3 and "dot_general" not in operations[constrained:]
    assert operations[constrained:].count("add") == 1  # the bias
    assert tuple(traced.eqns[constrained].params["sharding"].spec) == ("fsdp", None, None, None, None)


def test_without_a_mesh_nothing_is_constrained():
    x = jax.numpy.ones((2, 3))
    assert constrain(x, "batch", None) is x


@pytest.mark.parametrize("rows", [[[0, 1, 2], [3, 4, 5]], [[0, 5], [1, 4], [2, 3]]])
def test_processes_read_their_rows_of_the_same_batches(rows, monkeypatch, tmp_path):
    """Whoever reads a row, it is the same, and a position saved by one process serves any other."""
    write_random_latents(tmp_path, clips=4, sections=2, height=4, width=4, channels=2, text_rows=2, text_dim=3)

    def stream(make, own):
        monkeypatch.setattr(pipeline, "local_rows", lambda batch_size: own and np.array(own))
        return iter(make())

    for make, field in ((lambda: bucketed_dataset(folder_buckets(tmp_path), 6, seed=1), "target"),
                        (lambda: clip_dataset(6, seed=1, frames=1), "video")):
        whole = stream(make, None)
        expected = [next(whole)[field] for _ in range(3)]
        positions = []
        for own in rows:
            part = stream(make, own)
            for batch in expected[:2]:
                np.testing.assert_array_equal(next(part)[field], batch[own])
            positions.append(json.dumps(part.get_state()))
            later = stream(make, None)
            later.set_state(part.get_state())
            np.testing.assert_array_equal(next(later)[field], expected[2])
        assert len(set(positions)) == 1
