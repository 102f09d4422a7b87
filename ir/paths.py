"""Typed paths and their canonical text.

A path is a tuple of strings and integers: ``("layers", 0, "kernel")`` is item 0 of a container,
``("layers_0", "kernel")`` an attribute. The text is reversible for every legal name.
"""

from __future__ import annotations

import re

Key = str | int
Path = tuple[Key, ...]


def as_key(key: object) -> Key:
    """The path component for any key of a mapping: itself, or the text of one that is no name.

    Example:
        >>> as_key(("kernel", "sigma"))
        "('kernel', 'sigma')"
    """
    return key if type(key) in (str, int) else repr(key)  # type: ignore[return-value]


def _escape(key: Key) -> str:
    if isinstance(key, int):
        return f"[{key}]"
    if not key:
        return "\\e"
    text = key.replace("\\", "\\\\").replace("/", "\\/")
    return "\\" + text if text.startswith("[") else text


def format_path(path: Path) -> str:
    r"""The canonical text of a path; the empty path is the empty text.

    Example:
        >>> format_path(("params", "layers", 0, "a/b"))
        'params/layers/[0]/a\\/b'
    """
    return "/".join(map(_escape, path))


def _unescape(text: str) -> Key:
    if text == "\\e":
        return ""
    if text.startswith("["):
        if not re.fullmatch(r"\[-?[0-9]+\]", text):
            raise ValueError(f"{text!r} is not an index: expected [n], or \\[ for a name")
        return int(text[1:-1])
    out, escaped = [], False
    for char in text:
        if escaped or char != "\\":
            out.append(char)
            escaped = False
        else:
            escaped = True
    if escaped or not text:
        raise ValueError(f"{text!r} is not a path component: expected \\e for an empty name")
    return "".join(out)


def parse_path(text: str) -> Path:
    r"""The path that a canonical text stands for.

    Args:
        text: as `format_path` writes it.

    Raises:
        ValueError: an empty component, a broken index or an unfinished escape.

    Example:
        >>> parse_path("params/layers/[0]/kernel")
        ('params', 'layers', 0, 'kernel')
    """
    if not text:
        return ()
    parts, start, position = [], 0, 0
    while position < len(text):
        if text[position] == "\\":
            position += 2
            continue
        if text[position] == "/":
            parts.append(text[start:position])
            start = position + 1
        position += 1
    parts.append(text[start:])
    return tuple(map(_unescape, parts))
