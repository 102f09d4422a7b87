"""A program: a graph, its values where there are any, and what can be done with them."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jax.sharding import Mesh

from linsey import _trees, _trust, plugins
from linsey.backends import Backend, Report, Runner
from linsey.ir import (
    EmitError,
    FormatWarning,
    Graph,
    PluginError,
    Values,
    decode,
    left_out,
    verify,
)
from linsey.runtime import Executable, artefact, sharding
from linsey.runtime import exported as exports
from linsey.runtime._checks import check_method, no_init
from linsey.runtime.exported import Export, Interface, StoredProgram
from linsey.runtime.gradients import Wanted
from linsey.runtime.plan import Plan, plan


@dataclass(frozen=True, kw_only=True)
class Program:
    """What `linsey.lower` gives. Immutable; ``print`` shows the graph."""

    graph: Graph
    """The structure."""
    values: Values | None = None
    """One value per slot, or None when the program is abstract."""
    initialize: Callable[[Any], Values] | None = field(default=None, repr=False, compare=False)
    """The source's own initialisation; None for a live module, which is initialised already, and
    for what was lowered from an NNX module and loaded."""

    trust: tuple[str, ...] | None = field(default=None, repr=False, compare=False)
    """The packages that a loaded program may import from, besides those of jax and flax; None for
    one that was lowered here. See `linsey.load`."""
    exports: tuple[StoredProgram, ...] = field(default=(), repr=False, compare=False)
    """The exported programs of one that was loaded."""

    def __str__(self) -> str:
        return str(self.graph)

    def init(self, rngs: Any = None) -> Program:
        """The program with concrete values: the very numbers that the source's own init gives.

        Args:
            rngs: what the source API takes: an int seed, a jax key, a dict of keys by stream, or
                ``nnx.Rngs``; None: those given to `linsey.lower`, or seed 0.

        Raises:
            EmitError: the program was lowered from a live module, which has its values, or was
                loaded and is of NNX; or the Linen module of a file has changed since.
            LoweringError: a PRNG stream is missing.

        Example:
            >>> import jax, linsey
            >>> from flax import linen as nn
            >>> x = jax.numpy.ones((1, 3))
            >>> program = linsey.lower(nn.Dense(2), x).init(jax.random.key(0))
            >>> program.values["params/kernel"].shape
            (3, 2)
        """
        if self.initialize is None:
            raise no_init()
        return replace(self, values=self.initialize(rngs))

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        export: Iterable[str | Export | StoredProgram] | None = None,
        dynamic: Any = None,
        constraints: Sequence[str] = (),
        platforms: Sequence[str] | None = None,
    ) -> None:
        """Saves the graph, the values where there are any, and exported programs, as one file.

        The file has the layout of safetensors: each array under the name of its slot. The one that
        was there before stays until the new one is complete; a process that is killed leaves the
        old one or the new one. An array is written at a time, so that little memory is needed.

        An exported program is one method, lowered by ``jax.export``. `linsey.load` runs it where
        neither the model's source code nor flax is, on one device or any mesh. It holds no values
        and no sharding; those that lie beside it are used.

        Args:
            path: the file.
            export: the methods to export: the name of one, for the sample inputs that the program
                was lowered with; `linsey.Export`, which says more; or one of ``program.exports``,
                to export it anew. None: those that the program was loaded with, as they are.
            dynamic: for the methods given by name, as `linsey.Export.dynamic`.
            constraints: for the methods given by name, as `linsey.Export.constraints`.
            platforms: for the methods given by name, as `linsey.Export.platforms`.

        Raises:
            FormatError: the graph holds what cannot be data (a lambda, a local class), with all of
                it by path, and nothing is exported; a value cannot be written; or the file cannot.
            EmitError: a method cannot be exported.

        Warns:
            FormatWarning: what cannot be data was left out. Exported programs run without it; the
                model's own code cannot.

        Example:
            >>> import jax, linsey, tempfile
            >>> from flax import linen as nn
            >>> program = linsey.lower(nn.Dense(2), jax.numpy.ones((1, 3))).init(0)
            >>> path = tempfile.mkdtemp() + "/dense.linsey"
            >>> program.save(path)
            >>> linsey.load(path).values["params/kernel"].shape
            (3, 2)
        """
        programs = self._exported(export, dynamic, constraints, platforms)
        missing = left_out(self.graph) if programs else ()
        packed = None
        if programs:
            packed = artefact.Programs(
                records=exports.dump_records(programs), data=[each.data for each in programs]
            )
        artefact.save(path, verify(self.graph), self.values, packed, leave_out=bool(missing))
        if missing:
            warnings.warn(
                f"{len(missing)} values cannot be data and were left out of {os.fspath(path)};"
                " the exported programs run without them:\n  " + "\n  ".join(map(str, missing)),
                FormatWarning,
                stacklevel=2,
            )

    def _exported(
        self, export: Any, dynamic: Any, constraints: Sequence[str], platforms: Any
    ) -> tuple[StoredProgram, ...]:
        """The exported programs to save."""
        is_one = isinstance(export, str | Export | StoredProgram)
        wanted = (export,) if is_one else tuple(export or ())
        names = [each for each in wanted if isinstance(each, str)]
        if not names and (dynamic is not None or constraints or platforms is not None):
            raise EmitError(
                "dynamic, constraints and platforms are for methods that export= names, and it"
                " names none",
                path="export",
                fix='Pass export=["__call__"]; a linsey.Export has settings of its own.',
            )
        if export is None:
            return self.exports

        def compiled(interface: Interface) -> Executable:
            return self.compile(
                interface.method,
                mutable=decode(interface.mutable),
                capture=interface.capture,
                exported=False,
            )

        asked = [
            Export(method=each, dynamic=dynamic, constraints=constraints, platforms=platforms)
            if isinstance(each, str)
            else each
            for each in wanted
        ]
        return exports.export_all(asked, self.graph, self.values, compiled)

    def emit(self, target: str, *, native: bool = True) -> Any:
        """Emits the program in one of the APIs.

        Args:
            target: ``"nnx"`` gives ``(graphdef, state)``, ``"linen"`` gives ``(module,
                variables)``; another name, what the backend of that name gives. An abstract program
                gives ShapeDtypeStructs in place of arrays.
            native: whether flax's layers become the target's own where these compute the same, bit
                for bit; `report` tells which. Otherwise all code of the other API is hosted.

        Raises:
            PluginError: there is no such backend.
            EmitError: the graph cannot be emitted there; or it was loaded and names packages that
                are not trusted.
            VerifyError: the graph is not sound.
            ValuesError: a value has another shape than its slot.

        Example:
            >>> import jax, linsey
            >>> from flax import linen as nn, nnx
            >>> x = jax.numpy.ones((1, 3))
            >>> graphdef, state = linsey.lower(nn.Dense(2), x).init(0).emit("nnx")
            >>> nnx.merge(graphdef, state)(x).shape
            (1, 2)
        """
        backend: Backend = plugins.load("linsey.backends", target)
        if self.values is not None:
            _trees.check_shapes(self.graph, self.values.arrays)
        options = {} if native else {"native": False}
        return backend.emit(self._sound(), self.values, **options)

    def report(self, target: str | None = None, *, native: bool = True) -> Report:
        """What each node becomes when the program is emitted, and why where it is hosted.

        Args:
            target: as for `emit`; None: the API that the root is not of.
            native: as for `emit`.

        Returns:
            A row for each module, by path as in ``report["encoder/Dense_0"]``; ``print`` shows a
            table. ``report.native_share`` is the share of leaf layers that come out as layers of
            the target.

        Raises:
            PluginError: there is no such backend, or it does not tell.
            EmitError: as `emit`.

        Example:
            >>> import jax, linsey
            >>> from flax import linen as nn
            >>> net = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
            >>> report = linsey.lower(net, jax.numpy.ones((1, 3))).report()
            >>> report["layers_0"].became, report["layers_0"].target, report.native_share
            ('native', 'nnx.Linear', 1.0)
        """
        if target is None:
            target = "linen" if self._dialect() == "nnx" else "nnx"
        backend: Backend = plugins.load("linsey.backends", target)
        if backend.report is None:
            raise PluginError(
                "the backend does not tell what becomes of each node",
                path=target,
                fix="Ask for the report of another target.",
            )
        return backend.report(self._sound(), native=native)

    def compile(
        self,
        method: Any = None,
        *,
        mutable: Any = None,
        capture: str | tuple[str, ...] = (),
        donate: bool = False,
        mesh: Mesh | None = None,
        rules: Any = None,
        in_shardings: Any = None,
        pack: bool = False,
        share_traces: bool = False,
        exported: bool | None = None,
    ) -> Executable:
        """Compiles one method; see `linsey.runtime.Executable`.

        Args:
            method: its name, or a function of the module; None: the call.
            mutable: the collections that a call may change; None: for a Linen root all but
                ``params``, ``intermediates`` and ``perturbations``, for an NNX root all.
            capture: collections of state that calls make, to be returned beside the output.
            donate: whether a call may reuse the memory of the slots that it changes; those of the
                values passed in are gone then.
            mesh: the mesh to run on, with Auto or Explicit axes; None: no mesh.
            rules: pairs of a logical axis and mesh axes, in order of precedence, as
                ``nn.logical_axis_rules`` takes them; they hold for all slots. None: the rules that
                came with a slot, and those of ``nn.logical_axis_rules`` at this moment.
            in_shardings: how arrays of the arguments lie on the mesh: one spec or sharding for all,
                a tuple by position, or a dict by position and keyword. None: as they come.
            pack: whether slots of at most 64 KiB and of one collection, dtype and sharding share a
                buffer, which `init` and each call then give back. It makes calls of models with
                hundreds of small slots faster, and changes no number. Mesh axes must be Auto.
            share_traces: whether calls of layers of equal structure (the blocks of an unrolled
                transformer) are traced once and not each by itself. It makes tracing several times
                faster and changes no number. Python code in such a layer runs once per trace.
            exported: whether a stored program of the method runs (see `save`), or else the model's
                own code. None: a stored program where there is one of this name.

        Raises:
            EmitError: there is no such method, or no stored program of it.
            PartitionError: a slot, the rules or ``in_shardings`` do not fit the mesh.

        Example:
            >>> import jax, linsey
            >>> from flax import linen as nn
            >>> x = jax.numpy.ones((1, 3))
            >>> exe = linsey.lower(nn.Dense(2), x).compile()
            >>> y, values = exe(exe.init(0), x)
            >>> y.shape
            (1, 2)
        """
        capture = (capture,) if isinstance(capture, str) else tuple(capture)
        stored = exports.find(
            self.exports, method, mutable=mutable, capture=capture, exported=exported
        )
        return Executable(
            self.graph,
            self._stored_runner(stored, mesh) if stored else self._source_runner(method),
            self.initialize,
            method=method,
            mutable=mutable,
            capture=capture,
            donate=donate,
            mesh=mesh,
            rules=rules,
            in_shardings=in_shardings,
            pack=pack,
            share_traces=share_traces,
        )

    def partition_specs(self, *, mesh: Any = None, rules: Any = None) -> Values:
        """The ``PartitionSpec`` of each slot, by its name.

        Args:
            mesh: a mesh, an ``AbstractMesh`` or a dict of sizes by axis name that the specs must
                fit; None: they are not checked.
            rules: as for `compile`. Their semantics are those of ``nn.logical_to_mesh_axes``: taken
                in order, a mesh axis is used once in a slot, a name that no rule mentions is
                replicated. Only names that the source did not mark as logical
                (``nn.with_partitioning``, NNX's ``out_sharding``) stand for axes of the mesh where
                no rule mentions them.

        Returns:
            One spec per slot: empty where there is no annotation.

        Raises:
            PartitionError: a spec does not fit its slot or the mesh (rank, size, unknown axis); the
                message names the slot, the axis, both sizes and the rule. Notes tell of others.

        Example:
            >>> import jax, linsey
            >>> from flax import linen as nn
            >>> init = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))
            >>> program = linsey.lower(nn.Dense(4, kernel_init=init), jax.numpy.ones((1, 2)))
            >>> specs = program.partition_specs(
            ...     mesh={"data": 2, "model": 4}, rules=[("embed", None), ("mlp", "model")]
            ... )
            >>> tuple(specs["params/kernel"])
            (None, 'model')
        """
        return sharding.specs(self.graph, mesh, rules)

    def plan(
        self, mesh: Any, rules: Any = None, *, optimizer: Any = None, wrt: Wanted = "params"
    ) -> Plan:
        """What each device of a mesh would hold, counted from the graph: no such devices needed.

        Args:
            mesh: a mesh, an ``AbstractMesh``, or the sizes of its axes by name.
            rules: as for `compile`.
            optimizer: an optax transformation, whose state is counted too; None: no optimizer.
            wrt: what it optimizes, as `linsey.runtime.Executable.train` takes it.

        Returns:
            Bytes by collection, slots that stay replicated, uneven shards, names and rules that
            are not used, and what does not fit; ``print`` shows a table.

        Raises:
            PartitionError: the mesh or the rules cannot be read.

        Example:
            >>> import jax, linsey
            >>> from flax import linen as nn
            >>> init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
            >>> program = linsey.lower(nn.Dense(8, kernel_init=init), jax.numpy.ones((1, 4)))
            >>> plan = program.plan({"data": 2, "model": 4})
            >>> plan.shares[0].whole, plan.shares[0].per_device
            (160, 64)
        """
        return plan(self.graph, mesh, rules, optimizer=optimizer, wrt=wrt)

    def _source_runner(self, method: Any) -> Runner:
        """Runs the model's own code."""
        graph = self._sound()
        check_method(graph, method)
        backend: Backend = plugins.load("linsey.backends", self._dialect())
        return backend.runner(graph)

    def _stored_runner(self, stored: tuple[StoredProgram, ...], mesh: Mesh | None) -> Runner:
        """Runs stored programs. Imports nothing that the graph names."""
        return exports.StoredRunner(verify(self.graph), stored, mesh)

    def _sound(self) -> Graph:
        """The graph, checked before anything that it names is imported."""
        if self.trust is not None:
            _trust.check(self.graph, self.trust)
        return verify(self.graph)

    def _dialect(self) -> str:
        """The dialect that runs the root: that of its wrapper, where it has one."""
        root = self.graph.nodes[self.graph.root]
        dialect = "nnx" if root.source is None else root.source.dialect
        if root.wrapper is None:
            return dialect
        return "nnx" if dialect == "linen" else "linen"


def load(path: str | os.PathLike[str], *, trust: Sequence[str] = (), check: bool = True) -> Program:
    """The program in a file that `Program.save` wrote.

    Loading runs no code and imports nothing that the file names: that happens when the program is
    emitted, compiled or called. Values are read when they are asked for, straight from the file.

    Args:
        path: the file.
        trust: the packages or modules that the program may import from, ``["my_models"]``: those
            of jax, flax, optax and numpy that compute and no more are always among them, and
            nothing else is. A program that names others can be printed, but is neither emitted nor
            compiled. Importing runs code of the package; name only those that you would import
            yourself.
        check: whether the checksum of each value is compared when it is first read. That of the
            graph always is.

    Raises:
        FormatError: there is no such file, it is damaged, or of a version that is not supported.

    Example:
        >>> import jax, linsey, tempfile
        >>> from flax import linen as nn
        >>> program = linsey.lower(nn.Dense(2), jax.numpy.ones((1, 3)))
        >>> path = tempfile.mkdtemp() + "/dense.linsey"
        >>> program.save(path)
        >>> linsey.load(path).graph == program.graph
        True
    """
    packages = (trust,) if isinstance(trust, str) else tuple(trust)

    def trusts(name: str) -> bool:
        return _trust.allows(name, packages)

    found = artefact.load(path, trusts=trusts, check=check)
    programs = found.programs
    program = Program(
        graph=found.graph,
        values=found.values,
        trust=packages,
        exports=(programs and exports.load_records(programs.records, programs.data, trusts)) or (),
    )
    root = program.graph.nodes[program.graph.root]
    if root.wrapper is not None or program._dialect() != "linen" or not root.signatures:
        return program

    @functools.cache
    def initialize() -> Callable[[Any], Values]:
        from linsey.lowering import lower_again

        made = lower_again(program).initialize
        assert made is not None
        return made

    return replace(program, initialize=lambda rngs: initialize()(rngs))
