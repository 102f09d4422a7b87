"""Which packages a loaded program may import from."""

from __future__ import annotations

from collections.abc import Iterable

from linsey.ir import EmitError, Graph, Ref, walk

PACKAGES = ("flax", "jax", "jaxlib", "linsey", "ml_dtypes", "numpy", "optax")
"""The packages that every loaded program may name."""
_BUILTINS = ("bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "range")
NAMES = frozenset(
    {
        *(f"builtins:{name}" for name in (*_BUILTINS, "set", "slice", "str", "tuple")),
        *("collections:OrderedDict", "collections:defaultdict", "collections:deque"),
        *("functools:partial", "types:MappingProxyType", "types:MethodType", "types:NoneType"),
    }
)
"""The names of Python's own library that every loaded program may name: they run no code."""


def allows(name: str, trust: Iterable[str]) -> bool:
    """Whether ``package.module:Name`` is of a trusted package.

    Args:
        name: the name.
        trust: names of packages or modules, in addition to `PACKAGES`.
    """
    module = name.partition(":")[0]
    return name in NAMES or any(
        module == each or module.startswith(f"{each}.") for each in (*PACKAGES, *trust)
    )


def check(graph: Graph, trust: tuple[str, ...]) -> None:
    """Checks that a graph names objects of trusted packages only. Imports nothing.

    Args:
        graph: the graph.
        trust: names of packages or modules, in addition to `PACKAGES`.

    Raises:
        EmitError: it names others; the message lists them with their places.
    """
    refused: dict[str, str] = {}
    for place, ref in walk(graph, Ref):
        if not allows(ref.name, trust):
            refused.setdefault(ref.name, place)
    if refused:
        packages = sorted({name.partition(":")[0].partition(".")[0] for name in refused})
        raise EmitError(
            f"the file names {len(refused)} objects of packages that are not trusted:\n  "
            + "\n  ".join(f"{place}: {name}" for name, place in refused.items()),
            path="trust",
            fix="If the file comes from where you trust it:"
            f" linsey.load(path, trust={packages!r}).",
        )
