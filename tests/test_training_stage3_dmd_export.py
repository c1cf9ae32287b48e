"""Distribution matching on model folders: what is exported and sampled, the negative prompt, which models may play."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.convert.folder import read_model_folder
from helios_jax.convert.load import load_component
from helios_jax.convert.rules import flatten
from helios_jax.data.random_latents import write_random_latents
from helios_jax.errors import UserError
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.training.config import run_config
from helios_jax.training.objective import Objective
from helios_jax.training.program import Optimizers, initial_state
from helios_jax.training.stage3_dmd import build
from tests.tiny_checkpoint import CONFIGS

LORA = {"rank": 2, "alpha": 6.0, "targets": ("to_q", "proj_out"), "base_dtype": "float32"}


class Built(NamedTuple):
    """A run, its objective, and its models."""

    run: Any
    objective: Objective
    folders: dict[str, Path]


def run_of(folders: dict[str, Path], latents: Path, **objective):
    transformer = {name: tuple(v) if isinstance(v, list) else v
                   for name, v in CONFIGS["transformer"].to_dict().items()}
    return run_config({
        "objective": {
            "name": "stage3_dmd", "data": str(latents), "model": str(folders["base"]),
            "init_from": str(folders["distilled"]), "teacher": str(folders["base"]), "transformer": transformer,
            "lora": LORA, "critic": {"lora": LORA}, "negative_prompt": "a blue square", "export_dtype": "float32",
            "sample": {"prompts": ("a red circle",), "num_frames": 33, "steps": 1, "guidance": 1.0}, **objective,
        },
        "batch_size": 1, "ema_decay": 0.9,
    })


@pytest.fixture(scope="module")
def built(folders, tmp_path_factory) -> Built:
    latents = tmp_path_factory.mktemp("data") / "latents"
    write_random_latents(latents, clips=1, sections=2, height=8, width=8, channels=16, text_rows=4,
                         text_dim=CONFIGS["transformer"].text_dim)
    run = run_of(folders, latents)
    return Built(run, build(run), folders)


@pytest.fixture(scope="module")
def state(built):
    """A state whose player, critic and average all differ from the start and from one another."""
    params = jax.jit(built.objective.init_params)(jax.random.key(0))
    rng = np.random.default_rng(0)

    def moved(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf + rng.standard_normal(leaf.shape), leaf.dtype), tree)

    start = initial_state(params, Optimizers(built.run, built.objective.players, None), True,
                          built.objective.players)
    return dataclasses.replace(start, params=moved(params), ema=moved(start.ema))


def test_the_export_is_the_students_base_with_its_averaged_adapters(built, state, tmp_path):
    built.objective.export(state.best_params(), str(tmp_path / "export"))
    folder = read_model_folder(tmp_path / "export")
    assert folder.index.variant == "distilled" and folder.scheduler.is_dmd
    assert folder.scheduler.use_dynamic_shifting and folder.scheduler.time_shift_type == "linear"

    def transformer(folder: Path) -> dict:
        return dict(flatten(load_component(folder / "transformer", "transformer", CONFIGS["transformer"],
                                           jnp.dtype("float32"))))

    expected, found = transformer(built.folders["distilled"]), transformer(tmp_path / "export")
    adapters = dict(flatten(state.ema["student"]["lora"]))
    changed = {path[:-1] for path in adapters}
    assert ("proj_out",) in changed and len(changed) == 3  # two attentions' to_q
    for module in changed:
        a, b = (np.asarray(adapters[(*module, side)], np.float64) for side in "ab")
        expected[(*module, "kernel")] = expected[(*module, "kernel")] + 6.0 / 2 * a @ b
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-5, err_msg="/".join(path))


@pytest.mark.slow
def test_samples_during_training_are_those_of_the_export(built, state, tmp_path):
    built.objective.export(state.best_params(), str(tmp_path / "export"))
    (video,) = built.objective.sample(state.best_params(), 0).values()
    own = HeliosPipeline.from_pretrained(tmp_path / "export")("a red circle", num_frames=33, steps=1, seed=42)
    np.testing.assert_allclose(np.asarray(video, np.float32), 255 * np.asarray(own[0], np.float32), atol=1)


def test_another_negative_prompt_is_encoded_with_the_text_encoder_of_the_model(built):
    negative = built.objective.frozen["negative"]
    expected = HeliosPipeline.from_pretrained(built.folders["base"]).embed(("a blue square",))
    length = int(expected.lengths[0])
    np.testing.assert_allclose(negative["text"], expected.rows[0][:length], atol=1e-5)
    assert negative["text_length"] == length


def test_a_teacher_of_another_kind_is_refused(built, tmp_path):
    for variant in ("mid", "distilled"):
        run = dataclasses.replace(built.run, objective=dataclasses.replace(built.run.objective, teacher=str(
            built.folders[variant])))
        with pytest.raises(UserError, match=f"objective.teacher: a Base model expected, .* is {variant}$"):
            build(run)


@pytest.mark.parametrize(("file", "change", "message"), [
    ("vae/config.json", {"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8},
     "objective.model: the VAE of .* makes latents of 8 channels, the transformer takes 16"),
    ("text_encoder/config.json", {"d_model": 32},
     "objective.model: the text encoder of .* makes rows of width 32, the transformer takes 24"),
    ("tokenizer", None, "objective.model: .* has no tokenizer/")])
def test_a_model_folder_that_would_fail_at_the_first_sample_is_refused_at_the_start(built, file, change, message,
                                                                                    tmp_path):
    shutil.copytree(built.folders["base"], tmp_path / "model")
    path = tmp_path / "model" / file
    if change is None:
        shutil.rmtree(path)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    run = dataclasses.replace(built.run, objective=dataclasses.replace(built.run.objective, negative_prompt="",
                                                                       model=str(tmp_path / "model")))
    with pytest.raises(UserError, match=message):
        build(run)


def test_a_student_or_teacher_that_cannot_be_read_is_named_by_its_field(built):
    run = dataclasses.replace(built.run, objective=dataclasses.replace(built.run.objective, teacher="nowhere"))
    objective = build(run)
    with pytest.raises(UserError, match="^objective.teacher: nowhere/transformer: no such folder"):
        objective.base.load(None)


def test_the_critics_settings_are_named_as_its_own(built):
    objective = built.run.objective
    with pytest.raises(UserError, match="objective.critic.lora.targets: 'patch_foo' matches no module"):
        build(dataclasses.replace(built.run, objective=dataclasses.replace(objective, critic=dataclasses.replace(
            objective.critic, lora=dataclasses.replace(objective.critic.lora, targets=("patch_foo",))))))
    with pytest.raises(UserError, match="^objective.critic.lora.alpha: 0 or more, got -1"):
        run_of(built.folders, Path("data"), critic={"lora": LORA | {"alpha": -1.0}})
    with pytest.raises(UserError, match="^objective.critic.optimizer.learning_rate: must be positive, got 0"):
        run_of(built.folders, Path("data"), critic={"lora": LORA, "optimizer": {"learning_rate": 0.0}})
    with pytest.raises(UserError, match="^objective.lora.alpha: 0 or more, got -1"):
        run_of(built.folders, Path("data"), lora=LORA | {"alpha": -1.0})
