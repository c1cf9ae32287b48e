"""The compile check counts right, refuses nonsense, and (with libtpu) compiles the trainer's step for TPUs."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from helios_jax.errors import UserError
from helios_jax.sharding import MeshConfig, Partition, make_mesh
from helios_jax.tools.compile_check import (
    Built,
    apply_change,
    load_values,
    main,
    needed_memory,
    remedies,
    remedy,
    stand_in_data,
)
from helios_jax.tools.compile_check import check as compile_workload
from helios_jax.tools.roofline import CHIPS, Collective, collectives, count_flops
from helios_jax.tools.workloads import Workload, training_workload
from helios_jax.training.config import run_config

pytestmark = pytest.mark.usefixtures("fully_optimized")
ROOT = Path(__file__).resolve().parents[1]


def flops(function, *shapes) -> float:
    return count_flops(jax.make_jaxpr(function)(*[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]))


def test_matrix_products_are_counted_as_often_as_they_run():
    product = 2 * 3 * 4 * 5
    assert flops(jnp.matmul, (3, 4), (4, 5)) == product
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (7, 3, 4), (7, 4, 5)) == 7 * product

    def layers(x, kernels):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

    assert flops(layers, (3, 4), (6, 4, 4)) == 6 * 2 * 3 * 4 * 4
    assert flops(jax.jit(layers), (3, 4), (6, 4, 4)) == 6 * 2 * 3 * 4 * 4


def test_backward_passes_and_what_rematerialisation_repeats_are_counted():
    def loss(remat, kernels, x):
        layer = lambda x, kernel: (jnp.tanh(x @ kernel), None)  # noqa: E731
        if remat:
            layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
        return jax.lax.scan(layer, x, kernels)[0].sum()

    forward = 6 * 2 * 3 * 4 * 4
    assert flops(jax.grad(partial(loss, False)), (6, 4, 4), (3, 4)) == 3 * forward  # and both products' derivatives
    assert flops(jax.grad(partial(loss, True)), (6, 4, 4), (3, 4)) == 4 * forward


def test_convolutions_are_counted():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert flops(convolve, (1, 8, 8, 3), (5, 5, 3, 7)) == 2 * 8 * 8 * 7 * 5 * 5 * 3


HLO = """HloModule step, entry_computation_layout={()->f32[8]{0}}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %ag = bf16[16,8]{1,0:T(8,128)} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %out = (s32[], bf16[4,8]) tuple(%i, %x)
}

%permute (window: bf16[6]) -> bf16[6] {
  %start.1 = (bf16[6], bf16[6], u32[], u32[]) collective-permute-start(%window), source_target_pairs={{0,1},{1,0}}
  ROOT %done.1 = bf16[6] collective-permute-done(%start.1)
}

%cond.1 (state: (s32[], bf16[4,8])) -> pred[] {
  %n = s32[]{:T(128)} constant(5), metadata={op_name="bound"}
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={op_name="lt"}
}

ENTRY %main.2_spmd (p: f32[8]) -> f32[8] {
  %window = bf16[6] conditional(%more, %p, %p), true_computation=%permute, false_computation=%add
  %loop = (s32[], bf16[4,8]) while(%i), condition=%cond.1, body=%body.1
  %start = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %done = f32[8,4]{1,0} all-gather-done(%start)
  %rs = f32[2]{0} reduce-scatter(%p), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, to_apply=%add
  %exchange = f32[16]{0} all-to-all(%p), replica_groups=mesh['x'=2,'y'=4] {'x','y':(1)2}, dimensions={0}
  ROOT %ar = f32[8]{0} all-reduce(%p), replica_groups={}, to_apply=%add
}
"""


def test_collectives_are_counted_with_their_loops_and_bytes():
    found = collectives(HLO)
    gathered = 5 * 16 * 8 * 2, 8 * 4 * 4  # five times over groups of 4, once over groups of 2
    assert found == {"all-gather": Collective(6, sum(gathered), gathered[0] * 3 / 4 + gathered[1] / 2),
                     "all-reduce": Collective(1, 8 * 4, 2 * 8 * 4 * 7 / 8),  # over all 8
                     "all-to-all": Collective(1, 16 * 4, 16 * 4 * 3 / 4),  # x whole and half of y
                     "collective-permute": Collective(1, 6 * 2, 6 * 2),
                     "reduce-scatter": Collective(1, 2 * 4, 3 * 2 * 4)}


def test_changes_are_literals_or_strings_and_reach_any_depth():
    values = {"mesh": {"fsdp": 1}, "objective": {"name": "stage1"}}
    for change in ("mesh.fsdp=-1", "objective.dtype=bfloat16", "objective.transformer.num_layers=4", "accumulate=2"):
        apply_change(values, change)
    assert values == {"mesh": {"fsdp": -1}, "accumulate": 2,
                      "objective": {"name": "stage1", "dtype": "bfloat16", "transformer": {"num_layers": 4}}}
    for change, message in (("mesh.fsdp", "field=value expected, got 'mesh.fsdp'"),
                            ("accumulate.x=1", "'accumulate' in 'accumulate.x' is no group")):
        with pytest.raises(UserError, match=message):
            apply_change(values, change)
    for config, message in (("stage1_init.py:2b", "^--config: the size behind the colon is one of 14b, 3b, 1.3b, got"),
                            ("tiny_stage3_ode.py:x", "^--config: .*tiny_stage3_ode.py: cannot be read as a conf")):
        with pytest.raises(UserError, match=message):
            load_values(str(ROOT / "configs" / config), [])
    with pytest.raises(UserError, match="--config: no such file: configs/absent.py"):
        load_values("configs/absent.py", [])


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 4}, {"fsdp": -1}, {"fsdp": 4, "context": 2}])
def test_remedies_keep_batch_and_heads_divisible(mesh):
    start = {"objective": {"name": "stage1", "data": ""}, "batch_size": 32, "mesh": mesh}
    found = list(remedies(run_config(start), 8, sampling=False))
    for changes in found:
        values = json.loads(json.dumps(start))
        for change in changes:
            apply_change(values, change)
        changed = run_config(values)
        sizes = changed.mesh.resolve(8)
        assert math.prod(sizes.values()) == 8
        assert changed.batch_size % (sizes["data"] * sizes["fsdp"] * changed.accumulate) == 0
        assert 40 % (sizes["context"] * sizes["tensor"]) == 0
    if "data" in mesh:
        assert found[0] == ("mesh.fsdp=8", "mesh.data=1")
    if "context" in mesh:
        assert found[0] == ("mesh.rules=[['embed', ['fsdp', 'context']]]",)
    assert any("objective.remat=nothing_saveable" in changes for changes in found)
    assert any("accumulate=4" in changes for changes in found)
    assert any("mesh.context=8" in changes and "accumulate=32" in changes for changes in found)


def test_remedies_of_sampling_divide_the_parameters_over_every_axis():
    run = run_config({"objective": {"name": "stage1", "data": ""}, "mesh": {"data": 2, "context": 4}})
    assert list(remedies(run, 8, sampling=True)) == [("mesh.rules=[['embed', ['data', 'context']]]",)]


def test_the_compiler_s_complaints_say_how_much_memory_is_needed():
    single = "RESOURCE_EXHAUSTED: Allocation (size=40038400000) would exceed memory (size=17179869184) :: %s1 = ..."
    assert needed_memory(single) == 40038400000
    assert needed_memory("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.") == (
        20.5 * 2**30)
    assert math.isnan(needed_memory("RESOURCE_EXHAUSTED: something else"))


@pytest.mark.parametrize(("flags", "message"), [
    (["--topology", "v9:2x2"], "--topology: one of v4, v5e, v5p, v6e, h100"),
    (["--topology", "v5e:2x2", "--size", "64x100"], "--size: HEIGHTxWIDTH in multiples of 16, got '64x100'"),
    (["--topology", "v5e:2x2", "--efficiency", "2"], "--efficiency: above 0 and at most 1, got 2.0"),
])
def test_wrong_arguments_are_one_clear_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(ROOT / "configs/tiny_stage1.py"), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="needs libtpu (pip install libtpu), which compiles without a TPU")
SMALL = ("objective.dtype=bfloat16", "objective.unroll=1", "objective.transformer.num_layers=2",
         "optimizer.name=adamw")


def check(*flags: str, changes: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "helios_jax.tools.compile_check", *flags,
                           *[part for change in changes for part in ("--set", change)]], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"} | environment)


def programs(path: Path) -> list[dict]:
    return json.loads(path.read_text())["programs"]


@needs_libtpu
def test_the_step_is_compiled_for_a_topology(tmp_path):
    done = check("--config", "configs/tiny_stage1.py", "--topology", "v5e:2x2", "--size", "64x128", "--json",
                 str(tmp_path / "report.json"), changes=(*SMALL, "batch_size=8", "mesh.data=2", "mesh.fsdp=2"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data 2 x fsdp 2 x context 1 x tensor 1" in done.stdout and done.stdout.endswith("it fits\n")
    step, = programs(tmp_path / "report.json")
    assert step["fits"] and 0 < step["used"] < 2**30
    assert step["flops"] == step["flops_without_rematerialisation"] > 0
    assert step["collectives"]["all-reduce"]["sent"] > 0


@pytest.mark.slow
@needs_libtpu
def test_the_turn_of_the_14b_critic_is_compiled_alone_and_fits(tmp_path):
    """Two layers of the 14B and few tokens, divided over rows and tokens, with the compiler's least effort, which makes
    it minutes of processor time. What fits at 384x640 and full depth is in docs/pods.md."""
    report = tmp_path / "report.json"
    done = check("--config", "configs/stage3_dmd.py:post-14b", "--topology", "v5p:2x2x1", "--size", "64x128",
                 "--player", "critic", "--no-remedy", "--json", str(report),
                 changes=("objective.transformer.num_layers=2", "objective.rollout.steps=(1,1,1)", "batch_size=4",
                          "mesh.fsdp=2", "mesh.context=2"),
                 JAX_EXEC_TIME_OPTIMIZATION_EFFORT="-1.0", JAX_MEMORY_FITTING_EFFORT="-1.0")
    assert done.returncode == 0 and done.stdout.endswith("it fits\n"), done.stdout + done.stderr
    turn, = programs(report)
    assert turn["name"] == "turn of the critic" and turn["flops"] > 0
    assert "data 1 x fsdp 2 x context 2 x tensor 1" in done.stdout
    assert turn["collectives"]["all-to-all"]["sent"] > 0


@pytest.mark.parametrize(("config", "player", "message"), [
    ("tiny_stage3_dmd.py", "teacher", "--player: one of student, critic, got 'teacher'"),
    ("tiny_stage1.py", "student", "--player: this objective has none, got 'student'")])
def test_a_player_that_is_not_there_is_one_clear_line(config, player, message):
    with (stand_in_data(load_values(str(ROOT / "configs" / config), []), (64, 128)) as (values, _),
          pytest.raises(UserError, match=re.escape(message))):
        training_workload(run_config(values), jax.devices()[:1], player)


@pytest.mark.slow
@needs_libtpu
def test_every_program_of_a_chunk_is_compiled_for_a_topology(tmp_path):
    done = check("--config", "configs/tiny_stage2.py", "--topology", "v5e:2x2", "--size", "64x128", "--sample", "1",
                 "--json", str(tmp_path / "report.json"), changes=(*SMALL, "mesh.data=2", "mesh.fsdp=2"))
    assert done.returncode == 0, done.stdout + done.stderr
    *levels, decoding = programs(tmp_path / "report.json")
    assert decoding["name"] == "decoding" and decoding["fits"] and decoding["flops"] > 0
    assert [level["times"] for level in levels] == [8, 10, 10]  # zero init leaves two of ten steps out
    assert levels[0]["flops"] < levels[1]["flops"] < levels[2]["flops"]
    assert all(level["fits"] for level in levels)


@pytest.mark.slow
@needs_libtpu
def test_streamed_weights_of_the_14b_are_on_the_chip_two_layers_at_a_time(tmp_path):
    """At a reduced depth: what streaming saves on the chip is every layer but two."""
    layers, found = 6, {}
    for flags in ((), ("--stream_weights",)):
        report = tmp_path / f"{len(flags)}.json"
        done = check("--config", "configs/stage2_init.py:14b", "--topology", "v6e:2x2", "--sample", "1", "--json",
                     str(report), *flags, changes=("mesh.fsdp=1", "mesh.data=1", "objective.sample.guidance=1.0",
                                                   f"objective.transformer.num_layers={layers}"))
        assert done.returncode == 0, done.stdout + done.stderr
        found[bool(flags)] = programs(report)
    for plain, streamed in zip(found[False][:-1], found[True][:-1], strict=True):  # the last one decodes
        blocks = streamed["host_bytes"]
        assert blocks + streamed["kinds"]["parameters"] == plain["kinds"]["parameters"] and plain["host_bytes"] == 0
        assert plain["used"] - streamed["used"] > blocks * (layers - 2) / layers - 2**26


def described(monkeypatch, name: str, **options: int) -> list:
    for variable in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(variable, "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


@needs_libtpu
@pytest.mark.parametrize("sizes", [{"fsdp": 64, "context": 4}, {"data": 2, "fsdp": 8, "context": 4, "tensor": 4}])
def test_an_axis_may_take_a_part_of_one_of_the_torus_and_keeps_neighbours_together(sizes, monkeypatch):
    mesh = make_mesh(MeshConfig(**sizes), described(monkeypatch, "v6e:16x16"))
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == sizes
    assert len({device.id for device in mesh.devices.flat}) == 256
    for row in np.moveaxis(mesh.devices, 2, -1).reshape(-1, 4):  # along context
        steps = np.diff([device.coords for device in row], axis=0)
        assert (np.abs(steps).sum(1) == np.abs(steps).sum(1)[0]).all() and len(np.unique(steps, axis=0)) == 1


@needs_libtpu
@pytest.mark.parametrize(("sizes", "along_data"), [
    ({"data": 2, "fsdp": 4}, [{0}, {1}]), ({"data": 4, "fsdp": 2}, [{0}, {0}, {1}, {1}]), ({"fsdp": -1}, [{0, 1}])])
def test_slices_stand_along_the_first_axis_that_takes_them(sizes, along_data, monkeypatch):
    mesh = make_mesh(MeshConfig(**sizes), described(monkeypatch, "v5e:2x2", num_slices=2))
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == along_data


@needs_libtpu
def test_of_several_changes_the_first_that_compiles_within_the_memory_is_named(monkeypatch):
    """A stand-in for the step that adds 1 to rows of 512 bytes; it overflows for real unless they are divided."""
    chip, devices = CHIPS["v5e"], described(monkeypatch, "v5e:2x2")
    partition = Partition.create(MeshConfig(fsdp=4), devices)

    def build(changes: tuple[str, ...]) -> Built:
        place = partition.batch((2**26, 128)) if "divided=1" in changes else partition.replicated
        rows = jax.ShapeDtypeStruct((2**26 // (2 if "halved=1" in changes else 1), 128), jnp.float32, sharding=place)
        return Built(None, partition, [Workload("toy", 1, {}, lambda: jax.jit(lambda x: x + 1).lower(rows), None)])

    report = compile_workload(build(()).workloads[0], partition, chip.memory)
    assert not report.fits and report.used > chip.memory
    told = remedy(build, [("halved=1",), ("divided=1",), ("halved=1", "divided=1")], chip)
    # 32 GiB and as much for the result: 64 GiB on every chip, 32, 16, and at last 8.
    assert told.startswith("; it would with --set halved=1 --set divided=1 (8.0"), told


@pytest.mark.slow
@needs_libtpu
def test_a_step_that_divides_the_tokens_compiles_with_every_parameter_trained():
    """At a reduced depth; the compiler once stopped at the gradient of the history's patches."""
    done = check("--config", "configs/stage1_init.py:14b", "--topology", "v6e:4x4",
                 changes=("mesh.context=2", "batch_size=16", "objective.lora.rank=0",
                          "objective.transformer.num_layers=2"))
    assert done.returncode == 0 and done.stdout.endswith("it fits\n"), done.stdout + done.stderr


@pytest.mark.slow
@needs_libtpu
def test_of_a_training_step_that_overflows_the_change_with_which_it_fits_is_named():
    done = check("--config", "configs/tiny_stage1.py", "--topology", "v5e:2x2", "--size", "64x128",
                 changes=(*SMALL, "objective.transformer.num_layers=6", "batch_size=2048", "mesh.fsdp=4"))
    assert done.returncode == 1 and "does not fit the chip's memory" in done.stdout, done.stdout + done.stderr
    told = re.fullmatch(r"it does not fit; it would with --set objective.remat=nothing_saveable "
                        r"\(([\d.]+) of 15.75 GiB\)", done.stdout.splitlines()[-1])
    assert told and float(told[1]) < 15.75, done.stdout


@pytest.mark.slow
@needs_libtpu
def test_the_14b_run_of_stage_1_fits_a_pod_of_64_chips(tmp_path):
    """configs/stage1_init.py as it is: LoRA of rank 128, 128 videos of 384x640."""
    done = check("--config", "configs/stage1_init.py:14b", "--topology", "v5p:4x4x4", "--no-remedy", "--json",
                 str(tmp_path / "report.json"))
    assert done.returncode == 0 and done.stdout.endswith("it fits\n"), done.stdout + done.stderr
    step, = programs(tmp_path / "report.json")
    # Adapters, two moments of theirs and the whole base in bfloat16 are divided over all chips.
    trained = 623_820_800 + 23_936_000
    assert sum(step["kinds"][kind] for kind in ("parameters", "optimizer")) < 1.1 * 3 * 4 * trained / 64
    assert step["kinds"]["frozen"] < 1.1 * 2 * 14.3e9 / 64
    assert step["collectives"]
