"""The readable form of a graph: a line a node, its slots under it."""

from __future__ import annotations

from collections.abc import Iterator

from linsey.ir.attributes import AttrValue, Call, Ref, describe
from linsey.ir.graph import Graph, Node, Signature, TensorType, TreeType
from linsey.ir.paths import Key, Path, format_path

_INDENT = "  "
_MAX_ATTR = 72


def format_graph(graph: Graph) -> str:
    """Writes a graph as text, the same for equal graphs.

    A node is shown at its first path; where it is met again, a line ``-> %n`` stands for it.
    """
    lines = [f"graph {len(graph.nodes)} nodes, {len(graph.slots)} slots"]
    if graph.streams:
        streams = sorted({f"{stream.name}:{stream.derivation}" for stream in graph.streams})
        lines[0] += f", streams {', '.join(streams)}"
    lines.extend(_node_lines(graph))
    lines.extend(f"empty {format_path(path)}" for path in graph.empty)
    return "\n".join(lines)


def _node_lines(graph: Graph) -> Iterator[str]:
    seen_nodes: set[int] = set()
    seen_slots: set[int] = set()
    todo: list[tuple[int, Key | None, Path, int]] = [(graph.root, None, (), 0)]
    while todo:
        number, name, path, depth = todo.pop()
        pad = _INDENT * depth
        label = "" if name is None else f"{format_path((name,))}: "
        if number in seen_nodes:
            yield f"{pad}{label}-> %{number}"
            continue
        seen_nodes.add(number)
        node = graph.nodes[number]
        yield f"{pad}{label}%{number} {_head(node)}"
        for signature in node.signatures if number == graph.root else ():
            yield f"{pad}{_INDENT}{_call(signature)}"
        held = [*node.slots, *(node.wrapper.slots if node.wrapper else ())]
        for slot_name, index in held:
            slot = graph.slots[index]
            is_alias = index in seen_slots or (
                len(slot.paths) > 1 and slot.path != (*path, slot_name)
            )
            yield f"{pad}{_INDENT}{_slot(graph, index, slot_name, is_alias=is_alias)}"
            if not is_alias:
                seen_slots.add(index)
        children = [*node.children, *(node.wrapper.children if node.wrapper else ())]
        for child_name, child in reversed(children):
            todo.append((child, child_name, (*path, child_name), depth + 1))


def _head(node: Node) -> str:
    if node.source is None:
        return node.op
    text = f"{node.source.dialect}.{describe_class(node.source.cls)}"
    shown = [
        f"{name}={value}"
        for name, attr in node.attrs
        if not str(name).startswith("_") and (value := describe(attr)) != "None"
    ]
    attrs = ", ".join(item if len(item) <= _MAX_ATTR else item[:_MAX_ATTR] + "…" for item in shown)
    text += f"({attrs})"
    if node.op not in ("module", "container"):
        text = f"{node.op} {text}"
    if node.wrapper is not None:
        text += f" via {describe(node.wrapper.cls)}"
    if node.streams:
        text += f" draws {', '.join(name for name, _ in node.streams)}"
    return text


def describe_class(cls: AttrValue) -> str:
    """A class by its name, or by the calls that made it: ``vmap(scan(Block))``.

    Example:
        >>> from linsey.ir import encode
        >>> describe_class(encode(dict))
        'dict'
    """
    if isinstance(cls, Call) and cls.args:
        inner = ", ".join(map(describe_class, cls.args[1:]))
        return f"{describe(cls.args[0])}({inner})"
    return describe(cls)


def _slot(graph: Graph, number: int, name: Key, *, is_alias: bool) -> str:
    slot = graph.slots[number]
    place = format_path((slot.collection, name))
    if is_alias:
        return f"{place} = {slot.key}"
    parts = [f"{place}: {slot.type}"]
    if slot.raw:
        parts.append("raw")
    elif isinstance(slot.kind, Ref):
        parts.append(describe(slot.kind))
    if slot.partition is not None:
        parts.append(str(slot.partition))
    if slot.stack:
        parts.append(f"stack[{', '.join(map(str, slot.stack))}]")
    if slot.mirrors is not None:
        parts.append(f"follows {graph.slots[slot.mirrors].key}")
    if slot.lifetime != "persistent":
        parts.append(slot.lifetime)
    if len(slot.paths) > 1:
        parts.append(f"also {', '.join(map(format_path, slot.paths[1:]))}")
    return " ".join(parts)


def _call(signature: Signature) -> str:
    inputs = [
        (str(value) if isinstance(value, TensorType | TreeType) else describe(value), name)
        for name, value in signature.inputs
    ]
    shown = ", ".join(text if name.isdigit() else f"{name}={text}" for text, name in inputs)
    return f"{signature.method}({shown}) -> {signature.output if signature.output else '?'}"
