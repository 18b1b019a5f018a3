"""The second set's language models: targets in other people's styles, and the slips of whoever ports them.

RoBERTa as one flat forward over a dictionary of parameters; Llama with helpers outside of its classes; GPT-NeoX by
einsum with query, key and value interleaved by head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.defects import Slip
from tests.mutations.heldout_base import Family, rng, slips_of
from tests.pairs import shaken

D, H, FF, V = 32, 4, 56, 53
K = D // H


def padded(seed: int) -> tuple[Tensor, Tensor]:
    """One sequence of full length, one short, one of few tokens; what is padded holds the padding token."""
    ids = torch.randint(2, V, (3, 8), generator=rng(seed))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    mask[2, 1 + seed % 3 :] = 0
    return torch.where(mask.bool(), ids, torch.ones_like(ids)), mask


# -- RoBERTa ----------------------------------------------------------------------------------------------------------
def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=H,
        intermediate_size=FF,
        max_position_embeddings=14,
        type_vocab_size=1,
        pad_token_id=1,
        layer_norm_eps=1e-5,
    )
    return shaken(RobertaModel(config, add_pooling_layer=False))


class Roberta(nn.Module):
    """All in one forward, weights in a dictionary."""

    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        shapes: dict[str, tuple[int, ...]] = {"tok": (V, D), "pos": (14, D), "typ": (1, D), "ln_w": (D,), "ln_b": (D,)}
        for i in range(2):
            for n in ("q", "k", "v", "o"):
                shapes |= {f"l{i}_{n}_w": (D, D), f"l{i}_{n}_b": (D,)}
            shapes |= {f"l{i}_up_w": (FF, D), f"l{i}_up_b": (FF,), f"l{i}_down_w": (D, FF), f"l{i}_down_b": (D,)}
            for n in ("n1", "n2"):
                shapes |= {f"l{i}_{n}_w": (D,), f"l{i}_{n}_b": (D,)}
        self.p = nn.ParameterDict({n: nn.Parameter(torch.randn(s) * 0.1) for n, s in shapes.items()})

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        p, slip = self.p, self.slip
        b, t = ids.shape
        at = (mask.cumsum(1) * mask + 1).long()
        if slip == "offset 1":
            at = at - 1
        if slip == "arange":
            at = (torch.arange(t) + 2).expand(b, t)
        x = F.embedding(ids, p["tok"]) + F.embedding(at, p["pos"])
        if slip != "no type":
            x = x + p["typ"][0]
        if slip != "no embedding norm":
            x = F.layer_norm(x, (D,), p["ln_w"], p["ln_b"], 1e-5)
        hide = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        if slip == "mask times one":
            hide = 1.0 - mask[:, None, None, :].to(x.dtype)
        for i in range(2):
            bad = slip if i == 1 else ""
            q = F.linear(x, p[f"l{i}_q_w"], p[f"l{i}_q_b"]).view(b, t, H, K).transpose(1, 2)
            k = F.linear(x, p[f"l{i}_k_w"], p[f"l{i}_k_b"]).view(b, t, H, K).transpose(1, 2)
            v = F.linear(x, p[f"l{i}_v_w"], p[f"l{i}_v_b"]).view(b, t, H, K).transpose(1, 2)
            if bad == "v without bias":
                v = F.linear(x, p[f"l{i}_v_w"]).view(b, t, H, K).transpose(1, 2)
            if bad == "scale by width":
                q = q / math.sqrt(D) * math.sqrt(K)
            a = q @ k.transpose(-1, -2) / math.sqrt(K)
            if bad != "padding ignored":
                a = a + hide
            a = a.sigmoid() if bad == "sigmoid" else a.softmax(-1)
            if bad == "scale after softmax":
                a = a / math.sqrt(K)
            y = (a @ v).transpose(1, 2).reshape(b, t, D)
            if bad == "heads not joined":
                y = (a @ v).reshape(b, t, D)
            y = F.linear(y, p[f"l{i}_o_w"], None if bad == "o without bias" else p[f"l{i}_o_b"])
            n = 0 if bad == "norm of another layer" else i
            eps = 1e-12 if bad == "eps" else 1e-5
            x = F.layer_norm(x + y, (D,), p[f"l{n}_n1_w"], p[f"l{n}_n1_b"], eps)
            y = F.linear(x, p[f"l{i}_up_w"], p[f"l{i}_up_b"])
            y = F.gelu(y, approximate="tanh" if bad == "gelu tanh" else "none")
            if bad == "dropout":
                y = F.dropout(y, 0.1)
            if bad == "cast":
                y = y.half().to(x.dtype)
            y = F.linear(y, p[f"l{i}_down_w"], p[f"l{i}_down_b"])
            x = F.layer_norm(y if bad == "no residual" else x + y, (D,), p[f"l{i}_n2_w"], p[f"l{i}_n2_b"], 1e-5)
        return x


ROBERTA = slips_of(
    "roberta",
    ("position offset", "offset 1", ("", "p"), ("position offset",)),
    ("positions count padding", "arange", ("", "p"), ("position offset", "mask")),
    ("embedding missing", "no type", ("", "p"), ("missing bias", "missing embedding", "missing term")),
    ("norm missing", "no embedding norm", ("", "p"), ("pre/post norm", "missing norm")),
    ("mask too weak", "mask times one", ("", "p"), ("mask",)),
    ("mask missing", "padding ignored", ("", "p"), ("mask",)),
    ("bias missing", "v without bias", ("", "p"), ("missing bias",)),
    ("bias missing", "o without bias", ("", "p"), ("missing bias",)),
    ("attention scale", "scale by width", ("", "p"), ("scale",)),
    ("scale after softmax", "scale after softmax", ("", "p"), ("scale",)),
    ("sigmoid for softmax", "sigmoid", ("", "p"), ("activation", "softmax")),
    ("head order", "heads not joined", ("", "p"), ("head order", "layout")),
    (
        "norm of another layer",
        "norm of another layer",
        ("", "p"),
        ("swapped layers", "duplicated", "swapped tensors", "wrong tensor"),
    ),
    ("eps", "eps", ("", "p"), ("eps",)),
    ("GELU variant", "gelu tanh", ("", "p"), ("gelu", "activation")),
    ("dropout left on", "dropout", ("", "p"), ("dropout",)),
    ("cast inside", "cast", ("", "p"), ("dtype cast",)),
    ("residual missing", "no residual", ("", "p"), ("missing residual",)),
)


# -- Llama ------------------------------------------------------------------------------------------------------------
def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=2,
        num_attention_heads=H,
        num_key_value_heads=2,
        max_position_embeddings=32,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    return shaken(LlamaForCausalLM(config))


def angles(t: int, base: float = 10000.0, start: int = 0) -> tuple[Tensor, Tensor]:
    inv = base ** (-torch.arange(0, K, 2).float() / K)
    a = torch.outer(torch.arange(start, start + t).float(), inv)
    return a.cos(), a.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, slip: str = "") -> Tensor:
    if slip == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    if slip == "other direction":
        return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Rms(nn.Module):
    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.g, self.slip = nn.Parameter(torch.ones(D)), slip

    def forward(self, x: Tensor) -> Tensor:
        if self.slip == "eps outside":
            return self.g * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)
        if self.slip == "centred":
            x = x - x.mean(-1, keepdim=True)
        if self.slip == "sum":
            return self.g * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)
        if self.slip == "one plus":
            return (1 + self.g) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        eps = 1e-5 if self.slip == "eps" else 1e-6
        return self.g * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class SelfAttn(nn.Module):
    def __init__(self, slip: str) -> None:
        super().__init__()
        self.slip = slip
        self.wq, self.wo = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.wk, self.wv = nn.Linear(D, D // 2, bias=False), nn.Linear(D, D // 2, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        s = self.slip
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, H, K).transpose(1, 2)
        k = self.wk(x).view(b, t, 2, K).transpose(1, 2)
        v = self.wv(x).view(b, t, 2, K).transpose(1, 2)
        cos, sin = angles(t, 1e6 if s == "base" else 10000.0)
        q = rotate(q, cos, sin, s)
        if s == "key one late":
            cos, sin = angles(t, start=1)
        if s != "key not rotated":
            k = rotate(k, cos, sin, s)
        if s == "value rotated":
            v = rotate(v, cos, sin)
        if s == "groups tiled":
            k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
        else:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        see = torch.ones(t, t).tril(1 if s == "sees the next" else 0).bool() & mask[:, None, None, :].bool()
        if s == "padding ignored":
            see = torch.ones(t, t).tril().bool()
        if s == "no causal":
            see = mask[:, None, None, :].bool()
        a = (q @ k.mT) * (1.0 if s == "no scale" else K**-0.5)
        a = a.masked_fill(~see, -1e30).softmax(-1)
        return self.wo((a @ v).transpose(1, 2).flatten(2))


class SwiGlu(nn.Module):
    def __init__(self, slip: str) -> None:
        super().__init__()
        self.slip, self.w13, self.w2 = slip, nn.Linear(D, 2 * FF, bias=False), nn.Linear(FF, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, -1)
        if self.slip == "gate is up":
            gate, up = up, gate
        if self.slip == "clamped":
            gate = gate.clamp(max=0.3)
        f = {"gelu": F.gelu, "sigmoid gate": torch.sigmoid}.get(self.slip, F.silu)
        return self.w2(f(gate) * up)


class Decoder(nn.Module):
    def __init__(self, slip: str) -> None:
        super().__init__()
        self.slip = slip
        of = slip.removeprefix("norm ") if slip.startswith("norm ") else ""
        self.norms = nn.ModuleDict({"before": Rms(of), "between": Rms()})
        self.attn, self.mlp = SelfAttn(slip), SwiGlu(slip)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.slip == "parallel":
            return x + self.attn(self.norms["before"](x), mask) + self.mlp(self.norms["between"](x))
        if self.slip == "cast":
            x = x.to(torch.bfloat16).to(torch.float32)
        x = x + self.attn(self.norms["before"](x), mask)
        if self.slip == "same norm twice":
            return x + self.mlp(self.norms["before"](x))
        return x + self.mlp(self.norms["between"](x))


class Llama(nn.Module):
    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList([Decoder(""), Decoder(slip)])
        self.norm, self.lm_head = Rms(), nn.Linear(D, V, bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.slip == "embedding scaled":
            x = x * math.sqrt(D)
        for layer in self.layers:
            x = layer(x, mask)
        x = x if self.slip == "no last norm" else self.norm(x)
        if self.slip == "tied":
            return x @ self.embed.weight.T
        return self.lm_head(x)


def llama_rows() -> dict[str, str]:
    rows = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.g": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    for i in range(2):
        a, b = f"layers.{i}.", f"model.layers.{i}."
        rows |= {f"{a}attn.w{n}.weight": f"{b}self_attn.{n}_proj.weight" for n in "qkvo"}
        rows[f"{a}norms.before.g"] = f"{b}input_layernorm.weight"
        rows[f"{a}norms.between.g"] = f"{b}post_attention_layernorm.weight"
        rows[f"{a}mlp.w13.weight"] = f"cat({b}mlp.gate_proj.weight, {b}mlp.up_proj.weight, axis=0)"
        rows[f"{a}mlp.w2.weight"] = f"{b}mlp.down_proj.weight"
    return rows


AT, ML = "layers.1.attn", "layers.1.mlp"
ROTARY = ("rotary", "rotary base", "rotary order", "position", "position offset")
LLAMA = slips_of(
    "llama",
    ("rotary base", "base", (AT,), (*ROTARY, "constant")),
    ("rotary interleaved", "interleaved", (AT,), (*ROTARY, "head order", "block order")),
    ("rotary direction", "other direction", (AT,), (*ROTARY, "sign")),
    ("rotary offset", "key one late", (AT,), ROTARY),
    ("rotary missing", "key not rotated", (AT,), ROTARY),
    ("rotary too many", "value rotated", (AT,), ROTARY),
    ("groups tiled", "groups tiled", (AT,), ("head order",)),
    ("causal mask off by one", "sees the next", (AT,), ("mask",)),
    ("mask missing", "padding ignored", (AT,), ("mask",)),
    ("mask missing", "no causal", (AT,), ("mask",)),
    ("attention scale", "no scale", (AT,), ("scale",)),
    (
        "gate is up",
        "gate is up",
        (ML, f"{ML}.w13"),
        ("swapped tensors", "block order", "activation", "swapped arguments"),
    ),
    ("activation", "gelu", (ML,), ("activation", "gelu")),
    ("activation", "sigmoid gate", (ML,), ("activation",)),
    ("clamp inside", "clamped", (ML,), ("activation", "clamp")),
    ("eps outside of the root", "norm eps outside", ("layers.1.norms.before",), ("eps", "normalisation")),
    ("eps", "norm eps", ("layers.1.norms.before",), ("eps",)),
    ("another norm", "norm centred", ("layers.1.norms.before",), ("normalisation", "statistics", "mean")),
    ("another norm", "norm sum", ("layers.1.norms.before",), ("normalisation", "statistics", "mean", "scale")),
    ("gain plus one", "norm one plus", ("layers.1.norms.before",), ("offset", "constant", "normalisation")),
    ("parallel for serial", "parallel", ("layers.1",), ("pre/post norm", "missing residual", "parallel residual")),
    (
        "norm of another place",
        "same norm twice",
        ("layers.1", "layers.1.norms.before"),
        ("swapped layers", "duplicated", "swapped tensors", "wrong tensor"),
    ),
    ("cast inside", "cast", ("layers.1",), ("dtype cast",)),
    ("embedding scale", "embedding scaled", ("", "embed"), ("scale",)),
    ("norm missing", "no last norm", ("", "lm_head"), ("pre/post norm", "missing norm")),
    ("tied to the wrong table", "tied", ("", "lm_head", "embed"), ("stale tie", "swapped tensors", "wrong tensor")),
)


# -- GPT-NeoX ---------------------------------------------------------------------------------------------------------
def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXModel

    config = GPTNeoXConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=2,
        num_attention_heads=H,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        use_parallel_residual=True,
    )
    return shaken(GPTNeoXModel(config))


class NeoxLayer(nn.Module):
    def __init__(self, slip: str) -> None:
        super().__init__()
        self.slip = slip
        self.ln_a = nn.LayerNorm(D, eps=1e-6 if slip == "eps" else 1e-5)
        self.ln_m = nn.LayerNorm(D)
        self.wqkv, self.bqkv = nn.Parameter(torch.randn(H, 3, K, D)), nn.Parameter(torch.randn(H, 3, K))
        self.wo, self.bo = nn.Parameter(torch.randn(H, K, D)), nn.Parameter(torch.randn(D))
        act = nn.GELU(approximate="tanh") if slip == "gelu tanh" else nn.GELU()
        self.mlp = nn.Sequential(nn.Linear(D, FF), act, nn.Linear(FF, D))
        if slip == "no activation":
            self.mlp[1] = nn.Identity()

    def attend(self, x: Tensor) -> Tensor:
        s = self.slip
        q, k, v = (torch.einsum("btd,hcjd->cbhtj", x, self.wqkv) + self.bqkv.permute(1, 0, 2)[:, None, :, None]).unbind(
            0
        )
        if s == "q is k":
            q, k = k, q
        t = x.shape[1]
        part = K if s == "all rotated" else K // 2
        inv = 10000.0 ** (-torch.arange(0, part, 2).float() / part)
        a = torch.outer(torch.arange(t).float(), inv)
        cos, sin = a.cos(), a.sin()
        q = torch.cat([rotate(q[..., :part], cos, sin), q[..., part:]], -1)
        k = torch.cat([rotate(k[..., :part], cos, sin), k[..., part:]], -1)
        if s == "last half rotated":
            q = torch.cat([q[..., part:], q[..., :part]], -1)
        w = torch.einsum("bhqj,bhkj->bhqk", q, k) / (K if s == "scale not rooted" else math.sqrt(K))
        diagonal = 0 if s == "not itself" else 1
        w = w.masked_fill(torch.ones(t, t).triu(diagonal).bool(), torch.finfo(w.dtype).min)
        w = w.softmax(2 if s == "softmax over queries" else -1)
        return torch.einsum("bhqk,bhkj,hjd->bqd", w, v, self.wo) + (0 if s == "no output bias" else self.bo)

    def forward(self, x: Tensor) -> Tensor:
        if self.slip == "serial":
            x = x + self.attend(self.ln_a(x))
            return x + self.mlp(self.ln_m(x))
        if self.slip == "one norm":
            y = self.ln_a(x)
            return x + self.attend(y) + self.mlp(y)
        if self.slip == "no residual":
            return self.attend(self.ln_a(x)) + self.mlp(self.ln_m(x))
        return x + self.attend(self.ln_a(x)) + self.mlp(self.ln_m(x))


class Neox(nn.Module):
    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(V, D), NeoxLayer(""), NeoxLayer(slip), nn.LayerNorm(D))
        if slip == "no last norm":
            self.net.forward = lambda x: self.net[2](self.net[1](self.net[0](x)))  # type: ignore[method-assign]
        if slip == "swapped blocks":
            self.net.forward = lambda x: self.net[3](self.net[1](self.net[2](self.net[0](x))))  # type: ignore[method-assign]

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(ids)


N1 = "net.2"
NEOX = slips_of(
    "neox",
    ("eps", "eps", (f"{N1}.ln_a",), ("eps",)),
    ("GELU variant", "gelu tanh", (f"{N1}.mlp.1",), ("gelu", "activation")),
    ("activation missing", "no activation", (f"{N1}.mlp.1", f"{N1}.mlp", f"{N1}.mlp.2"), ("activation",)),
    ("query, key, value order", "q is k", (N1,), ("swapped query and key", "block order")),
    ("rotary too many", "all rotated", (N1,), (*ROTARY, "constant")),
    ("rotary too many", "last half rotated", (N1,), (*ROTARY, "head order", "block order")),
    ("attention scale", "scale not rooted", (N1,), ("scale",)),
    ("causal mask off by one", "not itself", (N1,), ("mask",)),
    ("softmax axis", "softmax over queries", (N1,), ("softmax axis",)),
    ("bias missing", "no output bias", (N1,), ("missing bias",)),
    ("parallel for serial", "serial", (N1,), ("pre/post norm", "missing residual", "parallel residual")),
    (
        "norm of another place",
        "one norm",
        (N1, f"{N1}.mlp.0", f"{N1}.mlp"),
        ("swapped layers", "duplicated", "swapped tensors", "wrong tensor", "pre/post norm"),
    ),
    ("residual missing", "no residual", (N1,), ("missing residual",)),
    ("norm missing", "no last norm", ("", "net", N1), ("pre/post norm", "missing norm")),
    ("blocks in another order", "swapped blocks", ("net", "net.2.", "net.1."), ("swapped layers",)),
)


FAMILIES = [
    Family("roberta", roberta, Roberta, padded, lambda m, x: m(input_ids=x[0], attention_mask=x[1]).last_hidden_state),
    Family("llama", llama, Llama, padded, lambda m, x: m(input_ids=x[0], attention_mask=x[1]).logits, llama_rows),
    Family("neox", neox, Neox, lambda s: padded(s)[0], lambda m, x: m(x).last_hidden_state),
]
SLIPS: list[Slip] = [*ROBERTA, *LLAMA, *NEOX]
