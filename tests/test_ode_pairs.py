"""ODE pairs: what a record holds, that it lies on the teacher's trajectory, and what kills and workers change."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource

from helios_jax.config import SchedulerConfig
from helios_jax.data.ode_records import OdeFolder, OdeRecord, decode_ode_record, encode_ode_record, ode_item, ode_items
from helios_jax.data.random_latents import write_random_latents
from helios_jax.diffusion import pyramid, solvers
from helios_jax.diffusion.few_step import level_grid, trajectory_schedule
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.diffusion.noise import SeededNoise
from helios_jax.diffusion.schedules import stage_table
from helios_jax.errors import UserError
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.tools.ode_pairs import PairsConfig, TrajectorySampler, read_prompts, write_pairs
from tests.tiny_checkpoint import write_tiny_checkpoint

LAYOUT = HistoryLayout()
PROMPTS = ["a red circle moving right", "the green triangle drifts left", "a red circle moving right"]
CONFIG = PairsConfig(sections=2, steps=3, seed=7, prompts_per_file=2, batch=2)
SIZE = {"frames": 9, "height": 8, "width": 8}


@pytest.fixture(scope="module")
def sampler(tmp_path_factory) -> TrajectorySampler:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "mid", "mid")
    return TrajectorySampler(HeliosPipeline.from_pretrained(folder), CONFIG)


def write(sampler, output, **options) -> bool:
    return write_pairs(PROMPTS, CONFIG, output, sampler, **{"identity": "tiny", "report": lambda line: None, **options})


def records(output) -> list[bytes]:
    sources = [ArrayRecordDataSource(str(path)) for path in sorted(output.glob("*.array_record"))]
    return [source[i] for source in sources for i in range(len(source))]


@pytest.fixture(scope="module")
def pairs(sampler, tmp_path_factory):
    output = tmp_path_factory.mktemp("pairs")
    assert write(sampler, output)
    return output, [decode_ode_record(serialised) for serialised in records(output)]


def test_records_hold_the_grid_points_and_the_end_of_every_level(sampler, pairs):
    output, made = pairs
    folder = OdeFolder.open(output)
    assert (folder.num_records, folder.sections, folder.shift_from, len(folder.stage_range)) == (3, 2, "own", 4)
    assert [record.prompt for record in made] == PROMPTS and [r.info["seed"] for r in made] == [7, 8, 9]
    for section, steps in ((0, 4), (1, 2)):
        for level in range(3):
            part = made[0].sections[section][level]
            assert part.states.shape == (steps + 1, 9, 2 << level, 2 << level, 16) and part.states.dtype == np.float32
            grid = level_grid(sampler.scheduler, steps, stage=level, **SIZE)
            np.testing.assert_allclose(part.sigmas, grid.sigmas[:-1], atol=1e-3)
            np.testing.assert_allclose(part.timesteps, grid.timesteps, atol=0.5)
    first, other = made[0].sections[0][0].states[0], made[2].sections[0][0].states[0]
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.15  # the same prompt, but noise of its own


def test_states_lie_on_the_trajectory_of_a_guided_teacher(sampler, pairs):
    """The same video, one model call after the other, guidance and history by hand."""
    record, pipeline = pairs[1][1], sampler.pipeline
    table, model = stage_table(sampler.scheduler), pipeline.transformer
    noise = SeededNoise((CONFIG.seed + 1,))
    contexts = [pipeline.context(pipeline.embed((text,))) for text in (PROMPTS[1], "")]
    history, anchor = np.zeros((1, 19, 8, 8, 16), np.float32), np.zeros((1, 1, 8, 8, 16), np.float32)

    @jax.jit
    def velocity(x, timestep, context, history, anchor):
        return model.apply(pipeline.variables, x, timestep, context, LAYOUT.split(history, anchor),
                           indices=LAYOUT.indices())

    for section, steps in ((0, 4), (1, 2)):
        white = noise.normal("chunk", (section,), (1, 9, 8, 8, 16))
        x = pyramid.noise_pyramid(white, 3)[0]
        for level in range(3):
            if level:
                shape = pyramid.block_noise_shape(1, 9, 2 << level, 2 << level, 16)
                x = pyramid.transition(x, noise.normal("block", (section, level), shape), table[level])
            schedule, kept = trajectory_schedule(sampler.scheduler, CONFIG.steps, steps, stage=level, **SIZE)
            coefficients = solvers.solver_coefficients(sampler.scheduler, schedule)
            state, inputs = solvers.init_state(x, coefficients.memory), []
            for i, timestep in enumerate(np.trunc(schedule.timesteps)):
                inputs.append(np.asarray(state.sample[0]))
                v, u = (velocity(state.sample, jnp.full(1, timestep), context, history, anchor)
                        for context in contexts)
                state = solvers.step(solvers.row(coefficients, i), state, u + CONFIG.guidance * (v - u))
            x = state.sample
            expected = np.stack([*(inputs[j] for j in kept), np.asarray(x[0])])
            got = record.sections[section][level].states
            np.testing.assert_allclose(got, expected, atol=2e-4 * np.abs(expected).max())
        history = np.concatenate([history, x], axis=1)[:, -19:]
        anchor = np.asarray(x[:, :1]) if section == 0 else anchor


def test_kills_and_workers_do_not_change_the_records(sampler, pairs, tmp_path):
    """Stopped inside the second file by worker 0, which is finished by worker 1."""

    def stopped(prompts, seeds):
        if 9 in seeds:
            raise KeyboardInterrupt
        return sampler(prompts, seeds)

    whole = records(pairs[0])
    broken = type("Stopped", (), {"__call__": lambda self, *call: stopped(*call), "__getattr__": lambda self, name:
                                  getattr(sampler, name)})()
    with pytest.raises(KeyboardInterrupt):
        write(broken, tmp_path)
    assert not (tmp_path / "dataset.json").exists() and len(records(tmp_path)) == 2
    assert not write(sampler, tmp_path, worker=2, workers=3)
    assert write(sampler, tmp_path, worker=1, workers=2)
    assert records(tmp_path) == whole
    with pytest.raises(UserError, match="holds a data set of another kind: identity"):
        write(sampler, tmp_path, identity="other")


def test_a_record_file_that_has_vanished_is_made_again(sampler, pairs, tmp_path):
    shutil.copytree(pairs[0], tmp_path / "copy")
    whole = records(pairs[0])
    next((tmp_path / "copy").glob("*.array_record")).unlink()
    assert write(sampler, tmp_path / "copy") and records(tmp_path / "copy") == whole


@pytest.mark.parametrize(("steps", "few_steps"), [(100, 64), (20, 5000)])
def test_points_that_share_a_sigma_with_a_step_are_refused(steps, few_steps):
    with pytest.raises(UserError, match=f"few_steps: {few_steps} points a level lie too close to the teacher's "):
        trajectory_schedule(SchedulerConfig(use_dynamic_shifting=True), steps, few_steps, frames=9, height=8, width=8,
                            stage=0)


def test_serialised_records_come_back(pairs):
    record = pairs[1][0]
    again = decode_ode_record(encode_ode_record(record))
    jax.tree.map(np.testing.assert_array_equal, leaves(again), leaves(record))
    assert (again.prompt, again.info) == (record.prompt, record.info)
    with pytest.raises(UserError, match="damaged or of another kind"):
        decode_ode_record(b"something else")


def leaves(record: OdeRecord) -> list[np.ndarray]:
    return [record.text, *(getattr(level, field.name) for section in record.sections for level in section
                           for field in dataclasses.fields(level))]


def test_items_hold_one_step_per_level_and_the_teachers_own_history(pairs):
    record = pairs[1][0]
    clean = np.concatenate([section[2].states[-1] for section in record.sections])
    seen = set()
    for seed in range(40):
        item = ode_item(record, np.random.default_rng(seed), LAYOUT, 1, 16, whole_timesteps=False)
        section = int(item["frames"].any())
        if section:
            np.testing.assert_array_equal(item["frames"][0, 0], clean[0])  # the anchor
            np.testing.assert_array_equal(item["frames"][0, -9:], clean[:9])
            assert not item["frames"][0, 1:-9].any()
        for level, part in enumerate(record.sections[section]):
            step = int(np.flatnonzero(part.timesteps == item["timestep"][0, level])[0])
            np.testing.assert_array_equal(item[f"noisy_{level}"][0], part.states[step])
            np.testing.assert_array_equal(item[f"end_{level}"][0], part.states[-1])
            assert item["sigma"][0, level] == part.sigmas[step]
            seen.add((section, level, step))
    assert len(seen) == 3 * (4 + 2)
    assert item["text"].shape[0] == 16 and item["text_length"] == len(record.text)
    np.testing.assert_array_equal(item["text"][: len(record.text)], record.text.astype(np.float32))


def test_steps_are_whole_numbers_where_the_student_is_sampled_so(pairs):
    folder, serialised = OdeFolder.open(pairs[0]), records(pairs[0])[0]
    for shift_from, whole in (("own", False), ("previous", True)):
        make = ode_items(dataclasses.replace(folder, shift_from=shift_from), LAYOUT, 2)
        timestep = make(serialised, np.random.default_rng(0))["timestep"]
        assert timestep.shape == (2, 3) and (timestep == np.trunc(timestep)).all() == whole
    with pytest.raises(UserError, match="objective.sections: at most the 2 of"):
        ode_items(folder, LAYOUT, 3)


def test_prompts_are_the_lines_of_a_file_or_the_captions_of_records(tmp_path):
    write_random_latents(tmp_path / "latents", clips=3, sections=1, height=2, width=2, text_rows=2, text_dim=4)
    assert read_prompts(tmp_path / "latents") == ["clip 0", "clip 1", "clip 2"]
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two \n")
    assert read_prompts(file) == ["one", "two"]
    file.write_text("\n")
    with pytest.raises(UserError, match="holds none"):
        read_prompts(file)


@pytest.mark.parametrize(("change", "message"), [
    ({"batch": 3}, "batch: must divide prompts_per_file 2"), ({"shift_from": "next"}, "shift_from: one of own"),
    ({"steps": 0}, "steps: must be a whole number"), ({"seed": -1}, "seed: must be"),
    ({"guidance": float("nan")}, "guidance: a finite number of at least 0, got nan"),
])
def test_wrong_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **change)
