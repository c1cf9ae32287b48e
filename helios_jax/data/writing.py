"""Writing a data set so that a kill at any moment loses one unfinished file and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from array_record.python import array_record_module

from helios_jax.errors import UserError


def _hidden(path: Path) -> Path:
    """A name beside ``path`` that no other process or thread uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a hidden name and gives it its name at the end."""
    temporary = _hidden(path)
    temporary.write_bytes(content)
    temporary.replace(path)


def write_json(path: Path, values: Any) -> None:
    """Like :func:`write_bytes`, as indented JSON."""
    write_bytes(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def record_file(path: Path) -> Iterator[array_record_module.ArrayRecordWriter]:
    """A writer of an ArrayRecord file, which takes its name when the block ends without an exception.

    What a killed process left of the same file is removed. One record per group, for random access.

    Raises:
      OSError: the file cannot be written, for example because the disk is full.
    """
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink(missing_ok=True)
    temporary = _hidden(path)
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    try:
        yield writer
        writer.close()
    except BaseException as error:
        with contextlib.suppress(RuntimeError):  # the same error once more
            writer.close()
        temporary.unlink(missing_ok=True)
        if type(error) is RuntimeError:  # what the writer raises; jax raises a kind of its own
            raise OSError(str(error)) from error
        raise
    temporary.replace(path)


def check_output(flag: str, path: str | Path) -> None:
    """Asks whether a file can be written before the work for it is done.

    Raises:
      UserError: a folder has this name, or there is no place for it.
    """
    path = Path(path).absolute()
    place = next(parent for parent in path.parents if parent.exists())
    if path.is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{flag}: {path} cannot be written")


def guard(path: Path, description: dict[str, Any]) -> None:
    """Makes a folder and notes in ``path`` inside it what is built there; building something else there is an error.

    Raises:
      UserError: the folder holds another data set, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, description)
            return
        saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"output: {path.parent} cannot be written ({error})") from None
    except ValueError as error:
        raise UserError(f"output: {path} is damaged ({error})") from None
    if not isinstance(saved, dict):
        raise UserError(f"output: {path} is damaged (no object)")
    changed = [f"{key} (was {saved.get(key)!r}, now {value!r})" for key, value in description.items()
               if saved.get(key) != value]
    if changed:
        raise UserError(f"output: {path.parent} holds a data set of another kind: {'; '.join(changed)}")


def parse_worker(text: str) -> tuple[int, int]:
    """'i/n' -> (i, n).

    Raises:
      UserError: anything but 0 <= i < n.
    """
    try:
        worker, workers = (int(part) for part in text.split("/"))
    except ValueError:
        worker, workers = -1, 0
    if not 0 <= worker < workers:
        raise UserError(f"worker: i/n with 0 <= i < n expected, got {text!r}")
    return worker, workers
