"""What an operator is to a sum of terms linear in the weights: it moves values, adds, multiplies, or ends the sum."""

from __future__ import annotations

from typing import Any

from torch.utils._pytree import tree_map

from surgery.mapper.record import Node, Ref, Tape, overlay

LAYOUT = frozenset(
    {
        "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand",
        "unsqueeze", "squeeze", "select", "slice", "split", "unsafe_split", "split_with_sizes",
        "unsafe_split_with_sizes", "unbind", "chunk", "unsafe_chunk", "cat", "clone", "_to_copy",
        "detach", "alias", "lift_fresh", "contiguous", "flip", "roll", "repeat",
        "as_strided", "index", "index_select", "unfold", "im2col", "diagonal", "reflection_pad1d",
        "reflection_pad2d", "replication_pad1d", "replication_pad2d", "pixel_shuffle", "pixel_unshuffle", "gather",
        "copy", "slice_scatter", "select_scatter", "movedim", "tril", "triu", "view_copy", "expand_copy",
    }
)  # fmt: skip


# Those of them that only view their argument.
VIEWS = frozenset(
    {
        "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "select", "slice", "split", "split_with_sizes",
        "unbind", "chunk", "movedim", "diagonal", "unfold",
    }
)  # fmt: skip


# Those of them behind which a concatenation is still told by the columns of each of its parts.
REARRANGED = VIEWS & {"t", "transpose", "permute", "expand", "squeeze"} | {"view", "_unsafe_view", "reshape", "clone"}


# Those of them that keep some of the elements.
PARTS = frozenset(
    {"slice", "split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes", "select", "unbind", "chunk"}
    | {"unsafe_chunk", "index", "index_select"}
)


def base(op: Any) -> str:
    """The operator's plain name: aten.view.default -> view."""
    if op is overlay:
        return "overlay"
    return op if isinstance(op, str) else str(op._schema.name).split("::")[1]


class Kinds:
    """What the nodes of a tape are."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def weight_only(self, vid: int) -> bool:
        v = self.tape.values[vid]
        return v.weights and not v.data

    def kind(self, node: Node) -> str:
        """layout | sum | product | scale | virtual | barrier"""
        name = base(node.op)
        values = self.tape.values
        floats = [v for v in node.inputs if values[v].dtype.is_floating_point]
        if not floats or node.op == "sync":
            return "barrier"
        if name in LAYOUT or name == "overlay":
            if name in ("index", "gather", "index_select"):
                return (
                    "layout"
                    if not (name == "index" and any(values[r.vid].weights for r in _refs(node.args[1:])))
                    else "barrier"
                )
            return "layout"
        if name == "constant_pad_nd" and (len(node.args) < 3 or node.args[2] == 0):
            return "layout"
        if name in ("add", "sub"):
            if len(floats) == 1 and self.weight_only(floats[0]):
                other = (
                    node.args[1] if isinstance(node.args[0], Ref) and node.args[0].vid == floats[0] else node.args[0]
                )
                if not isinstance(other, Ref) or not values[other.vid].data:
                    return "virtual"
            return "sum"
        if name == "neg":
            return "sum"
        if name in ("mul", "div"):
            a, b = node.args[0], node.args[1]
            if not isinstance(b, Ref) or not isinstance(a, Ref):
                return "sum"
            wa, wb = self.weight_only(a.vid), self.weight_only(b.vid)
            if wa and wb:
                return "virtual"
            if (wa and values[b.vid].data and name == "mul") or (wb and values[a.vid].data):
                return "scale"
            if wa or wb:  # by a constant that Python made
                return "virtual"
            return "barrier"
        if name == "sum":
            src = values[node.args[0].vid]
            dims = node.args[1] if len(node.args) > 1 else None
            if src.node >= 0 and dims and base(self.tape.nodes[src.node].op) == "cat" and len(dims) == 1:
                prod = self.tape.nodes[src.node]
                axis = prod.args[1] if len(prod.args) > 1 else 0
                if src.shape[dims[0]] <= 16 and dims[0] % len(src.shape) == axis % len(src.shape):
                    return "sum"
            return "barrier"
        if name in ("mm", "bmm", "convolution"):
            a, b = node.args[0].vid, node.args[1].vid
            wa, wb = self.weight_only(a), self.weight_only(b)
            if wa and wb:
                return "virtual"
            if wb or (wa and name != "convolution"):
                return "product"
            return "barrier"
        outs = [o for o in node.outs if o >= 0]
        if outs and self.weight_only(outs[0]):
            return "sum" if self.overwritten(node) is not None else "virtual"
        return "sum" if self.overwritten(node) is not None else "barrier"  # a mask made from the input

    def overwritten(self, node: Node) -> tuple[int, Any, bool] | None:
        """(weights, what stands in place of some of them, does the mask choose the weights?) where a mask and the other
        values are no weights (masked scores); None for any other operator."""
        name, args = base(node.op), node.args
        if name == "masked_fill":
            x, mask, other, chosen = args[0], args[1], args[2], False
        elif name == "where" and len(args) == 3:
            mask, (x, other) = args[0], args[1:]
            chosen = isinstance(x, Ref) and self.tape.values[x.vid].weights
            x, other = (x, other) if chosen else (other, x)
        else:
            return None
        rest = [r for r in (mask, other) if isinstance(r, Ref)]
        if not isinstance(x, Ref) or not self.weight_only(x.vid) or any(self.tape.values[r.vid].weights for r in rest):
            return None
        return x.vid, other, chosen


def _refs(x: Any) -> list[Ref]:
    out: list[Ref] = []
    tree_map(lambda r: out.append(r) if isinstance(r, Ref) else None, x)
    return out
