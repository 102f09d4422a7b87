"""The errors that linsey raises.

Every message has three parts: where (in the user's own notation), what was found against what was
expected, and what to do. The parts are also fields, so that a program can act on them.
"""

from __future__ import annotations

from typing import Any


class LinseyError(Exception):
    """Base of all errors of linsey.

    Args:
        message: what was found against what was expected.
        path: where, in the user's notation (``params/Dense_0/kernel``); empty: no place.
        fix: what to do about it, one sentence.

    Example:
        >>> error = LinseyError("found 3, expected 4", path="params/w", fix="Pass 4.")
        >>> print(error)
        at params/w: found 3, expected 4
        Pass 4.
    """

    def __init__(self, message: str, *, path: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.fix = fix

    def __str__(self) -> str:
        where = f"at {self.path}: " if self.path else ""
        return f"{where}{self.message}" + (f"\n{self.fix}" if self.fix else "")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.path, self.fix, dict(self.__dict__))


def _rebuild(
    cls: type[LinseyError], message: str, path: str, fix: str, state: dict[str, Any]
) -> LinseyError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class LoweringError(LinseyError):
    """A source module cannot be lowered as it was given."""


class EmitError(LinseyError):
    """A graph cannot be emitted into the target, or an emitted module cannot run as called."""


class ValuesError(LinseyError):
    """Values do not fit a graph: a slot is missing, unknown, or of another shape or dtype."""


class PartitionError(LinseyError):
    """A partition of a slot does not fit its value, the mesh or the rules."""


class CheckpointError(LinseyError):
    """A checkpoint is missing, incomplete, or does not fit the program."""


class FormatError(LinseyError):
    """A serialised graph or an artefact cannot be written, or cannot be read by this linsey.

    Args:
        message: what was found against what was expected.
        path: where: the file.
        fix: what to do about it, one sentence.
        version: the version of the format that was found, or None where it is not known.
        writer: what wrote it, or an empty text.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str = "",
        fix: str = "",
        version: tuple[int, int] | None = None,
        writer: str = "",
    ) -> None:
        super().__init__(message, path=path, fix=fix)
        self.version = version
        self.writer = writer


class FormatWarning(UserWarning):
    """A file of a newer minor version has fields that this linsey keeps and does not use."""


class BridgeError(LinseyError, ValueError):
    """A wrapper of `linsey.bridge` cannot be made, initialised or called as it was."""


class PluginError(LinseyError):
    """A frontend or a backend is unknown, clashes with another one, or failed to load."""


class VerifyError(LinseyError):
    """A graph breaks rules of the IR.

    Args:
        problems: all of them, one line each.
    """

    def __init__(self, problems: tuple[str, ...]) -> None:
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        super().__init__(
            f"the graph is not valid, {count}:\n  " + "\n  ".join(problems),
            fix="Graphs are made by frontends and passes; report the one that made this graph.",
        )
        self.problems = problems
