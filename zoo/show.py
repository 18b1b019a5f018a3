"""What is in a checkpoint: the tree of its parts and tensors, repeated blocks folded, from headers alone.

`{0..11}` stands for blocks with the same tensors in the same shapes and dtypes; blocks that differ are shown apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zoo.out import amount, size

if TYPE_CHECKING:
    from surgery import TensorInfo
    from zoo.entry import Entry

# Parameters are what training moves; tables of positions and counters of batches are not.
_NOT_PARAMETERS = ("I", "U", "B")


@dataclass
class Node:
    """A name in the tree. `times` is how many blocks it stands for; `tensor` is set on leaves."""

    name: str
    children: list[Node] = field(default_factory=list)
    tensor: TensorInfo | None = None
    times: int = 1

    @property
    def parameters(self) -> int:
        own = _parameters(self.tensor) if self.tensor is not None else 0
        return self.times * (own + sum(child.parameters for child in self.children))

    def shape(self) -> object:
        """What must be equal for two blocks to be folded into one."""
        own = (self.tensor.dtype, self.tensor.shape) if self.tensor is not None else None
        return own, tuple((child.name, child.times, child.shape()) for child in self.children)

    def tensors(self, prefix: str = "", times: int = 1) -> Iterator[tuple[str, TensorInfo, int]]:
        """Each folded tensor: its full name, with ranges in braces, and how many it stands for."""
        name = f"{prefix}.{self.name}" if prefix else self.name
        times *= self.times
        if self.tensor is not None:
            yield name, self.tensor, times
        for child in self.children:
            yield from child.tensors(name, times)


def _parameters(info: TensorInfo) -> int:
    return 0 if info.dtype.startswith(_NOT_PARAMETERS) and info.dtype != "BF16" else math.prod(info.shape)


def tree(tensors: Mapping[str, TensorInfo]) -> list[Node]:
    """The tensors as a folded tree, in the checkpoint's order."""
    root = Node("")
    index: dict[str, Node] = {"": root}
    for name, info in tensors.items():
        path, parent = "", root
        for word in name.split("."):
            path = f"{path}.{word}"
            if path not in index:
                index[path] = Node(word)
                parent.children.append(index[path])
            parent = index[path]
        parent.tensor = info
    return _folded(root.children)


def _folded(children: list[Node]) -> list[Node]:
    for child in children:
        child.children = _folded(child.children)
    blocks = sorted((child for child in children if child.name.isdigit()), key=lambda block: int(block.name))
    result: list[Node] = []
    done = False
    for child in children:
        if not child.name.isdigit():
            result.append(child)
        elif not done:  # all blocks stand where the first of them stood
            result += _runs(blocks)
            done = True
    return [_joined(child) for child in result]


def _runs(blocks: list[Node]) -> list[Node]:
    """Blocks of consecutive numbers and equal shape, as one."""
    runs: list[list[Node]] = []
    for block in blocks:
        last = runs[-1][-1] if runs else None
        follows = last is not None and int(block.name) == int(last.name) + 1 and block.shape() == last.shape()
        if follows:
            runs[-1].append(block)
        else:
            runs.append([block])
    return [
        run[0]
        if len(run) == 1
        else Node(f"{{{run[0].name}..{run[-1].name}}}", run[0].children, run[0].tensor, len(run))
        for run in runs
    ]


def _joined(node: Node) -> Node:
    """`layer` with the one child `{0..5}` reads better as `layer.{0..5}`."""
    if node.tensor is None and len(node.children) == 1:
        child = node.children[0]
        return Node(f"{node.name}.{child.name}", child.children, child.tensor, node.times * child.times)
    return node


@dataclass(frozen=True)
class Section:
    """A part, or what is in none. `shared` names parts whose tensors it holds as well but which are shown apart."""

    name: str
    nodes: list[Node]
    tensors: Mapping[str, TensorInfo]
    shared: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(_parameters(info) for info in self.tensors.values())


def sections(tensors: Mapping[str, TensorInfo], entry: Entry | None) -> list[Section]:
    """The parts of a checkpoint, each tensor under the smallest part that holds it; the rest under "(other)"."""
    layout = entry.layout_of(tensors) if entry is not None else None
    if entry is None or layout is None or not entry.parts:
        return [Section("", tree(tensors), tensors)]
    from zoo.entry import matching

    holds = {part.name: set(matching(tensors, part.tensors.get(layout, ()))) for part in entry.parts}
    home: dict[str, str] = {}
    for name in tensors:
        homes = [part for part in holds if name in holds[part]]
        home[name] = min(homes, key=lambda part: len(holds[part])) if homes else "(other)"
    found = []
    for part in [*holds, "(other)"]:
        held = {name: info for name, info in tensors.items() if name in holds.get(part, ()) or home[name] == part}
        own = {name: info for name, info in held.items() if home[name] == part}
        if held:
            shared = tuple(dict.fromkeys(home[name] for name in held if home[name] != part))
            found.append(Section(part, tree(own), held, shared))
    return found


def as_dict(found: list[Section]) -> list[dict[str, Any]]:
    return [
        {
            "name": section.name,
            "parameters": section.parameters,
            "with": list(section.shared),
            "tensors": [
                {"name": name, "dtype": info.dtype, "shape": list(info.shape), "count": times}
                for node in section.nodes
                for name, info, times in node.tensors()
            ],
        }
        for section in found
    ]


def totals(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    return {
        "tensors": len(tensors),
        "parameters": sum(_parameters(info) for info in tensors.values()),
        "bytes": sum(info.nbytes for info in tensors.values()),
        "dtypes": sorted({info.dtype for info in tensors.values()}),
    }


def summary(tensors: Mapping[str, TensorInfo]) -> str:
    found = totals(tensors)
    dtypes = ", ".join(found["dtypes"])
    return f"{found['tensors']} tensors, {amount(found['parameters'])} parameters, {size(found['bytes'])}, {dtypes}"


def render(found: list[Section]) -> str:
    """The tree as text: names to the left, dtype and shape and count to the right."""
    lines: list[tuple[str, str, str]] = []
    for section in found:
        if section.name:
            also = f" (with {' and '.join(section.shared)})" if section.shared else ""
            lines.append((section.name + also, "", amount(section.parameters)))
        nodes = section.nodes
        if len(nodes) == 1 and nodes[0].name == section.name and nodes[0].tensor is None:
            nodes = nodes[0].children  # the part's line has said this name
        lines += _lines(nodes, "  " if section.name else "")
    left = max((len(line[0]) for line in lines), default=0)
    middle = max((len(line[1]) for line in lines), default=0)
    return "\n".join(f"{name:{left}}  {what:{middle}}  {count}".rstrip() for name, what, count in lines)


def _lines(nodes: Iterable[Node], indent: str) -> Iterator[tuple[str, str, str]]:
    for node in nodes:
        each = f" ({node.times} x {amount(node.parameters // node.times)})" if node.times > 1 else ""
        what = f"{node.tensor.dtype} {json.dumps(list(node.tensor.shape))}" if node.tensor is not None else ""
        yield indent + node.name, what, f"{amount(node.parameters)}{each}" if node.parameters else "buffer"
        yield from _lines(node.children, indent + "  ")
