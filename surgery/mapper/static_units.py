"""What names and module types say before anything runs: tensors as units, and units in stacks of repeated blocks.

A unit is what one module holds (weight, bias, running statistics), or one bare parameter. Fused layouts that torch
documents (nn.MultiheadAttention's in_proj, weight norm's pair) are taken apart, so that both sides speak of the same
things. Units whose paths differ only in the number of a repeated block are one unit with several members.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from surgery.mapper.names import Roles, claims

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int, ...]
Index = tuple[int, ...]
Path = tuple[str, ...]

# The role that a tensor has in its module, by its own name, where torch (or the first BERT) documents the name.
_LEAVES = {"weight": "W", "bias": "B", "running_mean": "M", "running_var": "V", "num_batches_tracked": "N"}
_ORIGINAL = "parametrizations.weight.original"
_ALIKE = 0.6  # blocks of one stack share at least this part of the smaller one's names: one may hold something more
_A_BLOCK = 5  # a single numbered child of at least so many units is a stack of one block


@dataclass(frozen=True)
class Slot:
    """One tensor of a unit, and where it lies: a whole tensor, one of three blocks of a fused one, or a gain and a
    direction of which it is the product."""

    name: str
    shape: Shape
    part: int | None = None  # of an in_proj: 0 query, 1 key, 2 value
    gain: str | None = None  # weight norm: `name` is the direction, `gain` its length
    gain_shape: Shape = ()


Member = dict[str, Slot]


@dataclass
class Unit:
    path: Path  # with "{0}" in place of the number of a repeated block
    members: dict[Index, Member] = field(default_factory=dict)
    kind: str = ""  # the module's type where torch documents its layout: Linear, Embedding, Conv, Norm, BatchNorm, RNN
    family: str = ""  # the module's own type: tensors of one type are laid out in one way
    oriented: bool = False  # known to be [out, in]
    raw: bool = False  # a bare parameter
    known: Roles = field(default_factory=dict)  # what a documented type says of it
    # The numbers in its path that are no block's: the word before, the number, and all numbers beside it. Where the
    # same word counts the same numbers on both sides, the number is part of the name.
    numbered: frozenset[tuple[str, int, frozenset[int]]] = frozenset()

    @cached_property
    def stack(self) -> Path:
        """The path down to the innermost repeated block; () for what stands once."""
        last = max((i for i, c in enumerate(self.path) if "{" in c), default=-1)
        return self.path[: last + 1]

    @cached_property
    def roles(self) -> Roles:
        return dict(claims(self.words)[0]) | self.known

    @cached_property
    def rest(self) -> frozenset[str]:
        return claims(self.words)[1]

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        return claims(self.words)[2]

    @cached_property
    def words(self) -> Path:
        return tuple(re.sub(r"\{\d+\}", "", c) for c in self.path)

    @property
    def inner(self) -> Path:
        """The path within its block."""
        return self.path[len(self.stack) :]

    @property
    def first(self) -> Member:
        return next(iter(self.members.values()))

    def shape(self, role: str = "W") -> Shape:
        slot = self.first.get(role)
        return slot.shape if slot is not None else ()

    @property
    def is_norm(self) -> bool:
        return not self.raw and "W" in self.first and len(self.shape()) == 1

    @property
    def is_matrix(self) -> bool:
        return "W" in self.first and len(self.shape()) == 2

    def tensors(self) -> Iterable[tuple[Index, str, Slot]]:
        for index, member in self.members.items():
            for role, slot in member.items():
                yield index, role, slot

    def __str__(self) -> str:
        return ".".join(self.path)


@dataclass
class Side:
    """All units of one side, and its stacks with the numbers of their blocks in order."""

    units: list[Unit]
    stacks: dict[Path, list[Index]]

    @cached_property
    def in_stack(self) -> dict[Path, list[Unit]]:
        found: dict[Path, list[Unit]] = defaultdict(list)
        for unit in self.units:
            found[unit.stack].append(unit)
        return dict(found)


def read(shapes: Mapping[str, Shape], module: nn.Module | None = None) -> Side:
    """The units of the tensors with these names and shapes; `module` is the one that holds them, where there is one."""
    modules = dict(module.named_modules()) if module is not None else None
    shapes = _split(shapes, modules)
    flat: dict[str, Unit] = {}
    for name in shapes:
        stem, role, slot = _place(name, shapes, modules)
        unit = flat.get(stem)
        if unit is None:
            unit = flat[stem] = Unit(tuple(stem.split(".")))
            unit.raw = role == "W" and slot.name == stem
            if modules is not None:
                _typed(unit, stem, slot, modules)
            unit.oriented |= slot.part is not None or f"{stem.rpartition('.')[0]}.in_proj_weight" in shapes
        old = unit.first.get(role) if unit.members else None
        unit.members.setdefault((), {})[role] = slot if old is None else _joined(old, slot)
    out: list[Unit] = []
    stacks: dict[Path, set[Index]] = defaultdict(set)
    by_path: dict[tuple[Path, str, bool], Unit] = {}
    paths = {stem: tuple(stem.split(".")) for stem in flat}
    for stem, (path, index) in _templates(paths, {s: len(u.shape()) for s, u in flat.items()}).items():
        unit = flat[stem]
        key = (path, unit.family, unit.raw)
        if key not in by_path:
            by_path[key] = Unit(
                path, {}, unit.kind, unit.family, oriented=unit.oriented, raw=unit.raw, known=unit.known
            )
            out.append(by_path[key])
        by_path[key].members[index] = unit.first
        if by_path[key].stack:
            stacks[by_path[key].stack].add(index)
    _number(out)
    return Side(out, {path: sorted(indices) for path, indices in stacks.items()})


def _number(units: list[Unit]) -> None:
    beside: dict[tuple[Path, str], set[int]] = defaultdict(set)
    found: dict[int, list[tuple[tuple[Path, str], int]]] = defaultdict(list)
    for unit in units:
        for i, component in enumerate(unit.path):
            m = re.fullmatch(r"([^{}]*?)_?(\d+)", component)
            if m is not None:
                word = m[1] or (unit.path[i - 1] if i else "")
                key = (unit.path[:i], word.lower().rstrip("s"))
                beside[key].add(int(m[2]))
                found[id(unit)].append((key, int(m[2])))
    for unit in units:
        unit.numbered = frozenset((key[1], n, frozenset(beside[key])) for key, n in found[id(unit)])


def _place(name: str, shapes: Mapping[str, Shape], modules: Mapping[str, nn.Module] | None) -> tuple[str, str, Slot]:
    """The unit that a tensor belongs to, its role there, and its slot."""
    shape = shapes[name]
    if "::" in name:  # a part of a fused tensor: "stem::q::in_proj_weight"
        stem, part, leaf = name.split("::")
        path = f"{stem}.{part}" if stem else part
        whole = f"{stem}.{leaf}" if stem else leaf
        return path, "W" if leaf.endswith("weight") else "B", Slot(whole, shape, part="qkv".index(part))
    stem, _, leaf = name.rpartition(".")
    if leaf in ("original0", "original1") and stem.endswith("parametrizations.weight"):
        owner = stem.removesuffix("parametrizations.weight").rstrip(".")
        if _is_weight_norm(stem, shapes, modules):
            if leaf == "original0":
                return owner, "W", Slot("", (), gain=name, gain_shape=shape)
            return owner, "W", Slot(name, shape, gain="")
    if leaf in ("weight_g", "weight_v") and {f"{stem}.weight_g", f"{stem}.weight_v"} <= shapes.keys():
        if leaf == "weight_g":
            return stem, "W", Slot("", (), gain=name, gain_shape=shape)
        return stem, "W", Slot(name, shape, gain="")
    if leaf in _LEAVES and stem:
        return stem, _LEAVES[leaf], Slot(name, shape)
    pair = (f"{stem}.gamma", f"{stem}.beta")
    if leaf in ("gamma", "beta") and stem and len(shape) == 1 and shapes.get(pair[0]) == shapes.get(pair[1]):
        return stem, "W" if leaf == "gamma" else "B", Slot(name, shape)
    return name, "W", Slot(name, shape)


def _joined(a: Slot, b: Slot) -> Slot:
    """A weight-norm pair's two halves, met one after the other."""
    direction, gain = (a, b) if a.name else (b, a)
    return Slot(direction.name, direction.shape, gain=gain.gain, gain_shape=gain.gain_shape)


def _is_weight_norm(stem: str, shapes: Mapping[str, Shape], modules: Mapping[str, nn.Module] | None) -> bool:
    a, b = shapes.get(f"{stem}.original0"), shapes.get(f"{stem}.original1")
    if a is None or b is None or len(a) != len(b) or not all(x in (1, y) for x, y in zip(a, b, strict=True)):
        return False
    if modules is None:
        return True
    import torch.nn.utils.parametrizations as parametrizations

    inner = modules.get(f"{stem}.0")
    kind = getattr(parametrizations, "_WeightNorm", None)
    return inner is not None and kind is not None and isinstance(inner, kind)


def _split(shapes: Mapping[str, Shape], modules: Mapping[str, nn.Module] | None) -> dict[str, Shape]:
    """The same tensors, every documented [query | key | value] in_proj taken apart: "stem::q::in_proj_weight"."""
    from torch import nn

    out: dict[str, Shape] = {}
    for name, shape in shapes.items():
        stem, _, leaf = name.rpartition(".")
        fused = leaf in ("in_proj_weight", "in_proj_bias") and bool(shape) and shape[0] % 3 == 0
        if fused and modules is not None:
            fused = isinstance(modules.get(stem), nn.MultiheadAttention)
        elif fused:
            # Without a module, the three names together are those of nn.MultiheadAttention.
            prefix = f"{stem}." if stem else ""
            fused = shapes.get(f"{prefix}in_proj_weight", ())[-1:] == shapes.get(f"{prefix}out_proj.weight", (0,))[-1:]
        if fused:
            for part in "qkv":
                out[f"{stem}::{part}::{leaf}"] = (shape[0] // 3, *shape[1:])
        else:
            out[name] = shape
    return out


def _typed(unit: Unit, stem: str, slot: Slot, modules: Mapping[str, nn.Module]) -> None:
    """What the type of the module that holds a unit documents."""
    from torch import nn

    holder = stem.rpartition(".")[0]
    module = modules.get(holder if unit.raw or slot.part is not None else stem)
    if module is None:
        return
    unit.family = f"{type(module).__module__}.{type(module).__qualname__}"
    if slot.part is not None or (isinstance(module, nn.Linear) and not unit.raw):
        unit.kind, unit.family, unit.oriented = "Linear", "Linear", True
    elif isinstance(module, nn.Embedding):
        unit.kind = "Embedding"
    elif isinstance(module, nn.modules.conv._ConvNd):
        unit.kind = "Conv"
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        unit.kind = "BatchNorm"
    elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        unit.kind = "Norm"
    elif isinstance(module, nn.RNNBase):
        unit.kind = "RNN"
    # torch documents in which order its own transformer layers use their norms and attentions.
    for at in (holder, holder.rpartition(".")[0]):
        layer = modules.get(at)
        part = stem[len(at) + 1 :].split(".")[0] if at else stem.split(".")[0]
        if isinstance(layer, nn.TransformerEncoderLayer):
            unit.known |= _ENCODER_LAYER.get(part, {})
        elif isinstance(layer, nn.TransformerDecoderLayer):
            unit.known |= _DECODER_LAYER.get(part, {})


_SELF, _CROSS, _FORWARD = {"sublayer": "self"}, {"sublayer": "cross"}, {"sublayer": "feedforward"}
_ENCODER_LAYER = {"norm1": _SELF, "norm2": _FORWARD, "self_attn": _SELF}
_DECODER_LAYER = {"norm1": _SELF, "norm2": _CROSS, "norm3": _FORWARD, "self_attn": _SELF, "multihead_attn": _CROSS}


# -- repeated blocks --------------------------------------------------------------------------------------------------
def _templates(paths: Mapping[str, Path], ndim: Mapping[str, int]) -> dict[str, tuple[Path, Index]]:
    """Each path with the numbers of repeated blocks taken out: blocks are subtrees of at least two units under numbered
    siblings, most of whose names agree; or one larger subtree alone, where a model has one layer. All other numbers
    are part of the name."""
    done: dict[str, tuple[Path, Index]] = {}
    todo: list[tuple[list[str], int, Path]] = [(list(paths), 0, ())]
    at: dict[str, Index] = dict.fromkeys(paths, ())
    while todo:
        stems, depth, prefix = todo.pop()
        groups: dict[str, list[str]] = defaultdict(list)
        numbered: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        for stem in stems:
            component = paths[stem][depth]
            if depth == len(paths[stem]) - 1:
                done[stem] = ((*prefix, component), at[stem])
            elif (m := re.fullmatch(r"(.*?)(\d+)", component)) is not None:
                numbered[m[1]][int(m[2])].append(stem)
            else:
                groups[component].append(stem)
        for word, children in numbered.items():
            for k, cluster in enumerate(_clusters(children, paths, ndim, depth)):
                alone = len(children) == 1 and cluster[0] in (0, 1) and len(children[cluster[0]]) >= _A_BLOCK
                repeated = len(cluster) > 1 or alone
                component = f"{word}{{{k}}}" if repeated else f"{word}{cluster[0]}"
                for number in cluster:
                    if repeated:
                        for stem in children[number]:
                            at[stem] = (*at[stem], number)
                    groups[component].extend(children[number])
        todo.extend((inside, depth + 1, (*prefix, component)) for component, inside in groups.items())
    return {stem: done[stem] for stem in paths}


def _clusters(
    children: Mapping[int, list[str]], paths: Mapping[str, Path], ndim: Mapping[str, int], depth: int
) -> list[list[int]]:
    """The numbers of siblings that look like blocks of one stack, together; every other number by itself."""
    looks = {
        number: {
            (".".join(["#" if c.isdigit() else c for c in paths[s][depth + 1 : -1]] + [paths[s][-1]]), ndim[s])
            for s in stems
        }
        for number, stems in children.items()
    }
    found: list[tuple[set[tuple[str, int]], list[int]]] = []
    for number in sorted(looks):
        look = looks[number]
        for seen, cluster in found:
            if len(look) > 1 and len(look & seen) >= _ALIKE * min(len(look), len(seen)):
                cluster.append(number)
                seen |= look
                break
        else:
            found.append((set(look), [number]))
    return [cluster for _, cluster in found]
