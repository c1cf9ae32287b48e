"""What a run needs is known before it fails: the estimate, what is refused, and what is offered in its place.

Memory limits are faked; the numbers of compilers are those of docs/speed.md.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from helios_jax.config import ModelIndex, SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from helios_jax.convert.folder import ModelFolder
from helios_jax.errors import UserError
from helios_jax.pipeline import memory
from helios_jax.pipeline.memory import Budget, Request
from helios_jax.pipeline.pipeline import HeliosPipeline, VideoStream
from helios_jax.pipeline.placement import Placement
from helios_jax.sharding import DEFAULT_RULES, MESH_AXES, Partition
from tests.tiny_checkpoint import write_tiny_checkpoint

GIB = 2**30
PUBLISHED = ModelFolder(
    Path("."), "diffusers", ModelIndex("HeliosPyramidPipeline", "HeliosDMDScheduler", is_distilled=True),
    TransformerConfig(), VAEConfig(), TextEncoderConfig(), SchedulerConfig("HeliosDMDScheduler"))
NATIVE = Request(384, 640)
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"


def placement(dtype=jnp.bfloat16, **options) -> Placement:
    return Placement(PUBLISHED, dict.fromkeys(("transformer", "text_encoder", "vae"), dtype), **options)


@dataclasses.dataclass
class Device:
    limit: float | None
    device_kind: str = H100
    platform: str = "gpu"

    def memory_stats(self):
        return None if self.limit is None else {"bytes_limit": int(self.limit)}


@pytest.fixture
def machine(monkeypatch):
    """Sets what the device and the host have, in GB."""
    monkeypatch.setenv(memory.FRACTION_VARIABLES[0], "0.9")

    def set_to(device: float | None, host: float | None = 1000.0, count: int = 1, **fields):
        devices = [Device(device and device * 1e9, **fields)] * count
        monkeypatch.setattr(jax, "local_devices", lambda: devices)
        monkeypatch.setattr(memory, "host_room", lambda: host and int(host * 1e9))

    return set_to


def refusal(budget: Budget, work: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        budget.check(work)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def offers(line: str) -> list[str]:
    return [offer.split(":")[0] for offer in line.partition("would fit: ")[2].split("; ") if offer]


# --- The estimate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "planned"), [("none", 1.20), ("fp8", 1.20)])
def test_denoising_is_estimated_at_what_the_compiler_planned_for_an_h100_up_to_twice_that(precision, planned):
    assert planned * GIB <= memory.denoising_bytes(placement(precision=precision), NATIVE) <= 2 * planned * GIB


@pytest.mark.parametrize(("platform", "dtype", "planned"), [
    ("gpu", jnp.bfloat16, 1.97), ("tpu", jnp.float32, 4.3 - 0.48), ("tpu", jnp.bfloat16, 4.0 - 0.24)])
def test_decoding_is_estimated_at_what_compilers_planned_up_to_twice_that(platform, dtype, planned):
    """On the v6e weights of the VAE were counted with the program."""
    assert planned * GIB <= memory.decoding_bytes(placement(dtype), NATIVE, platform) <= 2 * planned * GIB


@pytest.mark.parametrize(("precision", "planned"), [("none", 39.6), ("fp8", 22.3)])
def test_a_whole_run_is_estimated_within_a_twentieth_above_the_compilers_number(precision, planned):
    need = memory.needed(placement(precision=precision), NATIVE, loaded=True)
    assert planned * GIB <= need.device <= 1.05 * planned * GIB and need.host == 0


def test_more_videos_guidance_and_pixels_take_more_and_a_mesh_less_of_each_device():
    def device(request, **options):
        return memory.needed(placement(**options), request, loaded=True).device

    plain = device(NATIVE)
    assert plain < device(NATIVE._replace(videos=2)) < device(NATIVE._replace(videos=2, guided=True))
    assert plain < device(Request(768, 1280)) and device(Request(192, 320)) < plain
    mesh = Partition(jax.sharding.AbstractMesh((1, 4, 1, 1), MESH_AXES), dict(DEFAULT_RULES))
    whole, divided = placement().bytes().device, placement(partition=mesh).bytes().device
    assert whole / 4 < divided < whole / 3
    tokens = Partition(jax.sharding.AbstractMesh((1, 1, 4, 1), MESH_AXES), dict(DEFAULT_RULES))
    assert memory.denoising_bytes(placement(partition=tokens), Request(768, 1280)) < 0.5 * memory.denoising_bytes(
        placement(), Request(768, 1280))


# --- What is refused, and what is offered ------------------------------------------------------------------------


def test_what_fits_is_not_refused_and_neither_is_what_nobody_knows(machine):
    machine(79.1)
    Budget(placement(), NATIVE).check()
    machine(None)
    Budget(placement(), NATIVE).check()
    machine(None, None, platform="cpu", device_kind="cpu")
    Budget(placement(), NATIVE).check()


def test_weights_that_do_not_fit_are_refused_with_what_would(machine):
    machine(26.0, 64.0)
    assert refusal(Budget(placement())) == (
        "memory: 46.0 GB needed (weights 40.3 GB, beside them 5.7 GB by estimate) of the device's 26.0 GB; would fit: "
        "precision fp8: 24.6 GB; stream_weights: 2.9 GB of the device, 47.4 GB of the host")
    # The largest stack of layers is there twice while it is taken apart, on a GPU.
    machine(41.0)
    refusal(Budget(placement()))
    machine(41.0, platform="tpu", device_kind="TPU v5")
    Budget(placement()).check()


def test_a_run_that_does_not_fit_is_refused_with_what_would(machine):
    machine(42.8)
    line = refusal(Budget(placement(), NATIVE, step=64, loaded=True))
    assert line.startswith("memory: 43.6 GB needed (weights 40.3 GB, beside them 3.3 GB by estimate) of the "
                           "device's 42.8 GB; would fit: precision fp8: 25.0 GB; ")
    assert offers(line) == ["precision fp8", "stream_weights", "size 320x512"]
    machine(41.0)  # not even half the sides would fit
    assert offers(refusal(Budget(placement(), NATIVE, step=64, loaded=True))) == ["precision fp8", "stream_weights"]


@pytest.mark.parametrize(("device", "options", "budget", "expected"), [
    ({}, {"dtype": jnp.float32}, {}, ["dtype bfloat16", "precision fp8", "stream_weights"]),
    ({"device_kind": A100}, {}, {}, ["precision int8", "stream_weights"]),
    ({"device_kind": "TPU v6 lite", "platform": "tpu"}, {}, {}, ["precision int8", "stream_weights"]),
    ({"device_kind": "some new chip"}, {}, {}, ["precision int8_weights", "stream_weights"]),
    ({}, {}, {"merges": True}, ["stream_weights"]),  # quantised weights take no adapters
    ({"count": 4}, {"precision": "int8_weights"}, {}, ["stream_weights"]),
    ({"host": 40.0}, {}, {}, ["precision fp8"]),  # too little for the weights
])
def test_only_what_the_device_and_the_options_allow_is_offered(machine, device, options, budget, expected):
    limit = {jnp.float32: 60.0}.get(options.get("dtype"), 27.0)
    limit = 15.0 if "precision" in options else limit
    machine(limit, **device) if "count" not in device else machine(limit)
    assert offers(refusal(Budget(placement(**options), **budget))) == expected


def test_fewer_videos_at_once_are_offered(machine):
    machine(46.0)
    assert offers(refusal(Budget(placement(), NATIVE._replace(videos=4, guided=True))))[0] == "videos_at_once 1"


def test_changes_are_offered_together_where_none_is_enough(machine):
    machine(6.0, 64.0)
    (offer,) = offers(refusal(Budget(placement(jnp.float32), NATIVE, step=64)))
    assert offer == "dtype bfloat16 with stream_weights"
    machine(1.0, 8.0)
    assert refusal(Budget(placement(), NATIVE)).endswith(
        "; nothing that was tried would fit: a larger device, several of them (mesh) or a smaller model would")


def test_what_xla_leaves_of_a_gpu_is_offered_where_nobody_chose(machine, monkeypatch):
    machine(0.75 * 50)
    line = refusal(Budget(placement(), NATIVE))
    assert "XLA_PYTHON" not in line
    monkeypatch.delenv(memory.FRACTION_VARIABLES[0])
    assert "would fit: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: 47.5 GB of the device may be used; " in refusal(
        Budget(placement(), NATIVE))
    machine(0.75 * 50, platform="tpu", device_kind="TPU v5")
    assert "XLA_PYTHON" not in refusal(Budget(placement(), NATIVE))


def test_streamed_weights_must_fit_the_host_while_they_are_read(machine):
    machine(24.0, 44.0)  # the weights are 39.5 GB, a fifth more while they are read
    line = refusal(Budget(placement(streamed=True), NATIVE))
    assert line.startswith("memory: 47.4 GB needed (stream_weights, 1.2 times the weights) of the "
                           "host's 44.0 GB available; would fit: precision fp8: ")
    Budget(placement(streamed=True), NATIVE, loaded=True).check()  # what is left says nothing of what is there
    machine(24.0, 48.0)
    Budget(placement(streamed=True), NATIVE).check()


def test_on_a_cpu_the_weights_must_fit_the_host(machine):
    machine(None, 64.0, platform="cpu", device_kind="cpu")
    line = refusal(Budget(placement(jnp.float32), NATIVE))
    assert line.startswith("memory: 91.8 GB needed (the weights) of the host's 64.0 GB available; would fit: ")
    assert offers(line) == ["dtype bfloat16", "precision int8"]


def test_the_compilers_number_takes_the_estimates_place(machine):
    machine(42.0)
    budget = Budget(placement(), NATIVE, loaded=True)
    assert "by estimate" in refusal(budget)
    budget.check(work=10**9)
    assert "beside them 30.4 GB by the compiler" in refusal(budget, 30 * 10**9)
    program = jax.jit(lambda x: jnp.tanh(x)).lower(jax.ShapeDtypeStruct((1024,), jnp.float32)).compile()
    assert memory.compiled_bytes([program]) >= 4096 and memory.compiled_bytes([]) is None


def test_the_hosts_memory_is_known():
    assert 2**28 < memory.host_room() < 2**50


# --- The pipeline ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", "distilled")


@pytest.fixture
def limit(monkeypatch):
    """Sets what the runtime says of the device's memory, in bytes."""
    def set_to(size: int):
        monkeypatch.setattr(type(jax.devices()[0]), "memory_stats", lambda self: {"bytes_limit": size})

    return set_to


@pytest.fixture
def unread(monkeypatch):
    monkeypatch.setattr("helios_jax.pipeline.pipeline.load_pipeline_params", lambda *_, **__: pytest.fail("read"))


RUN = dict(height=64, width=64, steps=1)


def test_a_model_or_run_that_does_not_fit_is_refused_before_it_is_read(model, limit, unread):
    limit(1000)
    for streamed in (False, True):
        with pytest.raises(UserError, match=r"^memory: [\d.]+ GB needed \(weights .* of the device's 0\.0 GB; "):
            HeliosPipeline.from_pretrained(model, stream_weights=streamed)
    limit(10**10)
    with pytest.raises(UserError, match=r"^memory: .*, beside them [\d.]+ GB by estimate\) of the device's 10\.0 "
                                        r"GB; would fit: .*size \d+x\d+: \d"):
        HeliosPipeline.from_pretrained(model, compile_for=dict(height=3072, width=3072, steps=1))


def test_a_run_that_does_not_fit_is_refused_when_it_is_asked_for(model, limit, monkeypatch):
    limit(10**9)
    pipe = HeliosPipeline.from_pretrained(model)
    with pytest.raises(UserError, match="^memory: .* by estimate"):
        pipe.stream("x", height=3072, width=3072, steps=1)
    monkeypatch.setattr("helios_jax.pipeline.pipeline._compiled", lambda lower: None)
    monkeypatch.setattr(memory, "compiled_bytes", lambda programs: 10**10)
    with pytest.raises(UserError, match="^memory: .* by the compiler"):
        pipe.compile("x", **RUN)


OUT = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.\nBuffers:")


def fail(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


def test_memory_that_runs_out_costs_one_line_wherever_it_does(model, monkeypatch):
    name = "helios_jax.pipeline.pipeline."
    line = r"^memory: the device's memory ran out while {} \(weights 0\.0 GB, beside them about 0\.\d GB\); "
    with monkeypatch.context() as patch:
        patch.setattr(name + "load_pipeline_params", fail(OUT))
        with pytest.raises(UserError, match=line.format("reading the weights and compiling")) as caught:
            HeliosPipeline.from_pretrained(model, compile_for=RUN)
    assert "\n" not in str(caught.value) and "dtype bfloat16: " in str(caught.value)
    pipe = HeliosPipeline.from_pretrained(model)
    with monkeypatch.context() as patch:
        patch.setattr(name + "_compiled", fail(OUT))
        with pytest.raises(UserError, match=line.format("compiling")):
            pipe.compile("x", **RUN)
    monkeypatch.setattr(VideoStream, "_begin", fail(OUT))
    for lookahead in (False, True):
        with pytest.raises(UserError, match=line.format("sampling")):
            next(pipe.stream("x", lookahead=lookahead, **RUN))
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "embed", fail(OUT))
        with pytest.raises(UserError, match=line.format("encoding text, image or video")):
            pipe.stream("x", **RUN)
    monkeypatch.setattr(VideoStream, "_begin", fail(jax.errors.JaxRuntimeError("INTERNAL: a defect")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a defect"):
        pipe("x", **RUN)
