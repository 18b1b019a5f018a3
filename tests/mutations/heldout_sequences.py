"""The second set's encoders and decoders of sequences: T5 sequence first, in dictionaries of modules; Whisper's decoder
with parameters of its own and scaled_dot_product_attention; BART's encoder of torch's own layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.defects import Slip
from tests.mutations.heldout_base import Family, noise, rng, slips_of
from tests.mutations.heldout_text import FF, D, H, K, V, padded
from tests.pairs import shaken


# -- T5 ---------------------------------------------------------------------------------------------------------------
def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=V,
        d_model=D,
        d_kv=K,
        d_ff=FF,
        num_layers=1,
        num_decoder_layers=2,
        num_heads=H,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
    )
    return shaken(T5ForConditionalGeneration(config))


def distance_bucket(relative: Tensor, both: bool) -> Tensor:
    n, found = 8, torch.zeros_like(relative)
    if both:
        n //= 2
        found = (relative > 0).long() * n
        relative = relative.abs()
    else:
        relative = (-relative).clamp(min=0)
    exact = n // 2
    far = exact + (torch.log(relative.float().clamp(min=1) / exact) / math.log(20 / exact) * (n - exact)).long()
    return found + torch.where(relative < exact, relative, far.clamp(max=n - 1))


def rms(x: Tensor, g: Tensor, eps: float = 1e-6) -> Tensor:
    return x * (x * x).mean(-1, keepdim=True).add(eps).rsqrt() * g


class T5Attn(nn.Module):
    def __init__(self, table: bool, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.q, self.kv, self.o = (nn.Linear(D, n, bias=False) for n in (D, 2 * D, D))
        self.rel = nn.Embedding(8, H) if table else None

    def forward(self, x: Tensor, mem: Tensor, bias: Tensor) -> Tensor:
        t, b, _ = x.shape
        q = self.q(x).view(t, b, H, K)
        k, v = self.kv(mem).view(len(mem), b, 2, H, K).unbind(2)
        if self.slip == "k is v":
            k, v = v, k
        a = torch.einsum("qbhj,kbhj->bhqk", q, k)
        if self.slip == "scaled":
            a = a / K**0.5
        a = (a + bias).softmax(-1)
        return self.o(torch.einsum("bhqk,kbhj->qbhj", a, v).reshape(t, b, D))


class T5Part(nn.Module):
    """A stack, sequence first; its layers are entries of a dictionary."""

    def __init__(self, layers: int, decoder: bool, slip: str = "") -> None:
        super().__init__()
        self.decoder, self.slip, self.n = decoder, slip, layers
        self.mods = nn.ModuleDict()
        for i in range(layers):
            bad = slip if i == layers - 1 else ""
            self.mods[f"self{i}"] = T5Attn(i == 0, bad.removeprefix("self "))
            if decoder:
                self.mods[f"cross{i}"] = T5Attn(False, bad.removeprefix("cross "))
            self.mods[f"wi{i}"] = nn.Linear(D, 2 * FF, bias=False)
            self.mods[f"wo{i}"] = nn.Linear(FF, D, bias=False)
            for part in ("self", "cross", "ff") if decoder else ("self", "ff"):
                self.mods[f"ln_{part}{i}"] = nn.Module()
                self.mods[f"ln_{part}{i}"].g = nn.Parameter(torch.ones(D))
        self.last = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor, mask: Tensor, mem: Tensor | None = None, mem_mask: Tensor | None = None) -> Tensor:
        m, s = self.mods, self.slip
        t = torch.arange(len(x))
        buckets = distance_bucket(t[None] - t[:, None], both=not self.decoder or s == "both ways")
        if s == "distance turned":
            buckets = buckets.T
        bias = m["self0"].rel(buckets).permute(2, 0, 1)[None]
        low = torch.finfo(x.dtype).min
        bias = bias + (mask[:, None, None] == 0) * low
        if self.decoder and s != "no causal":
            bias = bias.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), low)
        for i in range(self.n):
            bad = s if i == self.n - 1 else ""
            b = bias - m["self0"].rel(buckets).permute(2, 0, 1)[None] if bad == "bias of the first only" else bias
            y = rms(x, m[f"ln_self{i}"].g, 1e-5 if bad == "eps" else 1e-6)
            x = x + m[f"self{i}"](y, y, b)
            if self.decoder and mem is not None and mem_mask is not None:
                y = rms(x, m[f"ln_cross{i}"].g)
                b = (mem_mask[:, None, None] == 0) * low
                if bad == "memory padding seen":
                    b = torch.zeros(())
                if bad == "cross without norm":
                    y = x
                x = x + m[f"cross{i}"](y, mem, b)
            y = rms(x, m[f"ln_ff{i}"].g)
            gate, up = m[f"wi{i}"](y).chunk(2, -1)
            f = F.gelu(gate) if bad == "gelu erf" else F.gelu(gate, approximate="tanh")
            if bad == "relu":
                f = F.relu(gate)
            y = m[f"wo{i}"](f + up if bad == "gate added" else f * up)
            x = y if bad == "no residual" else x + y
        return rms(x, self.last)


class T5(nn.Module):
    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.tok = nn.Embedding(V, D)
        self.enc, self.dec = T5Part(1, False), T5Part(2, True, slip)

    def forward(self, ids: Tensor, mask: Tensor, out: Tensor) -> Tensor:
        mem = self.enc(self.tok(ids).transpose(0, 1), mask)
        if self.slip == "memory not normed":
            mem = mem / self.enc.last
        y = self.dec(self.tok(out).transpose(0, 1), torch.ones_like(out), mem, mask).transpose(0, 1)
        if self.slip != "logits not scaled":
            y = y * D**-0.5
        return F.linear(y, self.tok.weight)


DE = "dec.mods."
T5S = slips_of(
    "t5",
    ("key, value order", "cross k is v", (f"{DE}cross1", f"{DE}cross1.kv"), ("block order", "swapped tensors")),
    ("attention scale", "self scaled", (f"{DE}self1",), ("scale",)),
    ("attention scale", "cross scaled", (f"{DE}cross1",), ("scale",)),
    (
        "relative buckets",
        "both ways",
        ("dec", f"{DE}self0.rel", f"{DE}self0"),
        ("position offset", "position", "buckets"),
    ),
    ("relative buckets", "distance turned", ("dec", f"{DE}self0.rel"), ("position offset", "position", "transposed")),
    ("mask missing", "no causal", ("dec", f"{DE}self0"), ("mask",)),
    (
        "position bias missing",
        "bias of the first only",
        ("dec", f"{DE}self1"),
        ("position", "missing bias", "missing term", "mask", "position offset"),
    ),
    ("eps", "eps", ("dec",), ("eps",)),
    ("mask missing", "memory padding seen", ("dec", f"{DE}cross1"), ("mask",)),
    ("norm missing", "cross without norm", ("dec", f"{DE}cross1", f"{DE}cross1.q"), ("pre/post norm", "missing norm")),
    ("GELU variant", "gelu erf", ("dec",), ("gelu", "activation")),
    ("activation", "relu", ("dec",), ("activation",)),
    ("gate added", "gate added", ("dec", f"{DE}wo1"), ("activation", "gate", "wrong operation")),
    ("residual missing", "no residual", ("dec",), ("missing residual",)),
    ("gain missing", "memory not normed", ("", "enc"), ("scaled", "missing gain", "scale", "normalisation")),
    ("embedding scale", "logits not scaled", ("", "tok"), ("scale",)),
)


def t5_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    ids, mask = padded(seed)
    return ids, mask, torch.randint(2, V, (3, 7), generator=rng(seed + 50))


# -- Whisper's decoder ------------------------------------------------------------------------------------------------
def whisper() -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperDecoder

    config = WhisperConfig(
        vocab_size=V,
        d_model=D,
        decoder_layers=2,
        decoder_attention_heads=H,
        decoder_ffn_dim=FF,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return shaken(WhisperDecoder(config))


class Attend(nn.Module):
    """Weights of its own, no Linear."""

    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.w_q, self.w_k, self.w_v, self.w_o = (nn.Parameter(torch.randn(D, D) * 0.1) for _ in range(4))
        self.b_q, self.b_v, self.b_o = (nn.Parameter(torch.zeros(D)) for _ in range(3))

    def forward(self, x: Tensor, mem: Tensor, causal: bool) -> Tensor:
        s = self.slip
        b, t, _ = x.shape
        if s == "reads itself":
            mem = x
        q = F.linear(x, self.w_q, None if s == "no query bias" else self.b_q)
        k, v = F.linear(mem, self.w_k), F.linear(mem, self.w_v, self.b_v)
        if s == "scaled before too":
            q = q * K**-0.5
        if s == "heads inside":
            q, k, v = (z.view(b, -1, K, H).permute(0, 3, 1, 2) for z in (q, k, v))
        else:
            q, k, v = (z.view(b, -1, H, K).transpose(1, 2) for z in (q, k, v))
        if s == "causal too":
            causal = True
        if s == "not causal":
            causal = False
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=0.1 if s == "dropout" else 0.0)
        return F.linear(y.transpose(1, 2).reshape(b, t, D), self.w_o, self.b_o)


class WhisperBlock(nn.Module):
    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        at = slip.partition(": ")
        self.me = Attend(at[2] if at[0] == "me" else "")
        self.them = Attend(at[2] if at[0] == "them" else "")
        self.ln = nn.ModuleList(nn.LayerNorm(D) for _ in range(3))
        self.fc = nn.ModuleList([nn.Linear(D, FF), nn.Linear(FF, D)])

    def forward(self, x: Tensor, mem: Tensor) -> Tensor:
        y = self.ln[0](x)
        x = x + self.me(y, y, True)
        y = self.ln[0 if self.slip == "norm of self" else 1](x)
        z = self.them(y, self.ln[1](mem) if self.slip == "memory normed" else mem, False)
        x = y + z if self.slip == "residual after norm" else x + z
        if self.slip == "post norm":
            return self.ln[2](x + self.fc[1](F.gelu(self.fc[0](x))))
        act = F.relu if self.slip == "relu" else F.gelu
        return x + self.fc[1](act(self.fc[0](self.ln[2](x))))


class WhisperText(nn.Module):
    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.tok, self.pos = nn.Embedding(V, D), nn.Parameter(torch.zeros(12, D))
        self.blocks = nn.ModuleList([WhisperBlock(), WhisperBlock(slip)])
        self.ln = nn.LayerNorm(D)

    def forward(self, ids: Tensor, mem: Tensor) -> Tensor:
        t = ids.shape[1]
        pos = self.pos[1 : t + 1] if self.slip == "one late" else self.pos[:t]
        if self.slip == "from the end":
            pos = self.pos[-t:]
        x = self.tok(ids)
        if self.slip == "embedding scaled":
            x = x * D**0.5
        x = x if self.slip == "no positions" else x + pos
        for block in self.blocks:
            x = block(x, mem)
        return self.ln(x)


WM, WT = "blocks.1.me", "blocks.1.them"
WHISPER = slips_of(
    "whisper decoder",
    ("bias missing", "me: no query bias", (WM,), ("missing bias",)),
    ("attention scale", "me: scaled before too", (WM,), ("scale",)),
    ("attention scale", "them: scaled before too", (WT,), ("scale",)),
    ("head order", "me: heads inside", (WM,), ("head order",)),
    ("causal mask too many", "them: causal too", (WT,), ("mask",)),
    ("mask missing", "me: not causal", (WM,), ("mask",)),
    ("dropout left on", "me: dropout", (WM,), ("dropout",)),
    ("reads another input", "them: reads itself", (WT,), ("wrong input", "wrong tensor", "swapped tensors")),
    (
        "norm of another place",
        "norm of self",
        ("blocks.1", "blocks.1.ln.0"),
        ("swapped layers", "duplicated", "swapped tensors", "wrong tensor"),
    ),
    ("norm too many", "memory normed", ("blocks.1", "blocks.1.ln.1", WT), ("pre/post norm",)),
    ("pre/post norm", "post norm", ("blocks.1",), ("pre/post norm",)),
    ("residual after norm", "residual after norm", ("blocks.1",), ("pre/post norm", "missing residual", "residual")),
    ("activation", "relu", ("blocks.1",), ("activation",)),
    ("position offset", "one late", ("",), ("position offset",)),
    ("position offset", "from the end", ("",), ("position offset",)),
    (
        "positions missing",
        "no positions",
        ("", "blocks.0.", "blocks.0"),
        ("missing bias", "position", "missing term", "position offset"),
    ),
    ("embedding scale", "embedding scaled", ("", "tok"), ("scale",)),
)


# -- BART's encoder ---------------------------------------------------------------------------------------------------
def bart() -> nn.Module:
    from transformers import BartConfig
    from transformers.models.bart.modeling_bart import BartEncoder

    config = BartConfig(
        vocab_size=V,
        d_model=D,
        encoder_layers=2,
        encoder_attention_heads=H,
        encoder_ffn_dim=FF,
        max_position_embeddings=12,
        scale_embedding=True,
        pad_token_id=1,
    )
    return shaken(BartEncoder(config))


class Bart(nn.Module):
    """The layers of torch itself."""

    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.tok, self.pos, self.norm = nn.Embedding(V, D), nn.Embedding(14, D), nn.LayerNorm(D)
        of: list[dict[str, Any]] = [{}, {}]
        of[1] = {
            "norm first": {"norm_first": True},
            "relu": {"activation": F.relu},
            "eps": {"layer_norm_eps": 1e-6},
            "gelu tanh": {"activation": nn.GELU(approximate="tanh")},
        }.get(slip, {})
        self.enc = nn.ModuleList(
            nn.TransformerEncoderLayer(D, H, FF, **{"dropout": 0.0, "activation": F.gelu, "batch_first": True, **o})
            for o in of
        )
        if slip == "two heads":
            self.enc[1].self_attn = nn.MultiheadAttention(D, 2, batch_first=True)
        if slip == "dropout":
            self.enc[1].dropout2 = AlwaysDropout()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        s = self.slip
        x = self.tok(ids) if s == "no root" else self.tok(ids) * D**0.5
        at = torch.arange(ids.shape[1]) + (0 if s == "offset" else 2)
        x = x + self.pos(at)
        if s == "scaled after":
            x = self.tok(ids) + self.pos(at) * D**0.5
        x = x if s == "no norm" else self.norm(x)
        for i, layer in enumerate(self.enc):
            pad = mask == 0
            if s == "padding ignored" and i == 1:
                pad = None
            if s == "mask inverted" and i == 1:
                pad = mask == 1
            x = layer(x, src_key_padding_mask=pad)
        return F.layer_norm(x, (D,)) if s == "norm too many" else x


class AlwaysDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.1)


EN = "enc.1"
BART = slips_of(
    "bart",
    ("pre/post norm", "norm first", (EN,), ("pre/post norm",)),
    ("activation", "relu", (EN,), ("activation",)),
    ("eps", "eps", (f"{EN}.norm1",), ("eps",)),
    ("GELU variant", "gelu tanh", (EN, f"{EN}.activation"), ("gelu", "activation")),
    ("number of heads", "two heads", (f"{EN}.self_attn",), ("head order", "scale", "heads")),
    ("dropout left on", "dropout", (f"{EN}.dropout2",), ("dropout",)),
    ("embedding scale", "no root", ("", "tok"), ("scale",)),
    ("embedding scale", "scaled after", ("",), ("scale",)),
    ("position offset", "offset", ("", "pos"), ("position offset",)),
    ("norm missing", "no norm", ("", "enc.0.", "enc.0"), ("pre/post norm", "missing norm")),
    ("mask missing", "padding ignored", ("", EN, f"{EN}.self_attn"), ("mask",)),
    ("mask inverted", "mask inverted", ("", EN, f"{EN}.self_attn"), ("mask",)),
    ("norm too many", "norm too many", ("",), ("pre/post norm",)),
)

FAMILIES = [
    Family(
        "t5",
        t5,
        T5,
        t5_inputs,
        lambda m, x: m(input_ids=x[0], attention_mask=x[1], decoder_input_ids=x[2]).logits,
    ),
    Family(
        "whisper decoder",
        whisper,
        WhisperText,
        lambda s: (padded(s)[0], noise(3, 8, D)(s)),
        lambda m, x: m(input_ids=x[0], encoder_hidden_states=x[1]).last_hidden_state,
    ),
    Family("bart", bart, Bart, padded, lambda m, x: m(input_ids=x[0], attention_mask=x[1]).last_hidden_state),
]
SLIPS: list[Slip] = [*T5S, *WHISPER, *BART]
