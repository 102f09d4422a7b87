"""Which packages a loaded program may import from."""

from __future__ import annotations

from collections.abc import Iterable

from linsey.ir import EmitError, Graph, Ref, walk

_JAX = (
    *("ad_checkpoint", "api", "array", "core", "cudnn", "custom_derivatives", "dtypes", "image"),
    *("initializers", "lax", "layout", "literals", "mesh", "named_sharding", "nn", "numpy", "ops"),
    *("partition_spec", "pjit", "prng", "random", "scipy", "sharding_impls"),
)
MODULES = (
    *("flax.core", "flax.linen", "flax.nnx", "flax.struct", "flax.training.dynamic_scale"),
    *("flax.training.train_state", "flax.typing"),
    *("jax.image", "jax.lax", "jax.nn", "jax.numpy", "jax.random", "jax.scipy", "jax.sharding"),
    *(f"jax._src.{name}" for name in _JAX),
    *("linsey._boxes", "linsey._collections", "linsey._layers.functions", "linsey._meshes"),
    "linsey.backends",
    *("linsey.bridge", "linsey.ir.objects", "ml_dtypes", "optax"),
)
"""The modules that every loaded program may name, with those below them. They compute and no more:
none of them reads or writes files, imports by name, or runs what a text says."""
_EXACT = ("jax", "numpy", "numpy.fft", "numpy.linalg", "numpy.random")
"""The same for these without those below them."""
_FILES = frozenset(
    {
        *("DataSource", "dump", "fromfile", "fromregex", "genfromtxt", "load", "loadtxt", "memmap"),
        *("save", "savetxt", "savez", "savez_compressed", "source", "test", "tofile"),
    }
)
"""The names in them that deal with files after all."""
_BUILTINS = ("bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "range")
NAMES = frozenset(
    {
        *(f"builtins:{name}" for name in (*_BUILTINS, "set", "slice", "str", "tuple")),
        *("collections:OrderedDict", "collections:defaultdict", "collections:deque"),
        *(
            "functools:partial",
            "linsey._trees:dtype_of",
            "types:MappingProxyType",
            "types:MethodType",
            "types:NoneType",
        ),
    }
)
"""Names, most of them of Python's own library, that every loaded program may use: they run no code
of others."""


def allows(name: str, trust: Iterable[str]) -> bool:
    """Whether ``package.module:Name`` may be imported.

    Args:
        name: the name.
        trust: names of packages or modules, in addition to `MODULES`.
    """
    module, _, qualname = name.partition(":")
    if name in NAMES or _is_below(module, trust):
        return True
    if not _FILES.isdisjoint(qualname.split(".")):
        return False
    return _is_below(module, MODULES) or (module in _EXACT and "." not in qualname)


def _is_below(module: str, owners: Iterable[str]) -> bool:
    return any(module == each or module.startswith(f"{each}.") for each in owners)


def check(graph: Graph, trust: tuple[str, ...]) -> None:
    """Checks that a graph names objects of trusted packages only. Imports nothing.

    Args:
        graph: the graph.
        trust: names of packages or modules, in addition to `MODULES`.

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
