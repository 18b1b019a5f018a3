"""Further cases: audio, in more of the styles that people write."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import transformers as T
from torch import nn

from tests.further_cases.audio import (
    ACTX,
    BUCKETS,
    CONVS,
    FAR,
    MELS,
    POSG,
    POSK,
    TCTX,
    VOCAB,
    WB,
    WF,
    WH,
    WL,
    D,
    H,
    L,
    W,
    case,
    folded,
    heads,
    hf_speech,
    hf_to_ta,
    hf_whisper,
    merge,
    move,
    oa_whisper,
    run_hf,
    ta_plain,
    ta_wavlm,
    wave,
    whisper_inputs,
)
from tests.graft_matrix.core import shake

SIZES = [1] + [c[0] for c in CONVS]


def par(*shape) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def sdpa(q, k, v, h, **kw):
    return merge(F.scaled_dot_product_attention(heads(q, h), heads(k, h), heads(v, h), **kw))


# ------------------------------------------------- 1 Whisper's decoder, keys and values of the audio in one matrix


def memory_inputs(seed):
    x = whisper_inputs(seed)
    g = torch.Generator().manual_seed(seed + 7)
    return {"audio": torch.randn(2, ACTX, D, generator=g), "tokens": x["tokens"]}


class StepLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.cross_q, self.cross_o = nn.Linear(D, D), nn.Linear(D, D)
        self.ffn = nn.ModuleDict({"norm": nn.LayerNorm(D), "w_in": nn.Linear(D, 4 * D), "w_out": nn.Linear(4 * D, D)})
        self.norm_cross, self.norm_self = nn.LayerNorm(D), nn.LayerNorm(D)
        self.self_qkv, self.self_o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x, k, v):
        x = x + self.self_o(sdpa(*self.self_qkv(self.norm_self(x)).chunk(3, -1), H, is_causal=True))
        x = x + self.cross_o(sdpa(self.cross_q(self.norm_cross(x)), k, v, H))
        f = self.ffn
        return x + f["w_out"](F.gelu(f["w_in"](f["norm"](x))))


class MemoryDecoder(nn.Module):
    """For serving: one product makes the keys of all layers, then the values of all layers."""

    def __init__(self):
        super().__init__()
        self.audio_kv = nn.Linear(D, 2 * L * D)
        self.layers = nn.ModuleList(StepLayer() for _ in range(L))
        self.norm, self.vocab = nn.LayerNorm(D), nn.Embedding(VOCAB, D)
        self.where = nn.Embedding(TCTX, D)

    def forward(self, tokens, audio):
        k, v = (z.chunk(L, -1) for z in self.audio_kv(audio).chunk(2, -1))
        x = self.vocab(tokens) + self.where(torch.arange(tokens.shape[1], device=tokens.device))
        for i, layer in enumerate(self.layers):
            x = layer(x, k[i], v[i])
        z = self.norm(x) @ self.vocab.weight.T
        return z - z.logsumexp(-1, keepdim=True)


def whisper_to_memory(s):
    d, zero = "model.decoder.", torch.zeros(D)
    c = d + "layers.{}.encoder_attn.{}_proj."
    out = {
        "audio_kv.weight": torch.cat([s[c.format(i, n) + "weight"] for n in "kv" for i in range(L)]),
        "audio_kv.bias": torch.cat([zero] * L + [s[c.format(i, "v") + "bias"] for i in range(L)]),
        **move(s, {d + "layer_norm": "norm", d + "embed_tokens": "vocab", d + "embed_positions": "where"}),
    }
    names = {
        "encoder_attn.q_proj": "cross_q",
        "encoder_attn.out_proj": "cross_o",
        "encoder_attn_layer_norm": "norm_cross",
        "self_attn.out_proj": "self_o",
        "self_attn_layer_norm": "norm_self",
        "fc1": "ffn.w_in",
        "fc2": "ffn.w_out",
        "final_layer_norm": "ffn.norm",
    }
    for i in range(L):
        a, b = f"{d}layers.{i}.", f"layers.{i}."
        for w in WB:
            out[f"{b}self_qkv.{w}"] = torch.cat([s.get(f"{a}self_attn.{n}_proj.{w}", zero) for n in "qkv"])
        out.update(move(s, {a + x: b + y for x, y in names.items()}))
    return out


case(
    name="memory-whisper-decoder: transformers -> own (cross keys, values of all layers in one Linear, log-probs)",
    family="whisper-decoder",
    note="k0, k1, v0, v1 stacked, key biases have no source; decoder half of a bigger source; tied by use",
    source=lambda: hf_whisper(101),
    target=lambda: shake(MemoryDecoder(), 102),
    inputs=memory_inputs,
    run_source=lambda m, x: m(
        encoder_outputs=(x["audio"],), decoder_input_ids=x["tokens"], use_cache=False
    ).logits.log_softmax(-1),
    run_target=lambda m, x: m(x["tokens"], x["audio"]),
    oracle=whisper_to_memory,
)

# ------------------------------------------------------ 2 Whisper's encoder, channels first, every Linear a 1x1 conv


class FirstNorm(nn.Module):
    """Layer norm over axis 1."""

    def __init__(self):
        super().__init__()
        self.bias, self.weight = par(D), nn.Parameter(torch.ones(D))

    def forward(self, x):
        x = x - x.mean(1, keepdim=True)
        return x * (x.pow(2).mean(1, keepdim=True) + 1e-5).rsqrt() * self.weight[:, None] + self.bias[:, None]


class FirstBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Conv1d(D, D, 1), nn.Conv1d(D, D, 1, bias=False), nn.Conv1d(D, D, 1)
        self.expand, self.contract, self.o = nn.Conv1d(D, 4 * D, 1), nn.Conv1d(4 * D, D, 1), nn.Conv1d(D, D, 1)
        self.pre_mlp, self.pre_attn = FirstNorm(), FirstNorm()

    def forward(self, x):
        y = self.pre_attn(x)
        q, k, v = (f(y).unflatten(1, (H, -1)) for f in (self.q, self.k, self.v))  # [B, H, d, T]
        w = (torch.einsum("bhdt,bhds->bhst", q, k) * (D // H) ** -0.5).softmax(2)
        x = x + self.o(torch.einsum("bhst,bhds->bhdt", w, v).flatten(1, 2))
        return x + self.contract(F.gelu(self.expand(self.pre_mlp(x))))


class FirstEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.subsample = nn.ModuleList([nn.Conv1d(MELS, D, 3, 1, 1), nn.Conv1d(D, D, 3, 2, 1)])
        self.positions = par(1, D, ACTX)
        self.blocks, self.last = nn.Sequential(*(FirstBlock() for _ in range(L))), FirstNorm()

    def forward(self, x):
        for conv in self.subsample:
            x = F.gelu(conv(x))
        return self.last(self.blocks(x + self.positions))


def first_to_oa(s):
    out = {
        "positional_embedding": s["positions"][0].T,
        **move(s, {"subsample.0": "conv1", "subsample.1": "conv2", "last": "ln_post"}),
    }
    names = {"q": "attn.query", "k": "attn.key", "v": "attn.value", "o": "attn.out", "expand": "mlp.0"}
    names.update({"contract": "mlp.2", "pre_attn": "attn_ln", "pre_mlp": "mlp_ln"})
    for i in range(L):
        done = move(s, {f"blocks.{i}.{x}": f"blocks.{i}.{y}" for x, y in names.items()})
        out.update({k: v[..., 0] if v.ndim == 3 else v for k, v in done.items()})
    return out


def oa_encoder(seed):
    from whisper.model import AudioEncoder

    return shake(AudioEncoder(MELS, ACTX, D, H, L), seed)


case(
    name="first-whisper-encoder: own (channels first, 1x1 convolutions) -> openai-whisper AudioEncoder",
    family="whisper-encoder",
    note="[out, in, 1] to Linear; positions [1, d, t] turned, a buffer in the target; norm over axis 1, bias first",
    source=lambda: shake(FirstEncoder(), 103),
    target=lambda: oa_encoder(104),
    inputs=whisper_inputs,
    run_source=lambda m, x: m(x["mel"]).mT,
    run_target=lambda m, x: m(x["mel"]),
    oracle=first_to_oa,
)

# ----------------------------------------------------------------- 3 whole Whisper, q and v biases by themselves


class QvAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_bias, self.v_bias = par(D), par(D)
        self.weight = par(3, D, D)
        self.project = nn.Linear(D, D)

    def forward(self, x, memory=None, mask=None):
        y = x if memory is None else memory
        q = F.linear(x, self.weight[0], self.q_bias)
        k, v = F.linear(y, self.weight[1]), F.linear(y, self.weight[2], self.v_bias)
        return self.project(sdpa(q, k, v, H, attn_mask=mask))


class QvBlock(nn.Module):
    def __init__(self, cross):
        super().__init__()
        self.listen = nn.ModuleList([nn.LayerNorm(D), QvAttention()]) if cross else None
        self.think = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        self.own = nn.ModuleList([nn.LayerNorm(D), QvAttention()])

    def forward(self, x, memory=None, mask=None):
        x = x + self.own[1](self.own[0](x), mask=mask)
        if self.listen is not None:
            x = x + self.listen[1](self.listen[0](x), memory)
        return x + self.think(x)


class QvWhisper(nn.Module):
    """The head is a Linear of its own; encoder positions are stored."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(D, VOCAB, bias=False)
        self.write = nn.ModuleDict({"blocks": nn.ModuleList(QvBlock(True) for _ in range(L)), "norm": nn.LayerNorm(D)})
        self.hear = nn.ModuleDict({"blocks": nn.ModuleList(QvBlock(False) for _ in range(L)), "norm": nn.LayerNorm(D)})
        self.conv = nn.ModuleList([nn.Conv1d(MELS, D, 3, 1, 1), nn.Conv1d(D, D, 3, 2, 1)])
        self.embed, self.pos = nn.Embedding(VOCAB, D), nn.ParameterDict({"text": par(TCTX, D), "audio": par(ACTX, D)})
        self.register_buffer("mask", torch.full((TCTX, TCTX), float("-inf")).triu(1))

    def forward(self, mel, tokens):
        m = F.gelu(self.conv[1](F.gelu(self.conv[0](mel)))).mT + self.pos["audio"]
        for block in self.hear["blocks"]:
            m = block(m)
        m, t = self.hear["norm"](m), tokens.shape[1]
        x = self.embed(tokens) + self.pos["text"][:t]
        for block in self.write["blocks"]:
            x = block(x, m, self.mask[:t, :t])
        return self.head(self.write["norm"](x))


def oa_to_qv(s):
    out = {
        "embed.weight": s["decoder.token_embedding.weight"],
        "head.weight": s["decoder.token_embedding.weight"],
        "pos.text": s["decoder.positional_embedding"],
        "pos.audio": s["encoder.positional_embedding"],
        **move(
            s,
            {
                "encoder.conv1": "conv.0",
                "encoder.conv2": "conv.1",
                "encoder.ln_post": "hear.norm",
                "decoder.ln": "write.norm",
            },
        ),
    }
    for side, to, kinds in (("encoder", "hear", ("",)), ("decoder", "write", ("", "cross_"))):
        for i in range(L):
            a, b = f"{side}.blocks.{i}.", f"{to}.blocks.{i}."
            out.update(move(s, {a + "mlp_ln": b + "think.0", a + "mlp.0": b + "think.1", a + "mlp.2": b + "think.3"}))
            for kind in kinds:
                p, q = f"{a}{kind}attn", b + ("listen" if kind else "own")
                out.update(move(s, {p + "_ln": q + ".0", p + ".out": q + ".1.project"}))
                out[q + ".1.weight"] = torch.stack([s[f"{p}.{n}.weight"] for n in ("query", "key", "value")])
                out[q + ".1.q_bias"], out[q + ".1.v_bias"] = s[p + ".query.bias"], s[p + ".value.bias"]
    return out


case(
    name="qv-whisper: openai-whisper -> own (weights [3, d, d], q_bias and v_bias, untied head)",
    family="whisper",
    note="q, k, v stacked, the two biases bare; one table copied to embedding and head; decoder listed first",
    source=lambda: oa_whisper(105),
    target=lambda: shake(QvWhisper(), 106),
    inputs=whisper_inputs,
    run_source=lambda m, x: m(x["mel"], x["tokens"]),
    run_target=lambda m, x: m(x["mel"], x["tokens"]),
    oracle=oa_to_qv,
)

# ------------------------------------------------------------- speech models with a head, from one configuration


def hf_head(cls, family, seed, **kw):
    return shake(getattr(T, cls)(hf_speech(family, seed, **kw).config), seed)


def speech_layer(s, a, b, names, attn):
    """attn: the target's name for the three projections in one, up to weight and bias."""
    out = {attn + w: torch.cat([s[f"{a}attention.{n}_proj.{w}"] for n in "qkv"]) for w in WB}
    return {**out, **move(s, {a + x: b + y for x, y in names.items()})}


class UnfoldFront(nn.Module):
    """Strided convolutions as one product on cut-out windows: [B, T, C * k] @ [C * k, out]."""

    def __init__(self):
        super().__init__()
        self.kernels = nn.ParameterList(par(SIZES[i] * k, o) for i, (o, k, _) in enumerate(CONVS))
        self.gn = nn.GroupNorm(SIZES[1], SIZES[1])

    def forward(self, wav):
        x = wav[..., None]
        for i, (_, k, s) in enumerate(CONVS):
            x = x.unfold(1, k, s).flatten(2) @ self.kernels[i]
            x = F.gelu(self.gn(x.mT).mT if i == 0 else x)
        return x


class CtcNet(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(W, WH, WF, 0.0, "gelu", batch_first=True)
        self.context = nn.TransformerEncoder(layer, WL, enable_nested_tensor=False)
        self.front = UnfoldFront()
        self.pre = nn.Sequential(nn.LayerNorm(SIZES[-1]), nn.Linear(SIZES[-1], W))
        self.place, self.place_norm = nn.Conv1d(W, W, POSK, padding=POSK // 2, groups=POSG), nn.LayerNorm(W)
        self.letters = nn.Linear(W, 13)

    def forward(self, wav):
        """Log-probabilities [T, B, letters], as torch's CTC loss wants them."""
        x = self.pre(self.front(wav))
        x = self.place_norm(x + F.gelu(self.place(x.mT)[..., :-1]).mT)
        return F.log_softmax(self.letters(self.context(x)), -1).transpose(0, 1)


def w2v_to_ctc(s):
    head = {"lm_head": "letters"}
    head = move(s, head)
    s = {k.removeprefix("wav2vec2."): v for k, v in s.items()}
    f = "feature_extractor.conv_layers."
    out = {
        **head,
        **{f"front.kernels.{i}": s[f"{f}{i}.conv.weight"].flatten(1).T for i in range(len(CONVS))},
        "place.weight": folded(s),
        "place.bias": s["encoder.pos_conv_embed.conv.bias"],
        **move(
            s,
            {
                f + "0.layer_norm": "front.gn",
                "feature_projection.layer_norm": "pre.0",
                "feature_projection.projection": "pre.1",
                "encoder.layer_norm": "place_norm",
            },
        ),
    }
    names = {
        "attention.out_proj": "self_attn.out_proj",
        "layer_norm": "norm1",
        "final_layer_norm": "norm2",
        "feed_forward.intermediate_dense": "linear1",
        "feed_forward.output_dense": "linear2",
    }
    for i in range(WL):
        b = f"context.layers.{i}."
        out.update(speech_layer(s, f"encoder.layers.{i}.", b, names, b + "self_attn.in_proj_"))
    return out


case(
    name="ctc-wav2vec2: transformers Wav2Vec2ForCTC -> own (windows @ W, torch encoder, log-probs [T, B, V])",
    family="wav2vec2-ctc",
    note="conv kernels flattened and turned; weight norm folded; final_layer_norm is norm2; context registered first",
    source=lambda: hf_head("Wav2Vec2ForCTC", "Wav2Vec2", 107),
    target=lambda: shake(CtcNet(), 108),
    inputs=wave,
    run_source=lambda m, x: m(x).logits.log_softmax(-1).transpose(0, 1),
    run_target=lambda m, x: m(x),
    oracle=w2v_to_ctc,
)

# -------------------------------------------------------- 5 Wav2Vec2 (pre-norm), own with heads apart -> transformers


class Ln(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.offset, self.scale = par(d), nn.Parameter(torch.ones(d))

    def forward(self, x):
        v, m = torch.var_mean(x, -1, keepdim=True, unbiased=False)
        return (x - m) / (v + 1e-5).sqrt() * self.scale + self.offset


class HaikuBlock(nn.Module):
    def __init__(self):
        super().__init__()
        k = W // WH
        self.attn = nn.ParameterDict({"b": par(WH, 3, k), "b_o": par(W), "w": par(W, WH, 3, k), "w_o": par(W, W)})
        self.mlp = nn.ParameterDict({"b_1": par(WF), "b_2": par(W), "w_1": par(W, WF), "w_2": par(WF, W)})
        self.ln_attn, self.ln_mlp = Ln(W), Ln(W)

    def forward(self, x):
        a, m = self.attn, self.mlp
        q, k, v = (torch.einsum("btd,dhnk->btnhk", self.ln_attn(x), a["w"]) + a["b"].transpose(0, 1)).unbind(2)
        w = (torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(W // WH)).softmax(-1)
        x = x + torch.einsum("bhts,bshd->bthd", w, v).flatten(2) @ a["w_o"] + a["b_o"]
        return x + F.gelu(self.ln_mlp(x) @ m["w_1"] + m["b_1"]) @ m["w_2"] + m["b_2"]


class HaikuSpeech(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({f"block_{i}": HaikuBlock() for i in range(WL)})
        self.convs = nn.ModuleList(nn.Conv1d(SIZES[i], o, k, s) for i, (o, k, s) in enumerate(CONVS))
        self.conv_norms = nn.ModuleList(Ln(o) for o, *_ in CONVS)
        self.ln_in, self.ln_out = Ln(SIZES[-1]), Ln(W)
        self.widen, self.pos = nn.Linear(SIZES[-1], W), nn.Conv1d(W, W, POSK, padding=POSK // 2, groups=POSG)

    def forward(self, wav):
        x = wav[..., None]
        for conv, norm in zip(self.convs, self.conv_norms, strict=True):
            x = F.gelu(norm(conv(x.mT).mT))
        x = self.widen(self.ln_in(x))
        x = x + F.gelu(self.pos(x.mT)[..., :-1]).mT
        for block in self.blocks.values():
            x = block(x)
        return self.ln_out(x)


def haiku_to_hf(s):
    def norm(a, b):
        return {b + ".weight": s[a + ".scale"], b + ".bias": s[a + ".offset"]}

    f, p = "feature_extractor.conv_layers.{}.", "encoder.pos_conv_embed.conv."
    w = s["pos.weight"]
    out = {
        p + "parametrizations.weight.original0": w.norm(dim=(0, 1), keepdim=True),
        p + "parametrizations.weight.original1": w,
        p + "bias": s["pos.bias"],
        **move(s, {"widen": "feature_projection.projection"}),
        **norm("ln_in", "feature_projection.layer_norm"),
        **norm("ln_out", "encoder.layer_norm"),
    }
    for i in range(len(CONVS)):
        out.update(move(s, {f"convs.{i}": f.format(i) + "conv"}))
        out.update(norm(f"conv_norms.{i}", f.format(i) + "layer_norm"))
    for i in range(WL):
        a, b = f"blocks.block_{i}.", f"encoder.layers.{i}."
        for j, n in enumerate("qkv"):
            out[f"{b}attention.{n}_proj.weight"] = s[a + "attn.w"][:, :, j].flatten(1).T
            out[f"{b}attention.{n}_proj.bias"] = s[a + "attn.b"][:, j].flatten()
        for x, y in (
            ("attn.{}_o", "attention.out_proj"),
            ("mlp.{}_1", "feed_forward.intermediate_dense"),
            ("mlp.{}_2", "feed_forward.output_dense"),
        ):
            out[f"{b}{y}.weight"], out[f"{b}{y}.bias"] = s[a + x.format("w")].T, s[a + x.format("b")]
        out.update({**norm(a + "ln_attn", b + "layer_norm"), **norm(a + "ln_mlp", b + "final_layer_norm")})
    return out


case(
    name="haiku-wav2vec2: own (Haiku-like arrays [d, heads, 3, d_head]) -> transformers (stable layer norm)",
    family="wav2vec2",
    note="heads before q, k, v; plain positional conv to gain and direction; offset, scale; mask vector has no source",
    source=lambda: shake(HaikuSpeech(), 109),
    target=lambda: hf_speech("Wav2Vec2", 110, stable=True),
    inputs=wave,
    run_source=lambda m, x: m(x),
    run_target=run_hf,
    oracle=haiku_to_hf,
)

# --------------------------------------------------------- 6 HuBERT keyword spotter, weighted sum of the layers


class SpotBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha, self.mha_norm = nn.MultiheadAttention(W, WH), nn.LayerNorm(W)
        self.ff_norm, self.ff = nn.LayerNorm(W), nn.ModuleDict({"b": nn.Linear(WF, W), "a": nn.Linear(W, WF)})

    def forward(self, x):
        x = self.mha_norm(x + self.mha(x, x, x, need_weights=False)[0])
        return self.ff_norm(x + self.ff["b"](F.gelu(self.ff["a"](x))))


class Spotter(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = par(WL + 1)
        self.classes, self.squeeze = nn.Linear(16, 5), nn.Linear(W, 16)
        self.trunk = nn.ModuleList(SpotBlock() for _ in range(WL))
        conv = nn.Conv1d(W, W, POSK, padding=POSK // 2, groups=POSG)
        self.position = nn.Sequential(nn.utils.parametrizations.weight_norm(conv, dim=2), nn.GELU())
        self.enter, self.enter_norm = nn.Linear(SIZES[-1], W), nn.LayerNorm(W)
        self.features_norm = nn.LayerNorm(SIZES[-1])
        parts = []
        for i, (o, k, s) in enumerate(CONVS):
            parts += [nn.Conv1d(SIZES[i], o, k, s, bias=False), *([nn.GroupNorm(o, o)] if i == 0 else []), nn.GELU()]
        self.features = nn.Sequential(*parts)

    def forward(self, wav):
        x = self.enter(self.features_norm(self.features(wav[:, None]).mT))
        x = self.enter_norm(x + self.position[1](self.position[0](x.mT)[..., :-1]).mT).transpose(0, 1)
        states = [x]
        for block in self.trunk:
            states.append(block(states[-1]))
        x = torch.einsum("n,ntbd->btd", self.mix.softmax(0), torch.stack(states))
        return F.log_softmax(self.classes(self.squeeze(x).mean(1)), -1)


def hubert_to_spotter(s):
    out = {"mix": s["layer_weights"], **move(s, {"projector": "squeeze", "classifier": "classes"})}
    s = {k.removeprefix("hubert."): v for k, v in s.items()}
    f, p = "feature_extractor.conv_layers.", "encoder.pos_conv_embed.conv"
    out.update(
        move(
            s,
            {
                **{f"{f}{i}.conv": f"features.{j}" for i, j in enumerate((0, 3, 5))},
                f + "0.layer_norm": "features.1",
                "feature_projection.layer_norm": "features_norm",
                "feature_projection.projection": "enter",
                "encoder.layer_norm": "enter_norm",
            },
        )
    )
    for k in ("bias", "parametrizations.weight.original0", "parametrizations.weight.original1"):
        out[f"position.0.{k}"] = s[f"{p}.{k}"]
    names = {
        "attention.out_proj": "mha.out_proj",
        "layer_norm": "mha_norm",
        "final_layer_norm": "ff_norm",
        "feed_forward.intermediate_dense": "ff.a",
        "feed_forward.output_dense": "ff.b",
    }
    for i in range(WL):
        out.update(speech_layer(s, f"encoder.layers.{i}.", f"trunk.{i}.", names, f"trunk.{i}.mha.in_proj_"))
    return out


SPOT = {"num_labels": 5, "classifier_proj_size": 16, "use_weighted_layer_sum": True}

case(
    name="spot-hubert: transformers HubertForSequenceClassification -> own keyword spotter (weighted layer sum)",
    family="hubert",
    note="layer weights to mix; features one flat Sequential; ff.b is registered before ff.a; log-probabilities",
    source=lambda: hf_head("HubertForSequenceClassification", "Hubert", 111, **SPOT),
    target=lambda: shake(Spotter(), 112),
    inputs=wave,
    run_source=lambda m, x: m(x).logits.log_softmax(-1),
    run_target=lambda m, x: m(x),
    oracle=hubert_to_spotter,
)

# -------------------------------------------------------------- 7 WavLM, the table [heads, buckets] at the top


class GatedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.gate_scale = nn.Linear(W // WH, 8), par(WH)
        self.wq, self.wkv, self.wo = nn.Linear(W, W), nn.Linear(W, 2 * W), nn.Linear(W, W)
        self.ffn, self.norms = nn.Sequential(nn.Linear(W, WF), nn.GELU(), nn.Linear(WF, W)), nn.ModuleList()
        self.norms.extend(nn.LayerNorm(W) for _ in range(2))

    def forward(self, x, bias):
        a, b = torch.sigmoid(self.gate(heads(x, WH)).unflatten(-1, (2, 4)).sum(-1)).unbind(-1)
        gate = a * (b * self.gate_scale[:, None] - 1) + 2
        y = sdpa(self.wq(x), *self.wkv(x).chunk(2, -1), WH, attn_mask=gate[..., None] * bias)
        x = self.norms[0](x + self.wo(y))
        return self.norms[1](x + self.ffn(x))


class TableWavLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.distance = par(WH, BUCKETS)
        self.front = nn.ModuleList(nn.Conv1d(SIZES[i], o, k, s, bias=False) for i, (o, k, s) in enumerate(CONVS))
        self.front_norm = nn.GroupNorm(SIZES[1], SIZES[1])
        self.bridge = nn.ModuleDict({"linear": nn.Linear(SIZES[-1], W), "norm": nn.LayerNorm(SIZES[-1])})
        self.local, self.local_norm = nn.Conv1d(W, W, POSK, padding=POSK // 2, groups=POSG), nn.LayerNorm(W)
        self.layers = nn.ModuleList(GatedBlock() for _ in range(WL))

    def bias(self, t):
        p = torch.arange(t, device=self.distance.device)
        d, n = p[None] - p[:, None], BUCKETS // 2
        near = n // 2
        far = near + (torch.log(d.abs().clamp_min(1) / near) / math.log(FAR / near) * (n - near)).long()
        return self.distance[:, (d > 0) * n + torch.where(d.abs() < near, d.abs(), far.clamp_max(n - 1))]

    def forward(self, wav):
        x = wav[:, None]
        for i, conv in enumerate(self.front):
            x = conv(x)
            x = F.gelu(self.front_norm(x) if i == 0 else x)
        x = self.bridge["linear"](self.bridge["norm"](x.mT))
        x = self.local_norm(x + F.gelu(self.local(x.mT)[..., :-1]).mT)
        bias = self.bias(x.shape[1])
        for layer in self.layers:
            x = layer(x, bias)
        return x


def wavlm_to_table(s):
    f, t = "feature_extractor.conv_layers.", "encoder.transformer."
    pos = {k.replace("transformer.", ""): v for k, v in s.items()}
    out = {
        "distance": s[t + "layers.0.attention.rel_attn_embed.weight"].T,
        "local.weight": folded(pos),
        "local.bias": s[t + "pos_conv_embed.conv.bias"],
        **move(
            s,
            {
                **{f"{f}{i}.conv": f"front.{i}" for i in range(len(CONVS))},
                f + "0.layer_norm": "front_norm",
                "encoder.feature_projection.layer_norm": "bridge.norm",
                "encoder.feature_projection.projection": "bridge.linear",
                t + "layer_norm": "local_norm",
            },
        ),
    }
    names = {
        "attention.gru_rel_pos_linear": "gate",
        "attention.attention.out_proj": "wo",
        "layer_norm": "norms.0",
        "final_layer_norm": "norms.1",
        "feed_forward.intermediate_dense": "ffn.0",
        "feed_forward.output_dense": "ffn.2",
    }
    for i in range(WL):
        a, b = f"{t}layers.{i}.", f"layers.{i}."
        for w in WB:
            x = s[f"{a}attention.attention.in_proj_{w}"]
            out[f"{b}wq.{w}"], out[f"{b}wkv.{w}"] = x[:W], x[W:]
        out[b + "gate_scale"] = s[a + "attention.gru_rel_pos_const"].flatten()
        out.update(move(s, {a + x: b + y for x, y in names.items()}))
    return out


case(
    name="table-wavlm: torchaudio -> own (q and kv, table [heads, buckets] at the top, SDPA with a float mask)",
    family="wavlm",
    note="in_proj into q and kv; table turned and moved out of layer 0; weight norm folded; gate constant flattened",
    source=lambda: ta_wavlm(113),
    target=lambda: shake(TableWavLM(), 114),
    inputs=wave,
    run_source=lambda m, x: m(x)[0],
    run_target=lambda m, x: m(x),
    oracle=wavlm_to_table,
    tol=2e-5,
)

# ------------------------------------------------------------------------ 8 UniSpeech-SAT -> torchaudio

case(
    name="sat-hubert: transformers UniSpeechSatModel (stable layer norm) -> torchaudio",
    family="wav2vec2",
    note="a third library class of the same network; encoder.* nests deeper; masked_spec_embed has no counterpart",
    source=lambda: hf_speech("UniSpeechSat", 115, stable=True),
    target=lambda: ta_plain(116),
    inputs=wave,
    run_source=run_hf,
    run_target=lambda m, x: m(x)[0],
    oracle=hf_to_ta,
)
