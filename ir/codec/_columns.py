"""Columns as bytes, and the envelope around them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

from linsey.ir.codec._schema import OLDEST, VERSION
from linsey.ir.errors import FormatError

MAGIC = b"\x89LINSEY\n"
"""The first bytes: not text, and spoilt by anything that converts line ends."""
_HEAD = len(MAGIC) + hashlib.sha256().digest_size
_WIDTHS = {code: np.dtype(f"<{code}") for code in ("u1", "u2", "u4", "i8")}
_MOST_COLUMNS = 4096

Blob = list[bytes]
"""Lengths and contents of a column of bytes."""


def pack_ints(values: Sequence[int]) -> bytes:
    """Integers in as few bytes each as the largest needs: a code of two letters, then all of them.

    Raises:
        OverflowError: one does not fit into 64 bits with sign.
    """
    array = np.array(values, dtype=np.int64)
    low, high = (int(array.min()), int(array.max())) if len(array) else (0, 0)
    code = "i8"
    if low >= 0:
        code = next((code for code in ("u1", "u2", "u4") if high < 256 ** int(code[1])), code)
    return code.encode() + array.astype(_WIDTHS[code]).tobytes()


def unpack_ints(data: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """What `pack_ints` packed.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(data, bytes) or data[:2].decode("ascii", "replace") not in _WIDTHS:
        raise ValueError("a column is not one of integers")
    return np.frombuffer(data[2:], dtype=_WIDTHS[data[:2].decode()]).astype(np.int64)


def pack_blobs(values: Sequence[bytes]) -> Blob:
    """Pieces of bytes as their lengths and their contents."""
    return [pack_ints(list(map(len, values))), b"".join(values)]


def unpack_blobs(data: Any) -> list[bytes]:
    """What `pack_blobs` packed.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(data, list) or len(data) != 2 or not isinstance(data[1], bytes):
        raise ValueError("a column is not one of bytes")
    lengths = unpack_ints(data[0])
    ends = offsets(lengths, len(data[1]))
    return [data[1][start:end] for start, end in itertools.pairwise(ends)]


def offsets(counts: np.ndarray[Any, np.dtype[np.int64]], total: int) -> list[int]:
    """Where each of several runs begins, and the end of the last.

    Raises:
        ValueError: a length is negative, or they do not add up to the total.
    """
    if len(counts) and (int(counts.min()) < 0 or int(counts.max()) > total):
        raise ValueError("the lengths of a column are not possible")
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    if int(ends[-1]) != total:
        raise ValueError("the lengths of a column do not add up")
    return ends.tolist()  # type: ignore[no-any-return]


def seal(writer: str, tables: dict[str, Any]) -> bytes:
    """The bytes of a file: magic, checksum, and the rest as msgpack."""
    body: bytes = msgpack.packb([list(VERSION), writer, tables])
    return MAGIC + hashlib.sha256(body).digest() + body


def unseal(data: bytes) -> tuple[tuple[int, int], str, dict[Any, Any]]:
    """The version, the writer and the tables of a file.

    Raises:
        FormatError: it is not one, is damaged, or of a version that is not supported.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise FormatError(
            f"found {type(data).__name__}, expected bytes", fix="Pass what dumps gave."
        )
    data = bytes(data)
    if data[: len(MAGIC)] != MAGIC:
        raise FormatError(
            "found no graph of linsey: the first bytes are others",
            fix="Pass what linsey.ir.dumps gave, opened in binary mode.",
        )
    body = data[_HEAD:]
    if hashlib.sha256(body).digest() != data[len(MAGIC) : _HEAD]:
        raise damaged("its checksum is not that of its content")
    try:
        # Flat tables: nothing in a file is longer than a list of columns.
        parts = msgpack.unpackb(
            body, max_array_len=_MOST_COLUMNS, max_map_len=_MOST_COLUMNS, strict_map_key=True
        )
        (major, minor), writer, tables = parts
        is_sound = type(major) is int and type(minor) is int and isinstance(writer, str)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise damaged(f"its content cannot be read ({type(error).__name__})") from error
    if not is_sound or not isinstance(tables, dict):
        raise damaged("its content is not that of a graph")
    version = (major, minor)
    if major != VERSION[0] or version < OLDEST:
        raise unsupported(version, writer)
    return version, writer, tables


def unsupported(version: tuple[int, int], writer: str, why: str = "") -> FormatError:
    """The error for a file of another version."""
    is_newer = version > VERSION
    return FormatError(
        f"found version {version[0]}.{version[1]} of the format, written by {writer[:100]};"
        f" this linsey reads {OLDEST[0]}.{OLDEST[1]} to {VERSION[0]}.{VERSION[1]}"
        + (f": {why}" if why else ""),
        fix="Install the linsey that wrote it, or a newer one."
        if is_newer
        else "Read it with the linsey that wrote it, and lower the model again with this one.",
        version=version,
        writer=writer,
    )


def damaged(what: str) -> FormatError:
    """The error for a file that is not whole."""
    return FormatError(
        f"the graph is damaged: {what}",
        fix="Read another copy, or lower the model again and save it.",
    )
