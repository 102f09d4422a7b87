"""Which packages a loaded program may import from."""

from __future__ import annotations

from collections.abc import Iterable

from linsey.ir import EmitError, Graph, Ref, walk

PACKAGES = ("flax", "jax", "jaxlib", "linsey", "ml_dtypes", "numpy", "optax")
"""The packages that every loaded program may name."""
NAMES = frozenset(
    {
        *(
            f"builtins:{name}"
            for name in ("bool", "bytes", "complex", "dict", "float", "frozenset")
        ),
        *(f"builtins:{name}" for name in ("bool", "bytes", "complex", "dict", "float", "int")),
        *(f"builtins:{name}" for name in ("frozenset", "list", "range", "set", "slice", "str")),
        "builtins:tuple",
        *("collections:OrderedDict", "collections:defaultdict", "collections:deque"),
        *("functools:partial", "types:MappingProxyType", "types:NoneType"),
    }
)
"""The names of Python's own library that every loaded program may name: they run no code."""


def check(graph: Graph, trust: Iterable[str]) -> None:
    """Checks that a graph names objects of trusted packages only. Imports nothing.

    Args:
        graph: the graph.
        trust: names of packages or modules, in addition to `PACKAGES`.

    Raises:
        EmitError: it names others; the message lists them with their places.
    """
    trusted = (*PACKAGES, *trust)
    refused: dict[str, str] = {}
    for place, ref in walk(graph, Ref):
        module = ref.name.partition(":")[0]
        if ref.name not in NAMES and not any(
            module == each or module.startswith(f"{each}.") for each in trusted
        ):
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
