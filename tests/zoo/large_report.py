"""A report of a graft with about a thousand tensors on either side, and every way to end in it; no model is built."""

from __future__ import annotations

import math
import random

from surgery import TensorInfo
from surgery.expr import parse
from surgery.plan import Dropped, Plan, Row, Status
from surgery.proof import Divergence, PassResult, Proof
from surgery.report import Report
from surgery.residuals import Depth, Point
from zoo.html import Told

ODD = "<script>alert(1)</script>.\"odd\" & 'x'"  # names come from files that strangers wrote
_COPIED = {
    "attention.output.dense": ("attn.proj", (768, 768)),
    "attention.output.LayerNorm": ("norm1", (768,)),
    "intermediate.dense": ("mlp.fc1", (3072, 768)),
    "output.dense": ("mlp.fc2", (768, 3072)),
    "output.LayerNorm": ("norm2", (768,)),
}


def make(blocks: int = 60, *, refuted: bool = False) -> tuple[Report, Told]:
    """The report, and what a page tells beside it; refuted in the middle of the blocks where that is asked for."""
    tensors: dict[str, TensorInfo] = {}
    rows: list[Row] = []

    def source(name: str, *shape: int) -> str:
        tensors[name] = TensorInfo(shape, "F32", 4 * math.prod(shape))
        return name

    def filled(target: str, expr: str, *shape: int, status: Status = Status.FILLED, evidence: str = "") -> None:
        rows.append(Row(target, status, parse(expr), shape, "F32", evidence=evidence))

    def left(target: str, status: Status, *shape: int, note: str = "") -> None:
        rows.append(Row(target, status, None, shape, "F32", note=note))

    filled("tok.weight", source("embeddings.word.weight", 30522, 768), 30522, 768)
    places = source("embeddings.position.weight", 512, 768)
    filled("pos.weight", f"resize_pos_embed_1d({places}, to=600)", 600, 768, evidence="a table of positions")
    for i in range(blocks):
        theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            square = (768, 768) if kind == "weight" else (768,)
            three = [source(f"{theirs}.attention.self.{part}.{kind}", *square) for part in ("query", "key", "value")]
            filled(f"{ours}.attn.qkv.{kind}", f"cat({', '.join(three)}, axis=0)", 2304, *square[1:], evidence="run")
            for name, (own, shape) in _COPIED.items():
                shape = shape if kind == "weight" else shape[:1]
                filled(f"{ours}.{own}.{kind}", source(f"{theirs}.{name}.{kind}", *shape), *shape)
        filled(f"{ours}.scale", "ones(shape=(768,))", 768, status=Status.SYNTHESISED)
        left(f"{ours}.mask", Status.CONSTANT, 1, 512, note="a mask")
        left(f"{ours}.adapter.down.weight", Status.NEW, 64, 768, note="nothing corresponds to it")
        left(f"{ours}.adapter.up.weight", Status.KEPT, 768, 64, note="kept")
    rows.append(Row("lm.weight", Status.TIED, None, (30522, 768), "F32", tied_to="tok.weight"))
    left("head.weight", Status.NEW, 5, 768, note="nothing corresponds to it")
    dropped = [Dropped(source(name, 768), "<b>nothing</b> depends on it") for name in ("pooler.dense.bias", ODD)]
    symmetries = tuple(f"blocks.{i}.attn.qkv.bias[768:1536]: the softmax cancels it" for i in range(blocks))
    plan = Plan(tuple(rows), tuple(dropped), symmetries=symmetries, notes=("a note",))

    parts = ("attn.qkv", "attn.proj", "norm1", "mlp.fc1", "mlp.fc2", "norm2")
    modules = [name for i in range(blocks) for name in (*(f"blocks.{i}.{part}" for part in parts), f"blocks.{i}")]
    modules.append("")
    middle, noise = 7 * (blocks // 2), random.Random(0)

    def residual(at: int, base: float) -> float:
        wrong = refuted and at >= middle
        return (1e-4 if wrong else base * (1 + at / 100)) * noise.uniform(0.5, 2)

    depth = [
        Depth(
            name,
            "plain",
            tuple(
                Point(at, module, f"encoder: {module}", residual(at, base), 0.0 if base < 1e-12 else 2 * base)
                for at, module in enumerate(modules)
                if at % 7 != 6
            ),
            tuple(modules),
        )
        for name, base in (("cpu/float64", 1e-16), ("cpu/float32", 1e-7))
    ]
    why = f"{modules[middle]}: eps is 1e-05, the source has 1e-12 (plain: the outputs part there)"
    ran = PassResult(
        "cpu/float64",
        "failed" if refuted else "passed",
        "last_hidden_state differs by 1.0e-04 on plain" if refuted else "",
        {"last_hidden_state": 1e-4 if refuted else 1.2e-15},
        inputs=("plain", "padded", "shortest", "longest"),
        differs=refuted,
    )
    proof = Proof(
        (ran, PassResult("cuda/bfloat16", "not run", "no CUDA device")),
        not_exercised=("pos.weight: filled, not exercised: 3 of 600 rows",),
        divergence=Divergence(modules[middle], "encoder.layer.30", 1e-4, why, "eps") if refuted else None,
        surface={} if refuted else {"last_hidden_state": "blocks.59"},
        adapted=("pos.weight",),
    )
    report = Report.of(plan, proof.verdict, proof=proof, message=proof.message)
    wrote = () if refuted else ("mine.safetensors", "mine.graft.toml")
    where = "hf:google-bert/bert-base-uncased at commit 0123456789abcdef"
    return report, Told("bert-encoder", where, "Mine in mine.py", tensors, ("another note",), tuple(depth), "", wrote)
