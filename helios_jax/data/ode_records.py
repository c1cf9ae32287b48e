"""Trajectories of a teacher (ODE pairs): the record of one prompt, and training items made of it.

A record holds what the student's first stage of distillation regresses: of every section and pyramid level the states
at the input of those of the teacher's steps that lie on the student's few-step grid, and the state after the last
step. :mod:`helios_jax.tools.ode_pairs` writes them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from helios_jax.data.pipeline import LatentFolder, MakeItem
from helios_jax.data.records import pack, padded_rows, unpack
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class OdeLevel:
    """One pyramid level of one section.

    Attributes:
      states: [k + 1, 9, h_i, w_i, C] float32, the inputs of k steps in the order of the steps, and the level's end.
      timesteps: [k] float32, of those steps, not truncated.
      sigmas: [k] float32, relative to the level.
    """

    states: np.ndarray
    timesteps: np.ndarray
    sigmas: np.ndarray


@dataclasses.dataclass(frozen=True)
class OdeRecord:
    """The teacher's video of one prompt.

    Attributes:
      sections: per section the levels, lowest resolution first.
      text: [n, D] float16, the prompt's embedding without padding.
      prompt: the text.
      info: anything worth keeping, such as the seed; JSON values.
    """

    sections: tuple[tuple[OdeLevel, ...], ...]
    text: np.ndarray
    prompt: str
    info: dict[str, Any]


def encode_ode_record(record: OdeRecord) -> bytes:
    """The serialised record: arrays under names such as "states_0_2" (section 0, level 2)."""
    arrays = {f"{field.name}_{section}_{level}": np.asarray(getattr(part, field.name), np.float32)
              for section, levels in enumerate(record.sections) for level, part in enumerate(levels)
              for field in dataclasses.fields(OdeLevel)}
    return pack({**arrays, "text": np.asarray(record.text, np.float16)},
                {"prompt": record.prompt, "info": record.info,
                 "sections": len(record.sections), "levels": len(record.sections[0])})


def decode_ode_record(serialised: bytes) -> OdeRecord:
    """The record of its serialised form.

    Raises:
      UserError: the bytes are no such record.
    """

    def make(arrays: dict[str, np.ndarray], described: dict[str, Any]) -> OdeRecord:
        sections = tuple(
            tuple(OdeLevel(*(arrays[f"{field.name}_{section}_{level}"] for field in dataclasses.fields(OdeLevel)))
                  for level in range(described["levels"]))
            for section in range(described["sections"]))
        return OdeRecord(sections, arrays["text"], described["prompt"], described["info"])

    return unpack(serialised, make)


@dataclasses.dataclass(frozen=True)
class OdeFolder(LatentFolder):
    """What ``dataset.json`` of a folder of ODE records says.

    Attributes:
      stage_range, gamma: of the teacher's scheduler; the student is sampled with the same levels.
      shift_from: 'own' or 'previous', see :mod:`helios_jax.diffusion.few_step`.
    """

    BUILDER: ClassVar[str] = "helios_jax.tools.ode_pairs"

    stage_range: tuple[float, ...]
    gamma: float
    shift_from: str


def ode_item(record: OdeRecord, rng: np.random.Generator, layout: HistoryLayout, chosen: int, text_rows: int,
             whole_timesteps: bool) -> dict[str, np.ndarray]:
    """One training item of a record: some of its sections, and of each level of these one stored step.

    Args:
      record: of S sections.
      rng: of this item and epoch.
      layout: sizes of history and chunk.
      chosen: K, how many sections; drawn without replacement.
      text_rows: rows to which the prompt's embedding is padded.
      whole_timesteps: truncate the timesteps, as sampling does.

    Returns: "frames" [K, 1 + 19, h, w, C], anchor and history as the teacher's own results leave them; for every level
      i "noisy_i" and "end_i" [K, 9, h_i, w_i, C]; "timestep" and "sigma" [K, levels]; "text" [text_rows, D], all
      float32; "text_length" int32 [].
    """
    sections = np.sort(rng.choice(len(record.sections), chosen, replace=False))
    clean = np.concatenate([levels[-1].states[-1] for levels in record.sections])  # [S * 9, h, w, C]
    windows = [layout.training_window(clean, int(section)) for section in sections]
    item = {"frames": np.stack([np.concatenate([window.anchor, window.history]) for window in windows])}
    timesteps, sigmas = [], []
    for i in range(len(record.sections[0])):
        levels = [record.sections[section][i] for section in sections]
        steps = [int(rng.integers(len(level.timesteps))) for level in levels]
        item[f"noisy_{i}"] = np.stack([level.states[j] for level, j in zip(levels, steps, strict=True)])
        item[f"end_{i}"] = np.stack([level.states[-1] for level in levels])
        timesteps.append([level.timesteps[j] for level, j in zip(levels, steps, strict=True)])
        sigmas.append([level.sigmas[j] for level, j in zip(levels, steps, strict=True)])
    timestep = np.array(timesteps, np.float32).T  # [levels, K] -> [K, levels]
    return {**item, "timestep": np.trunc(timestep) if whole_timesteps else timestep,
            "sigma": np.array(sigmas, np.float32).T, "text": padded_rows(record.text, text_rows),
            "text_length": np.int32(len(record.text))}


def ode_items(folder: OdeFolder, layout: HistoryLayout, chosen: int) -> MakeItem:
    """:func:`ode_item` of the folder's records.

    Raises:
      UserError: other chunks than those of ``layout``, or fewer sections than are to be chosen.
    """
    if folder.frames != layout.chunk:
        raise UserError(f"data: sections of {folder.root} have {folder.frames} latent frames, the model's chunk "
                        f"{layout.chunk}")
    if folder.sections < chosen:
        raise UserError(f"objective.sections: at most the {folder.sections} of {folder.root}, got {chosen}")
    whole = folder.shift_from == "previous"
    return lambda serialised, rng: ode_item(decode_ode_record(serialised), rng, layout, chosen, folder.text_rows, whole)
