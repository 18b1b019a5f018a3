"""The defects: slips in the code, as switches of the targets; and what is done to weights, as other rows of a plan.

Each says where it is (the modules of which one must be named first; a name ending in a dot means any module inside)
and what causes would be the right ones. Who names a cause elsewhere or another cause is counted as wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations import models
from tests.mutations.models import HEAD, quick_gelu, tanh_gelu


@dataclass(frozen=True)
class Slip:
    """A switch of a family's target."""

    family: str
    kind: str
    options: dict[str, Any]
    where: tuple[str, ...]
    causes: tuple[str, ...]

    @property
    def name(self) -> str:
        said = ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in self.options.items())
        return f"{self.family} / {self.kind} ({said})"


B = "blocks.1"
ATT, FF = f"{B}.att", f"{B}.ffn"
NORM = ("normalisation", "statistics", "mean", "pre/post norm")


def _block_slips(
    family: str, *, causal: bool, masked: bool, post: bool, eps: float, act: Any, bias: bool
) -> Iterator[Slip]:
    """Slips of the second of two transformer blocks."""

    def slip(kind: str, where: tuple[str, ...], causes: tuple[str, ...], **options: Any) -> Slip:
        return Slip(family, kind, options, where, causes)

    fused = family == "vit"
    other_eps = 1e-6 if eps != 1e-6 else 1e-5
    yield slip("eps", (f"{B}.norm1",), ("eps",), eps=other_eps)
    yield slip("eps", (f"{B}.norm1",), ("eps",), eps=1e-3)
    acts = {"erf": F.gelu, "tanh": tanh_gelu, "quick": quick_gelu, "relu": F.relu, "silu": F.silu}
    for name, f in acts.items():
        if f is not act:
            yield slip(
                "activation" if name in ("relu", "silu") else "GELU variant", (FF,), ("gelu", "activation"), act=f
            )
    yield slip("pre/post norm", (B,), ("pre/post norm",), pre=post)
    yield slip("attention scale", (ATT,), ("scale",), scale=1.0 if family != "t5 encoder" else HEAD**-0.5)
    yield slip("attention scale", (ATT,), ("scale",), scale=1.0 / HEAD)
    yield slip("softmax axis", (ATT,), ("softmax axis",), axis=-2)
    yield slip("residual missing", (B,), ("missing residual",), skip=False)
    yield slip("dropout left on", (FF,), ("dropout",), drop=0.1)
    yield slip("head order", (ATT,), ("head order",), heads="last")
    yield slip("cast to bfloat16 inside", (B,), ("dtype cast",), cast=True)
    if bias:
        yield slip("bias missing", (FF, f"{FF}.up"), ("missing bias",), forget="up")
        yield slip("bias missing", (FF, f"{FF}.down"), ("missing bias",), forget="down")
    if not fused:
        if masked or causal:
            yield slip("mask missing", (ATT,), ("mask",), mask="none")
            yield slip("mask inverted", (ATT,), ("mask",), mask="inverted")
        if masked or not causal:
            yield slip("causal mask too many", (ATT,), ("mask",), mask="causal")
    if family != "t5 encoder" and family != "patchtst" and not fused:
        yield slip("another norm", (f"{B}.norm1",), NORM, norm=WeightedRMS)


class WeightedRMS(models.RMSNorm):
    """It has a bias, so that it has a place for everything that a layer norm holds."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1e-5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


def slips() -> list[Slip]:
    """All of them."""
    found = [
        *_block_slips("bert", causal=False, masked=True, post=True, eps=1e-12, act=F.gelu, bias=True),
        *_block_slips("gpt2", causal=True, masked=False, post=False, eps=1e-5, act=tanh_gelu, bias=True),
        *_block_slips("vit", causal=False, masked=False, post=False, eps=1e-6, act=F.gelu, bias=True),
        *_block_slips("clip text", causal=True, masked=False, post=False, eps=1e-5, act=F.gelu, bias=True),
        *_block_slips("whisper encoder", causal=False, masked=False, post=False, eps=1e-5, act=F.gelu, bias=True),
        *_block_slips("t5 encoder", causal=False, masked=True, post=False, eps=1e-6, act=F.relu, bias=False),
        *_block_slips("patchtst", causal=False, masked=False, post=True, eps=1e-5, act=F.gelu, bias=True),
    ]
    found = [s for s in found if s.options.get("act") is not F.relu or s.family != "t5 encoder"]
    top, att = ("",), ("position offset",)
    found += [
        Slip("bert", "position offset", {"off": 1}, ("", "places"), att),
        Slip("gpt2", "position offset", {"off": 2}, ("", "places"), att),
        Slip("clip text", "position offset", {"off": 1}, top, att),
        Slip("whisper encoder", "position offset", {"off": 1}, top, att),
        Slip("patchtst", "position offset", {"off": 1}, top, att),
        Slip("bert", "eps", {"first_eps": 1e-5}, ("norm",), ("eps",)),
        Slip("vit", "eps", {"final_eps": 1e-5}, ("last",), ("eps",)),
        Slip("gpt2", "norm missing", {"final": False}, ("", "head"), ("pre/post norm",)),
        Slip("vit", "pooling", {"pool": "mean"}, top, ("pooling",)),
        Slip("clip text", "pooling", {"pool": "last"}, top, ("pooling",)),
        Slip("vit", "query, key, value order", {"order": "kqv"}, (ATT, f"{ATT}.qkv"), ("swapped query and key",)),
        Slip("vit", "query, key, value order", {"order": "vkq"}, (ATT, f"{ATT}.qkv"), ("block order",)),
        Slip("whisper encoder", "padding mode", {"pad": "circular"}, ("conv1",), ("padding mode",)),
        Slip("whisper encoder", "padding mode", {"pad": "reflect"}, ("conv1",), ("padding mode",)),
        Slip("patchtst", "unbiased variance", {"std": "sample"}, top, ("variance", "scale")),
        Slip("patchtst", "batch statistics", {"norm": models.OverBatch}, (f"{B}.norm1",), ("statistics",)),
        Slip("patchtst", "another norm", {"norm": models.OverLayer}, (f"{B}.norm1",), NORM),
        Slip("resnet", "eps", {"eps": 1e-3}, ("stages.1.n1",), ("eps",)),
        Slip("resnet", "activation", {"act": F.relu6}, ("stages.1",), ("activation",)),
        Slip("resnet", "activation", {"act": F.silu}, ("stages.1",), ("activation",)),
        Slip("resnet", "padding mode", {"pad": "reflect"}, ("stages.0.c1",), ("padding mode",)),
        Slip("resnet", "padding mode", {"pad": "replicate"}, ("stages.0.c1",), ("padding mode",)),
        Slip("resnet", "residual missing", {"skip": False}, ("stages.0",), ("missing residual",)),
        Slip("resnet", "batch statistics", {"batch": True}, ("stages.1", "stages.1.n1"), ("statistics",)),
        Slip("resnet", "pooling", {"pool": "max"}, top, ("pooling",)),
        Slip("efficientnet blocks", "eps", {"eps": 1e-3}, (f"{B}.n1",), ("eps",)),
        Slip("efficientnet blocks", "activation", {"act": F.relu6}, (B,), ("activation",)),
        Slip("efficientnet blocks", "activation", {"act": F.hardswish}, (B,), ("activation",)),
        Slip("efficientnet blocks", "activation", {"gate": F.hardsigmoid}, (B,), ("activation",)),
        Slip("efficientnet blocks", "padding mode", {"pad": "reflect"}, (f"{B}.deep",), ("padding mode",)),
        Slip("efficientnet blocks", "residual missing", {"skip": False}, (B, ""), ("missing residual",)),
        Slip("lstm", "activation", {"candidate": torch.sigmoid}, top, ("activation",)),
        Slip("lstm", "constant added", {"forget_bias": 1.0}, top, ("constant",)),
        Slip("wav2vec2 positions", "position offset", {"trim": "start"}, top, ("position offset", "constant")),
        Slip("wav2vec2 positions", "GELU variant", {"act": tanh_gelu}, top, ("gelu",)),
    ]  # fmt: skip
    return found


# -- weights ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Damage:
    """Other values for some of the target's tensors."""

    family: str
    kind: str
    values: dict[str, Tensor] = field(repr=False)
    where: tuple[str, ...]
    causes: tuple[str, ...]

    @property
    def name(self) -> str:
        return (
            f"{self.family} / {self.kind} ({', '.join(list(self.values)[:2])}{' ...' if len(self.values) > 2 else ''})"
        )


Values = dict[str, Tensor]


def damages(family: str, values: Values) -> list[Damage]:
    """What can be done to the weights of a family's target, of which these are the right values. Reproducible."""
    found = []
    for kind, make in KINDS.items():
        for changed, where, causes in make(values):
            found.append(Damage(family, kind, changed, where, causes))
    return found


Made = Iterator[tuple[Values, tuple[str, ...], tuple[str, ...]]]


def _owner(name: str) -> str:
    return name.replace(".parametrizations.weight", "").rpartition(".")[0]


def _matrices(values: Values) -> list[str]:
    """One linear map or convolution of the first block, one of the last, one outside of blocks."""
    names = [n for n, v in values.items() if v.ndim >= 2 and v.shape[0] > 4 and v.is_floating_point()]
    first = [n for n in names if ".0." in n and "att.k" not in n][-1:]
    last = [n for n in names if ".1." in n and "att.k" not in n][:1]
    rest = [n for n in names if ".0." not in n and ".1." not in n]
    return list(dict.fromkeys([*first, *last, *rest[-1:]])) or names[:2]


def _one(name: str, value: Tensor, *causes: str) -> tuple[Values, tuple[str, ...], tuple[str, ...]]:
    return {name: value}, (_owner(name),), causes


def swapped_qk(values: Values) -> Made:
    for i in (0, 1):
        q, k = (f"blocks.{i}.att.{x}.weight" for x in "qk")
        if q in values:
            pair = {q: values[k], k: values[q]}
            for a, b in ((q, k), (k, q)):
                if (bias := a.replace("weight", "bias")) in values:
                    pair[bias] = values[b.replace("weight", "bias")]
            yield pair, (_owner(q), _owner(k)), ("swapped query and key", "swapped tensors")
        qkv = f"blocks.{i}.att.qkv"
        if f"{qkv}.weight" in values:
            both = {}
            for leaf in ("weight", "bias"):
                a, b, c = values[f"{qkv}.{leaf}"].chunk(3)
                both[f"{qkv}.{leaf}"] = torch.cat([b, a, c])
            yield both, (qkv,), ("swapped query and key", "block order")


def swapped_qv(values: Values) -> Made:
    q, v = "blocks.1.att.q.weight", "blocks.1.att.v.weight"
    if q in values:
        yield {q: values[v], v: values[q]}, (_owner(q), _owner(v)), ("swapped tensors", "swapped query and key")


def _block(values: Values, i: int) -> list[str]:
    return [n for n in values if n.startswith((f"blocks.{i}.", f"stages.{i}."))]


def _twin(name: str, i: int, j: int) -> str:
    return name.replace(f"blocks.{i}.", f"blocks.{j}.").replace(f"stages.{i}.", f"stages.{j}.")


def swapped_layers(values: Values) -> Made:
    names = _block(values, 0)
    pairs = [(n, _twin(n, 0, 1)) for n in names]
    if names and all(b in values and values[a].shape == values[b].shape for a, b in pairs):
        changed = {a: values[b] for a, b in pairs} | {b: values[a] for a, b in pairs}
        yield changed, (f"{names[0].split('.')[0]}.0.",), ("swapped layers",)


def swapped_maps(values: Values) -> Made:
    a = next((n for n in _block(values, 0) if values[n].ndim == 2 and "att.k" not in n), "")
    b = _twin(a, 0, 1)
    if a and b in values and values[a].shape == values[b].shape:
        yield {a: values[b], b: values[a]}, (_owner(a),), ("swapped layers",)


def layer_duplicated(values: Values) -> Made:
    pairs = [(n, _twin(n, 1, 0)) for n in _block(values, 1)]
    if pairs and all(b in values and values[a].shape == values[b].shape for a, b in pairs):
        yield {a: values[b] for a, b in pairs}, (f"{pairs[0][0].split('.')[0]}.1.",), ("duplicated", "swapped layers")


def transposed(values: Values) -> Made:
    square = [n for n, v in values.items() if v.ndim == 2 and v.shape[0] == v.shape[1] and not n.endswith("k.weight")]
    for n in dict.fromkeys([*square[:1], *square[-1:]]):
        yield _one(n, values[n].t(), "transposed")


def bias_dropped(values: Values) -> Made:
    biases = [n for n in values if n.endswith("bias") and values[n].ndim == 1]
    for n in dict.fromkeys([*biases[:1], *biases[len(biases) // 2 :][:1], *biases[-1:]]):
        yield _one(n, torch.zeros_like(values[n]), "zeroed", "missing bias")
    for n in [b for b in biases if b.endswith("att.k.bias")][:1]:
        yield _one(n, torch.zeros_like(values[n]), "zeroed")


def row_shifted(values: Values) -> Made:
    for n in _matrices(values):
        yield _one(n, values[n].roll(1, 0), "shifted", "position offset")
    tables = [n for n in values if "places" in n]
    for n in tables[:1]:
        yield _one(n, values[n].roll(1, values[n].ndim - 2), "shifted", "position offset")


def rounded(values: Values) -> Made:
    for n in _matrices(values):
        yield _one(n, values[n].to(torch.bfloat16).to(values[n].dtype), "rounding")


def stale_tie(values: Values) -> Made:
    if (
        "head.weight" in values
        and "words.weight" in values
        and torch.equal(values["head.weight"], values["words.weight"])
    ):
        g = torch.Generator().manual_seed(5)
        stale = values["head.weight"] + 0.02 * torch.randn(values["head.weight"].shape, generator=g)
        yield _one("head.weight", stale, "stale tie")


def row_zeroed(values: Values) -> Made:
    for n in _matrices(values):
        out = values[n].clone()
        out[3] = 0
        yield _one(n, out, "zeroed")


def scaled(values: Values) -> Made:
    for n in _matrices(values):
        yield _one(n, values[n] * (1 + 1e-4), "scaled")
    gains = [n for n, v in values.items() if v.ndim == 1 and "norm" in n and n.endswith("weight")]
    for n in gains[-1:]:
        yield _one(n, values[n] * (1 + 1e-4), "scaled")


def sign_of_a_head(values: Values) -> Made:
    for n in [n for n in values if n.endswith(("att.v.weight", "att.qkv.weight"))][-1:]:
        out = values[n].clone()
        out[-HEAD:] *= -1
        yield _one(n, out, "sign")


def gain_of_zero(values: Values) -> Made:
    """Gemma's norms hold the gain minus one."""
    for n in [n for n, v in values.items() if v.ndim == 1 and "norm" in n and n.endswith("weight")][:1]:
        yield _one(n, values[n] - 1, "offset")


def heads_rolled(values: Values) -> Made:
    """The output map's columns belong to the heads in another order."""
    for n in [n for n in values if n.endswith("att.out.weight")][:1]:
        yield _one(n, values[n].roll(HEAD, 1), "block order", "shifted")


def interleaved(values: Values) -> Made:
    """Query, key and value by head in place of one after the other."""
    for n in [n for n in values if n.endswith("att.qkv.weight")][:1]:
        v = values[n].view(3, -1, HEAD, values[n].shape[1]).transpose(0, 1).reshape(values[n].shape)
        yield _one(n, v, "block order", "head order")


def gates(values: Values) -> Made:
    if "seen.weight" in values:
        changed = {}
        for n, v in values.items():
            i, f, g, o = v.chunk(4)
            changed[n] = torch.cat([i, f, o, g])
        yield changed, ("seen", "state"), ("block order",)


def statistics(values: Values) -> Made:
    """The running statistics of another batch norm."""
    means = [n for n in values if n.endswith("running_mean")]
    for a in means[1:2]:
        b = next((n for n in means if n != a and values[n].shape == values[a].shape), "")
        if b:
            yield _one(a, values[b], "duplicated", "swapped layers")
            v = a.replace("mean", "var")
            yield _one(v, values[v].sqrt(), "wrong values", "block order")


def one_element(values: Values) -> Made:
    for n in _matrices(values)[:1]:
        out = values[n].clone(memory_format=torch.contiguous_format)
        out.view(-1)[values[n].numel() // 2] += 0.05
        yield _one(n, out, "one row", "wrong values")


KINDS: dict[str, Callable[[Values], Made]] = {
    "swapped query and key": swapped_qk,
    "swapped query and value": swapped_qv,
    "swapped layers": swapped_layers,
    "swapped maps of two layers": swapped_maps,
    "layer duplicated": layer_duplicated,
    "transposed square": transposed,
    "bias dropped": bias_dropped,
    "rows shifted by one": row_shifted,
    "rounded through bfloat16": rounded,
    "stale tie": stale_tie,
    "one row zeroed": row_zeroed,
    "scaled by 1 + 1e-4": scaled,
    "sign of one head": sign_of_a_head,
    "gain minus one": gain_of_zero,
    "heads rolled": heads_rolled,
    "interleaved by head": interleaved,
    "gates in another order": gates,
    "statistics of another norm": statistics,
    "one element changed": one_element,
}
