"""Pytrees of arrays as linsey sees them: types, templates, arguments, keys.

The one file that every layer above `linsey.ir` may use; it needs jax, but not flax.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from linsey.ir import (
    ABSENT,
    AttrValue,
    Decoder,
    Encoder,
    Graph,
    Hole,
    LinseyError,
    Signature,
    Slot,
    Template,
    TensorType,
    TreeType,
    ValuesError,
    ValueType,
    decode,
)

_NUMBERS = (bool, int, float, complex)
KEY_IMPLS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}
"""The implementation of typed PRNG keys by their dtype, as ``jax.random.key`` takes it."""


def is_array(obj: Any) -> bool:
    """Whether `obj` is an array, concrete, traced or abstract, of jax or numpy."""
    return isinstance(obj, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def tensor_type(leaf: Any) -> TensorType:
    """The type of an array or of a Python number.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(leaf, _NUMBERS):
        return TensorType(shape=(), dtype=type(leaf).__name__)
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(f"expected an array or a number, found {type(leaf).__name__}")
    return TensorType(shape=tuple(leaf.shape), dtype=_dtype_name(leaf.dtype))


@functools.cache
def _dtype_name(dtype: Any) -> str:
    return str(dtype)


def value_type(value: Any) -> ValueType:
    """The type of an array, of a Python number, or of a pytree of them.

    Raises:
        TypeError: a leaf is neither an array nor a number.
    """
    if is_array(value) or isinstance(value, _NUMBERS):
        return tensor_type(value)
    leaves, treedef = jax.tree.flatten(value)
    return TreeType(structure=template(treedef), leaves=tuple(map(tensor_type, leaves)))


@dataclass(frozen=True)
class _Mark:
    index: int


def template(treedef: Any) -> Template:
    """A tree definition as data, where its nodes can be data."""
    marks = [_Mark(index) for index in range(treedef.num_leaves)]
    encode = Encoder(lambda obj: Hole(index=obj.index) if isinstance(obj, _Mark) else None)
    try:
        structure: AttrValue = encode(jax.tree.unflatten(treedef, marks))
    except Exception:  # a node class that checks what it is made of
        structure = encode(treedef)
    return Template(structure=structure, live=treedef)


def fill(shape: Template, leaves: list[Any]) -> Any:
    """The tree that a template stands for, with these leaves."""
    if shape.live is not ABSENT:
        return jax.tree.unflatten(shape.live, leaves)
    return Decoder(holes=tuple(leaves))(shape.structure)


def abstract(value: Any) -> Any:
    """A pytree with each array replaced by its shape, dtype and (if it has one) sharding."""
    return jax.tree.map(
        lambda leaf: shape_struct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf, value
    )


def check_shapes(graph: Graph, arrays: Sequence[Any]) -> None:
    """Checks that values have the shapes of their slots; dtypes may differ, as for half precision.

    Raises:
        ValuesError: with every slot whose value has another shape.
    """
    wrong = [
        f"{slot.key}: found {_shown(value)}, expected {slot.type}"
        for slot, value in zip(graph.slots, arrays, strict=True)
        if not fits(slot, value)
    ]
    if wrong:
        raise ValuesError(
            f"{len(wrong)} values do not fit their slots:\n  " + "\n  ".join(wrong),
            path="values",
            fix="Give each slot a value of its shape.",
        )


def fits(slot: Slot, value: Any) -> bool:
    """Whether a value has the shape of a slot; pytrees and Python numbers are not looked into."""
    if not isinstance(slot.type, TensorType) or isinstance(value, _NUMBERS):
        return True
    return getattr(value, "shape", None) == slot.type.shape


def _shown(value: Any) -> str:
    return str(tensor_type(value)) if hasattr(value, "shape") else type(value).__name__


def placeholder(slot: Slot) -> Any:
    """A value for derived PRNG state (`Slot.is_derived`) that no call has derived yet."""
    shape = slot.type.shape if isinstance(slot.type, TensorType) else ()
    if slot.collection == "RngCount":
        return jnp.zeros(shape, jnp.uint32)
    return jnp.broadcast_to(jax.random.key(0), shape)


def shape_struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An abstract array."""
    make: Any = jax.ShapeDtypeStruct  # its constructor is not annotated
    made: jax.ShapeDtypeStruct = make(shape, dtype)
    return made


def abstract_value(slot: Slot) -> Any:
    """The value of a slot as shapes and dtypes."""
    if isinstance(slot.type, TreeType):
        return fill(slot.type.structure, list(map(abstract_type, slot.type.leaves)))
    return abstract_type(slot.type)


def abstract_type(kind: TensorType) -> jax.ShapeDtypeStruct:
    """An abstract array of a type."""
    return shape_struct(kind.shape, dtype_of(kind.dtype))


def dtype_of(name: str) -> Any:
    """A dtype by its name, those of typed PRNG keys too."""
    if not name.startswith("key<"):
        return jnp.dtype(name)
    impl = KEY_IMPLS.get(name, name[4:-1])
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call, arrays apart from everything else.

    Arrays (ShapeDtypeStructs included) are dynamic; what is not an array (``train=True``, a string,
    a module) is static.
    """

    treedef: Any
    """The structure of ``(args, kwargs)``."""
    static: tuple[tuple[int, Any], ...]
    """Position and value of each static leaf."""
    dynamic: tuple[Any, ...]
    """The arrays, in order."""

    @staticmethod
    def split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Splits a call's arguments."""
        leaves, treedef = jax.tree.flatten((args, dict(kwargs)))
        static = tuple((i, leaf) for i, leaf in enumerate(leaves) if not is_array(leaf))
        return Arguments(treedef, static, tuple(leaf for leaf in leaves if is_array(leaf)))

    def merge(self, dynamic: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's ``args`` and ``kwargs`` with other arrays in them."""
        static = dict(self.static)
        arrays = iter(dynamic)
        leaves = [
            static[position] if position in static else next(arrays)
            for position in range(self.treedef.num_leaves)
        ]
        args, kwargs = jax.tree.unflatten(self.treedef, leaves)
        return args, kwargs


def input_types(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], encode: Encoder
) -> tuple[tuple[str, ValueType | AttrValue], ...]:
    """The arguments of a call as a `Signature` holds them."""
    named = [(str(position), arg) for position, arg in enumerate(args)] + list(kwargs.items())
    return tuple((name, _input_type(arg, encode)) for name, arg in named)


def _input_type(arg: Any, encode: Encoder) -> ValueType | AttrValue:
    if is_array(arg):
        return tensor_type(arg)
    leaves = jax.tree.leaves(arg)
    if leaves and all(map(is_array, leaves)):
        return value_type(arg)
    return encode(abstract(arg))


def sample_inputs(signature: Signature) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call from its `Signature`, arrays as shapes: undoes `input_types`.

    Raises:
        LinseyError: one exists only in the process that lowered it.
    """
    named = {name: _sample(value) for name, value in signature.inputs}
    count = sum(name.isdigit() for name in named)
    return tuple(named.pop(str(position)) for position in range(count)), named


def _sample(value: ValueType | AttrValue) -> Any:
    if isinstance(value, TensorType):
        return abstract_type(value)
    if isinstance(value, TreeType):
        return fill(value.structure, list(map(abstract_type, value.leaves)))
    return decode(value)


def _is_key(array: Any) -> bool:
    is_typed = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return is_typed or (array.dtype == jnp.uint32 and array.ndim > 0)


def is_rngs(rngs: Any) -> bool:
    """Whether it is an `flax.nnx.Rngs`; flax is not imported for it."""
    return callable(rngs) and hasattr(rngs, "items")


def key_dict(rngs: Any) -> dict[str, Any]:
    """PRNG keys by stream name, from whatever way of giving them.

    Args:
        rngs: an int seed, a jax key (typed, or raw of dtype uint32), a mapping from stream to one
            of these, or an `flax.nnx.Rngs`, each stream of which is drawn from once. A single
            key, and a stream called ``default`` where there is no ``params``, is the stream
            ``params``.

    Raises:
        LinseyError: it is none of these.

    Example:
        >>> sorted(key_dict({"params": 0, "dropout": 1}))
        ['dropout', 'params']
    """
    if isinstance(rngs, int) and not isinstance(rngs, bool):
        return {"params": jax.random.key(rngs)}
    if is_array(rngs) and _is_key(rngs):
        return {"params": rngs}
    if isinstance(rngs, Mapping):
        keys = {str(name): key_dict(key)["params"] for name, key in rngs.items()}
    elif is_rngs(rngs):
        keys = {name: stream() for name, stream in rngs.items()}
    else:
        raise LinseyError(
            f"found {type(rngs).__name__} for PRNG keys, expected an int seed, a jax key, a dict of"
            " keys by stream name, or nnx.Rngs",
            path="rngs",
            fix="Pass for example rngs=0 or rngs={'params': jax.random.key(0)}.",
        )
    if "params" not in keys and "default" in keys:
        keys["params"] = keys.pop("default")
    return keys
