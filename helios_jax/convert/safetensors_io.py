"""Reading and writing safetensors files with plain file access.

The official reader maps files into memory, so every page that was ever touched counts as resident until the file is
closed; these functions read and write through the file descriptor, which is what bounds the memory of a conversion.
They read bfloat16 and float8 without PyTorch. Format: 8 bytes little-endian header length, a JSON header of
``name -> {dtype, shape, data_offsets}``, then the tensors, little-endian and C-contiguous, without gaps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from helios_jax.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the official reader


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte, from the start of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """An opened safetensors file whose header has been checked against the size of the file.

    Attributes:
      path: the file.
      entries: name -> :class:`TensorEntry`.
      metadata: the free-form strings of the header.

    Raises:
      UserError: the file is missing, empty, truncated, corrupt or holds a dtype that is not supported.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        try:
            self.entries, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> tuple[dict[str, TensorEntry], dict[str, str]]:
        try:
            size = os.fstat(self._file.fileno()).st_size
            start = self._file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if size < 8 or length > _MAX_HEADER_BYTES or 8 + length > size:
                raise UserError(f"{self.path}: not a safetensors file, or truncated ({size} bytes)")
            header = json.loads(self._file.read(length))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise UserError(f"{self.path}: corrupt safetensors header") from None
        if not isinstance(header, dict):
            raise UserError(f"{self.path}: corrupt safetensors header")
        metadata = header.pop("__metadata__", None) or {}
        entries, spans = {}, []
        for name, value in header.items():
            try:
                code, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
                valid = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
            except (TypeError, KeyError, ValueError):
                valid = False
            if not valid:
                raise UserError(f"{self.path}: corrupt safetensors header at tensor {name!r}")
            if code not in DTYPES:
                raise UserError(f"{self.path}: tensor {name!r} has dtype {code!r}; known: {', '.join(DTYPES)}")
            entry = TensorEntry(DTYPES[code], shape, 8 + length + begin)
            if end - begin != entry.nbytes:
                raise UserError(f"{self.path}: corrupt: tensor {name!r} has {end - begin} bytes, "
                                f"its shape needs {entry.nbytes}")
            entries[name] = entry
            spans.append((begin, end))
        position = 0
        for begin, end in sorted(spans):
            if begin != position:
                raise UserError(f"{self.path}: corrupt: tensors overlap or leave a gap at byte {position}")
            position = end
        if 8 + length + position != size:
            kind = "truncated" if size < 8 + length + position else "corrupt"
            raise UserError(f"{self.path}: {kind}: {size} bytes, its header promises {8 + length + position}")
        return entries, metadata

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """One tensor, or a contiguous range of its first axis.

        Args:
          name: a name in ``entries``.
          rows: range of the first axis with step 1; None reads everything.

        Returns: a fresh C-contiguous array in the stored dtype.
        """
        entry = self.entries[name]
        shape, offset = entry.shape, entry.offset
        if rows is not None:
            start, stop, _ = rows.indices(shape[0])
            offset += start * math.prod(shape[1:]) * entry.dtype.itemsize
            shape = (max(stop - start, 0), *shape[1:])
        out = np.empty(shape, entry.dtype)
        view = memoryview(out.reshape(-1).view(np.uint8))
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
                if count == 0:
                    raise UserError(f"{self.path}: truncated while reading tensor {name!r}")
                done += count
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        return out

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class SafetensorsWriter:
    """Writes a safetensors file whose tensors arrive in any order, one at a time.

    Args:
      path: the file to create.
      tensors: name -> (dtype, shape) of everything that will be written.
      metadata: free-form strings for the header; PyTorch loaders expect ``{"format": "pt"}``.
    """

    def __init__(self, path: str | Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
                 metadata: Mapping[str, str] | None = None):
        header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        position, begins = 0, {}
        # Wide dtypes first, so that every tensor starts at a multiple of its item size.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _CODES[np.dtype(dtype)], "shape": list(shape),
                            "data_offsets": [position, position + size]}
            begins[name] = position
            position += size
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._tensors = {n: (np.dtype(d), tuple(s), 8 + len(encoded) + begins[n]) for n, (d, s) in tensors.items()}
        self._missing_rows = {n: s[0] if s else 1 for n, (_, s) in tensors.items()}
        self._size = 8 + len(encoded) + position
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close or abort)
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)

    def write(self, name: str, tensor: np.ndarray, first_row: int = 0) -> None:
        """Writes a tensor, or a range of rows (of the first axis) that starts at ``first_row``."""
        dtype, shape, offset = self._tensors[name]
        rows = len(tensor) if shape else 1
        if tensor.dtype != dtype or tensor.shape[1:] != shape[1:] or (shape and first_row + rows > shape[0]):
            raise ValueError(f"{name}: announced as {dtype} {shape}, got {tensor.dtype} {tensor.shape}")
        if shape:
            offset += first_row * math.prod(shape[1:]) * dtype.itemsize
        self._file.seek(offset)
        if not tensor.flags.c_contiguous:
            contiguous = np.empty(tensor.shape, dtype)
            copy_strips(contiguous, tensor)
            tensor = contiguous
        self._file.write(memoryview(tensor.reshape(-1).view(np.uint8)))
        self._missing_rows[name] -= rows

    def close(self) -> None:
        """Flushes to the disk; every announced tensor must have been written."""
        incomplete = [name for name, rows in self._missing_rows.items() if rows]
        if incomplete:
            raise ValueError(f"{len(incomplete)} announced tensors were not written, e.g. {incomplete[0]}")
        self._file.truncate(self._size)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abort(self) -> None:
        """Closes the file as it is."""
        self._file.close()


def copy_strips(target: np.ndarray, source: np.ndarray) -> None:
    """``target[...] = source``, several times faster than numpy's where a large matrix is transposed or cast.

    A strip of the last axis at a time keeps both sides' cache lines in use until they are done with.
    """
    if target.ndim != 2:
        target[...] = source
        return
    for start in range(0, target.shape[1], 32):
        target[:, start: start + 32] = source[:, start: start + 32]


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
                      metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors that are all in memory to one file."""
    tensors = dict(tensors)
    writer = SafetensorsWriter(path, {n: (t.dtype, t.shape) for n, t in tensors.items()}, metadata)
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.close()
    except BaseException:
        writer.abort()
        raise
