"""The second set's audio and time-series models: wav2vec 2.0 whole, a GRU by hand, an LSTM both ways of torch's own
modules, Informer's distilling layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.defects import Slip
from tests.mutations.heldout_base import Family, awake, call, noise, rng, slips_of
from tests.pairs import shaken

D, H, FF = 32, 4, 56
K = D // H


# -- wav2vec 2.0 ------------------------------------------------------------------------------------------------------
def wav2vec() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=H,
        intermediate_size=FF,
        conv_dim=(8, 8, 12),
        conv_stride=(3, 2, 2),
        conv_kernel=(6, 3, 2),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=4,
        mask_time_prob=0.0,
    )
    return shaken(Wav2Vec2Model(config))


class Wav2Vec(nn.Module):
    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.convs = nn.ModuleList(
            [
                nn.Conv1d(1, 8, 6, stride=3, bias=False),
                nn.Conv1d(8, 8, 3, stride=2, bias=False),
                nn.Conv1d(8, 12, 2, stride=2, bias=False),
            ]
        )
        if slip == "one stride less":
            self.convs[2].stride = (1,)
        if slip == "same padding":
            self.convs[1].padding = (1,)
        self.gn = nn.GroupNorm(4 if slip == "four groups" else 8, 8, eps=1e-6 if slip == "group eps" else 1e-5)
        self.proj_ln, self.proj = nn.LayerNorm(12), nn.Linear(12, D)
        self.pos = nn.utils.parametrizations.weight_norm(nn.Conv1d(D, D, 6, padding=3, groups=4), dim=2)
        self.ln = nn.LayerNorm(D)
        self.layers = nn.ModuleList([SoundLayer(), SoundLayer(slip)])

    def forward(self, wave: Tensor) -> Tensor:
        s = self.slip
        if s == "wave normalised":
            wave = (wave - wave.mean(-1, keepdim=True)) / torch.sqrt(wave.var(-1, keepdim=True, unbiased=False) + 1e-7)
        x = self.convs[0](wave[:, None])
        if s == "gelu before norm":
            x = self.gn(F.gelu(x))
        elif s == "no gelu after norm":
            x = self.gn(x)
        elif s == "instance without gain":
            x = F.gelu(F.instance_norm(x))
        else:
            x = F.gelu(self.gn(x))
        x = F.gelu(self.convs[1](x), approximate="tanh" if s == "tanh in convs" else "none")
        x = F.gelu(self.convs[2](x)).mT
        x = self.proj(x if s == "features not normed" else self.proj_ln(x))
        y = self.pos(x.mT)
        if s == "position gelu after cut":
            y = F.gelu(y)[..., 1:]
        elif s == "position without gelu":
            y = y[..., :-1]
        else:
            y = F.gelu(y[..., :-1])
        if s == "positions replace":
            x = y.mT
        elif s == "positions after norm":
            x = self.ln(x) + y.mT
        else:
            x = x + y.mT
        if s != "positions after norm":
            x = x if s == "no encoder norm" else self.ln(x)
        for layer in self.layers:
            x = layer(x)
        return x


class SoundLayer(nn.Module):
    """Query, key and value in one map, by head."""

    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.in_w, self.in_b = nn.Parameter(torch.randn(H * 3 * K, D)), nn.Parameter(torch.randn(H * 3 * K))
        self.out = nn.Linear(D, D)
        self.norms = nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(D, eps=1e-12 if slip == "eps" else 1e-5)])
        self.ff = nn.Sequential(nn.Linear(D, FF), nn.ReLU() if slip == "relu" else nn.GELU(), nn.Linear(FF, D))

    def forward(self, x: Tensor) -> Tensor:
        s = self.slip
        b, t, _ = x.shape
        z = F.linear(x, self.in_w, self.in_b)
        if s == "blocks for heads":
            q, k, v = z.view(b, t, 3, H, K).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = z.view(b, t, H, 3, K).permute(3, 0, 2, 1, 4)
        if s == "local":
            near = (torch.arange(t)[:, None] - torch.arange(t)[None]).abs() <= 2
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=s == "causal", scale=1.0 if s == "no scale" else None)
        y = self.out(y.transpose(1, 2).flatten(2))
        if s == "pre norm":
            x = x + y
            return self.norms[1](self.norms[0](x) + self.ff(x))
        x = self.norms[1 if s == "norms turned" else 0](x + y)
        return self.norms[0 if s == "norms turned" else 1](x + self.ff(x))


SL = "layers.1"
WAV2VEC = slips_of(
    "wav2vec2",
    ("stride", "one stride less", ("convs.2",), ("stride",)),
    ("padding too many", "same padding", ("convs.1",), ("padding mode", "padding")),
    ("number of groups", "four groups", ("gn",), ("groups", "normalisation", "statistics")),
    ("eps", "group eps", ("gn",), ("eps",)),
    ("input scale", "wave normalised", ("", "convs.0"), ("scale", "input", "normalisation", "pre/post norm")),
    ("activation before norm", "gelu before norm", ("", "gn"), ("activation", "pre/post norm", "gelu")),
    ("activation missing", "no gelu after norm", ("", "convs.1"), ("activation", "gelu")),
    (
        "gain missing",
        "instance without gain",
        ("", "gn"),
        ("normalisation", "missing gain", "missing bias", "scale", "scaled"),
    ),
    ("GELU variant", "tanh in convs", ("",), ("gelu", "activation")),
    ("norm missing", "features not normed", ("", "proj"), ("pre/post norm", "missing norm")),
    ("position offset", "position gelu after cut", ("",), ("position offset",)),
    ("activation missing", "position without gelu", ("",), ("activation", "gelu")),
    ("residual missing", "positions replace", ("",), ("missing residual",)),
    ("pre/post norm", "positions after norm", ("", "ln"), ("pre/post norm",)),
    ("norm missing", "no encoder norm", ("", "layers.0.", "layers.0"), ("pre/post norm", "missing norm")),
    ("eps", "eps", (f"{SL}.norms.1",), ("eps",)),
    ("activation", "relu", (f"{SL}.ff.1",), ("activation",)),
    ("interleaved by head", "blocks for heads", (SL,), ("block order", "head order")),
    ("causal mask too many", "causal", (SL,), ("mask",)),
    ("causal mask too many", "local", (SL,), ("mask",)),
    ("attention scale", "no scale", (SL,), ("scale",)),
    ("residual before norm", "pre norm", (SL,), ("pre/post norm",)),
    (
        "norm of another place",
        "norms turned",
        (SL, f"{SL}.norms.1"),
        ("swapped layers", "swapped tensors", "duplicated", "wrong tensor"),
    ),
)


# -- GRU --------------------------------------------------------------------------------------------------------------
class Gru(nn.Module):
    """Two layers by hand, of plain parameters."""

    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.wx = nn.ParameterList([nn.Parameter(torch.randn(24, n)) for n in (5, 8)])
        self.wh = nn.ParameterList([nn.Parameter(torch.randn(24, 8)) for _ in range(2)])
        self.bx = nn.ParameterList([nn.Parameter(torch.randn(24)) for _ in range(2)])
        self.bh = nn.ParameterList([nn.Parameter(torch.randn(24)) for _ in range(2)])

    def step(self, x: Tensor, h: Tensor, i: int, bad: str) -> Tensor:
        a = F.linear(x, self.wx[i], self.bx[i])
        b = F.linear(h, self.wh[i], None if bad == "no state bias" else self.bh[i])
        ar, az, an = a.chunk(3, -1)
        br, bz, bn = b.chunk(3, -1)
        r, z = (ar + br).sigmoid(), (az + bz).sigmoid()
        if bad == "gates turned":
            r, z = z, r
        if bad == "reset before":
            n = (an + F.linear(r * h, self.wh[i][16:], self.bh[i][16:])).tanh()
        elif bad == "no reset":
            n = (an + bn).tanh()
        elif bad == "relu candidate":
            n = (an + r * bn).relu()
        else:
            n = (an + r * bn).tanh()
        if bad == "update turned":
            return z * n + (1 - z) * h
        return (1 - z) * n + z * h

    def forward(self, x: Tensor) -> Tensor:
        out = list(x.unbind(1))
        for i in range(2):
            bad = self.slip if i == 1 else ""
            h = x.new_zeros(len(x), 8)
            if bad == "starts from ones":
                h = h + 1
            states = []
            for v in reversed(out) if bad == "backwards" else out:
                h = self.step(v, h, i, bad)
                states.append(h)
            out = states
        return torch.stack(out, 1)


GRU = slips_of(
    "gru",
    ("bias missing", "no state bias", ("", "bh"), ("missing bias",)),
    ("gates in another order", "gates turned", ("", "wx", "wh"), ("block order", "swapped tensors")),
    ("reset before the map", "reset before", ("",), ("reset gate", "gate", "pre/post", "wrong operation")),
    ("gate missing", "no reset", ("",), ("gate", "missing gate", "scale", "missing factor")),
    ("activation", "relu candidate", ("",), ("activation",)),
    ("gate turned", "update turned", ("",), ("sign", "gate", "swapped tensors", "block order")),
    ("initial state", "starts from ones", ("",), ("constant", "initial state")),
    ("direction of time", "backwards", ("",), ("position offset", "direction", "order")),
)


# -- LSTM both ways ---------------------------------------------------------------------------------------------------
class TwoWays(nn.Module):
    """nn.LSTM of one layer and direction each, and a head."""

    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.fore, self.back = nn.LSTM(5, 6, batch_first=True), nn.LSTM(5, 6, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        s = self.slip
        a = self.fore(x)[0]
        b = self.back(x if s == "not turned" else x.flip(1))[0]
        b = b if s == "not turned back" else b.flip(1)
        if s == "state of ones":
            a = self.fore(x, (torch.ones(1, len(x), 6), torch.zeros(1, len(x), 6)))[0]
        y = torch.cat([b, a] if s == "directions turned" else [a, b], -1)
        if s == "last step":
            y = torch.cat([a, b[:, -1:].expand_as(b)], -1)
        if s == "squashed":
            y = y.tanh()
        return self.head(y)


class BothReference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(5, 6, batch_first=True, bidirectional=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


LSTM = slips_of(
    "lstm both ways",
    ("direction of time", "not turned", ("", "back"), ("position offset", "direction", "order", "flip")),
    ("direction of time", "not turned back", ("",), ("position offset", "direction", "order", "flip")),
    ("initial state", "state of ones", ("", "fore"), ("constant", "initial state")),
    ("concatenation order", "directions turned", ("",), ("block order", "concatenation order", "swapped tensors")),
    ("pooling", "last step", ("",), ("pooling", "position offset")),
    ("activation too many", "squashed", ("",), ("activation",)),
)


# -- Informer's distilling --------------------------------------------------------------------------------------------
def informer() -> nn.Module:
    from neuralforecast.models.informer import ConvLayer

    return awake(nn.Sequential(ConvLayer(8), ConvLayer(8)), torch.randn(8, 20, 8, generator=rng(4)), call)


class Distil(nn.Module):
    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.conv = nn.Conv1d(8, 8, 3, padding=0)
        self.bn = nn.BatchNorm1d(8, eps=1e-3 if slip == "eps" else 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        s = self.slip
        y = x.transpose(1, 2)
        n = 1 if s == "padded by one" else 2
        y = self.conv(
            F.pad(y, (n, n), mode="constant" if s == "zeros" else "replicate" if s == "replicate" else "circular")
        )
        if s == "norm after":
            y = self.bn(F.elu(y))
        elif s == "batch statistics":
            y = F.elu(F.batch_norm(y, None, None, self.bn.weight, self.bn.bias, training=True))
        else:
            f: Callable[[Tensor], Tensor] = {"gelu": F.gelu, "selu": F.selu, "tanh": torch.tanh}.get(s, F.elu)
            y = f(self.bn(y))
        if s == "average":
            y = F.avg_pool1d(y, 3, 2, 1)
        elif s == "ceil":
            y = F.max_pool1d(y, 3, 2, 0, ceil_mode=True)
        elif s == "kernel of two":
            y = F.max_pool1d(F.pad(y, (1, 0)), 2, 2, ceil_mode=True)
        else:
            y = F.max_pool1d(y, 3, 2, 1)
        return y.transpose(1, 2)


class Informer(nn.Module):
    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.stack = nn.Sequential(Distil(slip), Distil())

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(x)


I0 = "stack.0"
INFORMER = slips_of(
    "informer",
    ("eps", "eps", (f"{I0}.bn",), ("eps",)),
    ("padding mode", "zeros", (I0, f"{I0}.conv"), ("padding mode",)),
    ("padding mode", "replicate", (I0, f"{I0}.conv"), ("padding mode",)),
    ("padding too few", "padded by one", (I0, f"{I0}.conv"), ("padding mode", "padding")),
    ("activation before norm", "norm after", (I0, f"{I0}.bn"), ("activation", "pre/post norm")),
    ("batch statistics", "batch statistics", (I0, f"{I0}.bn"), ("statistics",)),
    ("activation", "gelu", (I0,), ("activation", "gelu")),
    ("activation", "selu", (I0,), ("activation",)),
    ("activation", "tanh", (I0,), ("activation",)),
    ("pooling", "average", (I0,), ("pooling",)),
    ("pooling padding", "ceil", (I0,), ("pooling", "padding mode", "padding")),
    ("pooling padding", "kernel of two", (I0,), ("pooling", "padding mode", "padding")),
)

FAMILIES = [
    Family("wav2vec2", wav2vec, Wav2Vec, noise(2, 80), lambda m, x: m(x).last_hidden_state),
    Family("gru", lambda: shaken(nn.GRU(5, 8, 2, batch_first=True)), Gru, noise(2, 4, 5), lambda m, x: m(x)[0]),
    Family("lstm both ways", lambda: shaken(BothReference()), TwoWays, noise(2, 4, 5)),
    Family("informer", informer, Informer, noise(2, 20, 8)),
]
SLIPS: list[Slip] = [*WAV2VEC, *GRU, *LSTM, *INFORMER]
