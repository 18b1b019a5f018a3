"""Further cases: time series. Transformers, neuralforecast, torch, and modules as a person would write them."""

from __future__ import annotations

import contextlib
import io
import logging
import math

import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor, nn

from tests.graft_matrix.core import State, case, shake

torch.set_num_threads(1)
T.utils.logging.set_verbosity_error()

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
WB = ("weight", "bias")
D, H, FF, LAYERS = 32, 4, 48, 2
LEN, LAB, HOR, MARKS = 24, 12, 6, 4
FUTR = ["month", "day", "weekday", "hour"]


def nf(cls: str, seed: int, **kw) -> nn.Module:
    """A shaken neuralforecast model, silently, with the global random state put back."""
    for n in ("lightning_fabric.utilities.seed", "lightning.fabric.utilities.seed", "pytorch_lightning"):
        logging.getLogger(n).setLevel(logging.ERROR)
    state = torch.get_rng_state()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import neuralforecast.models as models

        m = getattr(models, cls)(**kw)
    torch.set_rng_state(state)
    return shake(m, seed)


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def marked(seed, n=3):
    """A series and its calendar features, the horizon's included."""
    return randn(seed, n, LEN, 1), randn(seed + 1000, n, LEN + HOR, MARKS)


def run_nf(m, x):
    y, marks = x
    return m({"insample_y": y, "futr_exog": marks, "hist_exog": None, "stat_exog": None})


def with_history(m, x):
    return m({"insample_y": x[..., :1], "futr_exog": None, "hist_exog": x[..., 1:], "stat_exog": None})


def call(m, x):
    return m(x)


def star(m, x):
    return m(*x)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(-3, -2)


def unheads(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).flatten(-2)


def copy(s: State, out: State, pairs, ends=WB, fix=None) -> None:
    for a, b in pairs:
        for e in ends:
            if f"{a}.{e}" in s:
                v = s[f"{a}.{e}"]
                out[f"{b}.{e}"] = fix(v) if fix and e == "weight" else v


def join(s: State, out: State, sources, target) -> None:
    for e in WB:
        out[f"{target}{e}"] = torch.cat([s[f"{a}.{e}"] for a in sources])


def sincos(length, d):
    pe, t = torch.zeros(length, d), torch.arange(length).float()[:, None]
    div = (torch.arange(0, d, 2).float() * -(math.log(10000.0) / d)).exp()
    pe[:, 0::2], pe[:, 1::2] = torch.sin(t * div), torch.cos(t * div)
    return pe


def node(**kw):
    m = nn.Module()
    for k, v in kw.items():
        setattr(m, k, v)
    return m


# ---------------------------------------------------------------- 1 PatchTST: neuralforecast -> transformers

PL, ST = 8, 4
NP = (LEN - PL) // ST + 1


def hf_patchtst(seed, **kw):
    kw = {"num_input_channels": 1, "context_length": LEN, "pre_norm": False, "scaling": None, **kw}
    cfg = T.PatchTSTConfig(
        prediction_length=HOR,
        patch_length=PL,
        patch_stride=ST,
        d_model=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=H,
        ffn_dim=FF,
        positional_encoding_type="random",
        loss="mse",
        pooling_type=None,
        do_mask_input=False,
        **kw,
    )
    return shake(T.PatchTSTForPrediction(cfg), seed)


def o_nf_patchtst(s):
    a = "model.backbone."
    t = {"model.encoder.positional_encoder.position_enc": s[a + "W_pos"]}
    copy(s, t, [(a + "W_P", "model.encoder.embedder.input_embedding")])
    copy(s, t, [("model.head.linear", "head.projection")], fix=lambda w: w.unflatten(1, (D, -1)).mT.flatten(1))
    for i in range(LAYERS):
        a, b = f"model.backbone.encoder.layers.{i}.", f"model.encoder.layers.{i}."
        pairs = [(f"self_attn.W_{n.upper()}", f"self_attn.{n}_proj") for n in "qkv"]
        pairs += [("self_attn.to_out.0", "self_attn.out_proj"), ("ff.0", "ff.0"), ("ff.3", "ff.3")]
        pairs += [("norm_attn.1", "norm_sublayer1.batchnorm"), ("norm_ffn.1", "norm_sublayer3.batchnorm")]
        copy(s, t, [(a + x, b + y) for x, y in pairs], BN)
    return t


def padded(m, x):
    """transformers does not repeat the last value at the end: the caller does."""
    return m(torch.cat([x, x[:, -1:].expand(-1, ST, -1)], 1)).prediction_outputs


case(
    name="patchtst: neuralforecast -> transformers",
    modality="timeseries",
    family="patchtst",
    source=lambda: nf(
        "PatchTST",
        201,
        h=HOR,
        input_size=LEN,
        encoder_layers=LAYERS,
        n_heads=H,
        hidden_size=D,
        linear_hidden_size=FF,
        patch_len=PL,
        stride=ST,
        revin=False,
        res_attention=False,
        dropout=0.0,
        fc_dropout=0.0,
    ),
    target=lambda: hf_patchtst(202, context_length=LEN + ST),
    inputs=lambda seed: randn(seed, 4, LEN, 1),
    run_source=lambda m, x: run_nf(m, (x, None)),
    run_target=padded,
    oracle=o_nf_patchtst,
    note="the head flattens (width, patches) there and (patches, width) here, so its columns move; "
    "norm_sublayer3 and no 2; a frozen scale that is not used",
)


# ---------------------------------------------------------------- 2 PatchTST: own -> transformers

CH = 3


class OwnPatchTST(nn.Module):
    """Channel-independent, around nn.TransformerEncoder; the head is a raw matrix, used as x @ W."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, H, FF, 0.0, activation="gelu", batch_first=True, norm_first=True)
        self.head_w, self.head_b = nn.Parameter(torch.zeros(NP * D, HOR)), nn.Parameter(torch.zeros(HOR))
        self.pos = nn.Embedding(NP, D)
        self.proj = nn.Linear(PL, D)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, y):  # (batch, time, channels)
        mean, std = y.mean(1, keepdim=True), torch.sqrt(y.var(1, unbiased=False, keepdim=True) + 1e-5)
        z = ((y - mean) / std).transpose(1, 2).unfold(-1, PL, ST)
        z = self.encoder((self.proj(z) + self.pos.weight).flatten(0, 1)).unflatten(0, (-1, CH)).flatten(2)
        return (z @ self.head_w + self.head_b).transpose(1, 2) * std + mean


def o_own_patchtst(s):
    t = {"model.encoder.positional_encoder.position_enc": s["pos.weight"]}
    copy(s, t, [("proj", "model.encoder.embedder.input_embedding")])
    t["head.projection.weight"], t["head.projection.bias"] = s["head_w"].T, s["head_b"]
    for i in range(LAYERS):
        a, b = f"encoder.layers.{i}.", f"model.encoder.layers.{i}."
        for e in WB:
            for n, v in zip("qkv", s[f"{a}self_attn.in_proj_{e}"].chunk(3), strict=True):
                t[f"{b}self_attn.{n}_proj.{e}"] = v
        pairs = [("self_attn.out_proj", "self_attn.out_proj"), ("linear1", "ff.0"), ("linear2", "ff.3")]
        pairs += [("norm1", "norm_sublayer1"), ("norm2", "norm_sublayer3")]
        copy(s, t, [(a + x, b + y) for x, y in pairs])
    return t


case(
    name="patchtst: own around torch.nn.TransformerEncoder -> transformers",
    modality="timeseries",
    family="patchtst",
    source=lambda: shake(OwnPatchTST(), 203),
    target=lambda: hf_patchtst(204, num_input_channels=CH, norm_type="layernorm", pre_norm=True, scaling="std"),
    inputs=lambda seed: randn(seed, 4, LEN, CH).cumsum(1),
    run_source=call,
    run_target=lambda m, x: m(x).prediction_outputs,
    oracle=o_own_patchtst,
    note="in_proj splits, and k and v come before q; the head is x @ W; an embedding as a position table",
)


# ---------------------------------------------------------------- 3 Informer: neuralforecast -> own


class FusedAttention(nn.Module):
    """Keys and values in one Linear. As in the reference, an Informer's heads are not moved back before the output."""

    def __init__(self, d=D):
        super().__init__()
        self.mix = False
        self.q, self.kv, self.o = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)

    def forward(self, x, y, causal=False):
        q, k, v = (heads(t) for t in (self.q(x), *self.kv(y).chunk(2, -1)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.o(y.reshape(x.shape) if self.mix else unheads(y))


class Layer(nn.Module):
    """Post-norm; with cross-attention in a decoder."""

    def __init__(self, act, cross=False):
        super().__init__()
        self.act, self.causal = act, False
        self.ff_in, self.ff_out, self.ff_norm = nn.Linear(D, FF), nn.Linear(FF, D), nn.LayerNorm(D)
        if cross:
            self.cross, self.cross_norm = FusedAttention(), nn.LayerNorm(D)
        self.attn, self.attn_norm = FusedAttention(), nn.LayerNorm(D)

    def forward(self, x, memory=None):
        x = self.attn_norm(x + self.attn(x, x, self.causal))
        if memory is not None:
            x = self.cross_norm(x + self.cross(x, memory))
        return self.ff_norm(x + self.ff_out(self.act(self.ff_in(x))))


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.marks = nn.Linear(MARKS, D, bias=False)
        self.value = nn.Linear(3, D, bias=False)
        self.register_buffer("pe", sincos(64, D), persistent=False)

    def forward(self, y, marks):
        neighbours = torch.cat([y.roll(1, 1), y, y.roll(-1, 1)], -1)
        return self.value(neighbours) + self.pe[: y.shape[1]] + self.marks(marks)


class OwnForecaster(nn.Module):
    """An encoder-decoder forecaster, with an Informer's distilling between encoder layers if asked."""

    def __init__(self, act, distil, decoders=1):
        super().__init__()
        self.enc_in, self.dec_in = Embed(), Embed()
        self.encoder = nn.ModuleList([Layer(act) for _ in range(LAYERS)])
        self.decoder = nn.ModuleList([Layer(act, cross=True) for _ in range(decoders)])
        for layer in self.decoder:
            layer.causal = distil
        for m in self.modules():
            if isinstance(m, FusedAttention):
                m.mix = distil
        if distil:
            self.distil = nn.ModuleList([nn.Conv1d(D, D, 3) for _ in range(LAYERS - 1)])
            self.distil_norm = nn.ModuleList([nn.BatchNorm1d(D) for _ in range(LAYERS - 1)])
        self.enc_norm, self.dec_norm, self.out = nn.LayerNorm(D), nn.LayerNorm(D), nn.Linear(D, 1)

    def forward(self, y, marks):
        x = self.enc_in(y, marks[:, :LEN])
        for i, layer in enumerate(self.encoder):
            x = layer(x)
            if hasattr(self, "distil") and i < LAYERS - 1:
                x = self.distil[i](F.pad(x.transpose(1, 2), (2, 2), mode="circular"))
                x = F.max_pool1d(F.elu(self.distil_norm[i](x)), 3, 2, 1).transpose(1, 2)
        memory = self.enc_norm(x)
        x = self.dec_in(torch.cat([y[:, -LAB:], y.new_zeros(len(y), HOR, 1)], 1), marks[:, -(LAB + HOR) :])
        for layer in self.decoder:
            x = layer(x, memory)
        return self.out(self.dec_norm(x))[:, -HOR:]


def o_attention(s, t, a, b):
    copy(s, t, [(a + "query_projection", b + "q"), (a + "out_projection", b + "o")])
    join(s, t, [a + "key_projection", a + "value_projection"], b + "kv.")


def o_forecaster(s, decoders=1):
    t = {}
    for n in ("enc", "dec"):
        w = s[f"{n}_embedding.value_embedding.tokenConv.weight"]
        t[f"{n}_in.value.weight"] = w.mT.flatten(1)
        copy(s, t, [(f"{n}_embedding.temporal_embedding.embed", f"{n}_in.marks"), (f"{n}oder.norm", f"{n}_norm")])
    copy(s, t, [("decoder.projection", "out")])
    for i in range(LAYERS):
        copy(s, t, [(f"encoder.conv_layers.{i}.downConv", f"distil.{i}")])
        copy(s, t, [(f"encoder.conv_layers.{i}.norm", f"distil_norm.{i}")], BN)
        a, b = f"encoder.attn_layers.{i}.", f"encoder.{i}."
        o_attention(s, t, a + "attention.", b + "attn.")
        copy(s, t, [(a + "conv1", b + "ff_in"), (a + "conv2", b + "ff_out")], fix=lambda w: w[..., 0])
        copy(s, t, [(a + "norm1", b + "attn_norm"), (a + "norm2", b + "ff_norm")])
    for i in range(decoders):
        a, b = f"decoder.layers.{i}.", f"decoder.{i}."
        o_attention(s, t, a + "self_attention.", b + "attn.")
        o_attention(s, t, a + "cross_attention.", b + "cross.")
        copy(s, t, [(a + "conv1", b + "ff_in"), (a + "conv2", b + "ff_out")], fix=lambda w: w[..., 0])
        copy(s, t, [(a + "norm1", b + "attn_norm"), (a + "norm2", b + "cross_norm"), (a + "norm3", b + "ff_norm")])
    return t


def nf_seq2seq(cls, seed, **kw):
    return nf(
        cls,
        seed,
        h=HOR,
        input_size=LEN,
        futr_exog_list=FUTR,
        hidden_size=D,
        dropout=0.0,
        n_head=H,
        conv_hidden_size=FF,
        encoder_layers=LAYERS,
        **kw,
    )


case(
    name="informer: neuralforecast -> own (fused k/v, Linear feed-forward, distilling)",
    modality="timeseries",
    family="informer",
    source=lambda: nf_seq2seq("Informer", 205, factor=8),  # samples every key, and takes every query
    target=lambda: shake(OwnForecaster(F.gelu, True), 206),
    inputs=marked,
    run_source=run_nf,
    run_target=star,
    oracle=o_forecaster,
    note="1x1 convs become Linear, the token convolution a Linear on three neighbours; norm2 is cross-"
    "attention in the decoder and the feed-forward in the encoder; encoder and decoder embeddings of equal shapes",
)


# ---------------------------------------------------------------- 4 Transformer: neuralforecast -> own

case(
    name="transformer: neuralforecast VanillaTransformer -> own (fused k/v, Linear feed-forward, two decoder layers)",
    modality="timeseries",
    family="transformer",
    source=lambda: nf_seq2seq("VanillaTransformer", 207, activation="relu", decoder_layers=2),
    target=lambda: shake(OwnForecaster(F.relu, False, 2), 208),
    inputs=marked,
    run_source=run_nf,
    run_target=star,
    oracle=lambda s: o_forecaster(s, 2),
    note="six attentions of one shape, three norms a decoder layer; cross before self in the target",
)


# ---------------------------------------------------------------- 5 Informer: transformers -> own (TSLib style)


class AttentionLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_projection, self.key_projection = nn.Linear(D, D), nn.Linear(D, D)
        self.value_projection, self.out_projection = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = (heads(p(x)) for p in (self.query_projection, self.key_projection, self.value_projection))
        return self.out_projection(unheads(((q @ k.mT) / (D // H) ** 0.5).softmax(-1) @ v))


class EncoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = AttentionLayer()
        self.conv1, self.conv2 = nn.Conv1d(D, FF, 1), nn.Conv1d(FF, D, 1)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.conv2(F.gelu(self.conv1(x.transpose(1, 2)))).transpose(1, 2))


class ConvLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.downConv = nn.Conv1d(D, D, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x):
        return F.max_pool1d(F.elu(self.norm(self.downConv(x.transpose(1, 2)))), 3, 2, 1).transpose(1, 2)


FEATURES = 11


class Classifier(nn.Module):
    """A classifier of series on an Informer's encoder."""

    def __init__(self):
        super().__init__()
        self.enc_embedding = node(value_embedding=nn.Conv1d(FEATURES, D, 1, bias=False), norm=nn.LayerNorm(D))
        self.enc_embedding.position = nn.Parameter(torch.zeros(1, LEN, D))
        self.encoder = node(
            attn_layers=nn.ModuleList([EncoderLayer() for _ in range(3)]),
            conv_layers=nn.ModuleList([ConvLayer() for _ in range(2)]),
        )
        self.projection = nn.Linear(D, 5)

    def encode(self, x):
        e = self.enc_embedding
        x = e.norm(e.value_embedding(x.transpose(1, 2)).transpose(1, 2) + e.position)
        for i, layer in enumerate(self.encoder.attn_layers):
            x = layer(x)
            x = self.encoder.conv_layers[i](x) if i < 2 else x
        return x

    def forward(self, x):
        return self.projection(self.encode(x).mean(1))


def hf_informer(seed):
    cfg = T.InformerConfig(
        prediction_length=HOR,
        context_length=LEN,
        lags_sequence=[1, 2, 3, 4, 5],
        num_time_features=4,
        d_model=D,
        encoder_layers=3,
        decoder_layers=1,
        encoder_attention_heads=H,
        decoder_attention_heads=H,
        encoder_ffn_dim=FF,
        decoder_ffn_dim=FF,
        sampling_factor=8,
        dropout=0.0,
    )
    return shake(T.InformerForPrediction(cfg), seed)


def o_hf_informer(s):
    a = "model.encoder."
    t = {"enc_embedding.value_embedding.weight": s[a + "value_embedding.value_projection.weight"][..., None]}
    t["enc_embedding.position"] = s[a + "embed_positions.weight"][None, :LEN]
    copy(s, t, [(a + "layernorm_embedding", "enc_embedding.norm")])
    for i in range(3):
        a, b = f"model.encoder.layers.{i}.", f"encoder.attn_layers.{i}."
        for x, y in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
            copy(s, t, [(f"{a}self_attn.{x}_proj", f"{b}attention.{y}_projection")])
        copy(s, t, [(a + "self_attn_layer_norm", b + "norm1"), (a + "final_layer_norm", b + "norm2")])
        copy(s, t, [(a + "fc1", b + "conv1"), (a + "fc2", b + "conv2")], fix=lambda w: w[..., None])
        for x in ("downConv", "norm"):
            copy(s, t, [(f"model.encoder.conv_layers.{i}.{x}", f"encoder.conv_layers.{i}.{x}")], BN)
    return t


case(
    name="informer: transformers encoder -> own classifier (Time-Series-Library style)",
    modality="timeseries",
    family="informer",
    source=lambda: hf_informer(209),
    target=lambda: shake(Classifier(), 210),
    inputs=lambda seed: randn(seed, 3, LEN, FEATURES),
    run_source=lambda m, x: m.model.encoder(inputs_embeds=x).last_hidden_state,
    run_target=lambda m, x: m.encode(x),
    oracle=o_hf_informer,
    note="Linear becomes a 1x1 conv; positions are the first rows of a longer table; the source's decoder has the same "
    "names and shapes; fresh head",
)


# ---------------------------------------------------------------- 6 Autoformer: neuralforecast -> own

WINDOW = 5


def decompose(x):
    """Seasonal part and trend, by a moving average with repeated ends."""
    k = WINDOW // 2
    y = torch.cat([x[:, :1].expand(-1, k, -1), x, x[:, -1:].expand(-1, k, -1)], 1)
    trend = F.avg_pool1d(y.transpose(1, 2), WINDOW, 1).transpose(1, 2)
    return x - trend, trend


class AutoCorrelation(nn.Module):
    def __init__(self, factor=2):
        super().__init__()
        self.factor = factor
        self.qkv_w, self.qkv_b = nn.Parameter(torch.zeros(3, D, D)), nn.Parameter(torch.zeros(3, D))
        self.merge = nn.Linear(D, D)

    def forward(self, x, y):
        length, (q, k, v) = x.shape[1], (z @ w + b for z, w, b in zip((x, y, y), self.qkv_w, self.qkv_b, strict=True))
        k, v = (F.pad(z, (0, 0, 0, max(0, length - z.shape[1])))[:, :length] for z in (k, v))
        spectrum = torch.fft.rfft(q, dim=1) * torch.fft.rfft(k, dim=1).conj()
        corr = torch.fft.irfft(spectrum, n=length, dim=1).mean(-1)
        weight, delay = corr.topk(int(self.factor * math.log(length)), -1)
        at = (torch.arange(length)[None, None] + delay[..., None]) % length  # batch, k, time
        rolled = v[torch.arange(len(v))[:, None, None], at]
        return self.merge((weight.softmax(-1)[..., None, None] * rolled).sum(1))


class AutoLayer(nn.Module):
    def __init__(self, cross=False):
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(D, FF, bias=False), nn.GELU(), nn.Linear(FF, D, bias=False))
        self.auto = AutoCorrelation()
        if cross:
            self.cross = AutoCorrelation()
            self.trend = nn.Conv1d(D, 1, 3, padding=1, padding_mode="circular", bias=False)

    def forward(self, x, memory=None):
        x, t1 = decompose(x + self.auto(x, x))
        if memory is None:
            return decompose(x + self.ff(x))[0]
        x, t2 = decompose(x + self.cross(x, memory))
        x, t3 = decompose(x + self.ff(x))
        return x, self.trend((t1 + t2 + t3).transpose(1, 2)).transpose(1, 2)


class SeasonalNorm(nn.LayerNorm):
    def forward(self, x):
        x = super().forward(x)
        return x - x.mean(1, keepdim=True)


class OwnAutoformer(nn.Module):
    def __init__(self):
        super().__init__()
        conv = {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "bias": False}
        self.tokens = nn.ModuleDict({n: nn.Conv1d(1, D, **conv) for n in ("dec", "enc")})
        self.time = nn.ModuleDict({n: nn.Linear(MARKS, D, bias=False) for n in ("dec", "enc")})
        self.dec, self.enc = nn.ModuleList([AutoLayer(True)]), nn.ModuleList([AutoLayer() for _ in range(LAYERS)])
        self.norms = nn.ModuleDict({n: SeasonalNorm(D) for n in ("dec", "enc")})
        self.out = nn.Linear(D, 1)

    def embed(self, side, y, marks):
        return self.tokens[side](y.transpose(1, 2)).transpose(1, 2) + self.time[side](marks)

    def forward(self, y, marks):
        x = self.embed("enc", y, marks[:, :LEN])
        for layer in self.enc:
            x = layer(x)
        memory = self.norms["enc"](x)
        season, trend = (z[:, -LAB:] for z in decompose(y))
        trend = torch.cat([trend, y.mean(1, keepdim=True).expand(-1, HOR, -1)], 1)
        x = self.embed("dec", F.pad(season, (0, 0, 0, HOR)), marks[:, -(LAB + HOR) :])
        for layer in self.dec:
            x, part = layer(x, memory)
            trend = trend + part
        return (self.out(self.norms["dec"](x)) + trend)[:, -HOR:]


def o_autoformer(s):
    t = {}

    def auto(a, b):
        names = [f"{a}{n}_projection" for n in ("query", "key", "value")]
        t[b + "qkv_w"] = torch.stack([s[n + ".weight"].T for n in names])
        t[b + "qkv_b"] = torch.stack([s[n + ".bias"] for n in names])
        copy(s, t, [(a + "out_projection", b + "merge")])

    for n in ("enc", "dec"):
        copy(s, t, [(f"{n}_embedding.value_embedding.tokenConv", f"tokens.{n}")])
        copy(
            s, t, [(f"{n}_embedding.temporal_embedding.embed", f"time.{n}"), (f"{n}oder.norm.layernorm", f"norms.{n}")]
        )
    copy(s, t, [("decoder.projection", "out"), ("decoder.layers.0.projection", "dec.0.trend")])
    auto("decoder.layers.0.self_attention.", "dec.0.auto.")
    auto("decoder.layers.0.cross_attention.", "dec.0.cross.")
    for i in range(LAYERS):
        auto(f"encoder.attn_layers.{i}.attention.", f"enc.{i}.auto.")
    for a, b in [("decoder.layers.0", "dec.0")] + [(f"encoder.attn_layers.{i}", f"enc.{i}") for i in range(LAYERS)]:
        copy(s, t, [(a + ".conv1", b + ".ff.0"), (a + ".conv2", b + ".ff.2")], fix=lambda w: w[..., 0])
    return t


case(
    name="autoformer: neuralforecast -> own (stacked x @ W, Linear feed-forward, decoder first)",
    modality="timeseries",
    family="autoformer",
    source=lambda: nf_seq2seq("Autoformer", 211, factor=2, MovingAvg_window=WINDOW, activation="gelu"),
    target=lambda: shake(OwnAutoformer(), 212),
    inputs=marked,
    run_source=run_nf,
    run_target=star,
    oracle=o_autoformer,
    note="q, k, v as one [3, in, out] stack; heads do not matter (correlations are averaged); 1x1 convs become Linear; "
    "the trend's convolution and the last projection have one name",
)


# ---------------------------------------------------------------- 7 TimesNet: own -> neuralforecast

TD, TF = 16, 24


class Inception(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.k1, self.k3, self.k5 = (nn.Conv2d(i, o, k, padding=k // 2) for k in (1, 3, 5))

    def forward(self, x):
        return (self.k1(x) + self.k3(x) + self.k5(x)) / 3


class OwnTimesNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(TD, 1)
        self.extend = nn.Conv1d(LEN, LEN + HOR, 1)
        self.norm = nn.LayerNorm(TD)
        self.calendar = nn.Linear(MARKS, TD, bias=False)
        self.token = nn.Linear(3, TD, bias=False)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"widen": Inception(TD, TF), "narrow": Inception(TF, TD)}) for _ in range(LAYERS)]
        )

    def period(self, b, x, p):
        rows = -(-x.shape[1] // p)
        z = F.pad(x, (0, 0, 0, rows * p - x.shape[1])).transpose(1, 2).unflatten(2, (rows, p))
        return b["narrow"](F.gelu(b["widen"](z))).flatten(2).transpose(1, 2)[:, : x.shape[1]]

    def forward(self, y, marks):
        x = self.token(torch.cat([y.roll(1, 1), y, y.roll(-1, 1)], -1))
        x = x + sincos(LEN, TD).to(x) + self.calendar(marks[:, :LEN])
        x = self.extend(x)
        for b in self.blocks:
            amp = torch.fft.rfft(x, dim=1).abs().mean(-1)
            score = amp.mean(0)
            score[0] = 0
            top = score.topk(2)[1]
            maps = torch.stack([self.period(b, x, x.shape[1] // f) for f in top.tolist()], -1)
            x = self.norm(x + (maps * amp[:, top].softmax(1)[:, None, None]).sum(-1))
        return self.head(x)[:, -HOR:]


def o_timesnet(s):
    t = {"enc_embedding.value_embedding.tokenConv.weight": s["token.weight"][:, None]}
    copy(s, t, [("calendar", "enc_embedding.temporal_embedding.embed"), ("norm", "layer_norm"), ("head", "projection")])
    copy(s, t, [("extend", "predict_linear")], fix=lambda w: w[..., 0])
    for i in range(LAYERS):
        for a, b in (("widen", 0), ("narrow", 2)):
            copy(s, t, [(f"blocks.{i}.{a}.k{2 * k + 1}", f"model.{i}.conv.{b}.kernels.{k}") for k in range(3)])
    return t


case(
    name="timesnet: own (kernels by name, 1x1 conv over time) -> neuralforecast",
    modality="timeseries",
    family="timesnet",
    source=lambda: shake(OwnTimesNet(), 213),
    target=lambda: nf(
        "TimesNet",
        214,
        h=HOR,
        input_size=LEN,
        futr_exog_list=FUTR,
        hidden_size=TD,
        dropout=0.0,
        conv_hidden_size=TF,
        top_k=2,
        num_kernels=3,
        encoder_layers=LAYERS,
    ),
    inputs=marked,
    run_source=star,
    run_target=run_nf,
    oracle=o_timesnet,
    note="a Linear on three neighbours becomes a circular convolution; kernels' biases only count as a sum; the "
    "target's position table is a constant to leave alone",
)


# ---------------------------------------------------------------- 8 GRU: neuralforecast -> own

U, CIN = 16, 3


class TextbookGRU(nn.Module):
    """One Linear a gate and an input, as the equations are written."""

    def __init__(self, i, u=U):
        super().__init__()
        self.W_z, self.U_z = nn.Linear(i, u), nn.Linear(u, u, bias=False)
        self.W_r, self.U_r = nn.Linear(i, u), nn.Linear(u, u, bias=False)
        self.W_h, self.U_h = nn.Linear(i, u), nn.Linear(u, u)

    def forward(self, x):
        h, out = x.new_zeros(len(x), self.U_z.in_features), []
        for v in x.unbind(1):
            z, r = torch.sigmoid(self.W_z(v) + self.U_z(h)), torch.sigmoid(self.W_r(v) + self.U_r(h))
            h = z * h + (1 - z) * torch.tanh(self.W_h(v) + r * self.U_h(h))
            out.append(h)
        return torch.stack(out, 1)


class GRUForecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Sequential(nn.Linear(U, 20), nn.ReLU(), nn.Linear(20, 1))
        self.rnn = nn.Sequential(TextbookGRU(CIN), TextbookGRU(U))

    def forward(self, x):
        return self.out(self.rnn(x)[:, -HOR:])


def o_gru(s):
    t = {}
    copy(s, t, [("mlp_decoder.layers.0", "out.0"), ("mlp_decoder.layers.3", "out.2")])
    for i in range(2):
        wi, wh, bi, bh = (
            s[f"hist_encoder.{n}_l{i}"].chunk(3) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        for j, g in enumerate("rzh"):
            t[f"rnn.{i}.W_{g}.weight"], t[f"rnn.{i}.U_{g}.weight"] = wi[j], wh[j]
            t[f"rnn.{i}.W_{g}.bias"] = bi[j] if g == "h" else bi[j] + bh[j]
        t[f"rnn.{i}.U_h.bias"] = bh[2]
    return t


case(
    name="gru: neuralforecast GRU -> own (a matrix a gate)",
    modality="timeseries",
    family="gru",
    source=lambda: nf(
        "GRU",
        215,
        h=HOR,
        input_size=LEN,
        encoder_hidden_size=U,
        encoder_n_layers=2,
        decoder_hidden_size=20,
        decoder_layers=2,
        decoder_activation="ReLU",
        hist_exog_list=["a", "b"],
        recurrent=False,
    ),
    target=lambda: shake(GRUForecaster(), 216),
    inputs=lambda seed: randn(seed, 3, LEN, CIN),
    run_source=with_history,
    run_target=call,
    oracle=o_gru,
    note="gates r, z, n become z, r, h; two biases add up for two gates and stay apart for the third",
)


# ---------------------------------------------------------------- 9 GRU: torch -> own (Keras layout)


class TorchGRU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(CIN, U, num_layers=2, batch_first=True)
        self.fc = nn.Linear(U, HOR)

    def forward(self, x):
        return self.fc(self.gru(x)[1][-1])


class KerasGRU(nn.Module):
    """Keras with reset_after: gates z, r, h, kernel (in, 3u), recurrent_kernel (u, 3u), bias (2, 3u)."""

    def __init__(self, i, u=U):
        super().__init__()
        self.kernel, self.recurrent_kernel = nn.Parameter(torch.zeros(i, 3 * u)), nn.Parameter(torch.zeros(u, 3 * u))
        self.bias = nn.Parameter(torch.zeros(2, 3 * u))

    def forward(self, x):
        h, out = x.new_zeros(len(x), self.recurrent_kernel.shape[0]), []
        for v in x.unbind(1):
            xz, xr, xh = (v @ self.kernel + self.bias[0]).chunk(3, -1)
            hz, hr, hh = (h @ self.recurrent_kernel + self.bias[1]).chunk(3, -1)
            z, r = (xz + hz).sigmoid(), (xr + hr).sigmoid()
            h = z * h + (1 - z) * torch.tanh(xh + r * hh)
            out.append(h)
        return torch.stack(out, 1)


class KerasForecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = node(kernel=nn.Parameter(torch.zeros(U, HOR)), bias=nn.Parameter(torch.zeros(HOR)))
        self.gru, self.gru_1 = KerasGRU(CIN), KerasGRU(U)

    def forward(self, x):
        return self.gru_1(self.gru(x))[:, -1] @ self.dense.kernel + self.dense.bias


def o_keras_gru(s):
    def zrh(w):
        r, z, n = w.chunk(3)
        return torch.cat([z, r, n])

    t = {"dense.kernel": s["fc.weight"].T, "dense.bias": s["fc.bias"]}
    for i, n in enumerate(("gru", "gru_1")):
        t[n + ".kernel"] = zrh(s[f"gru.weight_ih_l{i}"]).T
        t[n + ".recurrent_kernel"] = zrh(s[f"gru.weight_hh_l{i}"]).T
        t[n + ".bias"] = torch.stack([zrh(s[f"gru.bias_{e}_l{i}"]) for e in ("ih", "hh")])
    return t


case(
    name="gru: torch.nn.GRU forecaster -> own (Keras layout, reset_after)",
    modality="timeseries",
    family="gru",
    source=lambda: shake(TorchGRU(), 217),
    target=lambda: shake(KerasForecaster(), 218),
    inputs=lambda seed: randn(seed, 3, LEN, CIN),
    run_source=call,
    run_target=call,
    oracle=o_keras_gru,
    note="gates in another order, all matrices transposed, two biases become the rows of one parameter",
)


# ---------------------------------------------------------------- 10 LSTM: own -> neuralforecast


class CombinedCell(nn.Module):
    """One Linear on [x, h] for all gates, in the order i, f, o, g."""

    def __init__(self, i, u=U):
        super().__init__()
        self.gates = nn.Linear(i + u, 4 * u)

    def forward(self, x, state):
        h, c = state
        i, f, o, g = self.gates(torch.cat([x, h], -1)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class CellForecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.decode = nn.ModuleList([nn.Linear(U, 20), nn.Linear(20, 1)])
        self.cells = nn.ModuleList([CombinedCell(CIN), CombinedCell(U)])

    def forward(self, x):
        states, out = [(x.new_zeros(len(x), U),) * 2 for _ in self.cells], []
        for v in x.unbind(1):
            for i, cell in enumerate(self.cells):
                states[i] = cell(v, states[i])
                v = states[i][0]
            out.append(v)
        return self.decode[1](F.relu(self.decode[0](torch.stack(out[-HOR:], 1))))


def o_lstm(s):
    t = {}
    copy(s, t, [("decode.0", "mlp_decoder.layers.0"), ("decode.1", "mlp_decoder.layers.3")])
    for k in range(2):
        w, b = (s[f"cells.{k}.gates.{e}"].chunk(4) for e in WB)
        w, b = (torch.cat([v[0], v[1], v[3], v[2]]) for v in (w, b))
        t[f"hist_encoder.weight_ih_l{k}"], t[f"hist_encoder.weight_hh_l{k}"] = w[:, :-U], w[:, -U:]
        t[f"hist_encoder.bias_ih_l{k}"], t[f"hist_encoder.bias_hh_l{k}"] = b, torch.zeros_like(b)
    return t


case(
    name="lstm: own (one Linear on [x, h] for all gates, looped cells) -> neuralforecast LSTM",
    modality="timeseries",
    family="lstm",
    source=lambda: shake(CellForecaster(), 219),
    target=lambda: nf(
        "LSTM",
        220,
        h=HOR,
        input_size=LEN,
        encoder_hidden_size=U,
        encoder_n_layers=2,
        decoder_hidden_size=20,
        decoder_layers=2,
        decoder_activation="ReLU",
        hist_exog_list=["a", "b"],
    ),
    inputs=lambda seed: randn(seed, 3, LEN, CIN),
    run_source=call,
    run_target=with_history,
    oracle=o_lstm,
    note="gates i, f, o, g become i, f, g, o; columns split; the second bias has no source and must be zero",
)


# ---------------------------------------------------------------- 11 TCN: own -> neuralforecast


class WeightNormTCN(nn.Module):
    def __init__(self, width=24, dilations=(1, 2, 4)):
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.dilations = dilations
        self.stack = nn.ModuleList([norm(nn.Conv1d(CIN if d == 1 else width, width, 3, dilation=d)) for d in dilations])
        self.w_time, self.b_time = nn.Parameter(torch.zeros(LEN, HOR)), nn.Parameter(torch.zeros(HOR))
        self.mlp = nn.Sequential(nn.Linear(width, 20), nn.ReLU(), nn.Linear(20, 1))

    def forward(self, x):
        x = x.transpose(1, 2)
        for conv, d in zip(self.stack, self.dilations, strict=True):
            x = F.relu(conv(F.pad(x, (2 * d, 0))))
        return self.mlp((x @ self.w_time + self.b_time).transpose(1, 2))


def o_tcn(s):
    t = {"context_adapter.weight": s["w_time"].T, "context_adapter.bias": s["b_time"]}
    copy(s, t, [("mlp.0", "mlp_decoder.layers.0"), ("mlp.2", "mlp_decoder.layers.3")])
    for i in range(3):
        g, v = (s[f"stack.{i}.parametrizations.weight.original{j}"] for j in (0, 1))
        for n in ("conv", "causalconv.0"):
            a = f"hist_encoder.tcn.{i}.{n}."
            t[a + "weight"], t[a + "bias"] = g * v / v.flatten(1).norm(dim=1)[:, None, None], s[f"stack.{i}.bias"]
    return t


case(
    name="tcn: own with weight norm -> neuralforecast TCN",
    modality="timeseries",
    family="tcn",
    source=lambda: shake(WeightNormTCN(), 221),
    target=lambda: nf(
        "TCN",
        222,
        h=HOR,
        input_size=LEN,
        kernel_size=3,
        dilations=[1, 2, 4],
        encoder_hidden_size=24,
        decoder_hidden_size=20,
        decoder_layers=2,
        decoder_activation="ReLU",
        hist_exog_list=["a", "b"],
    ),
    inputs=lambda seed: randn(seed, 3, LEN, CIN),
    run_source=call,
    run_target=with_history,
    oracle=o_tcn,
    note="weights are computed from gain and direction; the target names every conv twice (tied)",
)


# ---------------------------------------------------------------- 12 TimeSeriesTransformer: transformers -> own


class OwnSeriesTransformer(nn.Module):
    """Around torch.nn's encoder and decoder; a quantile head of its own."""

    def __init__(self):
        super().__init__()
        kw = {"dropout": 0.0, "activation": "gelu", "batch_first": True}
        self.quantiles = nn.Linear(D, 3)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, H, FF, **kw), LAYERS)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(D, H, FF, **kw), LAYERS, enable_nested_tensor=False
        )
        self.past = node(lin=nn.Linear(FEATURES, D, bias=False), pos=nn.Embedding(LEN, D), norm=nn.LayerNorm(D))
        self.future = node(lin=nn.Linear(FEATURES, D, bias=False), pos=nn.Embedding(HOR, D), norm=nn.LayerNorm(D))

    def decode(self, past, future):
        x, y = (e.norm(e.lin(z) + e.pos.weight) for e, z in ((self.past, past), (self.future, future)))
        mask = torch.ones(HOR, HOR, dtype=torch.bool).triu(1)
        return self.decoder(y, self.encoder(x), tgt_mask=mask)

    def forward(self, past, future):
        return self.quantiles(self.decode(past, future))


def hf_tst(seed):
    cfg = T.TimeSeriesTransformerConfig(
        prediction_length=HOR,
        context_length=LEN,
        lags_sequence=[1, 2, 3, 4, 5],
        num_time_features=4,
        d_model=D,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=H,
        decoder_attention_heads=H,
        encoder_ffn_dim=FF,
        decoder_ffn_dim=FF,
        dropout=0.0,
    )
    return shake(T.TimeSeriesTransformerForPrediction(cfg), seed)


def run_tst(m, x):
    memory = m.model.encoder(inputs_embeds=x[0]).last_hidden_state
    return m.model.decoder(inputs_embeds=x[1], encoder_hidden_states=memory, use_cache=False).last_hidden_state


def o_tst(s):
    t = {}
    for side, own in (("encoder", "past"), ("decoder", "future")):
        a = f"model.{side}."
        copy(s, t, [(a + "value_embedding.value_projection", own + ".lin"), (a + "layernorm_embedding", own + ".norm")])
        pos = s[a + "embed_positions.weight"]
        t[own + ".pos.weight"] = pos[:LEN] if own == "past" else pos[LEN : LEN + HOR]
        for i in range(LAYERS):
            a, b = f"model.{side}.layers.{i}.", f"{side}.layers.{i}."
            attns = [("self_attn", "self_attn"), ("encoder_attn", "multihead_attn")][: 1 if own == "past" else 2]
            for x, y in attns:
                join(s, t, [f"{a}{x}.{n}_proj" for n in "qkv"], f"{b}{y}.in_proj_")
                copy(s, t, [(f"{a}{x}.out_proj", f"{b}{y}.out_proj")])
            norms = ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"]
            if own == "past":
                del norms[1]
            copy(s, t, [(a + n, f"{b}norm{j + 1}") for j, n in enumerate(norms)])
            copy(s, t, [(a + "fc1", b + "linear1"), (a + "fc2", b + "linear2")])
    return t


case(
    name="time-series-transformer: transformers -> own around torch.nn.TransformerEncoder and Decoder",
    modality="timeseries",
    family="transformer",
    source=lambda: hf_tst(223),
    target=lambda: shake(OwnSeriesTransformer(), 224),
    inputs=lambda seed: (randn(seed, 3, LEN, FEATURES), randn(seed + 1000, 3, HOR, FEATURES)),
    run_source=run_tst,
    run_target=lambda m, x: m.decode(*x),
    oracle=o_tst,
    note="positions are different slices of two tables (the decoder's starts at the context's end); k before q; "
    "norm2 means the feed-forward's or the cross-attention's; fresh head",
)
