"""A tiny BERT of the transformers library, an encoder as a person writes it, and the plan between them, by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.expr import parse
from surgery.graft import infos
from surgery.plan import Dropped, Plan, Row, Stamp, Status

VOCAB, WIDTH, HEADS, LAYERS, FFN, PLACES = 53, 32, 4, 2, 64, 24


def bert(seed: int = 0) -> nn.Module:
    """The reference, with weights that no two tensors share by chance."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=PLACES,
    )
    return shaken(BertModel(config)).eval()


def shaken(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


class Attention(nn.Module):
    def __init__(self, heads: int, masked: bool, scaled: bool) -> None:
        super().__init__()
        self.heads, self.masked, self.scaled = heads, masked, scaled
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        hide = mask[:, None, None, :].bool() if self.masked else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=hide, scale=None if self.scaled else 1.0)
        return self.proj(y.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, eps: float, gelu: str, order: str, **attention: Any) -> None:
        super().__init__()
        self.order = order
        self.mix = Attention(**attention)
        self.norm1 = nn.LayerNorm(WIDTH, eps=eps)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, FFN), nn.GELU(gelu), nn.Linear(FFN, WIDTH))
        self.norm2 = nn.LayerNorm(WIDTH, eps=eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.order == "pre":
            x = x + self.mix(self.norm1(x), mask)
            return x + self.ffn(self.norm2(x))
        kept = 0 if self.order == "no residual" else x
        x = self.norm1(kept + self.mix(x, mask))
        return self.norm2(x + self.ffn(x))


class Encoder(nn.Module):
    """What a person writes: an encoder, and a fresh head on its mean."""

    def __init__(
        self,
        *,
        eps: float = 1e-12,
        gelu: str = "none",
        order: str = "post",
        heads: int = HEADS,
        masked: bool = True,
        scaled: bool = True,
        classes: int = 3,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.places = nn.Embedding(PLACES, WIDTH)
        self.types = nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=eps)
        self.blocks = nn.ModuleList(
            Block(eps, gelu, order, heads=heads, masked=masked, scaled=scaled) for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, classes)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.tokens(ids) + self.places(places) + self.types(torch.zeros_like(ids)))
        for block in self.blocks:
            x = block(x, mask)
        return x

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encode(ids, mask).mean(1))


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    """Token ids and a mask that hides padding."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (3, 9), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    mask[2, 2:] = 0
    return ids, mask


def run_bert(module: nn.Module, x: tuple[Tensor, Tensor]) -> Tensor:
    return module(input_ids=x[0], attention_mask=x[1]).last_hidden_state


def run_encoder(module: nn.Module, x: tuple[Tensor, Tensor]) -> Tensor:
    return module.encode(*x)


def probe(reference: nn.Module, *, surface: bool = False, **changes: Any) -> surgery.Probe:
    given: dict[str, Any] = {
        "reference": reference,
        "run_reference": run_bert,
        "run_target": None if surface else run_encoder,
        "inputs": inputs,
        "outputs": ("last_hidden_state",),
        **changes,
    }
    return surgery.Probe(**given)


_LAYER = {
    "mix.proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "ffn.0": "intermediate.dense",
    "ffn.2": "output.dense",
    "norm2": "output.LayerNorm",
}
_EMBEDDINGS = {
    "tokens": "word_embeddings",
    "places": "position_embeddings",
    "types": "token_type_embeddings",
    "norm": "LayerNorm",
}


def expressions(target: nn.Module) -> dict[str, str]:
    """{target tensor: expression} of the encoder; the head has none."""
    found = {}
    for name in target.state_dict():
        path, _, leaf = name.rpartition(".")
        if path in _EMBEDDINGS:
            found[name] = f"embeddings.{_EMBEDDINGS[path]}.{leaf}"
        elif path.startswith("blocks."):
            _, i, inner = path.split(".", 2)
            layer = f"encoder.layer.{i}"
            if inner == "mix.qkv":
                parts = [f"{layer}.attention.self.{which}.{leaf}" for which in ("query", "key", "value")]
                found[name] = f"cat({', '.join(parts)}, axis=0)"
            else:
                found[name] = f"{layer}.{_LAYER[inner]}.{leaf}"
    return found


def plan_of(source: Mapping[str, Tensor], target: nn.Module, rows: Mapping[str, str]) -> Plan:
    """A plan of these expressions; other tensors are new, other sources dropped."""
    made = []
    for name, info in infos(target).items():
        if name in rows:
            made.append(Row(name, Status.FILLED, parse(rows[name]), tuple(info.shape), info.dtype))
        else:
            made.append(Row(name, Status.NEW, None, tuple(info.shape), info.dtype, note="fresh"))
    used = {s for row in made for s in row.sources}
    opened = surgery.open(source)
    dropped = tuple(Dropped(name, "the target has no place for it") for name in opened if name not in used)
    return Plan(tuple(made), dropped, Stamp.of(opened), Stamp.of(infos(target)))


def plan(source: Mapping[str, Tensor], target: nn.Module) -> Plan:
    """The right plan from `bert()` to an Encoder."""
    return plan_of(source, target, expressions(target))
