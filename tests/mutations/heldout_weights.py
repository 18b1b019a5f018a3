"""What is done by hand to the weights of the second set's targets, and the whole second set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.mutations import heldout_convolutions, heldout_sequences, heldout_sound, heldout_text, heldout_vision
from tests.mutations.defects import Damage, Slip, Values

PARTS = (heldout_text, heldout_sequences, heldout_vision, heldout_convolutions, heldout_sound)
HELDOUT = {f.name: f for part in PARTS for f in part.FAMILIES}


def slips() -> list[Slip]:
    return [s for part in PARTS for s in part.SLIPS]


Edit = Callable[[Tensor], Tensor]


def _swap(values: Values, a: str, b: str) -> Values:
    return {a: values[b], b: values[a]}


def _with_bias(values: Values, a: str, b: str) -> Values:
    return {**_swap(values, f"{a}.weight", f"{b}.weight"), **_swap(values, f"{a}.bias", f"{b}.bias")}


def _rows(n: int, order: list[int]) -> Edit:
    return lambda v: torch.cat([v.chunk(n)[i] for i in order])


def _halves(v: Tensor) -> Tensor:
    """Rows of each head of 8: even and odd for first and second half."""
    return v.view(-1, 4, 2, v.shape[-1]).transpose(1, 2).reshape(v.shape)


def _noise(v: Tensor) -> Tensor:
    return v + 1e-3 * torch.randn(v.shape, generator=torch.Generator().manual_seed(9))


def _column(v: Tensor) -> Tensor:
    out = v.clone()
    out[:, 2] = 0
    return out


ORDER = ("block order", "swapped tensors", "head order")
SWAPPED = ("swapped tensors", "swapped layers", "duplicated")
# (family, kind, tensor, what is done, modules, causes)
EDITS: list[tuple[str, str, str, Edit, tuple[str, ...], tuple[str, ...]]] = [
    ("roberta", "bias zeroed", "p.l0_up_b", torch.zeros_like, ("p", ""), ("zeroed", "missing bias")),
    ("roberta", "transposed square", "p.l1_o_w", lambda v: v.T, ("p", ""), ("transposed",)),
    ("roberta", "rows shifted", "p.pos", lambda v: v.roll(1, 0), ("p", ""), ("shifted", "position offset")),
    ("roberta", "rounded", "p.l0_q_w", lambda v: v.bfloat16().to(v.dtype), ("p", ""), ("rounding",)),
    ("roberta", "gain scaled", "p.l1_n2_w", lambda v: v * 1.001, ("p", ""), ("scaled",)),
    ("llama", "rotary order of weights", "layers.0.attn.wk.weight", _halves, ("layers.0.attn.wk",), (*ORDER, "rotary")),
    ("llama", "gate and up turned", "layers.1.mlp.w13.weight", _rows(2, [1, 0]), ("layers.1.mlp.w13",), ORDER),
    ("llama", "key heads turned", "layers.0.attn.wk.weight", _rows(2, [1, 0]), ("layers.0.attn.wk",), ORDER),
    ("llama", "gain minus one", "norm.g", lambda v: v - 1, ("norm",), ("offset",)),
    ("llama", "rounded", "layers.1.mlp.w2.weight", lambda v: v.half().to(v.dtype), ("layers.1.mlp.w2",), ("rounding",)),
    ("llama", "noise of training", "layers.0.mlp.w2.weight", _noise, ("layers.0.mlp.w2",), ("wrong values",)),
    (
        "neox",
        "query, key, value turned",
        "net.1.wqkv",
        lambda v: v[:, [1, 0, 2]],
        ("net.1",),
        (*ORDER, "swapped query and key"),
    ),
    ("neox", "heads turned", "net.2.wo", lambda v: v.roll(1, 0), ("net.2",), (*ORDER, "shifted")),
    (
        "neox",
        "bias of a head missing",
        "net.2.bqkv",
        lambda v: torch.cat([v[:3], 0 * v[3:]]),
        ("net.2",),
        ("zeroed", "missing bias"),
    ),
    ("t5", "key and value turned", "dec.mods.self0.kv.weight", _rows(2, [1, 0]), ("dec.mods.self0.kv",), ORDER),
    (
        "t5",
        "table shifted",
        "dec.mods.self0.rel.weight",
        lambda v: v.roll(1, 0),
        ("dec.mods.self0.rel",),
        ("shifted", "position offset"),
    ),
    ("t5", "column zeroed", "dec.mods.wo1.weight", _column, ("dec.mods.wo1",), ("zeroed", "wrong values", "one row")),
    ("whisper decoder", "transposed square", "blocks.1.them.w_v", lambda v: v.T, ("blocks.1.them",), ("transposed",)),
    (
        "whisper decoder",
        "bias zeroed",
        "blocks.0.me.b_v",
        torch.zeros_like,
        ("blocks.0.me",),
        ("zeroed", "missing bias"),
    ),
    ("whisper decoder", "rows shifted", "pos", lambda v: v.roll(-1, 0), ("",), ("shifted", "position offset")),
    (
        "bart",
        "query, key, value turned",
        "enc.1.self_attn.in_proj_weight",
        _rows(3, [1, 0, 2]),
        ("enc.1.self_attn",),
        (*ORDER, "swapped query and key"),
    ),
    (
        "bart",
        "transposed square",
        "enc.0.self_attn.out_proj.weight",
        lambda v: v.T,
        ("enc.0.self_attn.out_proj", "enc.0.self_attn"),
        ("transposed",),
    ),
    ("bart", "sign", "enc.1.linear2.weight", lambda v: -v, ("enc.1.linear2",), ("sign",)),
    ("swin", "query, key, value turned", "one.0.to_qkv.weight", _rows(3, [2, 1, 0]), ("one.0.to_qkv",), ORDER),
    (
        "swin",
        "table transposed",
        "one.1.table",
        lambda v: v.transpose(0, 1),
        ("one.1",),
        ("transposed", "position offset"),
    ),
    (
        "swin",
        "merged parts turned",
        "merge.weight",
        lambda v: v[:, torch.arange(64).view(4, 16)[[0, 2, 1, 3]].flatten()],
        ("merge",),
        ("block order", "head order", "shifted"),
    ),
    (
        "convnext",
        "kernel turned",
        "rest.1.dw_w",
        lambda v: v.flip(-1, -2),
        ("rest.1",),
        ("transposed", "flipped", "block order", "wrong values"),
    ),
    ("convnext", "kernel transposed", "rest.1.dw_w", lambda v: v.mT, ("rest.1",), ("transposed",)),
    (
        "convnext",
        "gain of ones",
        "first.gamma",
        torch.ones_like,
        ("first",),
        ("wrong values", "duplicated", "missing gain", "constant", "scaled"),
    ),
    (
        "deit",
        "patch in another layout",
        "patch.weight",
        lambda v: v.view(-1, 3, 16).transpose(1, 2).reshape(v.shape),
        ("patch",),
        ("transposed", "layout", "block order", "head order"),
    ),
    ("deit", "rows shifted", "pos", lambda v: v.roll(1, 0), ("",), ("shifted", "position offset")),
    (
        "clip image",
        "query, key, value turned",
        "blocks.0.attn.in_proj_weight",
        _rows(3, [1, 2, 0]),
        ("blocks.0.attn",),
        ORDER,
    ),
    (
        "clip image",
        "bias of values missing",
        "blocks.1.attn.in_proj_bias",
        lambda v: torch.cat([v[:64], 0 * v[64:]]),
        ("blocks.1.attn",),
        ("zeroed", "missing bias"),
    ),
    ("clip image", "token zeroed", "token", torch.zeros_like, ("",), ("zeroed", "missing bias")),
    (
        "squeezenet",
        "channels turned",
        "stem.weight",
        lambda v: v.flip(1),
        ("stem",),
        ("flipped", "block order", "channel order", "head order", "wrong values"),
    ),
    (
        "squeezenet",
        "flatten order",
        "classifier.weight",
        lambda v: v.view(7, 20, 16).transpose(1, 2).reshape(7, 320),
        ("classifier",),
        ("transposed", "layout", "block order", "head order"),
    ),
    (
        "bottlenecks",
        "variance as deviation",
        "blocks.1.var2",
        torch.sqrt,
        ("blocks.1",),
        ("wrong values", "statistics", "variance"),
    ),
    (
        "bottlenecks",
        "statistics missing",
        "blocks.0.mean1",
        torch.zeros_like,
        ("blocks.0",),
        ("zeroed", "statistics", "mean"),
    ),
    (
        "wav2vec2",
        "gain of weight norm",
        "pos.parametrizations.weight.original0",
        lambda v: v * 1.01,
        ("pos",),
        ("scaled",),
    ),
    (
        "wav2vec2",
        "kernel turned",
        "pos.parametrizations.weight.original1",
        lambda v: v.flip(-1),
        ("pos",),
        ("flipped", "block order", "transposed", "wrong values", "shifted"),
    ),
    ("wav2vec2", "bias of weight norm", "pos.bias", torch.zeros_like, ("pos",), ("zeroed", "missing bias")),
    (
        "wav2vec2",
        "by block for by head",
        "layers.0.in_w",
        lambda v: v.view(4, 3, 8, 32).transpose(0, 1).reshape(96, 32),
        ("layers.0",),
        ORDER,
    ),
    ("gru", "gates turned", "wh.1", _rows(3, [1, 0, 2]), ("wh", ""), ORDER),
    ("gru", "gates turned", "bx.0", _rows(3, [0, 2, 1]), ("bx", ""), ORDER),
    ("gru", "transposed square", "wh.0", lambda v: torch.cat([c.T for c in v.chunk(3)]), ("wh", ""), ("transposed",)),
    ("gru", "bias zeroed", "bh.1", torch.zeros_like, ("bh", ""), ("zeroed", "missing bias")),
    ("lstm both ways", "gates turned", "fore.weight_hh_l0", _rows(4, [0, 1, 3, 2]), ("fore",), ORDER),
    ("lstm both ways", "gates turned", "back.weight_ih_l0", _rows(4, [1, 0, 2, 3]), ("back",), ORDER),
    ("lstm both ways", "bias zeroed", "back.bias_hh_l0", torch.zeros_like, ("back",), ("zeroed", "missing bias")),
    ("lstm both ways", "state scaled", "fore.weight_hh_l0", lambda v: v * 1.001, ("fore",), ("scaled",)),
    (
        "informer",
        "kernel turned",
        "stack.1.conv.weight",
        lambda v: v.flip(-1),
        ("stack.1.conv",),
        ("flipped", "block order", "transposed", "wrong values", "shifted"),
    ),
    (
        "informer",
        "statistics scaled",
        "stack.0.bn.running_var",
        lambda v: v * 1.01,
        ("stack.0.bn",),
        ("scaled", "statistics", "variance"),
    ),
]


def damages(family: str, values: Values) -> list[Damage]:
    """The edits of this family, and tensors that changed places."""
    found = [
        Damage(family, kind, {name: edit(values[name])}, where, causes)
        for of, kind, name, edit, where, causes in EDITS
        if of == family
    ]
    swaps: dict[str, list[tuple[str, Values, tuple[str, ...], tuple[str, ...]]]] = {}
    if family == "llama":
        g = "layers.0.norms.{}.g"
        swaps[family] = [
            (
                "norms swapped",
                _swap(values, g.format("before"), g.format("between")),
                ("layers.0.norms.before",),
                SWAPPED,
            ),
            ("tied by mistake", {"lm_head.weight": values["embed.weight"]}, ("lm_head",), (*SWAPPED, "stale tie")),
        ]
    if family == "whisper decoder":
        changed = _swap(values, "blocks.0.me.w_q", "blocks.0.me.w_k")
        swaps[family] = [("swapped query and key", changed, ("blocks.0.me",), ("swapped query and key", *SWAPPED))]
        both = _swap(values, "blocks.0.me.w_o", "blocks.0.them.w_o")
        swaps[family].append(("self and cross swapped", both, ("blocks.0.me",), SWAPPED))
    if family == "bart":
        changed = _with_bias(values, "enc.0.norm1", "enc.0.norm2")
        swaps[family] = [("norms swapped", changed, ("enc.0.norm1",), SWAPPED)]
    if family == "deit":
        swaps[family] = [
            ("heads swapped", _with_bias(values, "heads.cls", "heads.dist"), ("heads.cls", "heads.dist"), SWAPPED),
            ("tokens swapped", _swap(values, "cls", "dist"), ("",), SWAPPED),
        ]
    if family == "squeezenet":
        one = _swap(values, "features.4.c.e1.bias", "features.4.c.e3.bias")
        swaps[family] = [("biases swapped", one, ("features.4.c.e1", "features.4.c.e3"), SWAPPED)]
    if family == "lstm both ways":
        one = {n: values[n.replace("fore", "back")] for n in values if n.startswith("fore.")}
        two = {n: values[n.replace("back", "fore")] for n in values if n.startswith("back.")}
        swaps[family] = [("directions swapped", {**one, **two}, ("fore", "back"), SWAPPED)]
    if family == "wav2vec2":
        one = {n: values[n.replace("layers.0", "layers.1")] for n in values if n.startswith("layers.0.")}
        two = {n: values[n.replace("layers.1", "layers.0")] for n in values if n.startswith("layers.1.")}
        swaps[family] = [("layers swapped", {**one, **two}, ("layers.0", "layers.0."), SWAPPED)]
    return [*found, *(Damage(family, *row) for row in swaps.get(family, []))]
