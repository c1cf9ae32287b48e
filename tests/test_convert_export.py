"""Exported folders are what diffusers reads and writes; the command line keeps what exists when something fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from helios_jax.config import ModelIndex, SchedulerConfig, read_json
from helios_jax.convert import load_component, load_pipeline_params
from helios_jax.convert.__main__ import main
from helios_jax.convert.export import atomic_folder, convert_model, export_pipeline
from helios_jax.convert.folder import write_json
from helios_jax.convert.rules import flatten
from helios_jax.errors import UserError
from tests.convert_folders import (
    CONFIGS,
    SCHEDULER,
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    assert_trees_equal,
    random_params,
    state_dict,
    write_model,
    write_tokenizer,
)

MID = (ModelIndex("HeliosPyramidPipeline", is_cfg_zero_star=True), SchedulerConfig(use_dynamic_shifting=True))
DISTILLED = (ModelIndex("HeliosPyramidPipeline", "HeliosDMDScheduler", is_distilled=True),
             SchedulerConfig("HeliosDMDScheduler", use_dynamic_shifting=True))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    return exit_.value.code


# --- diffusers and transformers as oracles ---------------------------------------------------------------------------


def torch_modules():
    """Random PyTorch modules of the tiny configurations."""
    torch = pytest.importorskip("torch")
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    return {"transformer": diffusers.HeliosTransformer3DModel.from_config(TRANSFORMER.to_dict()),
            "vae": diffusers.AutoencoderKLWan.from_config(VAE.to_dict()),
            "text_encoder": transformers.UMT5EncoderModel(transformers.UMT5Config(**TEXT_ENCODER.to_dict()))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_pytorch_saved_loads_exactly_here(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    for component, module in torch_modules().items():
        folder = tmp_path / component
        module.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="5KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        params = load_component(folder, component)  # the configuration comes from the file too
        for path, leaf in flatten(params):
            assert leaf.dtype.name == dtype, path
        expected = {n: t.float().numpy() for n, t in module.state_dict().items()}
        from helios_jax.convert import params_to_torch_state_dict
        ours = params_to_torch_state_dict(component, CONFIGS[component], params)
        for name, tensor in ours.items():
            np.testing.assert_array_equal(tensor.astype(np.float32), expected[name], err_msg=name)


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_diffusers_loads_and_samples_from_an_exported_folder(tmp_path, variant):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    index, scheduler = {"base": (ModelIndex(), SCHEDULER), "mid": MID, "distilled": DISTILLED}[variant]
    params = write_model(tmp_path / "model", index=index, scheduler=scheduler, max_shard_bytes=60_000)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert type(pipeline).__name__ == index.class_name
    assert type(pipeline.scheduler).__name__ == index.scheduler_class
    for name, value in scheduler.to_dict().items():
        if name in pipeline.scheduler.config:
            loaded = pipeline.scheduler.config[name]
            assert (list(loaded) if isinstance(loaded, (list, tuple)) else loaded) == value, name
    if variant != "base":
        assert pipeline.config.is_distilled == index.is_distilled
        assert pipeline.config.is_cfg_zero_star == index.is_cfg_zero_star
    for component in CONFIGS:
        for name, tensor in getattr(pipeline, component).state_dict().items():
            expected = state_dict(component, CONFIGS[component], seed=list(CONFIGS).index(component))
            name = "shared.weight" if name == "encoder.embed_tokens.weight" else name
            np.testing.assert_array_equal(tensor.numpy(), expected[name], err_msg=name)
    assert params
    if variant == "base":
        video = pipeline("a red circle moves left", height=32, width=32, num_frames=33, num_inference_steps=2,
                         guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type="np").frames
        assert video.shape == (1, 33, 32, 32, 3) and np.isfinite(video).all()


def test_extra_keys_of_published_configs_survive_a_round_trip(tmp_path):
    write_model(tmp_path / "a")
    path = tmp_path / "a" / "transformer" / "config.json"
    write_json(path, read_json(path) | {"image_dim": None, "gan_hooks": [5]})
    convert_model(tmp_path / "a", tmp_path / "b", "orbax")
    convert_model(tmp_path / "b", tmp_path / "c", "diffusers")
    assert read_json(tmp_path / "c" / "transformer" / "config.json")["gan_hooks"] == [5]
    assert snapshot(tmp_path / "c") == snapshot(tmp_path / "a")


# --- Orbax -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_orbax_keeps_every_bit_and_restores_as_one_tree(tmp_path, dtype):
    import orbax.checkpoint as ocp

    params = write_model(tmp_path / "a", dtype, format="orbax")
    model, loaded = load_pipeline_params(tmp_path / "a")
    assert model.format == "orbax" and (model.tokenizer / "tokenizer.json").is_file()
    for component, tree in params.items():
        assert_trees_equal(loaded[component], tree)
        with ocp.StandardCheckpointer() as checkpointer:  # nothing of ours is needed to read it
            restored = checkpointer.restore((tmp_path / "a" / component / "params").absolute(), tree)
        assert_trees_equal(restored, tree)


def test_loading_orbax_applies_the_same_dtype_policy(tmp_path):
    write_model(tmp_path / "a")
    convert_model(tmp_path / "a", tmp_path / "b", "orbax")
    _, published = load_pipeline_params(tmp_path / "a", dtype={"transformer": "bfloat16", "vae": "float32"})
    _, orbax = load_pipeline_params(tmp_path / "b", dtype={"transformer": "bfloat16", "vae": "float32"})
    for component, tree in published.items():
        assert_trees_equal(orbax[component], tree)


@pytest.mark.parametrize("there,back", [("orbax", "orbax"), ("diffusers", "diffusers")])
def test_converting_with_a_dtype_writes_what_the_loader_would_have_cast(tmp_path, there, back):
    write_model(tmp_path / "a")
    convert_model(tmp_path / "a", tmp_path / "b", there, dtype="bfloat16")
    convert_model(tmp_path / "b", tmp_path / "c", back)
    _, expected = load_pipeline_params(tmp_path / "a", dtype="bfloat16")
    _, actual = load_pipeline_params(tmp_path / "c")
    for component, tree in expected.items():
        assert_trees_equal(actual[component], tree)


@pytest.mark.parametrize("how", ["metadata", "data", "foreign"])
def test_damaged_orbax_checkpoints_are_one_line(tmp_path, how):
    write_model(tmp_path / "a", format="orbax")
    folder = tmp_path / "a" / "vae" / "params"
    if how == "metadata":
        (folder / "_METADATA").write_text("{")
    elif how == "data":
        for file in folder.rglob("d/*"):
            file.write_bytes(b"")
    else:
        import shutil
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "a" / "text_encoder" / "params", folder)
    with pytest.raises(UserError) as error:
        load_component(tmp_path / "a" / "vae", "vae")
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


# --- writing safely --------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_kept_unless_overwrite_is_asked_for(tmp_path):
    write_model(tmp_path / "a")
    write_model(tmp_path / "b", ml_dtypes.bfloat16)
    before = snapshot(tmp_path / "b")
    with pytest.raises(UserError, match="exists and is not empty.*--overwrite"):
        convert_model(tmp_path / "a", tmp_path / "b", "diffusers")
    assert snapshot(tmp_path / "b") == before
    convert_model(tmp_path / "a", tmp_path / "b", "diffusers", overwrite=True)
    assert snapshot(tmp_path / "b") == snapshot(tmp_path / "a")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no model, so it is not overwritten"):
        convert_model(tmp_path / "a", tmp_path / "notes", "diffusers", overwrite=True)
    (tmp_path / "empty").mkdir()
    convert_model(tmp_path / "a", tmp_path / "empty", "diffusers")
    assert snapshot(tmp_path / "empty") == snapshot(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_model_is_never_replaced_by_its_own_conversion(tmp_path):
    write_model(tmp_path / "m" / "a")
    before = snapshot(tmp_path / "m" / "a")
    for out in (tmp_path / "m" / "a", tmp_path / "m", tmp_path / "m" / "a" / ".." / "a"):
        with pytest.raises(UserError, match="would replace the model that is converted"):
            convert_model(tmp_path / "m" / "a", out, "diffusers", overwrite=True)
    assert snapshot(tmp_path / "m" / "a") == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_halfway_leaves_nothing_half_written(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model_index.json").write_text("{}")
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError
    with pytest.raises(expected), atomic_folder(out, overwrite=True) as building:
        (building / "half").write_text("x")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and snapshot(out) == {"model_index.json": b"{}"}


@pytest.mark.parametrize("format", ["orbax", "diffusers"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, format):
    write_model(tmp_path / "a")
    # The largest file a process may write stands for the disk's size; the kernel refuses writes beyond it.
    code = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
            "from helios_jax.convert.__main__ import main; main(sys.argv[1:])")
    done = subprocess.run(
        [sys.executable, "-c", code, "--from", tmp_path / "a", "--to", tmp_path / "out", "--format", format],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith(("transformer:", "vae:", "text_enc"))]
    assert len(errors) == 1 and "out: cannot be written" in errors[0], done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a-tokenizer"]


def test_too_little_space_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    write_model(tmp_path / "a")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"needs .* MB, the disk has 0.00 MB left"):
        convert_model(tmp_path / "a", tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


def test_unwritable_outputs_are_one_line(tmp_path):
    write_model(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists and is not a folder"):
        convert_model(tmp_path / "a", tmp_path / "file", "diffusers")
    with pytest.raises(UserError, match="cannot be written"):
        convert_model(tmp_path / "a", tmp_path / "file" / "out", "diffusers")
    if os.geteuid() != 0:  # root may write everywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        with pytest.raises(UserError, match="cannot be written .Permission denied"):
            convert_model(tmp_path / "a", tmp_path / "locked" / "out", "diffusers")


def test_wrong_parameters_are_refused_before_anything_is_written(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "t")
    params = {"vae": random_params("vae", VAE)}
    del params["vae"]["quant_conv"]["bias"]
    with pytest.raises(UserError, match="1 missing: quant_conv/bias"):
        export_pipeline(tmp_path / "out", params, CONFIGS, index=ModelIndex(), scheduler=SCHEDULER,
                        tokenizer=tokenizer)
    with pytest.raises(UserError, match="the tokenizer"):
        export_pipeline(tmp_path / "out", {}, CONFIGS, index=ModelIndex(), scheduler=SCHEDULER,
                        tokenizer=tmp_path / "none")
    with pytest.raises(UserError, match="format: one of orbax, diffusers, got 'gguf'"):
        export_pipeline(tmp_path / "out", {}, CONFIGS, index=ModelIndex(), scheduler=SCHEDULER, format="gguf")
    assert not (tmp_path / "out").exists()


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_converts_and_reports(tmp_path, capsys):
    params = write_model(tmp_path / "a")
    assert run("--from", tmp_path / "a", "--to", tmp_path / "b") == 0
    _, loaded = load_pipeline_params(tmp_path / "b")
    assert_trees_equal(loaded["vae"], params["vae"])
    report = capsys.readouterr().err
    assert "transformer: 75 tensors" in report and "wrote" in report


def test_help_names_every_option(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for option in ("--from", "--to", "--format", "--dtype", "--from-wan", "--max-shard-gb", "--overwrite",
                   "--revision", "examples:"):
        assert option in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("arguments,message", [
    (["--to", "x"], "--from"), (["--from", "x", "--to", "y", "--nonsense"], "--nonsense"),
    (["--from", "x", "--to", "y", "--format", "gguf"], "gguf"),
    (["--from", "x", "--to", "y", "--dtype", "int8"], "int8"),
    (["--from", "x", "--to", "y", "--max-shard-gb", "0"], "--max-shard-gb: must be positive"),
    (["--from", "./nowhere", "--to", "y"], "no such folder")])
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert run(*arguments) == 2
    text = capsys.readouterr().err
    assert message in text and text.startswith("error: ") and text.count("\n") == 1
