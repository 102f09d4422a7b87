"""What is asked of an exported program, and what is known of one that is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from linsey.ir import (
    AttrValue,
    Const,
    Encoder,
    FormatError,
    Graph,
    Hole,
    Map,
    Node,
    describe,
    dumps,
    loads,
)
from linsey.ir import Sequence as Items
from linsey.runtime.exported._sizes import Dims, check, shape_text


@dataclass(frozen=True, kw_only=True)
class Export:
    """A method to export, where its name alone does not say enough; see `linsey.Program.save`.

    Example:
        >>> import jax, linsey, tempfile
        >>> from flax import linen as nn
        >>> x = jax.ShapeDtypeStruct((4, 3), "float32")
        >>> program = linsey.lower(nn.Dropout(0.5), x, deterministic=True).init(0)
        >>> path = tempfile.mkdtemp() + "/dropout.linsey"
        >>> train = linsey.Export(args=(x,), kwargs={"deterministic": False}, rngs=["dropout"])
        >>> program.save(path, export=["__call__", train], dynamic="batch, ...")
        >>> [str(stored) for stored in linsey.load(path).exports]  # doctest: +NORMALIZE_WHITESPACE
        ['__call__(float32[batch,3], deterministic=True)',
         '__call__(float32[4,3], deterministic=False), keys: dropout']
    """

    method: str = field(default="__call__", kw_only=False)
    """Name of the method."""
    args: Sequence[Any] | None = None
    """Sample inputs, as the method is called: arrays or ShapeDtypeStructs, and what is static.
    None: those that the program was lowered with."""
    kwargs: Mapping[str, Any] | None = None
    """Sample inputs by keyword."""
    rngs: Any = None
    """The streams that calls bring keys for: their names, or keys in any form that a call takes
    them. None: where ``args`` are None too, those that calls drew from when the program was
    lowered; else none."""
    mutable: Any = None
    """As for `linsey.Program.compile`."""
    capture: str | Sequence[str] = ()
    """As for `linsey.Program.compile`."""
    dynamic: Any = None
    """Which sizes of the inputs are symbolic: ``"batch, time, _"``, where ``_`` keeps the sample's
    size and ``...`` all that are left. One for all arrays; a tuple by position; or a dict by
    position and keyword, each entry for the whole argument or a pytree prefix of it."""
    constraints: Sequence[str] = ()
    """What holds for symbolic sizes: ``"time <= 512"``, ``"mod(batch, 8) == 0"``."""
    platforms: Sequence[str] | None = None
    """The platforms to lower for, some of ``cpu``, ``cuda``, ``rocm`` and ``tpu``; None: that of
    this process."""
    vjp_order: int = 1
    """How often the program can be differentiated: 1 for training, 0 where a gradient does not
    exist or is not needed."""


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What is asked of an exported program, as data."""

    method: str
    """Name of the method."""
    arguments: AttrValue
    """The pair of positional and keyword arguments, with a `Hole` for each array."""
    inputs: tuple[tuple[str, Dims], ...]
    """Dtype and sizes of each of these arrays."""
    constraints: tuple[str, ...]
    """What holds for symbolic sizes."""
    keys: tuple[tuple[str, str], ...]
    """The streams that calls bring keys for, and the dtypes of the keys."""
    mutable: AttrValue
    """The collections that a call may change, as given."""
    capture: tuple[str, ...]
    """The collections that are returned beside the output."""
    platforms: tuple[str, ...]
    """The platforms that it is lowered for."""
    vjp_order: int
    """How often it can be differentiated."""

    def to_json(self) -> dict[str, Any]:
        """What is known of it, as JSON."""
        named = {"inputs": [shape_text(*kind) for kind in self.inputs], "keys": dict(self.keys)}
        names = ("method", "constraints", "capture", "platforms", "vjp_order")
        return {"call": str(self), **{name: getattr(self, name) for name in names}, **named}

    def __str__(self) -> str:
        shapes = [shape_text(*kind) for kind in self.inputs]
        arguments = ", ".join(_arguments(self.arguments, shapes))
        more = [f"keys: {', '.join(name for name, _ in self.keys)}"] if self.keys else []
        more += [f"capture: {', '.join(self.capture)}"] if self.capture else []
        return ", ".join([f"{self.method}({arguments})", *more, *self.constraints])


@dataclass(frozen=True, kw_only=True)
class StoredProgram(Interface):
    """One method, lowered by ``jax.export`` to a function of flat slots and arrays."""

    output: AttrValue
    """What it returns, with a `Hole` for each array; with ``capture``, the pair of it and these."""
    changed: tuple[str, ...]
    """The slots that a call changes: those whose memory it may use again."""
    jax: str
    """The version of jax that exported it."""
    calling_convention: int
    """The version of jax.export's calling convention that it follows."""
    nbytes: int = field(compare=False)
    """Bytes of the program."""
    data: Callable[[], bytes] = field(repr=False, compare=False)
    """Gives what ``jax.export`` serialised."""

    def to_json(self) -> dict[str, Any]:
        """What is known of it, as JSON."""
        names = ("changed", "jax", "calling_convention", "nbytes")
        return {**super().to_json(), **{name: getattr(self, name) for name in names}}


def _arguments(call: AttrValue, shapes: list[str]) -> list[str]:
    """The arguments of a call in words: ``float32[b,3]``, ``train=True``."""
    match call:
        case Items(items=(Items(items=args), Map(items=kwargs))):
            named = [f"{key.value}={_shown(arg, shapes)}" for key, arg in kwargs]  # type: ignore[union-attr]
            return [*(_shown(arg, shapes) for arg in args), *named]
    return [_shown(call, shapes)]


def _shown(value: AttrValue, shapes: list[str]) -> str:
    match value:
        case Hole(index=index):
            return shapes[index]
        case Items(kind="tuple" | "list", items=items):
            inner = ", ".join(_shown(item, shapes) for item in items)
            return f"[{inner}]" if value.kind == "list" else f"({inner})"
        case Map(items=items):
            pairs = (f"{_shown(key, shapes)}: {_shown(item, shapes)}" for key, item in items)
            return f"{{{', '.join(pairs)}}}"
    return describe(value)


_PLAIN = (
    *("method", "inputs", "constraints", "keys", "capture", "platforms", "vjp_order"),
    *("changed", "jax", "calling_convention", "nbytes"),
)
_VALUES = ("arguments", "mutable", "output")


def dump_records(programs: Sequence[StoredProgram]) -> bytes:
    """What is known of programs, as bytes: a graph with a node for each.

    Raises:
        FormatError: a static argument cannot be data; the message says which.
    """
    encode = Encoder()
    nodes = [
        Node(
            op="program",
            attrs=(
                *((name, encode(getattr(program, name))) for name in _PLAIN),
                *((name, getattr(program, name)) for name in _VALUES),
            ),
        )
        for program in programs
    ]
    return dumps(Graph(nodes=tuple(nodes)))


def as_data(arguments: AttrValue) -> AttrValue:
    """Arguments as a file gives them: without the objects that they were made from.

    Raises:
        FormatError: a static argument cannot be data; the message says which.
    """
    node = Node(op="program", attrs=(("arguments", arguments),))
    return loads(dumps(Graph(nodes=(node,)))).nodes[0].attrs[0][1]


def load_records(
    data: bytes, sources: Sequence[Callable[[], bytes]], trusts: Callable[[str], bool]
) -> tuple[StoredProgram, ...]:
    """The programs that `dump_records` wrote. Nothing is imported.

    Args:
        data: the bytes.
        sources: gives the bytes of each program.
        trusts: as for `linsey.ir.loads`.

    Raises:
        FormatError: they are damaged.
    """
    programs: list[StoredProgram] = []
    nodes = loads(data, trusts=trusts).nodes
    if len(nodes) != len(sources):
        raise _damaged(f"{len(nodes)} are named, and there are {len(sources)}")
    for node, source in zip(nodes, sources, strict=True):
        fields: dict[str, Any] = {str(name): value for name, value in node.attrs}
        try:
            known = {name: _plain(fields[name]) for name in _PLAIN}
            values = {name: fields[name] for name in _VALUES}
            program = StoredProgram(**known, **values, data=source)
            _check(program)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(f"{type(error).__name__}: {error}") from error
        programs.append(program)
    return tuple(programs)


def _damaged(why: str) -> FormatError:
    return FormatError(
        f"the exported programs cannot be read: {why}",
        path="[programs]",
        fix="Load another copy, or save it again.",
    )


def _plain(value: AttrValue) -> Any:
    """Numbers, strings and tuples of them; nothing else is made of what a file says."""
    if isinstance(value, Const):
        return value.value
    if isinstance(value, Items) and value.kind == "tuple":
        return tuple(map(_plain, value.items))
    raise ValueError(f"found a {type(value).__name__}")


def _check(program: StoredProgram) -> None:
    """Checks the types of what was read.

    Raises:
        ValueError: one is wrong.
    """
    texts = (program.method, program.jax, *program.constraints, *program.capture)
    texts += (*program.platforms, *(text for pair in program.keys for text in pair))
    texts += (*(dtype for dtype, _ in program.inputs), *program.changed)
    numbers = (program.vjp_order, program.calling_convention, program.nbytes)
    sizes = [size for _, dims in program.inputs for size in dims]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a name is no text")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a number is none")
    if not all(type(size) is int or isinstance(size, str) for size in sizes):
        raise ValueError("a size is none")
    for text in (*program.constraints, *(size for size in sizes if isinstance(size, str))):
        check(text)
