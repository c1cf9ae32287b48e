"""Checkpoints of a training run, written by Orbax.

One folder per step, ``<workdir>/checkpoints/<step>``, with separate items, so that a later program can read the
parameters without the optimizer:

    params      the trained parameters, in their training dtype
    ema         their moving average (absent when it is off)
    optimizer   the optimizer's state, the step count and the count of skipped steps
    data        the position of every process in its data

A step folder appears under its final name only when it is complete (Orbax writes it under a temporary name and then
renames it), so a process killed in the middle of a save leaves the older checkpoints whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from helios_jax.errors import UserError
from helios_jax.training.config import HARMLESS_ON_RESUME, RunConfig, require

PyTree = Any


class Checkpointer:
    """Saves and restores training states in one folder, and deletes the old ones.

    Args:
      folder: created if missing.
      keep_last: how many of the newest checkpoints stay.
      keep_every: checkpoints whose step is a multiple of it stay for ever (0: none).
    """

    def __init__(self, folder: str | Path, keep_last: int, keep_every: int = 0):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, keep_period=keep_every or None, cleanup_tmp_directories=True,
            enable_async_checkpointing=True)
        if Path(folder).exists() and not Path(folder).is_dir():
            raise UserError(f"workdir: {folder} is a file, the folder of the checkpoints expected")
        try:
            self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)
        except OSError as error:
            raise UserError(f"workdir: {folder} cannot be used for checkpoints ({error})") from None

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, items: dict[str, PyTree], data_iterator: Any) -> None:
        """Copies the arrays and writes them in the background; the data position is taken at once.

        ``items`` maps item names to trees of arrays. Does nothing if the step is saved already.
        """
        if step in self._manager.all_steps():
            return
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(step, force=True,
                           args=ocp.args.Composite(**args, data=grain.checkpoint.CheckpointSave(data_iterator)))

    def restore(self, step: int, abstract_items: dict[str, PyTree], data_iterator: Any) -> dict[str, PyTree]:
        """The saved items with the structure, dtypes and shardings asked for; sets the data position.

        The mesh and the number of processes may be others than those that saved.

        Raises:
          UserError: the checkpoint is damaged or has other parameters than ``abstract_items``.
        """
        args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract_items.items()}
        folder = Path(self._manager.directory) / str(step) / "data"
        same_processes = (folder / f"process_{jax.process_index()}-of-{jax.process_count()}.json").exists()
        if same_processes:
            args["data"] = grain.checkpoint.CheckpointRestore(data_iterator)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
            if not same_processes:  # the position is a number of batches, the same in every file
                data_iterator.set_state(json.loads(next(folder.glob("process_*.json")).read_text(encoding="utf-8")))
        except Exception as error:  # Orbax raises many kinds for damaged and for foreign files
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"checkpoint {self._manager.directory / str(step)} cannot be restored: it is damaged or "
                            f"belongs to another model ({type(error).__name__}: {reason})") from error
        return {name: restored[name] for name in abstract_items}

    def wait(self) -> None:
        """Returns when the last save is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Completes the last save and frees the threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def read_params(folder: str | Path, step: int | None = None, prefer_ema: bool = True) -> PyTree:
    """The parameters of a run as numpy arrays, without knowing its model: what exporters and later stages load.

    Args:
      folder: the run's ``workdir``.
      step: which checkpoint; the newest by default.
      prefer_ema: the moving average if the run has one, else the raw parameters.

    Raises:
      UserError: no (such) checkpoint in the folder.
    """
    root = Path(folder).absolute() / "checkpoints"
    if not root.is_dir():
        raise UserError(f"{folder}: no checkpoints of a training run here")
    steps = sorted(int(p.name) for p in root.iterdir() if p.name.isdigit())
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{folder}: no checkpoint of step {step if step is not None else '(any)'}; found: {steps}")
    chosen = root / str(step if step is not None else steps[-1])
    item = chosen / "ema" if prefer_ema and (chosen / "ema").is_dir() else chosen / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(item)
        tree = getattr(metadata, "item_metadata", metadata)
        tree = getattr(tree, "tree", tree)
        # Without an explicit placement Orbax would ask for the devices of the machine that wrote the checkpoint.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), tree)
        return jax.device_get(checkpointer.restore(item, target))


def _differences(old: Any, new: Any, free: set[str], prefix: str = "") -> list[str]:
    """One line per changed value, as 'optimizer.name (was ..., now ...)'; keys of ``free`` may differ.

    A key that the old file lacks came with a newer version of the library and is no change by the user.
    """
    if prefix in free:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in sorted(old)
                for line in _differences(old[key], new.get(key), free, f"{prefix}.{key}" if prefix else key)]
    return [] if old == new else [f"{prefix} (was {old!r}, now {new!r})"]


def _schedules(values: dict[str, Any]) -> set[str]:
    """Learning-rate schedules of all optimizers of a configuration, those of an objective's players included."""
    found = {values["schedule"]} if "schedule" in values else set()
    return found.union(*(_schedules(value) for value in values.values() if isinstance(value, dict)))


def check_config(workdir: str | Path, config: RunConfig) -> dict[str, Any]:
    """Refuses to continue a run with other settings than those of its ``config.json``, where there is one.

    Fields that only concern logging, saving and looking may change (the objective's own are named in its class, as
    ``HARMLESS_ON_RESUME``), and so may ``num_steps`` where all learning rates are constant (a cosine's earlier steps
    would have been different ones).

    Returns: the settings as JSON has them.

    Raises:
      UserError: naming every changed key with both values.
    """
    path = Path(workdir) / "config.json"  # read by all processes, written by the first
    current = json.loads(json.dumps(config.to_dict()))  # tuples become lists, as in the file
    if path.exists():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
        require(isinstance(saved, dict), f"{path}: the configuration of a run expected")
        free = set(HARMLESS_ON_RESUME) | ({"num_steps"} if _schedules(current) == {"constant"} else set())
        free |= {f"objective.{name}" for name in getattr(config.objective, "HARMLESS_ON_RESUME", ())}
        changed = _differences(saved, current, free)
        if changed:
            raise UserError(f"{workdir} holds a run with another configuration: {'; '.join(changed)}; use another "
                            "--workdir or the old values")
    return current


def guard_config(workdir: str | Path, config: RunConfig) -> None:
    """:func:`check_config`, and writes ``config.json``; called when everything in it is known to be usable."""
    current, path = check_config(workdir, config), Path(workdir) / "config.json"
    if jax.process_index() != 0:
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(current, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
