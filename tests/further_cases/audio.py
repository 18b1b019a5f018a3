"""Further cases: audio."""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor, nn

from tests.graft_matrix import core
from tests.graft_matrix.core import State, shake

torch.set_num_threads(1)
WB = ("weight", "bias")


def case(source, target, **kw):
    """Fixes the constructors' own randomness too."""

    def fixed(build, seed):
        def make():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return build()

        return make

    return core.case(modality="audio", source=fixed(source, 3000), target=fixed(target, 4000), **kw)


def move(s: State, names: dict[str, str]) -> State:
    return {f"{b}.{w}": s[f"{a}.{w}"] for a, b in names.items() for w in WB if f"{a}.{w}" in s}


def heads(x: Tensor, h: int) -> Tensor:
    return x.unflatten(-1, (h, -1)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


# ============================================================================================================ Whisper

MELS, ACTX, D, H, L, VOCAB, TCTX = 20, 24, 48, 4, 2, 67, 16


def whisper_inputs(seed):
    g = torch.Generator().manual_seed(seed)
    return {"mel": torch.randn(2, MELS, 2 * ACTX, generator=g), "tokens": torch.randint(3, VOCAB, (2, 10), generator=g)}


def hf_whisper(seed, cls="WhisperForConditionalGeneration"):
    c = T.WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=MELS,
        d_model=D,
        encoder_layers=L,
        decoder_layers=L,
        encoder_attention_heads=H,
        decoder_attention_heads=H,
        encoder_ffn_dim=4 * D,
        decoder_ffn_dim=4 * D,
        max_source_positions=ACTX,
        max_target_positions=TCTX,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return shake(getattr(T, cls)(c), seed)


def oa_whisper(seed):
    from whisper.model import ModelDimensions, Whisper

    return shake(Whisper(ModelDimensions(MELS, ACTX, D, H, L, VOCAB, TCTX, D, H, L)), seed)


OA_TO_HF = {
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "attn_ln": "self_attn_layer_norm",
    "cross_attn.query": "encoder_attn.q_proj",
    "cross_attn.key": "encoder_attn.k_proj",
    "cross_attn.value": "encoder_attn.v_proj",
    "cross_attn.out": "encoder_attn.out_proj",
    "cross_attn_ln": "encoder_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
}


def oa_to_hf(s):
    tok = s["decoder.token_embedding.weight"]
    out = {
        "model.decoder.embed_tokens.weight": tok,
        "proj_out.weight": tok,
        "model.decoder.embed_positions.weight": s["decoder.positional_embedding"],
        "model.encoder.embed_positions.weight": s["encoder.positional_embedding"],
        **move(
            s,
            {
                "encoder.conv1": "model.encoder.conv1",
                "encoder.conv2": "model.encoder.conv2",
                "encoder.ln_post": "model.encoder.layer_norm",
                "decoder.ln": "model.decoder.layer_norm",
            },
        ),
    }
    for side in ("encoder", "decoder"):
        for i in range(L):
            a, b = f"{side}.blocks.{i}.", f"model.{side}.layers.{i}."
            out.update(move(s, {a + x: b + y for x, y in OA_TO_HF.items()}))
    return out


case(
    name="whisper: openai-whisper -> transformers WhisperForConditionalGeneration",
    family="whisper",
    note="encoder positions are a buffer there and a parameter here; head tied; final_layer_norm is the mlp's norm",
    source=lambda: oa_whisper(1),
    target=lambda: hf_whisper(2),
    inputs=whisper_inputs,
    run_source=lambda m, x: m(x["mel"], x["tokens"]),
    run_target=lambda m, x: m(input_features=x["mel"], decoder_input_ids=x["tokens"], use_cache=False).logits,
    oracle=oa_to_hf,
)


class TorchWhisper(nn.Module):
    """torch's own encoder and decoder layers; every attention has a key bias, Whisper's has none."""

    def __init__(self):
        super().__init__()
        kw = {"dim_feedforward": 4 * D, "dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.conv = nn.Sequential(nn.Conv1d(MELS, D, 3, padding=1), nn.GELU(), nn.Conv1d(D, D, 3, 2, 1), nn.GELU())
        self.audio_pos, self.text_pos = nn.Parameter(torch.zeros(ACTX, D)), nn.Parameter(torch.zeros(TCTX, D))
        self.tokens = nn.Embedding(VOCAB, D)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, H, **kw), L, nn.LayerNorm(D))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(D, H, **kw), L, nn.LayerNorm(D), enable_nested_tensor=False
        )

    def forward(self, mel, ids):
        t = ids.shape[1]
        audio = self.encoder(self.conv(mel).mT + self.audio_pos)
        hide = torch.ones(t, t, dtype=torch.bool, device=ids.device).triu(1)
        x = self.decoder(self.tokens(ids) + self.text_pos[:t], audio, tgt_mask=hide)
        return F.linear(x, self.tokens.weight)


def mha(s, src, dst):
    out = {
        dst + ".in_proj_weight": torch.cat([s[f"{src}.{n}_proj.weight"] for n in "qkv"]),
        dst + ".in_proj_bias": torch.cat([s.get(f"{src}.{n}_proj.bias", torch.zeros(D)) for n in "qkv"]),
    }
    return {**out, **move(s, {src + ".out_proj": dst + ".out_proj"})}


def whisper_to_torch(s):
    s = {k.removeprefix("model."): v for k, v in s.items()}
    out = {
        "audio_pos": s["encoder.embed_positions.weight"],
        "text_pos": s["decoder.embed_positions.weight"],
        **move(
            s,
            {
                "encoder.conv1": "conv.0",
                "encoder.conv2": "conv.2",
                "encoder.layer_norm": "encoder.norm",
                "decoder.layer_norm": "decoder.norm",
                "decoder.embed_tokens": "tokens",
            },
        ),
    }
    for side in ("encoder", "decoder"):
        last = "norm2" if side == "encoder" else "norm3"
        for i in range(L):
            p = f"{side}.layers.{i}."
            out.update(mha(s, p + "self_attn", p + "self_attn"))
            if side == "decoder":
                out.update(mha(s, p + "encoder_attn", p + "multihead_attn"))
            out.update(
                move(
                    s,
                    {
                        p + "self_attn_layer_norm": p + "norm1",
                        p + "encoder_attn_layer_norm": p + "norm2",
                        p + "final_layer_norm": p + last,
                        p + "fc1": p + "linear1",
                        p + "fc2": p + "linear2",
                    },
                )
            )
    return out


case(
    name="whisper: transformers -> torch.nn.TransformerEncoder and TransformerDecoder",
    family="whisper",
    note="in_proj bias whose middle third has no source; norm2 is the mlp's in one half, the cross attention's in "
    "the other; decoder registered first",
    source=lambda: hf_whisper(3),
    target=lambda: shake(TorchWhisper(), 4),
    inputs=whisper_inputs,
    run_source=lambda m, x: m(input_features=x["mel"], decoder_input_ids=x["tokens"], use_cache=False).logits,
    run_target=lambda m, x: m(x["mel"], x["tokens"]),
    oracle=whisper_to_torch,
)


class WindowLinear(nn.Module):
    """A convolution of three steps as one Linear on cut-out windows [B, T, 3 * channels]."""

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.stride, self.fc = stride, nn.Linear(3 * cin, cout)

    def forward(self, x):  # [B, T, C]
        w = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, self.stride)  # [B, T, C, 3]
        return F.gelu(self.fc(w.transpose(2, 3).flatten(2)))


class ServingEncoder(nn.Module):
    """For serving: one qkv product, the 1/sqrt(d_head) already in its query rows."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(WindowLinear(MELS, D, 1), WindowLinear(D, D, 2))
        self.pos = nn.Parameter(torch.zeros(1, ACTX, D))
        self.ln = nn.ModuleList(nn.LayerNorm(D) for _ in range(2 * L + 1))
        self.qkv = nn.ModuleList(nn.Linear(D, 3 * D) for _ in range(L))
        self.proj = nn.ModuleList(nn.Linear(D, D) for _ in range(L))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D)) for _ in range(L))

    def forward(self, mel):  # [B, T, mels]
        x = self.front(mel) + self.pos
        for i in range(L):
            q, k, v = (heads(y, H) for y in self.qkv[i](self.ln[2 * i](x)).chunk(3, -1))
            x = x + self.proj[i](merge(torch.softmax(q @ k.mT, -1) @ v))
            x = x + self.mlp[i](self.ln[2 * i + 1](x))
        return self.ln[-1](x)


def oa_to_serving(s):
    s = {k.removeprefix("encoder."): v for k, v in s.items() if k.startswith("encoder.")}
    scale = (D // H) ** -0.5
    out = {"pos": s["positional_embedding"][None], **move(s, {"ln_post": f"ln.{2 * L}"})}
    for j in (1, 2):
        out[f"front.{j - 1}.fc.weight"] = s[f"conv{j}.weight"].transpose(1, 2).flatten(1)
        out[f"front.{j - 1}.fc.bias"] = s[f"conv{j}.bias"]
    for i in range(L):
        a = f"blocks.{i}."
        q, k, v = (s[f"{a}attn.{n}.weight"] for n in ("query", "key", "value"))
        out[f"qkv.{i}.weight"] = torch.cat([q * scale, k, v])
        out[f"qkv.{i}.bias"] = torch.cat([s[a + "attn.query.bias"] * scale, torch.zeros(D), s[a + "attn.value.bias"]])
        out.update(
            move(
                s,
                {
                    a + "attn_ln": f"ln.{2 * i}",
                    a + "mlp_ln": f"ln.{2 * i + 1}",
                    a + "attn.out": f"proj.{i}",
                    a + "mlp.0": f"mlp.{i}.0",
                    a + "mlp.2": f"mlp.{i}.2",
                },
            )
        )
    return out


case(
    name="whisper-encoder: openai-whisper -> own (scale folded into q, convolutions as Linear on windows)",
    family="whisper-encoder",
    note="query rows times d_head**-0.5; conv weight [out, in, 3] to Linear [out, 3 * in]; lists by kind",
    source=lambda: oa_whisper(5),
    target=lambda: shake(ServingEncoder(), 6),
    inputs=whisper_inputs,
    run_source=lambda m, x: m.encoder(x["mel"]),
    run_target=lambda m, x: m(x["mel"].mT),
    oracle=oa_to_serving,
)

# =========================================================================================== Wav2Vec2, HuBERT, WavLM

W, WH, WL, WF = 48, 4, 2, 80
CONVS = [(32, 10, 5), (32, 3, 2), (32, 2, 2)]
POSK, POSG = 16, 4
BUCKETS, FAR = 16, 40


def wave(seed):
    return 0.5 * torch.randn(2, 1500, generator=torch.Generator().manual_seed(seed))


def hf_speech(family, seed, stable=False, **kw):
    c = getattr(T, family + "Config")(
        vocab_size=13,
        hidden_size=W,
        num_hidden_layers=WL,
        num_attention_heads=WH,
        intermediate_size=WF,
        conv_dim=[c[0] for c in CONVS],
        conv_kernel=[c[1] for c in CONVS],
        conv_stride=[c[2] for c in CONVS],
        num_feat_extract_layers=len(CONVS),
        num_conv_pos_embeddings=POSK,
        num_conv_pos_embedding_groups=POSG,
        feat_extract_norm="layer" if stable else "group",
        conv_bias=stable,
        do_stable_layer_norm=stable,
        layerdrop=0.0,
        **kw,
    )
    return shake(getattr(T, family + "Model")(c), seed)


def ta_kw(stable=False):
    return {
        "extractor_mode": "layer_norm" if stable else "group_norm",
        "extractor_conv_layer_config": CONVS,
        "extractor_conv_bias": stable,
        "encoder_embed_dim": W,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": POSK,
        "encoder_pos_conv_groups": POSG,
        "encoder_num_layers": WL,
        "encoder_num_heads": WH,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": WF,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": stable,
        "encoder_layer_drop": 0.0,
    }


def run_hf(m, x):
    return m(x).last_hidden_state


def hf_to_ta(s):
    s = {k: v for k, v in s.items() if k != "masked_spec_embed"}
    return {
        re.sub(r"^encoder\.", "encoder.transformer.", k)
        if k.startswith("encoder.")
        else re.sub(r"^feature_projection\.", "encoder.feature_projection.", k): v
        for k, v in s.items()
    }


def ta_to_hf(s):
    out = {}
    for k, v in s.items():
        k = re.sub(r"^encoder\.transformer\.", "transformer.", k)
        k = re.sub(r"^encoder\.feature_projection\.", "feature_projection.", k)
        out[re.sub(r"^transformer\.", "encoder.", k)] = v
    return out


def ta_plain(seed):
    from torchaudio.models import wav2vec2_model

    return shake(wav2vec2_model(**ta_kw(stable=True), aux_num_out=None), seed)


case(
    name="hubert: transformers HubertModel (stable layer norm) -> torchaudio",
    family="hubert",
    note="encoder.* nests one level deeper; norm in every conv block; masked_spec_embed has no counterpart",
    source=lambda: hf_speech("Hubert", 7, stable=True),
    target=lambda: ta_plain(8),
    inputs=wave,
    run_source=run_hf,
    run_target=lambda m, x: m(x)[0],
    oracle=hf_to_ta,
)


def ta_pretrain(seed):
    from torchaudio.models import hubert_pretrain_model

    return shake(
        hubert_pretrain_model(
            **ta_kw(),
            mask_prob=0.8,
            mask_selection="static",
            mask_other=0.0,
            mask_length=4,
            no_mask_overlap=False,
            mask_min_space=1,
            mask_channel_prob=0.0,
            mask_channel_selection="static",
            mask_channel_other=0.0,
            mask_channel_length=4,
            no_mask_channel_overlap=False,
            mask_channel_min_space=1,
            skip_masked=False,
            skip_nomask=False,
            num_classes=17,
            final_dim=W,
            feature_grad_mult=None,
        ),
        seed,
    )


def pretrain_to_hf(s):
    out = ta_to_hf({k.removeprefix("wav2vec2."): v for k, v in s.items() if k.startswith("wav2vec2.")})
    return {**out, "masked_spec_embed": s["mask_generator.mask_embedding"]}


case(
    name="hubert: torchaudio HuBERTPretrainModel -> transformers HubertModel",
    family="hubert",
    note="one part of a training wrapper; its square projection and its mask vector have the sizes of others",
    source=lambda: ta_pretrain(9),
    target=lambda: hf_speech("Hubert", 10),
    inputs=wave,
    run_source=lambda m, x: m.wav2vec2(x)[0],
    run_target=run_hf,
    oracle=pretrain_to_hf,
)


def ta_wavlm(seed):
    from torchaudio.models import wavlm_model

    return shake(wavlm_model(**ta_kw(), encoder_num_buckets=BUCKETS, encoder_max_distance=FAR, aux_num_out=None), seed)


def wavlm_to_hf(s):
    out = ta_to_hf(s)
    for i in range(WL):
        p = f"encoder.layers.{i}.attention."
        for w in WB:
            for n, x in zip("qkv", out.pop(f"{p}attention.in_proj_{w}").chunk(3), strict=True):
                out[f"{p}{n}_proj.{w}"] = x
            out[f"{p}out_proj.{w}"] = out.pop(f"{p}attention.out_proj.{w}")
    return out


case(
    name="wavlm: torchaudio -> transformers WavLMModel",
    family="wavlm",
    note="in_proj split into k, v, q order; out_proj one level up; bucket table in the first layer only",
    source=lambda: ta_wavlm(11),
    target=lambda: hf_speech("WavLM", 12, num_buckets=BUCKETS, max_bucket_distance=FAR),
    inputs=wave,
    run_source=lambda m, x: m(x)[0],
    run_target=run_hf,
    oracle=wavlm_to_hf,
    tol=2e-5,
)

# ---------------------------------------------------------------------------------------------------------------- own


class KioConv(nn.Module):
    """[B, T, C] in and out, weight [kernel, in, out] as in JAX."""

    def __init__(self, k, cin, cout, stride=1, groups=1, bias=False, pad=0):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(k, cin // groups, cout))
        self.b = nn.Parameter(torch.zeros(cout)) if bias else None
        self.kw = {"stride": stride, "groups": groups, "padding": pad}

    def forward(self, x):
        return F.conv1d(x.mT, self.w.permute(2, 1, 0), self.b, **self.kw).mT


class SpeechBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_qkv, self.to_out, self.norm1 = nn.Linear(W, 3 * W), nn.Linear(W, W), nn.LayerNorm(W)
        self.ff, self.norm2 = nn.Sequential(nn.Linear(W, WF), nn.GELU(), nn.Linear(WF, W)), nn.LayerNorm(W)

    def forward(self, x):
        q, k, v = (heads(y, WH) for y in self.to_qkv(x).chunk(3, -1))
        x = self.norm1(x + self.to_out(merge(F.scaled_dot_product_attention(q, k, v))))
        return self.norm2(x + self.ff(x))


class Emotion(nn.Module):
    """A classifier on speech; the body is Wav2Vec2's with a plain positional convolution and channels last."""

    def __init__(self):
        super().__init__()
        sizes = [1] + [c[0] for c in CONVS]
        self.convs = nn.ModuleList(KioConv(k, sizes[i], o, s) for i, (o, k, s) in enumerate(CONVS))
        self.gn_scale, self.gn_shift = nn.Parameter(torch.ones(sizes[1])), nn.Parameter(torch.zeros(sizes[1]))
        self.widen = nn.Sequential(nn.LayerNorm(sizes[-1]), nn.Linear(sizes[-1], W))
        self.pos_conv = KioConv(POSK, W, W, groups=POSG, bias=True, pad=POSK // 2)
        self.norm = nn.LayerNorm(W)
        self.blocks = nn.ModuleList(SpeechBlock() for _ in range(WL))
        self.classify = nn.Linear(W, 7)

    def states(self, wav):
        x = wav[..., None]
        for i, conv in enumerate(self.convs):
            x = conv(x)
            if i == 0:  # one group a channel: statistics over time
                mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
                x = (x - mean) / torch.sqrt(var + 1e-5) * self.gn_scale + self.gn_shift
            x = F.gelu(x)
        x = self.widen(x)
        x = self.norm(x + F.gelu(self.pos_conv(x)[:, :-1]))
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, wav):
        return self.classify(self.states(wav).mean(1))


def folded(s):
    p = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
    g, v = s[p + "0"], s[p + "1"]
    return g * v / v.norm(dim=(0, 1), keepdim=True)


def fused(s, names, dst):
    return {f"{dst}.{w}": torch.cat([s[f"{n}.{w}"] for n in names]) for w in WB}


def w2v_to_emotion(s):
    f = "feature_extractor.conv_layers."
    out = {f"convs.{i}.w": s[f"{f}{i}.conv.weight"].permute(2, 1, 0) for i in range(len(CONVS))}
    out.update(
        {
            "gn_scale": s[f + "0.layer_norm.weight"],
            "gn_shift": s[f + "0.layer_norm.bias"],
            "pos_conv.w": folded(s).permute(2, 1, 0),
            "pos_conv.b": s["encoder.pos_conv_embed.conv.bias"],
            **move(
                s,
                {
                    "feature_projection.layer_norm": "widen.0",
                    "feature_projection.projection": "widen.1",
                    "encoder.layer_norm": "norm",
                },
            ),
        }
    )
    for i in range(WL):
        a, b = f"encoder.layers.{i}.", f"blocks.{i}."
        out.update(fused(s, [f"{a}attention.{n}_proj" for n in "qkv"], b + "to_qkv"))
        out.update(
            move(
                s,
                {
                    a + "attention.out_proj": b + "to_out",
                    a + "layer_norm": b + "norm1",
                    a + "final_layer_norm": b + "norm2",
                    a + "feed_forward.intermediate_dense": b + "ff.0",
                    a + "feed_forward.output_dense": b + "ff.2",
                },
            )
        )
    return out


case(
    name="wav2vec2: transformers -> own classifier (kernels [k, in, out], plain positional convolution)",
    family="wav2vec2",
    note="weight norm to be folded into one kernel and turned; group norm as two bare vectors; fresh classifier",
    source=lambda: hf_speech("Wav2Vec2", 13),
    target=lambda: shake(Emotion(), 14),
    inputs=wave,
    run_source=run_hf,
    run_target=lambda m, x: m.states(x),
    oracle=w2v_to_emotion,
)


class FairAttention(nn.Module):
    """[T, B, D], heads folded into the batch; optionally WavLM's gated relative bias."""

    def __init__(self, gated=False, table=False):
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(W, W) for _ in range(4))
        self.relative_attention_bias = nn.Embedding(BUCKETS, WH) if table else None
        if gated:
            self.grep_linear = nn.Linear(W // WH, 8)
            self.grep_a = nn.Parameter(torch.ones(1, WH, 1, 1))

    def distances(self, t):
        p = torch.arange(t, device=self.k_proj.weight.device)
        d, n = p[None] - p[:, None], BUCKETS // 2
        near = n // 2
        far = near + (torch.log(d.abs().clamp_min(1) / near) / math.log(FAR / near) * (n - near)).long()
        b = (d > 0).long() * n + torch.where(d.abs() < near, d.abs(), far.clamp_max(n - 1))
        return self.relative_attention_bias(b).permute(2, 0, 1)

    def forward(self, x, bias=None):
        t, b, _ = x.shape
        if self.relative_attention_bias is not None:
            bias = self.distances(t)
        q = self.q_proj(x) * (W // WH) ** -0.5
        q, k, v = (y.reshape(t, b * WH, -1).transpose(0, 1) for y in (q, self.k_proj(x), self.v_proj(x)))
        w = torch.bmm(q, k.transpose(1, 2))
        if bias is not None:
            y = x.view(t, b, WH, -1).permute(1, 2, 0, 3)
            a, c = torch.sigmoid(self.grep_linear(y).unflatten(-1, (2, 4)).sum(-1)).chunk(2, -1)
            gate = a * (c * self.grep_a - 1.0) + 2.0
            w = w + (gate * bias).reshape(b * WH, t, t)
        y = torch.bmm(w.softmax(-1), v).transpose(0, 1).reshape(t, b, W)
        return self.out_proj(y), bias


class FairBlock(nn.Module):
    def __init__(self, **kw):
        super().__init__()
        self.self_attn, self.self_attn_layer_norm = FairAttention(**kw), nn.LayerNorm(W)
        self.fc1, self.fc2, self.final_layer_norm = nn.Linear(W, WF), nn.Linear(WF, W), nn.LayerNorm(W)

    def forward(self, x, bias):
        y, bias = self.self_attn(x, bias)
        x = self.self_attn_layer_norm(x + y)
        return self.final_layer_norm(x + self.fc2(F.gelu(self.fc1(x)))), bias


class FairSpeech(nn.Module):
    """In fairseq's names: conv blocks and pos_conv are Sequentials, weight norm is the old one (weight_g, weight_v)."""

    def __init__(self, wavlm=False):
        super().__init__()
        sizes = [1] + [c[0] for c in CONVS]
        blocks = []
        for i, (o, k, s) in enumerate(CONVS):
            norm = [nn.GroupNorm(o, o)] if i == 0 else []
            blocks.append(nn.Sequential(nn.Conv1d(sizes[i], o, k, s, bias=False), nn.Dropout(0.0), *norm, nn.GELU()))
        self.feature_extractor = nn.ModuleDict({"conv_layers": nn.ModuleList(blocks)})
        self.mask_emb = nn.Parameter(torch.zeros(W))
        self.post_extract_proj = nn.Linear(sizes[-1], W)
        conv = nn.utils.weight_norm(nn.Conv1d(W, W, POSK, padding=POSK // 2, groups=POSG), dim=2)
        layers = nn.ModuleList(FairBlock(gated=wavlm, table=wavlm and i == 0) for i in range(WL))
        self.encoder = nn.ModuleDict({"pos_conv": nn.Sequential(conv), "layers": layers, "layer_norm": nn.LayerNorm(W)})
        self.layer_norm = nn.LayerNorm(sizes[-1])
        if not wavlm:
            self.final_proj = nn.Linear(W, W)
            self.label_embs_concat = nn.Parameter(torch.zeros(17, W))

    def extract(self, wav):
        x = wav[:, None]
        for conv in self.feature_extractor["conv_layers"]:
            x = conv(x)
        x = self.post_extract_proj(self.layer_norm(x.transpose(1, 2)))
        e = self.encoder
        x = e["layer_norm"](x + F.gelu(e["pos_conv"](x.transpose(1, 2))[..., :-1]).transpose(1, 2)).transpose(0, 1)
        bias = None
        for layer in e["layers"]:
            x, bias = layer(x, bias)
        return x.transpose(0, 1)

    def forward(self, wav):
        y = self.final_proj(self.extract(wav))
        return F.cosine_similarity(y[:, :, None], self.label_embs_concat, dim=-1) / 0.1


def hf_to_fair(s):
    f, p = "feature_extractor.conv_layers.", "encoder.pos_conv_embed.conv."
    out = {f"{f}{i}.0.weight": s[f"{f}{i}.conv.weight"] for i in range(len(CONVS))}
    out.update(
        {
            **move(
                s,
                {
                    f + "0.layer_norm": f + "0.2",
                    "feature_projection.layer_norm": "layer_norm",
                    "feature_projection.projection": "post_extract_proj",
                    "encoder.layer_norm": "encoder.layer_norm",
                },
            ),
            "encoder.pos_conv.0.weight_g": s[p + "parametrizations.weight.original0"],
            "encoder.pos_conv.0.weight_v": s[p + "parametrizations.weight.original1"],
            "encoder.pos_conv.0.bias": s[p + "bias"],
            "mask_emb": s["masked_spec_embed"],
        }
    )
    for i in range(WL):
        a = f"encoder.layers.{i}."
        names = {f"attention.{n}_proj": f"self_attn.{n}_proj" for n in ("k", "v", "q", "out")}
        names.update(
            {
                "layer_norm": "self_attn_layer_norm",
                "feed_forward.intermediate_dense": "fc1",
                "feed_forward.output_dense": "fc2",
                "final_layer_norm": "final_layer_norm",
                "attention.gru_rel_pos_linear": "self_attn.grep_linear",
                "attention.rel_attn_embed": "self_attn.relative_attention_bias",
            }
        )
        out.update(move(s, {a + x: a + y for x, y in names.items()}))
        if a + "attention.gru_rel_pos_const" in s:
            out[a + "self_attn.grep_a"] = s[a + "attention.gru_rel_pos_const"]
    return out


case(
    name="hubert: transformers -> own (fairseq style, [T, B, D], weight_g/weight_v, fresh label head)",
    family="hubert",
    note="Sequential numbers with a gap for dropout; layer_norm is the features' here and the layer's there; square "
    "final_proj is fresh",
    source=lambda: hf_speech("Hubert", 15),
    target=lambda: shake(FairSpeech(), 16),
    inputs=wave,
    run_source=run_hf,
    run_target=lambda m, x: m.extract(x),
    oracle=hf_to_fair,
)

case(
    name="wavlm: transformers -> own (fairseq style, manual gated bias)",
    family="wavlm",
    note="grep_linear and grep_a for the gate; bucket table in the first layer only; attention written out",
    source=lambda: hf_speech("WavLM", 17, num_buckets=BUCKETS, max_bucket_distance=FAR),
    target=lambda: shake(FairSpeech(wavlm=True), 18),
    inputs=wave,
    run_source=run_hf,
    run_target=lambda m, x: m.extract(x),
    oracle=hf_to_fair,
    tol=2e-5,
)
