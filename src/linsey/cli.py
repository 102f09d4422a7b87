"""The command line: ``linsey lower pkg.module:factory --input 'f32[8,28,28,1]'``."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from typing import Any

import click

import linsey
from linsey import _options
from linsey._tables import print_summary
from linsey.ir import Axis, Rules, TensorType
from linsey.ir import summary as _summary
from linsey.runtime import artefact, exported
from linsey.runtime._shards import axis_names
from linsey.runtime._text import bytes_text
from linsey.runtime.analyse import Analysis, analyse
from linsey.runtime.plan import abstract_values
from linsey.runtime.plan import plan as plan_graph
from linsey.runtime.sharding import rules_in_force

JSON_VERSION = 1
"""Version of what ``--json`` prints. Entries may be added within a version; one that goes, or that
changes its meaning, makes a new version."""

_JSON_HELP = """\b
--json prints one object:
  version     1; entries may be added, none goes or changes its meaning
  target      TARGET
  root        id of the root node
  nodes       id, op, source (dialect, class), attrs (as text), children,
              slots and streams (by name and id), signatures, wrapper
  slots       id, key, collection, paths, kind, type (dtype and shape, or
              tree and leaves), bytes, partition, stack (axis, length,
              name, owner), lifetime, raw, mirrors, metadata, box
  streams     id, name, derivation, use, key and count (ids of slots)
  signatures  the calls of the root: method, inputs, output
  empty       paths of collections and subtrees that hold nothing
  summary     nodes, slots, bytes, layers (number by class), collections
              (slots and bytes by name), streams, shared, tied, stacked
"""

_PLAN_JSON_HELP = """\b
--json prints one object:
  version       1; entries may be added, none goes or changes its meaning
  target        TARGET
  mesh          size by axis
  devices       their number
  rules         pairs of a name and axes, or null
  bytes         whole (unsharded), per_device, all_devices
  collections   name, slots, whole, per_device
  optimizer     the same, or null
  replicated    group (name, example, slots), type, axes, over, copies,
                per_device, least, factor, saved
  uneven        group, axis, size, parts, on, reason
  unmapped      name, slots, example
  unused_rules  rule, reason
  unused_axes   axes of the mesh
  problems      group, message
  compiled      null, or: platform, devices, memory (arguments, outputs,
                temporaries, aliased, code: bytes per device), collectives
                (kind, instructions, executed, nbytes)
"""


@click.group()
@click.version_option(linsey.__version__, prog_name="linsey")
def main() -> None:
    """A graph-IR interop compiler for Flax: Linen modules, NNX modules and any mix of the two."""


@main.command(epilog=_JSON_HELP)
@_options.call_options
@click.option("as_json", "--json", is_flag=True, help="Print JSON, for programs.")
def lower(
    target: str,
    inputs: list[_options.Input],
    settings: list[tuple[str, Any]],
    method: str | None,
    as_json: bool,
) -> None:
    """Lowers a module to a graph, and prints the graph and a summary.

    TARGET is a Linen or NNX module, a function that makes one (it takes nothing, or rngs), or a
    class that needs nothing. The current directory can be imported from. Nothing is allocated: a
    model of any size can be lowered.
    """
    args, keywords = _options.call_of(inputs, settings)
    graph = _lowered(target, args, keywords, method)[0].graph
    if as_json:
        data = {"version": JSON_VERSION, "target": target, **_summary.to_json(graph)}
        click.echo(json.dumps(data, indent=2))
        return
    click.echo(str(graph))
    click.echo()
    print_summary(_summary.summarize(graph), graph)


_SHOW_JSON_HELP = """\b
--json prints what `linsey lower --json` prints, with the path as target, and:
  file        bytes, format (major and minor version), writer, values (their
              bytes, or null), programs (the exported ones: call, method, inputs,
              keys, constraints, capture, platforms, vjp_order, changed slots,
              jax and calling_convention that wrote it, nbytes, readable by the
              jax that is installed)
"""


@main.command(epilog=_SHOW_JSON_HELP)
@click.argument("file", type=click.Path())
@click.option("as_json", "--json", is_flag=True, help="Print JSON, for programs.")
def show(file: str, as_json: bool) -> None:
    """Prints the graph of an artefact, which `program.save` wrote, and a summary.

    FILE is its path. No value is read, and nothing that the file names is imported.
    """
    found, programs = _opened(file)
    size = None if found.values is None else found.values.nbytes
    readable = {program: exported.is_readable(program) for program in programs}
    if as_json:
        about = {
            "bytes": found.nbytes,
            "format": list(found.version),
            "writer": found.writer,
            "values": size,
            "programs": [{**each.to_json(), "readable": readable[each]} for each in programs],
        }
        data = {"version": JSON_VERSION, "target": file, **_summary.to_json(found.graph)}
        click.echo(json.dumps({**data, "file": about}, indent=2))
        return
    click.echo(str(found.graph))
    click.echo()
    print_summary(_summary.summarize(found.graph), found.graph)
    for program in programs:
        changed = f", changes {len(program.changed)} slots" if program.changed else ""
        gradient = "" if program.vjp_order else ", no gradient"
        old = "" if readable[program] else ", which the jax that is installed cannot read"
        click.echo(
            f"exported {program}\n  for {', '.join(program.platforms)}{changed}{gradient};"
            f" {bytes_text(program.nbytes)}, by jax {program.jax}{old}"
        )
    major, minor = found.version
    held = "no values" if size is None else f"values of {bytes_text(size)}"
    click.echo(f"{bytes_text(found.nbytes)}, {held}; format {major}.{minor}, by {found.writer}")


def _opened(file: str) -> tuple[artefact.Artefact, tuple[exported.StoredProgram, ...]]:
    """An artefact and its exported programs; nothing that they name may be imported."""

    def read() -> Any:
        found = artefact.load(file, trusts=lambda name: False)
        held = found.programs
        if held is None:
            return found, ()
        return found, exported.load_records(held.records, held.data, lambda name: False)

    return _options.guarded(read, "reading")  # type: ignore[no-any-return]


@main.command()
@click.argument("file", type=click.Path())
@click.option("--output", "-o", type=click.Path(), help="Where to save it; FILE when left out.")
@click.option(
    "--trust",
    multiple=True,
    metavar="PACKAGE",
    help="A package whose code the artefact may import and run. Repeat it for more.",
)
def export(file: str, output: str | None, trust: tuple[str, ...]) -> None:
    """Exports the programs of an artefact anew, from the source, with the jax of today.

    FILE is its path. Sizes, constraints, platforms and all else stay as they were asked for.
    """

    def made() -> tuple[Any, ...]:
        program = linsey.load(file, trust=trust)
        if not program.exports:
            raise click.ClickException(
                f"{file} holds no exported programs\nSave it by program.save(path, export=[...])."
            )
        program.save(output or file, export=program.exports)
        return program.exports

    for each in _options.guarded(made, "exporting"):
        click.echo(f"exported {each}")


@main.command(epilog=_PLAN_JSON_HELP)
@_options.call_options
@click.option(
    "--mesh",
    callback=_options.mesh,
    multiple=True,
    required=True,
    metavar="AXIS=SIZE,...",
    help="The mesh, such as data=16,fsdp=16,tensor=2. No such devices are needed.",
)
@click.option(
    "--rules",
    callback=_options.rules,
    multiple=True,
    metavar="NAME=AXIS,...",
    help="Rules from logical names to axes of the mesh, the first that fits decides:"
    " embed=fsdp,batch=data+fsdp,heads=none. Repeat it for more.",
)
@click.option(
    "--rules-from",
    callback=_options.target,
    metavar="MODULE:NAME",
    help="Rules as a list of pairs in a module; those of --rules come before them.",
)
@click.option(
    "optimizer_from",
    "--optimizer",
    callback=_options.target,
    metavar="MODULE:NAME",
    help="An optax transformation, or a function that makes one: its state is counted too.",
)
@click.option("compiling", "--compile", is_flag=True, help="Compile the call too; see above.")
@click.option(
    "--batch",
    callback=_options.axis_list,
    metavar="AXIS+...",
    help="With --compile: the axes of the mesh that split the first axis of each input.",
)
@click.option("as_json", "--json", is_flag=True, help="Print JSON, for programs.")
def plan(
    target: str,
    inputs: list[_options.Input],
    settings: list[tuple[str, Any]],
    method: str | None,
    mesh: dict[str, int],
    rules: list[tuple[str, Axis]],
    rules_from: str | None,
    optimizer_from: str | None,
    compiling: bool,
    batch: tuple[str, ...],
    as_json: bool,
) -> None:
    """Counts what each device of a mesh would hold, and tells what is not split.

    TARGET and the options that call it are those of `linsey lower`; nothing is allocated, and the
    devices need not be there.

    With --compile, the call is compiled for that many faked CPU devices, which can take minutes for
    a large model. Then XLA's own memory analysis is printed, and the collectives that XLA inserted.
    """
    _check_axes(mesh, rules, batch)
    if batch and not compiling:
        raise click.UsageError("--batch is of use with --compile only")
    args, keywords = _options.call_of(inputs, settings)
    if compiling:
        _fake_devices(math.prod(mesh.values()))
    given = [*rules, *(_rules_of(rules_from) if rules_from else ())] or None
    optimizer = _made(optimizer_from) if optimizer_from else None
    program, call = _lowered(target, args, keywords, method, mesh)
    made = _options.guarded(
        lambda: plan_graph(program.graph, mesh, given, optimizer=optimizer), "planning"
    )
    if not as_json:
        click.echo(str(made))
    analysis = None
    if compiling:
        click.echo(f"\nCompiling the call for {made.devices} faked CPU devices ...", err=True)
        analysis = _options.guarded(
            lambda: _compiled(program, call, method, mesh, given, batch), "compiling"
        )
    if as_json:
        data = {**made.to_json(), "target": target}
        data["compiled"] = None if analysis is None else analysis.to_json()
        click.echo(json.dumps(data, indent=2))
    elif analysis is not None:
        click.echo(f"\n{analysis}")


def _check_axes(
    mesh: dict[str, int], rules: list[tuple[str, Axis]], batch: tuple[str, ...]
) -> None:
    """Refuses an axis that the mesh does not have, where the user has just written both."""
    named = [(f"the rule for {name!r}", axis) for name, on in rules for axis in axis_names(on)]
    for where, axis in (*named, *(("--batch", axis) for axis in batch)):
        if axis not in mesh:
            raise click.UsageError(
                f"{where} names the axis {axis!r}; the mesh has {', '.join(mesh)}"
            )


def _rules_of(target: str) -> Rules:
    """The rules that a target names."""
    named = _options.load(target)
    return _options.guarded(lambda: rules_in_force(named), f"reading {target}") or ()


def _fake_devices(count: int) -> None:
    """Has jax fake that many CPU devices; it must not have started."""
    import jax

    config: Any = jax.config  # its methods are not annotated
    with contextlib.suppress(RuntimeError):  # it has started: perhaps with enough of them
        config.update("jax_num_cpu_devices", count)
        config.update("jax_platforms", "cpu")
    if len(jax.devices("cpu")) < count:
        raise click.ClickException(
            f"--compile needs {count} CPU devices, and jax has started with"
            f" {len(jax.devices('cpu'))}\nSet XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{count} in the environment."
        )


def _made(target: str) -> Any:
    """What a target names, called where it is a function."""
    named = _options.load(target)
    made = _options.guarded(named, f"calling {target}") if inspect.isfunction(named) else named
    if not hasattr(made, "init"):
        raise click.ClickException(
            f"{target} is a {type(made).__name__}, expected an optax transformation"
        )
    return made


def _compiled(
    program: linsey.Program,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    method: str | None,
    sizes: dict[str, int],
    rules: Any,
    batch: tuple[str, ...],
) -> Analysis:
    import jax
    import numpy as np

    count = math.prod(sizes.values())
    devices = np.array(jax.devices("cpu")[:count]).reshape(tuple(sizes.values()))
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.sharding.Mesh(devices, tuple(sizes), axis_types=auto)
    spec: Any = jax.sharding.PartitionSpec  # its constructor is not annotated
    split = spec(batch) if batch else None
    exe = program.compile(method, mesh=mesh, rules=rules, in_shardings=split)
    drawn = [each for each in program.graph.streams if each.derivation == "path"]
    keys = {each.name: jax.random.key(0) for each in drawn if each.use == "call"}
    args, kwargs = call
    values = abstract_values(program.graph)
    return analyse(exe.lower(values, *args, rngs=keys or None, **kwargs).compile())


def _lowered(
    target: str,
    args: list[TensorType],
    keywords: dict[str, Any],
    method: str | None,
    mesh: dict[str, int] | None = None,
) -> tuple[linsey.Program, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The program of a target, lowered with a mesh around or none, and its sample inputs."""
    import jax
    from flax import linen
    from jax.sharding import AbstractMesh, AxisType

    def abstract(kind: TensorType) -> Any:
        dtype = jax.numpy.dtype(kind.dtype)
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise click.ClickException(
                f"{kind} needs jax in its 64-bit mode\nSet JAX_ENABLE_X64=1 in the environment."
            )
        return jax.ShapeDtypeStruct(kind.shape, dtype)  # type: ignore[no-untyped-call]

    def made() -> Any:
        is_class = isinstance(source, type) and issubclass(source, linen.Module)
        return source() if is_class else source

    source = _options.load(target)
    given = tuple(map(abstract, args))
    named = {
        name: abstract(value) if isinstance(value, TensorType) else value
        for name, value in keywords.items()
    }
    around: Any = contextlib.nullcontext()
    if mesh is not None:  # for constraints of the model that need one
        axes = (AxisType.Auto,) * len(mesh)
        around = jax.sharding.use_abstract_mesh(
            AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=axes)
        )
    with around:
        program = _options.guarded(
            lambda: linsey.lower(made(), *given, method=method, **named), f"lowering {target}"
        )
    return program, (given, named)


if __name__ == "__main__":
    main(prog_name="linsey")
