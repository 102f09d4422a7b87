"""The types of the graph: all of the IR on one page.

A `Graph` holds structure and no arrays; the arrays lie beside it in `linsey.ir.values.Values`, one
per slot. Everything here is immutable, hashable and compared by value.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from linsey.ir.attributes import Attrs, AttrValue, Const, Template
from linsey.ir.decode import decode
from linsey.ir.paths import Key, Path, format_path

NONE = Const(None)
RNG_COLLECTIONS = frozenset({"RngKey", "RngCount"})
"""The collections in which the state of NNX's streams sits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorType:
    """The type of one array.

    Example:
        >>> print(TensorType(shape=(3, 4), dtype="float32"))
        float32[3,4]
    """

    shape: tuple[int, ...]
    """Sizes of its axes, each >= 0."""
    dtype: str
    """Its dtype by name: ``float32``, ``key<fry>`` for typed PRNG keys; ``int``, ``float``,
    ``bool`` or ``complex`` for a Python number."""

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeType:
    """The type of a value that is a pytree of arrays."""

    structure: Template
    """The tree without its arrays."""
    leaves: tuple[TensorType, ...]
    """The types of the arrays, in the order of the holes."""

    def __str__(self) -> str:
        return f"tree({', '.join(map(str, self.leaves))})"


ValueType: TypeAlias = TensorType | TreeType


class Unconstrained(enum.Enum):
    """The entry ``PartitionSpec.UNCONSTRAINED`` of a partition: the compiler chooses."""

    UNCONSTRAINED = "UNCONSTRAINED"

    def __repr__(self) -> str:
        return self.value


UNCONSTRAINED = Unconstrained.UNCONSTRAINED
Axis: TypeAlias = str | tuple[str, ...] | Unconstrained | None
"""One entry of a partition: a logical or mesh axis, several of them, `UNCONSTRAINED`, or None for
an axis that is replicated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """How the axes of a slot lie on the axes of a mesh."""

    axes: tuple[Axis, ...]
    """One entry per axis of the slot."""
    logical: bool = False
    """Whether the names are logical ones, which only rules map to a mesh
    (``nn.with_logical_partitioning``, ``param_with_axes``). Otherwise a name that no rule maps is
    an axis of the mesh itself (``nn.with_partitioning``, NNX's ``out_sharding``)."""
    spec: AttrValue
    """The annotation as the source wrote it; None where it follows from something else."""
    rules: AttrValue = NONE
    """The logical-to-mesh rules that came with it, or None."""
    mesh: AttrValue = NONE
    """The mesh that came with it, or None."""

    def __str__(self) -> str:
        return f"P({', '.join(repr(axis) for axis in self.axes)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class StackAxis:
    """An axis that a lifted transform added to a slot."""

    axis: int
    """Its position in the array after this axis and all inner ones were added, >= 0."""
    length: int
    """Its size, >= 0."""
    name: str | None = None
    """Its partition name (``metadata_params[nn.PARTITION_NAME]``), or None."""
    owner: Path = ()
    """Path of the node whose call runs the transform; below it values arrive sliced."""

    def __str__(self) -> str:
        return f"{self.name or 'axis'}:{self.axis}={self.length}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One variable: a typed place for a value."""

    collection: str
    """The Linen collection: ``params``, ``batch_stats``, ``cache`` …"""
    paths: tuple[Path, ...]
    """All its paths, the canonical one first; more than one when it is tied."""
    kind: AttrValue | None = None
    """The NNX variable class; None where the one registered for the collection is meant."""
    type: ValueType
    """Type of its value, stacked axes included."""
    partition: Partition | None = None
    """How it is partitioned, or None when nothing was said."""
    stack: tuple[StackAxis, ...] = ()
    """The lifted axes, outermost first."""
    lifetime: Literal["persistent", "ephemeral"] = "persistent"
    """Whether a checkpoint holds it."""
    raw: bool = False
    """Whether it is a bare array attribute and not an NNX Variable."""
    mirrors: int | None = None
    """The slot whose shape and partition it follows (optimizer state), or None."""
    metadata: Attrs = ()
    """What else an NNX Variable carries, key by key."""
    box: Template | None = None
    """The Linen metadata box around the value; None when it is unboxed."""

    @property
    def is_derived(self) -> bool:
        """Whether it is PRNG state of an NNX module inside a ToLinen.

        Linen's streams give it anew at every call, and no variable of flax holds it.
        """
        return self.lifetime == "ephemeral" and self.collection in RNG_COLLECTIONS

    @property
    def path(self) -> Path:
        """The canonical path, collection not included."""
        return self.paths[0]

    @property
    def key(self) -> str:
        """The text by which `Values` is indexed: ``params/Dense_0/kernel``."""
        return format_path((self.collection, *self.paths[0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A source of PRNG keys."""

    name: str
    """``params``, ``dropout`` …"""
    derivation: Literal["path", "count"]
    """``path``: Linen's, a fold-in of scope path and call counter; ``count``: NNX's, a fold-in of a
    stored counter into a stored key."""
    use: Literal["init", "call"] = "call"
    """Whether only initialisation draws from it."""
    key: int | None = None
    """The slot that holds the key, for ``count``."""
    count: int | None = None
    """The slot that holds the counter, for ``count``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """One observed call of a node."""

    method: str
    """Name of the method."""
    inputs: tuple[tuple[str, ValueType | AttrValue], ...] = ()
    """The arguments, in order; positional ones are named ``0``, ``1`` …"""
    output: ValueType | None = None
    """The result; None when it was not observed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the behaviour of a node comes from."""

    dialect: str
    """``linen``, ``nnx`` or the name of another frontend."""
    cls: AttrValue
    """The class; a `Live` one when it cannot be imported (a local or a transformed class)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapper:
    """The bridge object through which a parent of the other dialect holds a node."""

    cls: AttrValue
    """Its class: ToNNX, ToLinen or a subclass."""
    attrs: Attrs = ()
    """Its own static attributes."""
    children: tuple[tuple[Key, int], ...] = ()
    """Its own children (its rngs, say): name and node."""
    slots: tuple[tuple[Key, int], ...] = ()
    """Its own variables, those of the wrapped module not included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A module, or a container of modules and variables."""

    op: str = "module"
    """``module`` for user code, ``container`` for a list, dict or other pytree, ``scope`` for a
    name that was seen in a path but never called, or the name of a neutral layer."""
    source: Source | None = None
    """Its class; None for a ``scope``."""
    attrs: Attrs = ()
    """Static hyper-parameters, by name."""
    children: tuple[tuple[Key, int], ...] = ()
    """Name and index of each child node; a shared node is a child of several parents."""
    slots: tuple[tuple[Key, int], ...] = ()
    """Name and index of each variable; one name may occur once per collection."""
    streams: tuple[tuple[str, int], ...] = ()
    """Name and index of each stream that it draws from."""
    signatures: tuple[Signature, ...] = ()
    """The calls that lowering observed, one per method."""
    wrapper: Wrapper | None = None
    """The bridge between it and its parent, when the parent is of the other dialect."""

    def attr(self, name: str | int) -> object:
        """The decoded value of one attribute.

        Raises:
            KeyError: there is no such attribute.
        """
        for key, value in self.attrs:
            if key == name:
                return decode(value)
        raise KeyError(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """What a file of a newer version holds besides the graph."""

    fields: tuple[str, ...]
    """The fields, as ``Slot.name``, and the tables that this version does not know."""
    data: bytes
    """The whole file, which `linsey.ir.dumps` writes again while the graph is the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A whole program's structure."""

    nodes: tuple[Node, ...]
    """All nodes, each once."""
    slots: tuple[Slot, ...] = ()
    """All variables, each once; `Values` holds one entry per slot, in this order."""
    streams: tuple[Stream, ...] = ()
    """All sources of PRNG keys."""
    root: int = 0
    """Index of the node that is the program."""
    empty: tuple[Path, ...] = ()
    """Paths (collection first) of Linen collections and subtrees that exist and hold nothing."""
    unknown: Unknown | None = None
    """What was read of a newer version of the format; None but for such files."""
    memo: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What was worked out of this very object once: its hash, the index of its slots."""

    def __hash__(self) -> int:
        if "hash" not in self.memo:
            self.memo["hash"] = hash(self._parts)
        return self.memo["hash"]  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the memo: the hash of a str differs from process to process.
        return _graph, self._parts

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.nodes, self.slots, self.streams, self.root, self.empty, self.unknown

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """The observed calls of the root."""
        return self.nodes[self.root].signatures

    def __str__(self) -> str:
        from linsey.ir.text import format_graph

        return format_graph(self)


def _graph(
    nodes: tuple[Node, ...],
    slots: tuple[Slot, ...],
    streams: tuple[Stream, ...],
    root: int,
    empty: tuple[Path, ...],
    unknown: Unknown | None,
) -> Graph:
    return Graph(nodes=nodes, slots=slots, streams=streams, root=root, empty=empty, unknown=unknown)
