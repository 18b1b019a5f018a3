"""Further cases: time series, in the styles of those who port weights (research code, deployment code, Lightning)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import transformers as T
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tests.further_cases.timeseries import (
    BN,
    FF,
    FUTR,
    HOR,
    LAB,
    LAYERS,
    LEN,
    MARKS,
    PL,
    ST,
    WB,
    WINDOW,
    D,
    H,
    call,
    copy,
    marked,
    nf,
    nf_seq2seq,
    node,
    randn,
    run_nf,
    sincos,
    star,
    with_history,
)
from tests.graft_matrix.core import case, shake

CIN, U = 3, 16


def style(number, name, **kw):
    case(name=f"styles series {number:02d}, {name}", modality="timeseries", **kw)


def zeros(*shape):
    return nn.Parameter(torch.zeros(shape))


def series(seed):
    return randn(seed, 3, LEN, CIN)


# ---------------------------------------------------------------- 1 LSTM: torch (two directions, projected) -> cells

PROJ = 8


class BiLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(CIN, U, num_layers=2, batch_first=True, bidirectional=True, proj_size=PROJ)
        self.classifier = nn.Linear(2 * PROJ, 5)

    def forward(self, x):
        return self.classifier(self.lstm(x)[0].mean(1))


class ProjectedCell(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.project = nn.Linear(U, PROJ, bias=False)
        self.h2h, self.x2h = nn.Linear(PROJ, 4 * U, bias=False), nn.Linear(i, 4 * U)

    def forward(self, x, state):
        h, c = state
        i, f, g, o = (self.x2h(x) + self.h2h(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return self.project(torch.sigmoid(o) * torch.tanh(c)), c


class CellsClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.backward_cells = nn.ModuleList([ProjectedCell(CIN), ProjectedCell(2 * PROJ)])
        self.forward_cells = nn.ModuleList([ProjectedCell(CIN), ProjectedCell(2 * PROJ)])
        self.head = nn.Linear(2 * PROJ, 5)

    @staticmethod
    def scan(cell, steps):
        state, out = (steps[0].new_zeros(len(steps[0]), PROJ), steps[0].new_zeros(len(steps[0]), U)), []
        for v in steps:
            state = cell(v, state)
            out.append(state[0])
        return out

    def forward(self, x):
        steps = list(x.unbind(1))
        for f, b in zip(self.forward_cells, self.backward_cells, strict=True):
            pairs = zip(self.scan(f, steps), self.scan(b, steps[::-1])[::-1], strict=True)
            steps = [torch.cat(p, -1) for p in pairs]
        return self.head(torch.stack(steps, 1).mean(1))


def o_bilstm(s):
    t = {}
    copy(s, t, [("classifier", "head")])
    for i in range(2):
        for a, b in ((f"l{i}", f"forward_cells.{i}."), (f"l{i}_reverse", f"backward_cells.{i}.")):
            t[b + "x2h.weight"], t[b + "h2h.weight"] = s["lstm.weight_ih_" + a], s["lstm.weight_hh_" + a]
            t[b + "x2h.bias"] = s["lstm.bias_ih_" + a] + s["lstm.bias_hh_" + a]
            t[b + "project.weight"] = s["lstm.weight_hr_" + a]
    return t


style(
    1,
    "lstm: torch.nn.LSTM (bidirectional, proj_size) -> own loops of cells (one bias, backward list first)",
    family="lstm",
    source=lambda: shake(BiLSTM(), 1),
    target=lambda: shake(CellsClassifier(), 2),
    inputs=series,
    run_source=call,
    run_target=call,
    oracle=o_bilstm,
    note="the two directions have equal shapes and the backward one comes first; the biases add up",
)


# ---------------------------------------------------------------- 2 LSTM: sequence to sequence with attention


class Seq2Seq(nn.Module):
    """A tutorial's: nn.LSTM encoder, nn.LSTMCell decoder, additive attention on the concatenation."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(CIN, U, batch_first=True)
        self.attn, self.v = nn.Linear(2 * U, 12), nn.Linear(12, 1, bias=False)
        self.decoder = nn.LSTMCell(1 + U, U)
        self.out = nn.Linear(2 * U, 1)

    def forward(self, x):
        memory, (h, c) = self.encoder(x)
        h, c, y, ys = h[0], c[0], x[:, -1, :1], []
        for _ in range(HOR):
            both = torch.cat([h[:, None].expand_as(memory), memory], -1)
            weight = self.v(torch.tanh(self.attn(both))).softmax(1)
            context = (weight * memory).sum(1)
            h, c = self.decoder(torch.cat([y, context], -1), (h, c))
            y = self.out(torch.cat([h, context], -1))
            ys.append(y)
        return torch.cat(ys, 1)


class RawCell(nn.Module):
    """Keras' order of things: kernel (in, 4u), recurrent kernel, one bias; gates i, f, c, o."""

    def __init__(self, i):
        super().__init__()
        self.kernel, self.recurrent, self.bias = zeros(i, 4 * U), zeros(U, 4 * U), zeros(4 * U)

    def forward(self, x, h, c):
        i, f, g, o = (x @ self.kernel + h @ self.recurrent + self.bias).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class Bahdanau(nn.Module):
    def __init__(self):
        super().__init__()
        self.dec, self.enc = RawCell(U + 1), RawCell(CIN)  # the decoder reads [context, y]
        self.W_keys, self.W_query, self.score = nn.Linear(U, 12, bias=False), nn.Linear(U, 12), zeros(12)
        self.read_h, self.read_c = nn.Linear(U, 1), nn.Linear(U, 1, bias=False)

    def forward(self, x):
        h = c = x.new_zeros(len(x), U)
        memory = []
        for v in x.unbind(1):
            h, c = self.enc(v, h, c)
            memory.append(h)
        memory = torch.stack(memory, 1)
        keys, y, ys = self.W_keys(memory), x[:, -1, :1], []
        for _ in range(HOR):
            weight = ((keys + self.W_query(h)[:, None]).tanh() @ self.score).softmax(1)
            context = torch.einsum("bt,btu->bu", weight, memory)
            h, c = self.dec(torch.cat([context, y], -1), h, c)
            y = self.read_h(h) + self.read_c(context)
            ys.append(y)
        return torch.cat(ys, 1)


def o_seq2seq(s):
    t = {}
    w = s["decoder.weight_ih"]
    t["dec.kernel"] = torch.cat([w[:, 1:], w[:, :1]], 1).T
    t["enc.kernel"] = s["encoder.weight_ih_l0"].T
    for a, b, e in (("decoder", "dec", ""), ("encoder", "enc", "_l0")):
        t[b + ".recurrent"], t[b + ".bias"] = s[f"{a}.weight_hh{e}"].T, s[f"{a}.bias_ih{e}"] + s[f"{a}.bias_hh{e}"]
    t["W_query.weight"], t["W_keys.weight"] = s["attn.weight"].chunk(2, 1)
    t["W_query.bias"], t["score"] = s["attn.bias"], s["v.weight"][0]
    t["read_h.weight"], t["read_c.weight"] = s["out.weight"].chunk(2, 1)
    t["read_h.bias"] = s["out.bias"]
    return t


style(
    2,
    "lstm: own seq2seq around nn.LSTM and nn.LSTMCell -> own (Keras kernels, attention in two matrices)",
    family="lstm",
    source=lambda: shake(Seq2Seq(), 3),
    target=lambda: shake(Bahdanau(), 4),
    inputs=series,
    run_source=call,
    run_target=call,
    oracle=o_seq2seq,
    note="Linears on concatenations split by column; the decoder's input in another order",
)


# ---------------------------------------------------------------- 3 GRU: own cells (Lightning) -> neuralforecast


class LitGRU(nn.Module):
    """As a LightningModule's checkpoint has it: everything under `model`, an auxiliary head beside it."""

    def __init__(self):
        super().__init__()
        net = nn.Module()
        net.mlp = nn.ModuleDict({"final": nn.Linear(20, 1), "hidden": nn.Linear(U, 20)})
        net.cells = nn.ModuleDict({"upper": nn.GRUCell(U, U), "lower": nn.GRUCell(CIN, U)})
        self.model, self.aux = net, nn.Linear(U, 2)

    def forward(self, x):
        low = up = x.new_zeros(len(x), U)
        out = []
        for v in x.unbind(1):
            low = self.model.cells["lower"](v, low)
            up = self.model.cells["upper"](low, up)
            out.append(up)
        out = torch.stack(out[-HOR:], 1)
        return self.model.mlp["final"](F.relu(self.model.mlp["hidden"](out)))


def o_lit_gru(s):
    t = {}
    copy(s, t, [("model.mlp.hidden", "mlp_decoder.layers.0"), ("model.mlp.final", "mlp_decoder.layers.3")])
    for i, n in enumerate(("lower", "upper")):
        for w in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            t[f"hist_encoder.{w}_l{i}"] = s[f"model.cells.{n}.{w}"]
    return t


GRU_KW = {"encoder_hidden_size": U, "encoder_n_layers": 2, "decoder_hidden_size": 20, "decoder_layers": 2}
GRU_KW |= {"h": HOR, "input_size": LEN, "hist_exog_list": ["a", "b"], "recurrent": False}

style(
    3,
    "gru: own nn.GRUCell pair (Lightning prefix, upper cell first) -> neuralforecast GRU",
    family="gru",
    source=lambda: shake(LitGRU(), 5),
    target=lambda: nf("GRU", 6, decoder_activation="ReLU", **GRU_KW),
    inputs=series,
    run_source=call,
    run_target=with_history,
    oracle=o_lit_gru,
    note="cells become layers of one module; the upper is registered first, the last Linear too; an unused head",
)


# ---------------------------------------------------------------- 4 TCN: weight_norm parametrization -> plain, NWC

TCN = ((CIN, 12), (12, 12), (12, 16))


class NormedBlock(nn.Module):
    def __init__(self, i, o, dilation):
        super().__init__()
        self.d = dilation
        self.conv1 = weight_norm(nn.Conv1d(i, o, 3, dilation=dilation, padding=2 * dilation))
        self.conv2 = weight_norm(nn.Conv1d(o, o, 3, dilation=dilation, padding=2 * dilation))
        self.downsample = nn.Conv1d(i, o, 1) if i != o else None

    def forward(self, x):
        y = F.relu(self.conv1(x)[..., : -2 * self.d])
        y = F.relu(self.conv2(y)[..., : -2 * self.d])
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class NormedTCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(*[NormedBlock(i, o, 2**n) for n, (i, o) in enumerate(TCN)])
        self.linear = nn.Linear(16, HOR)

    def forward(self, x):
        return self.linear(self.network(x.mT)[..., -1])


class Taps(nn.Module):
    """A causal convolution over [batch, time, channel] as a sum of shifted products, kernel [k, in, out]."""

    def __init__(self, i, o, dilation):
        super().__init__()
        self.bias, self.kernel, self.d = zeros(o), zeros(3, i, o), dilation

    def forward(self, x):
        x, n = F.pad(x, (0, 0, 2 * self.d, 0)), x.shape[1]
        return self.bias + sum(x[:, j * self.d : j * self.d + n] @ w for j, w in enumerate(self.kernel))


class PlainTCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.forecast = nn.Linear(16, HOR)
        self.res = nn.ModuleDict({str(n): nn.Linear(i, o) for n, (i, o) in enumerate(TCN) if i != o})
        self.second = nn.ModuleList([Taps(o, o, 2**n) for n, (_, o) in enumerate(TCN)])
        self.first = nn.ModuleList([Taps(i, o, 2**n) for n, (i, o) in enumerate(TCN)])

    def forward(self, x):
        for n, (a, b) in enumerate(zip(self.first, self.second, strict=True)):
            y = b(a(x).relu()).relu()
            x = (y + (self.res[str(n)](x) if str(n) in self.res else x)).relu()
        return self.forecast(x[:, -1])


def o_tcn(s):
    t = {}
    copy(s, t, [("linear", "forecast")])
    for n in range(len(TCN)):
        copy(s, t, [(f"network.{n}.downsample", f"res.{n}")], fix=lambda w: w[..., 0])
        for a, b in (("conv1", "first"), ("conv2", "second")):
            c = f"network.{n}.{a}."
            g, v = (s[f"{c}parametrizations.weight.original{j}"] for j in range(2))
            t[f"{b}.{n}.kernel"] = (g * v / v.norm(dim=(1, 2), keepdim=True)).permute(2, 1, 0)
            t[f"{b}.{n}.bias"] = s[c + "bias"]
    return t


style(
    4,
    "tcn: own with weight_norm parametrization (chomps) -> own plain (kernels [k, in, out] over [B, T, C])",
    family="tcn",
    source=lambda: shake(NormedTCN(), 7),
    target=lambda: shake(PlainTCN(), 8),
    inputs=series,
    run_source=call,
    run_target=call,
    oracle=o_tcn,
    note="kernels are computed from gain and direction, then permuted; 1x1 convolutions become Linear",
)


# ---------------------------------------------------------------- 5 Transformer: torch.nn.Transformer -> neuralforecast


class TorchForecaster(nn.Module):
    """Around torch.nn.Transformer: one module for both sides, post-norm, no masks."""

    def __init__(self):
        super().__init__()
        kw = {"dim_feedforward": FF, "dropout": 0.0, "activation": "gelu", "batch_first": True}
        self.body = nn.Transformer(D, H, LAYERS, 1, **kw)
        self.value = nn.ModuleList([nn.Linear(3, D, bias=False) for _ in range(2)])
        self.calendar = nn.ModuleList([nn.Linear(MARKS, D, bias=False) for _ in range(2)])
        self.register_buffer("pos", sincos(LEN + HOR, D), persistent=False)
        self.to_y = nn.Linear(D, 1)

    def embed(self, n, y, marks):
        around = torch.cat([y.roll(1, 1), y, y.roll(-1, 1)], -1)
        return self.value[n](around) + self.calendar[n](marks) + self.pos[: y.shape[1]]

    def forward(self, y, marks):
        src = self.embed(0, y, marks[:, :LEN])
        tgt = self.embed(1, F.pad(y[:, -LAB:], (0, 0, 0, HOR)), marks[:, -(LAB + HOR) :])
        return self.to_y(self.body(src, tgt))[:, -HOR:]


def o_torch(s):
    t = {}
    for n, e in enumerate(("enc", "dec")):
        t[f"{e}_embedding.value_embedding.tokenConv.weight"] = s[f"value.{n}.weight"][:, None]
        copy(s, t, [(f"calendar.{n}", f"{e}_embedding.temporal_embedding.embed")])
        copy(s, t, [(f"body.{e}oder.norm", f"{e}oder.norm")])
    copy(s, t, [("to_y", "decoder.projection")])
    blocks = [(f"body.encoder.layers.{i}.", f"encoder.attn_layers.{i}.") for i in range(LAYERS)]
    for a, b in [*blocks, ("body.decoder.layers.0.", "decoder.layers.0.")]:
        own = "self_attention." if "decoder" in a else "attention."
        for x, y in (("self_attn.", own), ("multihead_attn.", "cross_attention.")):
            if a + x + "in_proj_weight" not in s:
                continue
            for e in WB:
                for n, v in zip(("query", "key", "value"), s[f"{a}{x}in_proj_{e}"].chunk(3), strict=True):
                    t[f"{b}{y}{n}_projection.{e}"] = v
            copy(s, t, [(a + x + "out_proj", b + y + "out_projection")])
        copy(s, t, [(f"{a}linear{j}", f"{b}conv{j}") for j in (1, 2)], fix=lambda w: w[..., None])
        copy(s, t, [(f"{a}norm{j}", f"{b}norm{j}") for j in (1, 2, 3)])
    return t


style(
    5,
    "transformer: own around torch.nn.Transformer -> neuralforecast VanillaTransformer",
    family="transformer",
    source=lambda: shake(TorchForecaster(), 9),
    target=lambda: nf_seq2seq("VanillaTransformer", 10, decoder_layers=1, activation="gelu"),
    inputs=marked,
    run_source=star,
    run_target=run_nf,
    oracle=o_torch,
    note="Linears become 1x1 and three-tap convolutions; constants of positions to leave alone",
)


# ---------------------------------------------------------------- 6 Informer: own -> neuralforecast


class HeadKernels(nn.Module):
    """Kernels [in, heads, width] as in Keras' MultiHeadAttention; heads stay in front, as in the reference."""

    def __init__(self):
        super().__init__()
        self.kernels = nn.ParameterDict({n: zeros(D, H, D // H) for n in ("key", "query", "value")})
        self.biases = nn.ParameterDict({n: zeros(H, D // H) for n in ("key", "query", "value")})
        self.out = nn.Linear(D, D)

    def forward(self, x, y, causal=False):
        of = {"query": x, "key": y, "value": y}
        q, k, v = (torch.einsum("btd,dhe->bhte", z, self.kernels[n]) + self.biases[n][:, None] for n, z in of.items())
        a = torch.einsum("bhte,bhse->bhts", q, k) / (D // H) ** 0.5
        if causal:
            a = a.masked_fill(torch.ones(a.shape[-2:]).triu(1).bool(), float("-inf"))
        return self.out((a.softmax(-1) @ v).reshape(x.shape))


class Distil(nn.Module):
    """A normalised convolution that halves the series; written out, with the running statistics as buffers."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(3 * D, D)  # three neighbours at once, circular, padded by two
        self.scale, self.shift = nn.Parameter(torch.ones(D)), zeros(D)
        self.register_buffer("running_mean", torch.zeros(D))
        self.register_buffer("running_var", torch.ones(D))

    def forward(self, x):
        x = torch.cat([x[:, -2:], x, x[:, :2]], 1).unfold(1, 3, 1).flatten(2)  # channel major
        x = (self.down(x) - self.running_mean) / (self.running_var + 1e-5).sqrt() * self.scale + self.shift
        return F.max_pool1d(F.elu(x).mT, 3, 2, 1).mT


class InformerLayer(nn.Module):
    def __init__(self, cross=False):
        super().__init__()
        self.norms = nn.ModuleDict({n: nn.LayerNorm(D) for n in (("ff", "self", "cross") if cross else ("ff", "self"))})
        self.expand, self.contract = nn.Linear(D, FF), nn.Linear(FF, D)
        self.attention = nn.ModuleDict({n: HeadKernels() for n in (("cross", "self") if cross else ("self",))})

    def forward(self, x, memory=None):
        x = self.norms["self"](x + self.attention["self"](x, x, causal=memory is not None))
        if memory is not None:
            x = self.norms["cross"](x + self.attention["cross"](x, memory))
        return self.norms["ff"](x + self.contract(F.gelu(self.expand(x))))


class KerasInformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection, self.final = nn.Linear(D, 1), nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(D)])
        self.embed = nn.ModuleList(
            [
                nn.ModuleDict({"time": nn.Linear(MARKS, D, bias=False), "value": nn.Linear(3, D, bias=False)})
                for _ in "ed"
            ]
        )
        self.distil, self.decode = Distil(), InformerLayer(True)
        self.encode = nn.ModuleList([InformerLayer() for _ in range(LAYERS)])
        self.register_buffer("table", sincos(LEN + HOR, D), persistent=False)

    def start(self, i, y, marks):
        around = torch.cat([y.roll(1, 1), y, y.roll(-1, 1)], -1)
        return self.embed[i]["value"](around) + self.embed[i]["time"](marks) + self.table[: y.shape[1]]

    def forward(self, y, marks):
        x = self.encode[0](self.start(0, y, marks[:, :LEN]))
        memory = self.final[0](self.encode[1](self.distil(x)))
        x = self.start(1, F.pad(y[:, -LAB:], (0, 0, 0, HOR)), marks[:, -(LAB + HOR) :])
        return self.projection(self.final[1](self.decode(x, memory)))[:, -HOR:]


def o_keras_informer(s):
    t = {}
    copy(s, t, [("projection", "decoder.projection")])
    for i, e in enumerate(("enc", "dec")):
        t[f"{e}_embedding.value_embedding.tokenConv.weight"] = s[f"embed.{i}.value.weight"][:, None]
        copy(s, t, [(f"embed.{i}.time", f"{e}_embedding.temporal_embedding.embed"), (f"final.{i}", f"{e}oder.norm")])
    c = "encoder.conv_layers.0."
    t[c + "downConv.weight"], t[c + "downConv.bias"] = (
        s["distil.down.weight"].unflatten(1, (D, 3)),
        s["distil.down.bias"],
    )
    for a, b in (("scale", "weight"), ("shift", "bias"), ("running_mean",) * 2, ("running_var",) * 2):
        t[f"{c}norm.{b}"] = s["distil." + a]
    blocks = [(f"encode.{i}.", f"encoder.attn_layers.{i}.") for i in range(LAYERS)]
    for a, b in [*blocks, ("decode.", "decoder.layers.0.")]:
        decoder = a == "decode."
        kinds = {"self": "self_attention.", "cross": "cross_attention."} if decoder else {"self": "attention."}
        for k, n in kinds.items():
            for x in ("query", "key", "value"):
                t[f"{b}{n}{x}_projection.weight"] = s[f"{a}attention.{k}.kernels.{x}"].flatten(1).T
                t[f"{b}{n}{x}_projection.bias"] = s[f"{a}attention.{k}.biases.{x}"].flatten()
            copy(s, t, [(f"{a}attention.{k}.out", b + n + "out_projection")])
        copy(s, t, [(a + "expand", b + "conv1"), (a + "contract", b + "conv2")], fix=lambda w: w[..., None])
        names = ("self", "cross", "ff") if decoder else ("self", "ff")
        copy(s, t, [(f"{a}norms.{n}", f"{b}norm{j + 1}") for j, n in enumerate(names)])
    return t


style(
    6,
    "informer: own (kernels [in, heads, width], distilling written out on raw statistics) -> neuralforecast",
    family="informer",
    source=lambda: shake(KerasInformer(), 11),
    target=lambda: nf_seq2seq("Informer", 12, factor=8),
    inputs=marked,
    run_source=star,
    run_target=run_nf,
    oracle=o_keras_informer,
    note="head axes to flatten, Linears become convolutions, a batch norm without a module",
)


# ---------------------------------------------------------------- 7 Autoformer: own (channels first) -> neuralforecast


class MovingAverage(nn.Module):
    """A depthwise convolution with a fixed kernel, ends repeated; [batch, channel, time]."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", torch.full((1, 1, WINDOW), 1 / WINDOW))

    def forward(self, x):
        y = F.pad(x, (WINDOW // 2, WINDOW // 2), mode="replicate").flatten(0, 1)[:, None]
        trend = F.conv1d(y, self.kernel)[:, 0].unflatten(0, x.shape[:2])
        return x - trend, trend


class Correlation(nn.Module):
    def __init__(self):
        super().__init__()
        self.o, self.v, self.k, self.q = (nn.Conv1d(D, D, 1) for _ in range(4))

    def forward(self, x, y):
        n = x.shape[-1]
        fit = (0, max(0, n - y.shape[-1]))
        q, k, v = self.q(x), F.pad(self.k(y), fit)[..., :n], F.pad(self.v(y), fit)[..., :n]
        corr = torch.fft.irfft(torch.fft.rfft(q) * torch.fft.rfft(k).conj(), n=n).mean(1)
        weight, delay = corr.topk(int(2 * math.log(n)))
        every = torch.stack([v.roll(-j, -1) for j in range(n)], 1)  # batch, delay, channel, time
        chosen = every.take_along_dim(delay[..., None, None], 1)
        return self.o((weight.softmax(-1)[..., None, None] * chosen).sum(1))


class AutoBlock(nn.Module):
    def __init__(self, cross):
        super().__init__()
        self.split = MovingAverage()
        self.up, self.down = nn.Conv1d(D, FF, 1, bias=False), nn.Conv1d(FF, D, 1, bias=False)
        self.b = Correlation() if cross else None
        self.a = Correlation()
        self.to_trend = nn.Conv1d(D, 1, 3, padding=1, padding_mode="circular", bias=False) if cross else None

    def forward(self, x, memory=None):
        x, trend = self.split(x + self.a(x, x))
        if memory is not None:
            x, more = self.split(x + self.b(x, memory))
            trend = trend + more
        x, more = self.split(x + self.down(F.gelu(self.up(x))))
        return x, None if memory is None else self.to_trend(trend + more)


class ChannelsFirstAutoformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.split = MovingAverage()
        self.encoder = nn.ModuleList([AutoBlock(False) for _ in range(LAYERS)])
        self.decoder = AutoBlock(True)
        for side in ("past", "future"):
            conv = nn.Conv1d(1, D, 3, padding=1, padding_mode="circular", bias=False)
            setattr(self, side, node(calendar=nn.Conv1d(MARKS, D, 1, bias=False), norm=nn.LayerNorm(D), token=conv))
        self.last = nn.Conv1d(D, 1, 1)

    @staticmethod
    def norm(side, x):
        x = side.norm(x.mT).mT
        return x - x.mean(-1, keepdim=True)

    def forward(self, y, marks):
        y, marks = y.mT, marks.mT
        x = self.past.token(y) + self.past.calendar(marks[..., :LEN])
        for b in self.encoder:
            x = b(x)[0]
        memory = self.norm(self.past, x)
        season, trend = (z[..., -LAB:] for z in self.split(y))
        trend = torch.cat([trend, y.mean(-1, keepdim=True).expand(-1, -1, HOR)], -1)
        x = self.future.token(F.pad(season, (0, HOR))) + self.future.calendar(marks[..., -(LAB + HOR) :])
        x, more = self.decoder(x, memory)
        return (self.last(self.norm(self.future, x)) + trend + more)[..., -HOR:].mT


def o_channels_first(s):
    t = {}

    def flat(w):
        return w[..., 0]

    for a, b in (("past", "enc"), ("future", "dec")):
        copy(
            s, t, [(a + ".token", b + "_embedding.value_embedding.tokenConv"), (a + ".norm", b + "oder.norm.layernorm")]
        )
        copy(s, t, [(a + ".calendar", b + "_embedding.temporal_embedding.embed")], fix=flat)
    copy(s, t, [("last", "decoder.projection")], fix=flat)
    copy(s, t, [("decoder.to_trend", "decoder.layers.0.projection")])
    names = [("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")]
    sides = [(f"encoder.{i}.", f"encoder.attn_layers.{i}.", {"a": "attention"}) for i in range(LAYERS)]
    sides.append(("decoder.", "decoder.layers.0.", {"a": "self_attention", "b": "cross_attention"}))
    for a, b, kinds in sides:
        copy(s, t, [(a + "up", b + "conv1"), (a + "down", b + "conv2")])
        for k, n in kinds.items():
            copy(s, t, [(f"{a}{k}.{x}", f"{b}{n}.{y}_projection") for x, y in names], fix=flat)
    return t


style(
    7,
    "autoformer: own (channels first, 1x1 convolutions, moving average as a fixed kernel) -> neuralforecast",
    family="autoformer",
    source=lambda: shake(ChannelsFirstAutoformer(), 13),
    target=lambda: nf_seq2seq("Autoformer", 14, factor=2, MovingAvg_window=WINDOW, activation="gelu"),
    inputs=marked,
    run_source=star,
    run_target=run_nf,
    oracle=o_channels_first,
    note="1x1 convolutions become Linears and stay convolutions in the feed-forward; constant kernels in the source",
)


# ---------------------------------------------------------------- 8 TimesNet: neuralforecast -> own (merged kernels)

TD, TF = 16, 24


class MergedTimesNet(nn.Module):
    """For deployment: the mean of an inception block's kernels is one kernel, so there is one convolution."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv1d(1, TD, 3, bias=False)
        self.marks = zeros(MARKS, TD)
        self.stretch, self.stretch_b = zeros(LEN, LEN + HOR), zeros(LEN + HOR)
        convs = [
            nn.Sequential(nn.Conv2d(TD, TF, 5, padding=2), nn.GELU(), nn.Conv2d(TF, TD, 5, padding=2)) for _ in "ab"
        ]
        self.times = nn.Sequential(*convs)
        self.norm, self.readout = nn.LayerNorm(TD), nn.Linear(TD, 1)
        self.register_buffer("pe", sincos(LEN, TD), persistent=False)

    def forward(self, y, marks):
        x = self.embed(F.pad(y.mT, (1, 1), mode="circular")).mT + self.pe + marks[:, :LEN] @ self.marks
        x = torch.einsum("bld,lt->btd", x, self.stretch) + self.stretch_b[:, None]
        n = LEN + HOR
        for conv in self.times:
            amp = torch.fft.rfft(x, dim=1).abs().mean(-1)
            top = amp.mean(0)[1:].topk(2)[1] + 1
            weight, mixed = amp[:, top].softmax(-1), x
            for j, f in enumerate(top.tolist()):
                p = n // f
                z = F.pad(x.mT, (0, -n % p)).unflatten(-1, (-1, p))
                mixed = mixed + weight[:, j, None, None] * conv(z).flatten(2)[..., :n].mT
            x = self.norm(mixed)
        return self.readout(x[:, -HOR:])


def o_merged(s):
    t = {"embed.weight": s["enc_embedding.value_embedding.tokenConv.weight"]}
    t["marks"] = s["enc_embedding.temporal_embedding.embed.weight"].T
    t["stretch"], t["stretch_b"] = s["predict_linear.weight"].T, s["predict_linear.bias"]
    copy(s, t, [("layer_norm", "norm"), ("projection", "readout")])
    for i in range(2):
        for j in (0, 2):
            a = f"model.{i}.conv.{j}.kernels."
            t[f"times.{i}.{j}.weight"] = sum(F.pad(s[f"{a}{k}.weight"], (2 - k,) * 4) for k in range(3)) / 3
            t[f"times.{i}.{j}.bias"] = sum(s[f"{a}{k}.bias"] for k in range(3)) / 3
    return t


TIMES_KW = {"hidden_size": TD, "conv_hidden_size": TF, "top_k": 2, "num_kernels": 3, "encoder_layers": 2}

style(
    8,
    "timesnet: neuralforecast -> own for deployment (an inception block merged into one kernel)",
    family="timesnet",
    source=lambda: nf("TimesNet", 15, h=HOR, input_size=LEN, futr_exog_list=FUTR, dropout=0.0, **TIMES_KW),
    target=lambda: shake(MergedTimesNet(), 16),
    inputs=marked,
    run_source=run_nf,
    run_target=star,
    oracle=o_merged,
    note="the target's kernel is the mean of three padded ones; Linears become matrices for x @ W and einsum",
)


# ---------------------------------------------------------------- 9 PatchTST: transformers (channel attention) -> own


class ChannelBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_in, self.b_in, self.w_out, self.b_out = zeros(3 * D, D), zeros(3 * D), zeros(D, D), zeros(D)
        self.norm_mlp, self.norm_time, self.norm_channel = (nn.BatchNorm1d(D) for _ in range(3))
        self.mlp = nn.Sequential(nn.Conv1d(D, FF, 1), nn.GELU(), nn.Conv1d(FF, D, 1))

    def attend(self, norm, x):  # sequence, batch, width
        y = norm(x.permute(1, 2, 0)).permute(2, 0, 1)
        args = (D, H, self.w_in, self.b_in, None, None, False, 0.0, self.w_out, self.b_out)
        return x + F.multi_head_attention_forward(y, y, y, *args, training=False, need_weights=False)[0]

    def forward(self, x):  # batch, channel, patch, width
        b, c, n, _ = x.shape
        x = self.attend(self.norm_time, x.flatten(0, 1).transpose(0, 1))  # patch, batch * channel, width
        x = x.unflatten(1, (b, c)).permute(2, 1, 0, 3).flatten(1, 2)  # channel, batch * patch, width
        x = self.attend(self.norm_channel, x)
        x = x.unflatten(1, (b, n)).permute(1, 0, 3, 2).flatten(0, 1)  # batch * channel, width, patch
        return (x + self.mlp(self.norm_mlp(x))).unflatten(0, (b, c)).mT


class ChannelPatchTST(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv1d(1, D, PL, ST)
        self.start, self.positions = zeros(D), zeros(D, (LEN - PL) // ST + 1)
        self.blocks = nn.ModuleList([ChannelBlock() for _ in range(LAYERS)])
        self.classify = zeros(CIN, D, 5)
        self.classify_bias = zeros(5)

    def forward(self, x):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = (self.patch(x.mT.flatten(0, 1)[:, None]) + self.positions).mT.unflatten(0, (-1, CIN))
        x = torch.cat([self.start.expand(*x.shape[:2], 1, D), x], 2)
        for b in self.blocks:
            x = b(x)
        return torch.einsum("bcd,cdk->bk", x[:, :, 0], self.classify) + self.classify_bias


def o_channels(s):
    e = "model.encoder."
    pos = s[e + "positional_encoder.position_enc"]
    t = {"positions": pos[1:].T, "start": s[e + "positional_encoder.cls_token"].flatten() + pos[0]}
    copy(s, t, [(e + "embedder.input_embedding", "patch")], fix=lambda w: w[:, None])
    t["classify"], t["classify_bias"] = (
        s["head.linear.weight"].unflatten(1, (CIN, D)).permute(1, 2, 0),
        s["head.linear.bias"],
    )
    for i in range(LAYERS):
        a, b = f"{e}layers.{i}.", f"blocks.{i}."
        for x, y in (("weight", "w"), ("bias", "b")):
            t[f"{b}{y}_in"] = torch.cat([s[f"{a}self_attn.{n}_proj.{x}"] for n in "qkv"])
            t[f"{b}{y}_out"] = s[f"{a}self_attn.out_proj.{x}"]
        for j, n in enumerate(("time", "channel", "mlp")):
            copy(s, t, [(f"{a}norm_sublayer{j + 1}.batchnorm", f"{b}norm_{n}")], BN)
        copy(s, t, [(a + "ff.0", b + "mlp.0"), (a + "ff.3", b + "mlp.2")], fix=lambda w: w[..., None])
    return t


def hf_classifier(seed):
    kw = {"num_input_channels": CIN, "context_length": LEN, "patch_length": PL, "patch_stride": ST, "num_targets": 5}
    kw |= {"d_model": D, "num_hidden_layers": LAYERS, "num_attention_heads": H, "ffn_dim": FF, "do_mask_input": False}
    kw |= {"use_cls_token": True, "channel_attention": True, "positional_encoding_type": "random", "scaling": "std"}
    return shake(T.PatchTSTForClassification(T.PatchTSTConfig(**kw)), seed)


style(
    9,
    "patchtst: transformers PatchTSTForClassification (channel attention) -> own (F.multi_head_attention_forward)",
    family="patchtst",
    source=lambda: hf_classifier(17),
    target=lambda: shake(ChannelPatchTST(), 18),
    inputs=series,
    run_source=lambda m, x: m(x).prediction_logits,
    run_target=call,
    oracle=o_channels,
    note="class token joined with its position, positions transposed; one attention used twice; a head with axes",
)


# ---------------------------------------------------------------- 10 TiDE: neuralforecast -> own (skip joined)

WIDE, TW, DEC = 20, 4, 5


class Residual(nn.Module):
    """The first layer and the skip read the same input: one matrix for both."""

    def __init__(self, i, hidden, o):
        super().__init__()
        self.back = nn.Linear(hidden, o, bias=False)
        self.both = nn.Linear(i, o + hidden)  # skip first

    def forward(self, x):
        o = self.back.out_features
        skip, y = self.both(x).tensor_split([o], -1)
        return skip + self.back(y.relu())


class OwnTiDE(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(LEN, HOR)
        self.per_step = Residual(DEC + TW, 12, 1)
        self.decoder = nn.ModuleList([Residual(WIDE, WIDE, WIDE), Residual(WIDE, WIDE, DEC * HOR)])
        self.encoder = nn.ModuleList([Residual(LEN + LEN * TW + (LEN + HOR) * TW, WIDE, WIDE), Residual(*[WIDE] * 3)])
        self.covariates = nn.ModuleDict({"known": Residual(MARKS, WIDE, TW), "past": Residual(2, WIDE, TW)})

    def forward(self, y, marks, past):
        known, y = self.covariates["known"](marks), y[..., 0]
        x = torch.cat([y, self.covariates["past"](past).flatten(1), known.flatten(1)], 1)
        for layer in [*self.encoder, *self.decoder]:
            x = layer(x)
        x = self.per_step(torch.cat([x.unflatten(1, (HOR, DEC)), known[:, LEN:]], -1))
        return x + self.linear(y)[..., None]


def o_tide(s):
    t = {}
    copy(s, t, [("global_skip", "linear")])
    pairs = [(f"dense_{n}.{i}", f"{n}.{i}") for n in ("encoder", "decoder") for i in range(2)]
    pairs += [("temporal_decoder", "per_step"), ("hist_exog_projection", "covariates.past")]
    for a, b in [*pairs, ("futr_exog_projection", "covariates.known")]:
        t[b + ".both.weight"] = torch.cat([s[a + ".skip.weight"], s[a + ".lin1.weight"]])
        t[b + ".both.bias"] = torch.cat([s[a + ".skip.bias"] + s[a + ".lin2.bias"], s[a + ".lin1.bias"]])
        t[b + ".back.weight"] = s[a + ".lin2.weight"]
    return t


def nf_tide(seed):
    kw = {"hidden_size": WIDE, "decoder_output_dim": DEC, "temporal_decoder_dim": 12, "temporal_width": TW}
    kw |= {"num_encoder_layers": 2, "num_decoder_layers": 2, "layernorm": False, "dropout": 0.0}
    return nf("TiDE", seed, h=HOR, input_size=LEN, futr_exog_list=FUTR, hist_exog_list=["a", "b"], **kw)


def run_tide(m, x):
    y, marks, past = x
    return m({"insample_y": y, "futr_exog": marks, "hist_exog": past, "stat_exog": None})


style(
    10,
    "tide: neuralforecast -> own (first layer and skip in one matrix, one bias for two)",
    family="tide",
    source=lambda: nf_tide(19),
    target=lambda: shake(OwnTiDE(), 20),
    inputs=lambda seed: (*marked(seed), randn(seed + 2000, 3, LEN, 2)),
    run_source=run_tide,
    run_target=star,
    oracle=o_tide,
    note="a merge of two Linears over one input, skip first; two biases are only known by their sum",
)
