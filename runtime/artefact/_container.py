"""One file of named arrays in the layout of safetensors: written piece by piece, read by mapping.

A file is the length of a header (8 bytes, little-endian), the header as JSON, and the arrays one
after the other. The last one, ``[checks]``, holds the CRC-32 of each of the others in their order,
and the SHA-256 of the header and of these.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from linsey.ir import FormatError

CHECKS = "[checks]"
"""The array of checksums; no slot has such a name."""
CODES: dict[str, str] = {
    "bool": "BOOL",
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16)},
    **{
        f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (32, 64)
    },
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""The dtypes that the layout has, by name."""
_DTYPES = {code: np.dtype(getattr(ml_dtypes, name, name)) for name, code in CODES.items()}
_MAX_HEADER = 100_000_000
_CHUNK = 1 << 24
_LARGE = 1 << 20
_ALIGN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An array to write."""

    name: str
    """Its name in the file."""
    dtype: str
    """Its dtype, one of `CODES`."""
    shape: tuple[int, ...]
    """Its shape."""
    get: Callable[[], np.ndarray[Any, Any]]
    """Gives it when its turn comes, so that one at a time is in memory."""

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.itemsize

    @property
    def itemsize(self) -> int:
        """The bytes of one element."""
        return _DTYPES[CODES[self.dtype]].itemsize


def write(path: Path, arrays: Sequence[Stored]) -> None:
    """Writes a file: the old one, if any, stays until the new one is complete.

    Raises:
        FormatError: another process writes to the same path.
        OSError: the disk is full, the folder is missing, and so on.
    """
    order = sorted(arrays, key=lambda each: (-each.itemsize, each.name))
    header = _header(order)
    with _replacing(path) as file, ThreadPoolExecutor(max_workers=1) as pool:
        file.write(header)
        found = [_write_array(file, each.get(), pool) for each in order]
        checks = struct.pack(f"<{len(found)}I", *found)
        file.write(checks + hashlib.sha256(header + checks).digest())


def _write_array(file: Any, array: np.ndarray[Any, Any], pool: Executor) -> int:
    """Writes an array, and gives its checksum."""
    if array.nbytes < _LARGE:
        whole = array.tobytes()
        file.write(whole)
        return zlib.crc32(whole)
    data, check = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, 0
    for start in range(0, len(data), _CHUNK):
        piece = data[start : start + _CHUNK]
        later = pool.submit(zlib.crc32, piece, check)  # beside the writing: it takes half as long
        file.write(piece)
        check = later.result()
    return check


def _header(order: Sequence[Stored]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "linsey"}}
    end = 0
    for each in order:
        start, end = end, end + each.nbytes
        entries[each.name] = {
            "dtype": CODES[each.dtype],
            "shape": list(each.shape),
            "data_offsets": [start, end],
        }
    size = 4 * len(order) + hashlib.sha256().digest_size
    entries[CHECKS] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    return struct.pack("<Q", len(text)) + text


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A file that takes the place of the one at a path when all is written and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with _locked(partial) as file:
        file.truncate(0)
        try:
            yield file
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        file.flush()
        os.fsync(file.fileno())
        os.replace(partial, path)
    with contextlib.suppress(OSError):  # not every system lets a folder be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[Any]:
    """The file beside the path that is written first; what a killed process left there is reused.

    Raises:
        FormatError: another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where nobody else can open a file that is being replaced
        with partial.open("wb") as file:
            yield file
        return
    with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_own = os.path.samestat(os.fstat(file.fileno()), partial.stat())
        except OSError:
            is_own = False
        if not is_own:  # or another process has just finished, and moved it away
            raise FormatError(
                "another process is writing this file",
                path=os.fspath(partial),
                fix="Save from one process; on several machines use linsey.checkpoint.",
            )
        yield file


class Container:
    """A file that is mapped: arrays are views of it, read by the operating system when touched.

    Args:
        path: the file.

    Raises:
        FormatError: it is not such a file, or damaged.
        FileNotFoundError: there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise self._foreign()
            text = file.read(length)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._start = 8 + length
        self._entries = self._read(text, size - self._start)
        self._checks = self._check_header(head + text)
        self._checked: set[str] = set()

    def _read(self, text: bytes, size: int) -> Mapping[str, tuple[Any, tuple[int, ...], int, int]]:
        try:
            data = json.loads(text)
            data.pop("__metadata__", None)
            entries, end = {}, 0
            for name, entry in data.items():
                dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
                start, after = entry["data_offsets"]
                numbers = (*shape, start, after)
                if {*map(type, numbers)} != {int} or min(numbers) < 0 or start != end:
                    raise ValueError(name)
                if after - start != math.prod(shape) * dtype.itemsize:
                    raise ValueError(name)
                entries[name] = (dtype, shape, start, after)
                end = after
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._foreign() from error
        if end != size or CHECKS not in entries:
            raise self._foreign() if CHECKS not in entries else self.damaged("its length is wrong")
        return entries

    def _check_header(self, header: bytes) -> Mapping[str, int]:
        names = [name for name in self._entries if name != CHECKS]
        data = self._bytes(CHECKS)
        sums, digest = bytes(data[: 4 * len(names)]), bytes(data[4 * len(names) :])
        if hashlib.sha256(header + sums).digest() != digest:
            raise self.damaged("the checksum of its header is wrong")
        values = struct.unpack(f"<{len(names)}I", sums)
        return dict(zip(names, values, strict=True))

    def _bytes(self, name: str) -> memoryview:
        _, _, start, end = self._entries[name]
        return memoryview(self._map)[self._start + start : self._start + end]

    def names(self) -> tuple[str, ...]:
        """The names of the arrays, in their order in the file."""
        return tuple(self._checks)

    @property
    def nbytes(self) -> int:
        """The bytes of the file."""
        return len(self._map)

    def sizes(self) -> Iterator[tuple[str, int]]:
        """The names of the arrays and their bytes."""
        for name, (_, _, start, end) in self._entries.items():
            yield name, end - start

    def size(self, name: str) -> int:
        """The bytes of an array."""
        _, _, start, end = self._entries[name]
        return end - start

    def array(self, name: str, *, check: bool = True) -> np.ndarray[Any, Any]:
        """An array, as a view of the file that cannot be written to.

        Args:
            name: its name.
            check: whether to compare its checksum when it is first asked for, which reads it.

        Raises:
            FormatError: it is not there, or damaged.
        """
        if name not in self._checks:
            raise self.damaged(f"{name} is not there")
        data = self._bytes(name)
        if check and name not in self._checked:
            if zlib.crc32(data) != self._checks[name]:
                raise self.damaged(f"the checksum of {name} is wrong")
            self._checked.add(name)
        dtype, shape, _, _ = self._entries[name]
        return np.frombuffer(data, dtype=dtype).reshape(shape)

    def _foreign(self) -> FormatError:
        return FormatError(
            "found no artefact of linsey",
            path=os.fspath(self.path),
            fix="Give the path of one that program.save wrote; a file of safetensors or a"
            " checkpoint is none.",
        )

    def damaged(self, what: str) -> FormatError:
        """The error for a file that is not whole."""
        return FormatError(
            f"the artefact is damaged: {what}",
            path=os.fspath(self.path),
            fix="Load another copy, or save it again.",
        )
