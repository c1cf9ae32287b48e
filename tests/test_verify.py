"""`python -m helios_jax.verify`: equal models pass for every variant, a changed weight fails and is named.

PyTorch runs with one thread here: two of them lose most of their time to each other where the cores are shared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from helios_jax.config import TransformerConfig, VAEConfig
from helios_jax.convert import load_component
from helios_jax.convert.export import convert_model, export_pipeline
from helios_jax.convert.rules import leaves, unflatten
from helios_jax.training.tokenizer import save_tokenizer, train_tokenizer
from helios_jax.verify import compare, inputs, memory
from helios_jax.verify.__main__ import main, make_settings, parser
from tests import tiny_checkpoint
from tests.golden import fill

SMALL = ("--size", "64x64", "--frames", "34", "--steps", "2")  # two chunks


@pytest.fixture(scope="session")
def torch():
    module = pytest.importorskip("torch")
    for name in ("diffusers", "transformers", "accelerate"):
        pytest.importorskip(name)
    threads = module.get_num_threads()
    module.set_num_threads(1)
    yield module
    module.set_num_threads(threads)


def write(folder: Path, variant: str, change: tuple[str, str] | None = None, **options) -> Path:
    """A tiny checkpoint; ``change``: (component, leaf) of one tensor that gets other numbers.

    The VAE is wider than in other tests: norms over four channels meet vectors near zero, where rounding rules.
    """
    configs = tiny_checkpoint.CONFIGS | {"vae": VAEConfig(base_dim=8, dim_mult=(1, 1, 1, 1), num_res_blocks=1)}
    params = {}
    for component, config in configs.items():
        tensors = {}
        for leaf in leaves(component, config):
            for rule in leaf.tensors:
                tensors[rule.name] = fill(rule.name.replace("shared.", "encoder.embed_tokens."), rule.shape)
                if change == (component, leaf.key):
                    tensors[rule.name] = tensors[rule.name] * np.float32(1.001)
        params[component] = tiny_checkpoint.params_from_torch_state_dict(component, config, tensors)
    tokenizer = folder.parent / f"{folder.name}_tokenizer"
    save_tokenizer(train_tokenizer(tiny_checkpoint._CAPTIONS, tiny_checkpoint.VOCAB_SIZE), tokenizer)
    export_pipeline(folder, params, configs, index=tiny_checkpoint.INDEX[variant],
                    scheduler=tiny_checkpoint.SCHEDULER[variant], tokenizer=tokenizer, **options)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    return {variant: write(root / variant, variant) for variant in ("base", "mid", "distilled")}


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    return exit_.value.code


def settings_of(*arguments) -> inputs.Settings:
    return make_settings(parser().parse_args([str(a) for a in arguments]))


# --- Whole comparisons ------------------------------------------------------------------------------------------------


def test_an_equal_base_model_passes_in_every_component(torch, models, tmp_path, capsys):
    report = tmp_path / "report.json"
    code = run("--model", models["base"], *SMALL, "--json", report)
    out = capsys.readouterr()
    assert code == 0, out.out
    assert "PASS: all" in out.out and "FAIL" not in out.out and "memory needed" in out.err
    values = json.loads(report.read_text())
    assert values["passed"] and {c["component"] for c in values["checks"]} == set(inputs.COMPONENTS)
    assert {"history tokens, long", "history tokens, mid", "history tokens, short"} <= {
        c["name"] for c in values["checks"]}


@pytest.mark.parametrize("variant, steps", [("mid", "3,1,1"), ("distilled", "1")])
def test_equal_pyramid_models_pass_at_every_stage(torch, models, variant, steps, capsys):
    code = run("--model", models[variant], "--size", "64x64", "--frames", 33, "--steps", steps,
               "--components", "transformer,sample")
    out = capsys.readouterr().out
    assert code == 0, out
    assert all(f"stage {i} of 3" in out for i in (1, 2, 3)) and "frames" in out


def test_in_bfloat16_errors_are_measured_against_pytorchs(torch, models, capsys):
    code = run("--model", models["base"], "--dtype", "bfloat16", "--components", "text_encoder,transformer", *SMALL)
    out = capsys.readouterr().out
    assert code == 0, out
    assert "makes in bfloat16" in out and "of range 1.0e-05" not in out


@pytest.mark.parametrize("component, leaf", [
    ("text_encoder", "encoder/block/layer_0/SelfAttention/o/kernel"), ("transformer", "patch_mid/kernel"),
    ("vae", "decoder/mid_block/resnets_1/conv2/kernel")])
def test_one_changed_tensor_fails_with_its_component_named(torch, models, tmp_path, component, leaf, capsys):
    """A tenth of a percent in one tensor, on the side of this library only."""
    changed = write(tmp_path / "changed", "base", (component, leaf))
    code = run("--model", changed, "--against", models["base"], "--size", "64x64",
               "--components", f"tokenizer,{component}")
    out = capsys.readouterr().out
    assert code == 1
    assert out.splitlines()[-1].startswith("FAIL") and out.splitlines()[-1].endswith(f"in {component}")
    if leaf.startswith("patch_mid"):
        lines = [line for line in out.splitlines() if "history tokens" in line]
        assert {line.split()[3]: line.split()[-1] for line in lines} == {"long": "PASS", "mid": "FAIL", "short": "PASS"}


def test_a_model_stored_in_half_precision_is_compared_in_float32_arithmetic(torch, models, tmp_path, capsys):
    """The weights stay as stored on both sides and are widened at use, which loses nothing. With Orbax."""
    half, orbax = write(tmp_path / "half", "base", dtype="bfloat16"), tmp_path / "orbax"
    convert_model(half, orbax, "orbax")
    settings = settings_of("--model", orbax, "--against", half)
    assert memory.kept_dtype(settings.against, "transformer", "float32") == "bfloat16"
    assert run("--model", orbax, "--against", half, "--components", "text_encoder,transformer", "--size", "64x64") == 0
    assert "of range 1.0e-05" in capsys.readouterr().out
    assert run("--model", orbax) == 2
    assert "Orbax" in capsys.readouterr().err


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_too_little_memory_is_refused_in_one_line_before_anything_is_loaded(torch, models, capsys):
    assert run("--model", models["base"], "--memory", "1") == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: memory: text_encoder needs 1.5") and "available are 1.00 GB" in error[-1]
    assert not any("PyTorch" in line for line in error)


def test_the_stated_weights_are_the_tensors_of_the_larger_side(models, tmp_path):
    base = settings_of("--model", models["base"])
    count = sum(np.prod(leaf.shape) for leaf in leaves("transformer", base.folder.transformer))
    assert memory.weight_bytes(base.folder, "transformer", "float32") == 4 * count
    half = memory.weight_bytes(base.folder, "transformer", "bfloat16")
    assert 2 * count < half < 2.5 * count  # with its float32 parameters


def test_the_published_model_needs_little_more_than_its_weights(monkeypatch):
    monkeypatch.setattr(memory, "weight_bytes", lambda folder, component, dtype: {
        "transformer": 28_683_223_168, "vae": 507_570_124, "text_encoder": 11_361_820_672}[component])
    base = settings_of_published()
    needs = {step.name: step.total / 1e9 for step in memory.plan(base)}
    assert list(needs) == ["text_encoder", "vae", "transformer + sample"]
    assert 11.4 < needs["text_encoder"] < 17 and needs["vae"] < 5 and 28.7 < needs["transformer + sample"] < 40


def settings_of_published() -> inputs.Settings:
    from helios_jax.config import ModelIndex, SchedulerConfig, TextEncoderConfig
    from helios_jax.convert.folder import ModelFolder
    from helios_jax.pipeline.request import Size

    folder = ModelFolder(Path("."), "diffusers", ModelIndex(), TransformerConfig(), VAEConfig(), TextEncoderConfig(),
                         SchedulerConfig(stages=1))
    return inputs.Settings(folder, folder, "bfloat16", Size(64, 128), 66, (3,), "a", 0, inputs.COMPONENTS)


# --- Verdicts ---------------------------------------------------------------------------------------------------------


def test_a_float32_verdict_is_the_largest_error_over_the_range():
    want = np.linspace(-1, 3, 1000).astype(np.float32)
    for error, passed in ((3.9e-5, True), (4.2e-5, False), (np.nan, False), (np.inf, False)):
        got = want.copy()
        got[7] += np.float32(error)
        check, = compare.compare("vae", {"x": got}, {"x": want})
        assert check.passed is passed, error
    check, = compare.compare("vae", {"x": want[:5]}, {"x": want})
    assert not check.passed and "shapes" in check.note
    json.dumps(check.to_dict(), allow_nan=False)


def test_a_half_precision_verdict_is_relative_to_pytorchs_error():
    rng = np.random.default_rng(0)
    want = rng.standard_normal(10000)
    noise = 1e-2 * rng.standard_normal(10000)
    half = {"x": want + noise}
    assert compare.compare("vae", {"x": want - noise}, {"x": want}, half)[0].passed
    assert not compare.compare("vae", {"x": want - 1.1 * noise}, {"x": want}, half)[0].passed
    assert compare.compare("vae", {"x": want}, {"x": want}, {"x": want})[0].passed


def test_an_appeal_tells_a_defect_from_sensitivity_to_rounding():
    rng = np.random.default_rng(0)
    exact = rng.standard_normal(10000)
    ours, theirs = (exact + 1e-3 * rng.standard_normal(10000) for _ in range(2))
    failed, = compare.compare("vae", {"x": ours}, {"x": theirs})
    assert not failed.passed
    assert compare.appeal(failed, ours, theirs, exact).passed
    assert not compare.appeal(failed, ours, exact + 1e-7, exact).passed


def test_frames_may_differ_by_less_than_one_level():
    want = np.linspace(0, 1, 100)
    for error, passed in ((0.0039, True), (0.0040, False)):
        assert compare.compare("sample", {"frames": want + error}, {"frames": want})[0].passed is passed


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, message", [
    (("--size", "100x100"), "nearest allowed"), (("--size", "big"), "HEIGHTxWIDTH"),
    (("--components", "unet"), "--components"), (("--steps", "two"), "--steps"), (("--steps", "1,1"), "steps"),
    (("--frames", "0"), "--frames"), (("--seed", "-1"), "--seed"), (("--memory", "-3"), "--memory"),
    (("--dtype", "int8"), "--dtype"), (("--layers", "2"), "unrecognized"), (("--json", "/no/such/folder/x"), "--json"),
    (("--against", "/no/such/model"), "no such folder")])
def test_wrong_options_are_refused_in_one_line(models, arguments, message, capsys):
    assert run("--model", models["base"], *arguments) == 2
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error


def test_a_model_of_another_variant_is_no_comparison(models, capsys):
    assert run("--model", models["base"], "--against", models["mid"]) == 2
    assert "a base model of 1 stages expected" in capsys.readouterr().err


def test_without_pytorch_one_line_says_what_to_install(models):
    """In a process in which PyTorch cannot be imported."""
    code = "import sys; sys.modules['torch'] = None\nfrom helios_jax.verify.__main__ import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, "--model", models["base"]], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install" in done.stderr.splitlines()[-1]


def test_changing_no_tensor_changes_no_number(models, tmp_path):
    """The fixture's two folders differ in the changed tensor alone."""
    changed = write(tmp_path / "changed", "base", ("transformer", "patch_mid/kernel"))
    a, b = (load_component(folder / "transformer", "transformer") for folder in (models["base"], changed))
    np.testing.assert_array_equal(a["patch_long"]["kernel"], b["patch_long"]["kernel"])
    assert np.abs(a["patch_mid"]["kernel"] - b["patch_mid"]["kernel"]).max() > 1e-5


@pytest.mark.slow
def test_memory_stays_within_what_is_stated(torch, tmp_path):
    """A model of 0.7 GB, where the frame of the program does not hide a copy of the weights."""
    config = TransformerConfig(num_attention_heads=8, attention_head_dim=128, text_dim=64, ffn_dim=2752, num_layers=24)
    text = dataclasses.replace(tiny_checkpoint.CONFIGS["text_encoder"], d_model=64)
    rng = np.random.default_rng(0)
    params = {}
    configs = tiny_checkpoint.CONFIGS | {"transformer": config, "text_encoder": text}
    for component, its in configs.items():
        arrays = [(leaf.path, rng.standard_normal(leaf.shape, np.float32) * max(leaf.shape) ** -0.5)
                  for leaf in leaves(component, its)]
        params[component] = unflatten([(path, array.astype(ml_dtypes.bfloat16)) for path, array in arrays])
    save_tokenizer(train_tokenizer(tiny_checkpoint._CAPTIONS, tiny_checkpoint.VOCAB_SIZE), tmp_path / "tokenizer")
    export_pipeline(tmp_path / "model", params, configs, index=tiny_checkpoint.INDEX["base"],
                    scheduler=tiny_checkpoint.SCHEDULER["base"], tokenizer=tmp_path / "tokenizer")
    for dtype in ("float32", "bfloat16"):
        settings = settings_of("--model", tmp_path / "model", "--dtype", dtype)
        stated = next(step.total for step in memory.plan(settings) if step.name.startswith("transformer"))
        command = [sys.executable, "-m", "helios_jax.verify", "--model", tmp_path / "model", "--dtype", dtype,
                   "--steps", "2", "--components", "transformer,sample"]
        process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, text=True)
        peak = 0
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak = max(peak, 1024 * int(next(x for x in lines if x.startswith("RssAnon")).split()[1]))
            time.sleep(0.05)
        print(f"{dtype}: peak {peak / 1e9:.2f} GB, stated {stated / 1e9:.2f} GB\n{process.stdout.read()}")
        assert process.returncode == 0
        assert peak < stated
