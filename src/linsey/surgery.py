"""Replaces modules of an NNX model by path."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

from linsey.ir import EmitError, Path, format_path


def replace(model: nnx.Module, pattern: str, make: Callable[[Any], nnx.Module]) -> tuple[str, ...]:
    """Replaces the modules of a model whose path fits a pattern, in place.

    In a model that `to_nnx` made, hosted Linen code calls the new modules where it called its own
    layers, with the same arguments. Below a scan or a vmap of Linen's a new module has to be
    stacked as the old one was; the call says how if it is not.

    Args:
        model: the model.
        pattern: a path as `lower` prints it, ``encoder/layers_0/Dense_0``. In each part ``*``,
            ``?`` and ``[...]`` stand for characters as in file names; a part ``**`` stands for any
            number of parts.
        make: takes a module and gives the one that is to stand in its place. The same one leaves it
            there. It is asked once for a module that the model holds several times.

    Returns:
        The paths at which there is another module now.

    Raises:
        EmitError: no module fits the pattern, or `make` gave something that is no module.

    Example:
        >>> import jax, linsey
        >>> from flax import linen as nn, nnx
        >>> net = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
        >>> model = linsey.to_nnx(net, jax.numpy.ones((1, 3)), rngs=0)
        >>> def with_lora(dense):
        ...     lora = nnx.LoRALinear(
        ...         dense.in_features, dense.out_features, lora_rank=1, rngs=nnx.Rngs(0)
        ...     )
        ...     lora.kernel, lora.bias = dense.kernel, dense.bias
        ...     return lora
        >>> linsey.replace(model, "layers_*", with_lora)
        ('layers_0', 'layers_2')
    """
    wanted = pattern.split("/")
    seen: dict[int, Any] = {}
    fitting, replaced, paths = 0, [], []
    for path, holder, name, module in list(_modules(model, (), set())):
        parts = [format_path((part,)) for part in path]
        paths.append("/".join(parts))
        if not _fits(parts, wanted):
            continue
        fitting += 1
        if id(module) not in seen:
            seen[id(module)] = make(module)
        new = seen[id(module)]
        if not isinstance(new, nnx.Module):
            raise EmitError(
                f"found a {type(new).__name__} in place of {type(module).__name__}, expected an"
                " nnx.Module",
                path=paths[-1],
                fix="Let the function return an nnx.Module with the same call.",
            )
        if new is not module:
            _put(holder, name, new)
            replaced.append(paths[-1])
    if not fitting:
        shown = ", ".join(paths[:20]) + (", …" if len(paths) > 20 else "")
        raise EmitError(
            f"no module fits the pattern; there are: {shown or 'none'}",
            path=pattern,
            fix="Match whole paths: a part `**` stands for any number of parts.",
        )
    return tuple(replaced)


def _modules(obj: Any, path: Path, inside: set[int]) -> Iterator[tuple[Path, Any, Any, Any]]:
    """Each module below an object: path, what holds it, its name there, and itself."""
    if id(obj) in inside:
        return
    inside = inside | {id(obj)}
    for name, value in _items(obj):
        below = (*path, name)
        if isinstance(value, nnx.Module) and not isinstance(value, nnx.List | nnx.Dict):
            yield below, obj, name, value
        if isinstance(value, nnx.Module | list | tuple | dict):
            yield from _modules(value, below, inside)


def _items(obj: Any) -> list[tuple[Any, Any]]:
    if isinstance(obj, list | tuple | nnx.List):
        return list(enumerate(obj))
    if isinstance(obj, dict):
        return list(obj.items())
    return [(name, value) for name, value in vars(obj).items() if not name.startswith("_pytree__")]


def _put(holder: Any, name: Any, new: nnx.Module) -> None:
    if isinstance(holder, tuple):
        raise EmitError(
            "found a module in a tuple, which cannot change",
            path=str(name),
            fix="Hold the modules in an nnx.List.",
        )
    if isinstance(holder, list | dict | nnx.List):
        holder[name] = new
    else:
        setattr(holder, name, new)


def _fits(parts: list[str], wanted: list[str]) -> bool:
    if not wanted:
        return not parts
    first, rest = wanted[0], wanted[1:]
    if first == "**":
        return any(_fits(parts[start:], rest) for start in range(len(parts) + 1))
    return bool(parts) and _fits_part(parts[0], first) and _fits(parts[1:], rest)


def _fits_part(part: str, wanted: str) -> bool:
    # `[0]` is how the item of a list is written, and a set of characters to fnmatch.
    return part == wanted or fnmatch.fnmatchcase(part, wanted)
