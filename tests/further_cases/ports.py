"""Further cases: ports between libraries and the dialects that other engineers know (GGUF, ESPnet...)."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import timm
import torch
import torch.nn.functional as F
import torchaudio
import torchvision
import transformers as T
from torch import nn

from tests.graft_matrix.core import case, shake

D, H, L, M, V, N = 32, 4, 2, 64, 61, 9
WB = ("weight", "bias")


def port(name, modality, **kw):
    case(name=f"port: {name}", modality=modality, **kw)


def par(*shape):
    return nn.Parameter(torch.zeros(shape))


def ids(seed, vocab=V, low=3):
    return torch.randint(low, vocab, (2, N), generator=torch.Generator().manual_seed(seed))


def noise(*shape):
    return lambda seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def split(x, h=H):
    return x.unflatten(-1, (h, -1)).transpose(-2, -3)


def attend(q, k, v, h=H, **kw):
    return F.scaled_dot_product_attention(split(q, h), split(k, h), split(v, h), **kw).transpose(1, 2).flatten(2)


def renamed(state, rules, drop="^$"):
    """Regex substitutions in order on every name that is not dropped."""
    out = {}
    for k, v in state.items():
        if not re.search(drop, k):
            for a, b in rules:
                k = re.sub(a, b, k)
            out[k] = v
    return out


def hf(cls, config, seed, **kw):
    kw = {"attn_implementation": "eager"} | kw
    return shake(cls(config(**kw)), seed)


BERT = {"hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H, "intermediate_size": M, "vocab_size": V}


# ---------------------------------------------------------------- bert: x-transformers


class XAttn(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        return self.to_out(attend(self.to_q(x), self.to_k(x), self.to_v(x)))


class XBert(nn.Module):
    """One flat list in which attention and feed-forward alternate, each with its norm first in a pair."""

    def __init__(self):
        super().__init__()
        self.token_emb = nn.Embedding(V, D)
        self.pos_emb = nn.ModuleDict({"emb": nn.Embedding(16, D)})
        self.post_emb_norm = nn.LayerNorm(D, eps=1e-12)
        ff = [lambda: nn.Sequential(nn.Sequential(nn.Linear(D, M), nn.GELU()), nn.Dropout(0.1), nn.Linear(M, D)), XAttn]
        pairs = [nn.ModuleList([nn.LayerNorm(D, eps=1e-12), ff[1 - i % 2]()]) for i in range(2 * L)]
        self.attn_layers = nn.ModuleDict({"layers": nn.ModuleList(pairs)})
        self.to_logits = nn.Linear(D, 5)

    def forward(self, t):
        x = self.post_emb_norm(self.token_emb(t) + self.pos_emb["emb"].weight[: t.shape[1]])
        for norm, fn in self.attn_layers["layers"]:
            x = norm(x + fn(x))
        return self.to_logits(x)


def o_xbert(s):
    out = {"token_emb.weight": s["bert.embeddings.word_embeddings.weight"]}
    out["token_emb.weight"] = out["token_emb.weight"] + s["bert.embeddings.token_type_embeddings.weight"][0]
    out["pos_emb.emb.weight"] = s["bert.embeddings.position_embeddings.weight"]
    a, b = r"bert\.encoder\.layer\.(\d)\.", "attn_layers.layers."
    rest = renamed(
        s,
        [
            (r"bert\.embeddings\.LayerNorm", "post_emb_norm"),
            ("classifier", "to_logits"),
            (a + r"attention\.output\.LayerNorm", lambda m: f"{b}{2 * int(m[1])}.0"),
            (a + r"output\.LayerNorm", lambda m: f"{b}{2 * int(m[1]) + 1}.0"),
            (a + r"attention\.self\.(.)\w+", lambda m: f"{b}{2 * int(m[1])}.1.to_{m[2]}"),
            (a + r"attention\.output\.dense", lambda m: f"{b}{2 * int(m[1])}.1.to_out"),
            (a + r"intermediate\.dense", lambda m: f"{b}{2 * int(m[1]) + 1}.1.0.0"),
            (a + r"output\.dense", lambda m: f"{b}{2 * int(m[1]) + 1}.1.2"),
        ],
        "_embeddings|position_ids",
    )
    return out | rest


port(
    "bert: transformers BertForTokenClassification -> own (x-transformers style, segment 0 inside the words)",
    "text",
    family="bert-encoder",
    source=lambda: hf(T.BertForTokenClassification, T.BertConfig, 1, **BERT, max_position_embeddings=16, num_labels=5),
    target=lambda: shake(XBert(), 2),
    inputs=ids,
    run_source=lambda m, x: m(input_ids=x).logits,
    run_target=lambda m, x: m(x),
    oracle=o_xbert,
    note="one flat list of [norm, sublayer] pairs; the token type table is added to the words",
)


# ---------------------------------------------------------------- roberta: torchtext -> transformers


class TTLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"input_projection": nn.Linear(D, 3 * D), "output_projection": nn.Linear(D, D)})
        self.residual_mlp = nn.Sequential(nn.Linear(D, M), nn.GELU(), nn.Dropout(0.1), nn.Linear(M, D), nn.Dropout(0.1))
        self.attention_layer_norm, self.final_layer_norm = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x):
        n, b, _ = x.shape  # head-major: each head has its q, k and v side by side
        q, k, v = self.attention["input_projection"](x).view(n, b, H, 3, D // H).permute(3, 1, 2, 0, 4)
        y = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).reshape(n, b, D)
        x = self.attention_layer_norm(x + self.attention["output_projection"](y))
        return self.final_layer_norm(x + self.residual_mlp(x))


class TTRoberta(nn.Module):
    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(V, D, padding_idx=1)
        self.layers = nn.ModuleList(TTLayer() for _ in range(L))
        self.positional_embedding = nn.ModuleDict({"embedding": nn.Embedding(18, D, padding_idx=1)})
        self.embedding_layer_norm = nn.LayerNorm(D)

    def forward(self, t):
        pos = t.ne(1).long().cumsum(1) * t.ne(1) + 1
        x = self.embedding_layer_norm(self.token_embedding(t) + self.positional_embedding["embedding"](pos))
        x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x.transpose(0, 1)


def o_ttroberta(s):
    out = {"embeddings.token_type_embeddings.weight": torch.zeros(1, D)}
    for k, v in s.items():
        if m := re.match(r"layers\.(\d)\.attention\.input_projection\.(\w+)", k):
            for name, w in zip(("query", "key", "value"), v.unflatten(0, (H, 3, -1)).unbind(1), strict=True):
                out[f"encoder.layer.{m[1]}.attention.self.{name}.{m[2]}"] = w.flatten(0, 1)
    rules = [
        (r"^token_embedding", "embeddings.word_embeddings"),
        (r"^positional_embedding\.embedding", "embeddings.position_embeddings"),
        (r"^embedding_layer_norm", "embeddings.LayerNorm"),
        (r"^layers", "encoder.layer"),
        (r"attention\.output_projection", "attention.output.dense"),
        (r"residual_mlp\.0", "intermediate.dense"),
        (r"residual_mlp\.3", "output.dense"),
        ("attention_layer_norm", "attention.output.LayerNorm"),
        ("final_layer_norm", "output.LayerNorm"),
    ]
    return out | renamed(s, rules, "input_projection")


ROBERTA = BERT | {"max_position_embeddings": 18, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
port(
    "roberta: own (torchtext style, [T, B, D], heads interleaved) -> transformers RobertaModel",
    "text",
    family="roberta",
    source=lambda: shake(TTRoberta(), 3),
    target=lambda: shake(T.RobertaModel(T.RobertaConfig(**ROBERTA), add_pooling_layer=False), 4),
    inputs=ids,
    run_source=lambda m, x: m(x),
    run_target=lambda m, x: m(input_ids=x).last_hidden_state,
    oracle=o_ttroberta,
    note="head-interleaved qkv is pulled apart; the token type table must be zero",
)


# ---------------------------------------------------------------- distilbert: GGUF


class GGUFDistil(nn.Module):
    """Every tensor at the top, by its GGUF name; a projection for the answer's start and one for its end."""

    def __init__(self):
        super().__init__()
        for n in range(L):
            for name, (i, o) in {"q": (D, D), "k": (D, D), "v": (D, D), "output": (D, D)}.items():
                self.lin(f"blk_{n}_attn_{name}", i, o)
            self.lin(f"blk_{n}_ffn_up", D, M)
            self.lin(f"blk_{n}_ffn_down", M, D)
            self.norm(f"blk_{n}_attn_output_norm")
            self.norm(f"blk_{n}_layer_output_norm")
        self.norm("token_embd_norm")
        self.token_embd_weight, self.position_embd_weight = par(V, D), par(16, D)
        self.start_weight, self.end_weight, self.start_bias, self.end_bias = par(D), par(D), par(1), par(1)

    def lin(self, name, i, o):
        self.register_parameter(f"{name}_weight", par(o, i))
        self.register_parameter(f"{name}_bias", par(o))

    def norm(self, name):
        self.register_parameter(f"{name}_weight", nn.Parameter(torch.ones(D)))
        self.register_parameter(f"{name}_bias", par(D))

    def mm(self, name, x):
        return x @ getattr(self, f"{name}_weight").T + getattr(self, f"{name}_bias")

    def ln(self, name, x):
        return F.layer_norm(x, (D,), getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"), 1e-12)

    def forward(self, t):
        x = self.ln("token_embd_norm", self.token_embd_weight[t] + self.position_embd_weight[: t.shape[1]])
        for n in range(L):
            q, k, v = (split(self.mm(f"blk_{n}_attn_{c}", x)) for c in "qkv")
            y = torch.softmax(q @ k.mT / math.sqrt(D // H), -1) @ v
            x = self.ln(f"blk_{n}_attn_output_norm", x + self.mm(f"blk_{n}_attn_output", y.transpose(1, 2).flatten(2)))
            y = self.mm(f"blk_{n}_ffn_down", F.gelu(self.mm(f"blk_{n}_ffn_up", x)))
            x = self.ln(f"blk_{n}_layer_output_norm", x + y)
        return torch.stack([x @ self.start_weight + self.start_bias, x @ self.end_weight + self.end_bias], -1)


def o_gguf(s):
    rules = [
        (r"distilbert\.embeddings\.word_embeddings", "token_embd"),
        (r"distilbert\.embeddings\.position_embeddings", "position_embd"),
        (r"distilbert\.embeddings\.LayerNorm", "token_embd_norm"),
        (r"distilbert\.transformer\.layer\.(\d)\.", r"blk_\1_"),
        (r"attention\.(.)_lin", r"attn_\1"),
        (r"attention\.out_lin|attn_out_lin", "attn_output"),
        (r"sa_layer_norm", "attn_output_norm"),
        (r"(?<!attn_)output_layer_norm", "layer_output_norm"),
        (r"ffn\.lin1", "ffn_up"),
        (r"ffn\.lin2", "ffn_down"),
        (r"\.", "_"),
    ]
    out = renamed(s, rules, "qa_outputs|position_ids")
    out["start_weight"], out["end_weight"] = s["qa_outputs.weight"]
    out["start_bias"], out["end_bias"] = s["qa_outputs.bias"].split(1)
    return out


DISTIL = {"dim": D, "n_layers": L, "n_heads": H, "hidden_dim": M, "vocab_size": V, "max_position_embeddings": 16}
port(
    "distilbert: transformers DistilBertForQuestionAnswering -> own (GGUF names at the top, two answer vectors)",
    "text",
    family="distilbert",
    source=lambda: hf(T.DistilBertForQuestionAnswering, T.DistilBertConfig, 5, **DISTIL),
    target=lambda: shake(GGUFDistil(), 6),
    inputs=ids,
    run_source=lambda m, x: torch.stack([(o := m(input_ids=x)).start_logits, o.end_logits], -1),
    run_target=lambda m, x: m(x),
    oracle=o_gguf,
    note="no modules at all; the head's two rows become vectors of their own",
)


# ---------------------------------------------------------------- gpt2: TransformerLens


class LensBlock(nn.Module):
    def __init__(self):
        super().__init__()
        d = D // H
        self.ln1, self.ln2 = (nn.ParameterDict({"w": nn.Parameter(torch.ones(D)), "b": par(D)}) for _ in range(2))
        self.attn = nn.ParameterDict({f"W_{c}": par(H, D, d) for c in "QKV"} | {f"b_{c}": par(H, d) for c in "QKV"})
        self.attn["W_O"], self.attn["b_O"] = par(H, d, D), par(D)
        self.mlp = nn.ParameterDict({"W_in": par(D, M), "b_in": par(M), "W_out": par(M, D), "b_out": par(D)})


def lens_norm(x, p):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * p["w"] + p["b"]


class Lens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.ParameterDict({"W_E": par(V, D)})
        self.pos_embed = nn.ParameterDict({"W_pos": par(16, D)})
        self.blocks = nn.ModuleList(LensBlock() for _ in range(L))
        self.ln_final = nn.ParameterDict({"w": nn.Parameter(torch.ones(D)), "b": par(D)})
        self.unembed = nn.ParameterDict({"W_U": par(D, V), "b_U": par(V)})

    def forward(self, t):
        n = t.shape[1]
        x = self.embed["W_E"][t] + self.pos_embed["W_pos"][:n]
        for b in self.blocks:
            y, a = lens_norm(x, b.ln1), b.attn
            q, k, v = (torch.einsum("bpd,hde->bphe", y, a[f"W_{c}"]) + a[f"b_{c}"] for c in "QKV")
            s = torch.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(D // H)
            s = s.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -1e5).softmax(-1)
            z = torch.einsum("bhqk,bkhe->bqhe", s, v)
            x = x + torch.einsum("bqhe,hed->bqd", z, a["W_O"]) + a["b_O"]
            y = F.gelu(lens_norm(x, b.ln2) @ b.mlp["W_in"] + b.mlp["b_in"], approximate="tanh")
            x = x + y @ b.mlp["W_out"] + b.mlp["b_out"]
        return lens_norm(x, self.ln_final) @ self.unembed["W_U"] + self.unembed["b_U"]


def o_lens(s):
    out = {"embed.W_E": s["transformer.wte.weight"], "pos_embed.W_pos": s["transformer.wpe.weight"]}
    out |= {"unembed.W_U": s["lm_head.weight"].T, "unembed.b_U": torch.zeros(V)}
    for w, n in zip("wb", WB, strict=True):
        out[f"ln_final.{w}"] = s[f"transformer.ln_f.{n}"]
    for i in range(L):
        a, b = f"transformer.h.{i}.", f"blocks.{i}."
        for j, c in enumerate("QKV"):
            w = s[a + "attn.c_attn.weight"].chunk(3, 1)[j]
            out[f"{b}attn.W_{c}"] = w.unflatten(1, (H, -1)).transpose(0, 1)
            out[f"{b}attn.b_{c}"] = s[a + "attn.c_attn.bias"].chunk(3)[j].view(H, -1)
        out[b + "attn.W_O"], out[b + "attn.b_O"] = s[a + "attn.c_proj.weight"].view(H, -1, D), s[a + "attn.c_proj.bias"]
        for w, n in zip("wb", WB, strict=True):
            out[f"{b}ln1.{w}"], out[f"{b}ln2.{w}"] = s[f"{a}ln_1.{n}"], s[f"{a}ln_2.{n}"]
            out[f"{b}mlp.{w.upper() if w == 'w' else w}_in"] = s[f"{a}mlp.c_fc.{n}"]
            out[f"{b}mlp.{w.upper() if w == 'w' else w}_out"] = s[f"{a}mlp.c_proj.{n}"]
    return out


GPT2 = {"n_embd": D, "n_layer": L, "n_head": H, "n_inner": M, "n_positions": 16, "vocab_size": V}
port(
    "gpt2: transformers GPT2LMHeadModel -> own (TransformerLens layout, W_Q [heads, d, d_head], untied biased unembed)",
    "text",
    family="gpt2",
    source=lambda: hf(T.GPT2LMHeadModel, T.GPT2Config, 7, **GPT2),
    target=lambda: shake(Lens(), 8),
    inputs=ids,
    run_source=lambda m, x: m(input_ids=x).logits,
    run_target=lambda m, x: m(x),
    oracle=o_lens,
    note="per-head 3-d weights; a bias that the source does not have; the tied head is transposed",
)


# ---------------------------------------------------------------- t5 encoder: a table in every layer, nn.RMSNorm


class T5Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.wkv, self.wq, self.wo = (nn.Linear(D, n * D, bias=False) for n in (2, 1, 1))
        self.rel = nn.Embedding(8, H)
        self.rms_att, self.rms_ffn = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)
        self.w1, self.w2 = nn.Linear(D, M, bias=False), nn.Linear(M, D, bias=False)

    def forward(self, x, buckets):
        y = self.rms_att(x)
        k, v = self.wkv(y).chunk(2, -1)
        bias = self.rel(buckets).permute(2, 0, 1)
        x = x + self.wo(attend(self.wq(y), k, v, attn_mask=bias, scale=1.0))
        return x + self.w2(self.w1(self.rms_ffn(x)).relu())


class T5Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(V, D)
        self.mixers = nn.ModuleList(T5Mixer() for _ in range(L))
        self.rms = nn.RMSNorm(D, eps=1e-6)

    def forward(self, t):
        p = torch.arange(t.shape[1])
        r = p[None] - p[:, None]
        far = 2 + (torch.log(r.abs().clamp_min(1).float() / 2) / math.log(12 / 2) * 2).long()
        b = torch.where(r.abs() < 2, r.abs(), far.clamp_max(3)) + 4 * (r > 0)
        x = self.tok(t)
        for m in self.mixers:
            x = m(x, b)
        return self.rms(x)


def o_t5(s):
    rules = [
        ("^shared", "tok"),
        (r"^encoder\.block\.(\d)\.layer\.", r"mixers.\1."),
        (r"0\.SelfAttention\.(.)\.", r"w\1."),
        (r"0\.layer_norm", "rms_att"),
        (r"1\.layer_norm", "rms_ffn"),
        (r"1\.DenseReluDense\.wi", "w1"),
        (r"1\.DenseReluDense\.wo", "w2"),
        (r"encoder\.final_layer_norm", "rms"),
    ]
    out = renamed(s, rules, r"relative|SelfAttention\.[kv]|embed_tokens")
    for i in range(L):
        a = f"encoder.block.{i}.layer.0.SelfAttention."
        out[f"mixers.{i}.wkv.weight"] = torch.cat([s[f"{a}{c}.weight"] for c in "kv"])
        out[f"mixers.{i}.rel.weight"] = s["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return out


T5 = {"d_model": D, "num_layers": L, "num_heads": H, "d_kv": D // H, "d_ff": M, "vocab_size": V}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
port(
    "t5: transformers T5EncoderModel -> own (nn.RMSNorm, kv in one, a bias table in every layer)",
    "text",
    family="t5-encoder",
    source=lambda: hf(T.T5EncoderModel, T.T5Config, 9, **T5),
    target=lambda: shake(T5Own(), 10),
    inputs=ids,
    run_source=lambda m, x: m(input_ids=x).last_hidden_state,
    run_target=lambda m, x: m(x),
    oracle=o_t5,
    note="one shared table becomes one in each layer",
)


# ---------------------------------------------------------------- clip text: Stable Diffusion, last layer skipped


class SDLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layernorm_1, self.layernorm_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = nn.ModuleDict({"in_proj": nn.Linear(D, 3 * D), "out_proj": nn.Linear(D, D)})
        self.linear_1, self.linear_2 = nn.Linear(D, M), nn.Linear(M, D)

    def forward(self, x):
        q, k, v = self.attention["in_proj"](self.layernorm_1(x)).chunk(3, -1)
        x = x + self.attention["out_proj"](attend(q, k, v, is_causal=True))
        y = self.linear_1(self.layernorm_2(x))
        return x + self.linear_2(y * torch.sigmoid(1.702 * y))


class SDText(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Module()
        self.embedding.token_embedding = nn.Embedding(V, D)
        self.embedding.position_embedding = par(16, D)
        self.layers = nn.ModuleList(SDLayer() for _ in range(2))
        self.layernorm = nn.LayerNorm(D)

    def forward(self, t):
        x = self.embedding.token_embedding(t) + self.embedding.position_embedding[: t.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.layernorm(x)


def o_sd(s):
    s = {k.removeprefix("text_model."): v for k, v in s.items()}
    rules = [
        (r"embeddings\.position_embedding\.weight", "embedding.position_embedding"),
        (r"embeddings\.token", "embedding.token"),
        (r"encoder\.layers", "layers"),
        (r"layer_norm(\d)", r"layernorm_\1"),
        ("self_attn", "attention"),
        (r"mlp\.fc", "linear_"),
        ("final_layer_norm", "layernorm"),
    ]
    out = renamed(s, rules, r"[qkv]_proj|position_ids|layers\.2")
    for i in range(2):
        for w in WB:
            parts = [s[f"encoder.layers.{i}.self_attn.{c}_proj.{w}"] for c in "qkv"]
            out[f"layers.{i}.attention.in_proj.{w}"] = torch.cat(parts)
    return out


TEXT = {"hidden_size": D, "num_attention_heads": H, "intermediate_size": M, "vocab_size": V, "eos_token_id": 2}
TEXT |= {"max_position_embeddings": 16, "num_hidden_layers": 3}
port(
    "clip-text: transformers CLIPTextModel -> own (Stable Diffusion from scratch, clip skip 2)",
    "clip",
    family="clip-text",
    source=lambda: hf(T.CLIPTextModel, T.CLIPTextConfig, 11, **TEXT),
    target=lambda: shake(SDText(), 12),
    inputs=ids,
    run_source=lambda m, x: dict(m.named_modules())[
        next(n for n, _ in m.named_modules() if n.endswith("final_layer_norm"))
    ](m(input_ids=x, output_hidden_states=True).hidden_states[-2]),
    run_target=lambda m, x: m(x),
    oracle=o_sd,
    note="the source's last layer is not wanted, its final norm is",
)


# ---------------------------------------------------------------- siglip vision: timm -> transformers


def timm_siglip(seed):
    kw = {"img_size": 16, "patch_size": 4, "embed_dim": D, "depth": L, "num_heads": H, "mlp_ratio": 2, "num_classes": 0}
    return shake(timm.models.vision_transformer.VisionTransformer(**kw, class_token=False, global_pool="map"), seed)


def o_siglip(s, pre=""):
    rules = [
        (r"patch_embed\.proj", "embeddings.patch_embedding"),
        (r"^norm", "post_layernorm"),
        (r"^blocks", "encoder.layers"),
        (r"(layers\.\d\.)norm", r"\1layer_norm"),
        (r"attn\.proj", "self_attn.out_proj"),
        (r"attn_pool\.norm", "head.layernorm"),
        (r"attn_pool\.proj|attn_pool\.self_attn\.out_proj", "head.attention.out_proj"),
        (r"attn_pool\.mlp", "head.mlp"),
    ]
    s = {k.replace("attn_pool.proj", "head.attention.out_proj"): v for k, v in s.items()}
    out = renamed(s, rules, r"qkv|pos_embed|attn_pool\.(q|kv|latent)")
    out["embeddings.position_embedding.weight"] = s["pos_embed"][0]
    out["head.probe"] = s["attn_pool.latent"]
    for w in WB:
        out[f"head.attention.in_proj_{w}"] = torch.cat([s[f"attn_pool.q.{w}"], s[f"attn_pool.kv.{w}"]])
        for i in range(L):
            for c, v in zip("qkv", s[f"blocks.{i}.attn.qkv.{w}"].chunk(3), strict=True):
                out[f"encoder.layers.{i}.self_attn.{c}_proj.{w}"] = v
    full = siglip_prefix()
    return {full + k: v for k, v in out.items()}


def siglip_prefix():
    names = hf_siglip(0).state_dict()
    return "vision_model." if any(k.startswith("vision_model.") for k in names) else ""


def hf_siglip(seed):
    kw = {"hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H, "intermediate_size": M}
    return hf(T.SiglipVisionModel, T.SiglipVisionConfig, seed, **kw, image_size=16, patch_size=4, hidden_act="gelu")


port(
    "siglip-vision: timm VisionTransformer (map pool) -> transformers SiglipVisionModel",
    "clip",
    family="siglip-vision",
    source=lambda: timm_siglip(13),
    target=lambda: hf_siglip(14),
    inputs=noise(2, 3, 16, 16),
    run_source=lambda m, x: m(x),
    run_target=lambda m, x: m(pixel_values=x).pooler_output,
    oracle=o_siglip,
    note="qkv apart in the trunk, q and kv together in the pool",
)


# ---------------------------------------------------------------- whisper: CTranslate2


def gb(d=D):
    return nn.ParameterDict({"gamma": nn.Parameter(torch.ones(d)), "beta": par(d)})


def ctn(p, x):
    return F.layer_norm(x, (D,), p["gamma"], p["beta"])


class CTAttn(nn.Module):
    def __init__(self, cross=False):
        super().__init__()
        self.layer_norm, self.cross = gb(), cross
        self.linear = nn.ModuleList(nn.Linear(D, n * D) for n in ((1, 2, 1) if cross else (3, 1)))

    def forward(self, x, mem=None, causal=False):
        y = self.linear[0](ctn(self.layer_norm, x))
        q, k, v = (y, *self.linear[1](mem).chunk(2, -1)) if self.cross else y.chunk(3, -1)
        return x + self.linear[-1](attend(q, k, v, is_causal=causal))


class CTLayer(nn.Module):
    def __init__(self, cross):
        super().__init__()
        self.ffn = nn.ModuleDict({"layer_norm": gb(), "linear_0": nn.Linear(D, M), "linear_1": nn.Linear(M, D)})
        self.self_attention = CTAttn()
        self.attention = CTAttn(True) if cross else None

    def forward(self, x, mem=None):
        x = self.self_attention(x, causal=mem is not None)
        x = x if mem is None else self.attention(x, mem)
        f = self.ffn
        return x + f["linear_1"](F.gelu(f["linear_0"](ctn(f["layer_norm"], x))))


class CTWhisper(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Module(), nn.Module()
        for side, n in ((self.decoder, 16), (self.encoder, 12)):
            side.layer = nn.ModuleList(CTLayer(side is self.decoder) for _ in range(L))
            side.layer_norm = gb()
            side.position_encodings = nn.ParameterDict({"encodings": par(n, D)})
        self.decoder.embeddings = nn.Embedding(V, D)
        self.decoder.projection = nn.Linear(D, V, bias=False)
        self.encoder.conv1, self.encoder.conv2 = nn.Conv1d(8, D, 3, 1, 1), nn.Conv1d(D, D, 3, 2, 1)

    def forward(self, mel, t):
        e, d = self.encoder, self.decoder
        m = F.gelu(e.conv2(F.gelu(e.conv1(mel)))).mT + e.position_encodings["encodings"]
        for layer in e.layer:
            m = layer(m)
        m = ctn(e.layer_norm, m)
        x = d.embeddings(t) + d.position_encodings["encodings"][: t.shape[1]]
        for layer in d.layer:
            x = layer(x, m)
        return d.projection(ctn(d.layer_norm, x))


def o_ct(s):
    out = {"decoder.projection.weight": s["proj_out.weight"]}
    for k, w in s.items():
        k = k.removeprefix("model.").replace("embed_positions.weight", "position_encodings.encodings")
        k = k.replace("embed_tokens", "embeddings").replace(".layers.", ".layer.")
        k = k.replace("encoder_attn.out_proj", "attention.linear.2").replace(
            "encoder_attn.q_proj", "attention.linear.0"
        )
        k = k.replace("encoder_attn_layer_norm", "attention.layer_norm")
        k = k.replace("self_attn.out_proj", "self_attention.linear.1")
        k = k.replace("self_attn_layer_norm", "self_attention.layer_norm").replace("fc1", "ffn.linear_0")
        k = k.replace("final_layer_norm", "ffn.layer_norm").replace("fc2", "ffn.linear_1")
        k = re.sub("layer_norm.weight", "layer_norm.gamma", k)
        k = re.sub("layer_norm.bias", "layer_norm.beta", k)
        if not re.search("_attn|proj_out", k):
            out[k] = w
    for side in ("encoder", "decoder"):
        for i in range(L):
            for kind, to, names in (("self_attn", "self_attention.linear.0", "qkv"), ("encoder_attn", "x", "kv")):
                a = f"model.{side}.layers.{i}.{kind}."
                if a + "q_proj.weight" in s:
                    to = f"{side}.layer.{i}." + (to if kind == "self_attn" else "attention.linear.1")
                    for w in WB:
                        parts = [s.get(f"{a}{c}_proj.{w}", torch.zeros(D)) for c in names]
                        out[f"{to}.{w}"] = torch.cat(parts)
    return out


WHISPER = {"d_model": D, "encoder_layers": L, "decoder_layers": L, "vocab_size": V, "num_mel_bins": 8}
WHISPER |= {"encoder_attention_heads": H, "decoder_attention_heads": H, "encoder_ffn_dim": M, "decoder_ffn_dim": M}
WHISPER |= {"max_source_positions": 12, "max_target_positions": 16, "pad_token_id": 0, "eos_token_id": 2}
port(
    "whisper: transformers WhisperForConditionalGeneration -> own (CTranslate2 layout, gamma, beta, numbered linears)",
    "audio",
    family="whisper",
    source=lambda: hf(T.WhisperForConditionalGeneration, T.WhisperConfig, 15, **WHISPER),
    target=lambda: shake(CTWhisper(), 16),
    inputs=lambda seed: (noise(2, 8, 24)(seed), ids(seed)),
    run_source=lambda m, x: m(input_features=x[0], decoder_input_ids=x[1], use_cache=False).logits,
    run_target=lambda m, x: m(*x),
    oracle=o_ct,
    note="linear.1 is the output of one attention and the keys and values of the other; key biases do not exist",
)


# ---------------------------------------------------------------- wav2vec2: ESPnet


class ESAttn(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        q, k, v = (split(f(x)) for f in (self.linear_q, self.linear_k, self.linear_v))
        y = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), -1) @ v
        return self.linear_out(y.transpose(1, 2).reshape(x.shape))


class ESLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = ESAttn()
        self.feed_forward = nn.ModuleDict({"w_1": nn.Linear(D, M), "w_2": nn.Linear(M, D)})
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x):
        x = self.norm1(x + self.self_attn(x))
        return self.norm2(x + self.feed_forward["w_2"](F.gelu(self.feed_forward["w_1"](x))))


class ESCtc(nn.Module):
    def __init__(self):
        super().__init__()
        self.ctc = nn.ModuleDict({"ctc_lo": nn.Linear(D, 11)})
        self.frontend = nn.Sequential(
            *(nn.Conv1d(1, 16, 10, 5, bias=False), nn.GroupNorm(16, 16), nn.GELU()),
            *(nn.Conv1d(16, 16, 3, 2, bias=False), nn.GELU(), nn.Conv1d(16, 16, 2, 2, bias=False), nn.GELU()),
        )
        self.embed = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, D), nn.Dropout(0.1))
        self.pos = nn.Conv1d(D, D, 8, padding=4, groups=4)
        self.after_pos = nn.LayerNorm(D)
        self.encoders = nn.ModuleList(ESLayer() for _ in range(L))

    def forward(self, wav):
        x = self.embed(self.frontend(wav[:, None]).mT)
        x = self.after_pos(x + F.gelu(self.pos(x.mT)[..., :-1]).mT)
        for layer in self.encoders:
            x = layer(x)
        return self.ctc["ctc_lo"](x).log_softmax(-1)


def o_es(s):
    a = "feature_extractor.conv_layers."
    rules = [
        ("^aux", "ctc.ctc_lo"),
        (a.replace(".", r"\.") + r"0\.layer_norm", "frontend.1"),
        (a.replace(".", r"\.") + r"(\d)\.conv", lambda m: f"frontend.{(0, 3, 5)[int(m[1])]}"),
        (r"encoder\.feature_projection\.layer_norm", "embed.0"),
        (r"encoder\.feature_projection\.projection", "embed.1"),
        (r"encoder\.transformer\.pos_conv_embed\.conv\.bias", "pos.bias"),
        (r"encoder\.transformer\.layer_norm", "after_pos"),
        (r"encoder\.transformer\.layers", "encoders"),
        (r"attention\.(q|k|v|out)_proj", r"self_attn.linear_\1"),
        (r"feed_forward\.intermediate_dense", "feed_forward.w_1"),
        (r"feed_forward\.output_dense", "feed_forward.w_2"),
        (r"(encoders\.\d\.)layer_norm", r"\1norm1"),
        ("final_layer_norm", "norm2"),
    ]
    out = renamed(s, rules, "pos_conv_embed.conv.*weight")
    g, v = (w for k, w in s.items() if re.search("pos_conv_embed.conv.*(weight|original)", k) and "bias" not in k)
    g, v = (g, v) if g.numel() < v.numel() else (v, g)
    out["pos.weight"] = v * (g / v.norm(dim=(0, 1), keepdim=True))
    return out


def ta_wav2vec2(seed):
    conv = [(16, 10, 5), (16, 3, 2), (16, 2, 2)]
    drop = {f"encoder_{k}": 0.0 for k in ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout")}
    kw = {"encoder_embed_dim": D, "encoder_pos_conv_kernel": 8, "encoder_pos_conv_groups": 4, "encoder_num_layers": L}
    kw |= {"encoder_num_heads": H, "encoder_ff_interm_features": M, "encoder_layer_norm_first": False}
    kw |= {"extractor_mode": "group_norm", "extractor_conv_layer_config": conv, "extractor_conv_bias": False}
    return shake(torchaudio.models.wav2vec2_model(**kw, **drop, encoder_layer_drop=0.0, aux_num_out=11), seed)


port(
    "wav2vec2: torchaudio (CTC) -> own (ESPnet names, flat frontend, norms folded out of the positional convolution)",
    "audio",
    family="wav2vec2",
    source=lambda: ta_wav2vec2(17),
    target=lambda: shake(ESCtc(), 18),
    inputs=noise(2, 400),
    run_source=lambda m, x: m(x)[0].log_softmax(-1),
    run_target=lambda m, x: m(x),
    oracle=o_es,
    note="weight norm over the taps is multiplied out; log-probabilities against logits",
)


# ---------------------------------------------------------------- vit: torchvision -> a notebook's names from Flax


class JBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.ffn = nn.ModuleDict({"fc1": nn.Linear(D, M), "fc2": nn.Linear(M, D)})
        self.attn = nn.ModuleDict({n: nn.Linear(D, D) for n in ("query", "key", "value", "out")})

    def forward(self, x):
        y, a = self.attention_norm(x), self.attn
        x = x + a["out"](attend(a["query"](y), a["key"](y), a["value"](y)))
        return x + self.ffn["fc2"](F.gelu(self.ffn["fc1"](self.ffn_norm(x))))


class JViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.Module()
        e = self.transformer.embeddings = nn.Module()
        e.position_embeddings, e.patch_embeddings, e.cls_token = par(1, 17, D), nn.Conv2d(3, D, 4, 4), par(1, 1, D)
        c = self.transformer.encoder = nn.Module()
        c.layer, c.encoder_norm = nn.ModuleList(JBlock() for _ in range(L)), nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Linear(D, 5)

    def forward(self, x):
        e, c = self.transformer.embeddings, self.transformer.encoder
        x = e.patch_embeddings(x).flatten(2).mT
        x = torch.cat([e.cls_token.expand(len(x), -1, -1), x], 1) + e.position_embeddings
        for block in c.layer:
            x = block(x)
        return self.head(c.encoder_norm(x)[:, 0])


def o_jvit(s):
    rules = [
        ("class_token", "transformer.embeddings.cls_token"),
        ("conv_proj", "transformer.embeddings.patch_embeddings"),
        (r"encoder\.pos_embedding", "transformer.embeddings.position_embeddings"),
        (r"^encoder\.ln\.", "transformer.encoder.encoder_norm."),
        (r"^encoder\.layers\.encoder_layer_(\d)", r"transformer.encoder.layer.\1"),
        ("ln_1", "attention_norm"),
        ("ln_2", "ffn_norm"),
        (r"mlp\.0", "ffn.fc1"),
        (r"mlp\.3", "ffn.fc2"),
        (r"self_attention\.out_proj", "attn.out"),
        (r"heads\.head", "head"),
    ]
    out = renamed(s, rules, "in_proj")
    for i in range(L):
        for w in WB:
            v = s[f"encoder.layers.encoder_layer_{i}.self_attention.in_proj_{w}"].chunk(3)
            out |= {
                f"transformer.encoder.layer.{i}.attn.{n}.{w}": v[j] for j, n in enumerate(("query", "key", "value"))
            }
    return out


port(
    "vit: torchvision -> own (ViT-pytorch names, query, key and value apart)",
    "vision",
    family="vit",
    source=lambda: shake(torchvision.models.VisionTransformer(16, 4, L, H, D, M, num_classes=5), 19),
    target=lambda: shake(JViT(), 20),
    inputs=noise(2, 3, 16, 16),
    run_source=lambda m, x: m(x),
    run_target=lambda m, x: m(x),
    oracle=o_jvit,
    note="packed projections come apart under three names",
)


# ---------------------------------------------------------------- convnext: timm -> the authors' layout


class CFNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), par(d)

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        x = (x - u) / torch.sqrt((x - u).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class FBBlock(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.gamma = par(d)
        self.dwconv, self.norm = nn.Conv2d(d, d, 7, padding=3, groups=d), nn.LayerNorm(d, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))).permute(0, 3, 1, 2)


class FBConvNeXt(nn.Module):
    def __init__(self, dims=(8, 16, 24, 32)):
        super().__init__()
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), CFNorm(dims[0]))])
        for a, b in pairwise(dims):
            self.downsample_layers.append(nn.Sequential(CFNorm(a), nn.Conv2d(a, b, 2, 2)))
        self.stages = nn.ModuleList(nn.Sequential(FBBlock(d), FBBlock(d)) for d in dims)
        self.norm, self.head = nn.LayerNorm(dims[-1], eps=1e-6), nn.Linear(dims[-1], 5)

    def forward(self, x):
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        return self.head(self.norm(x.mean((2, 3))))


def o_fb(s):
    rules = [
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample", r"downsample_layers.\1"),
        (r"\.blocks\.", "."),
        ("conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"head\.norm", "norm"),
        (r"head\.fc", "head"),
    ]
    return renamed(s, rules)


port(
    "convnext: timm -> own (the authors' layout: downsample_layers beside stages, channels-first norm)",
    "vision",
    family="convnext",
    source=lambda: shake(timm.models.ConvNeXt(depths=(2, 2, 2, 2), dims=(8, 16, 24, 32), num_classes=5), 21),
    target=lambda: shake(FBConvNeXt(), 22),
    inputs=noise(2, 3, 32, 32),
    run_source=lambda m, x: m(x),
    run_target=lambda m, x: m(x),
    oracle=o_fb,
    note="the downsampling layers of all stages stand together, first",
)


# ---------------------------------------------------------------- resnet: torchvision -> detectron2


class D2Conv(nn.Conv2d):
    def __init__(self, i, o, k, s=1):
        super().__init__(i, o, k, s, k // 2, bias=False)
        self.norm = nn.BatchNorm2d(o)

    def forward(self, x):
        return self.norm(super().forward(x))


class D2Block(nn.Module):
    def __init__(self, i, d, o, s):
        super().__init__()
        self.shortcut = D2Conv(i, o, 1, s) if i != o else None
        self.conv1, self.conv2, self.conv3 = D2Conv(i, d, 1), D2Conv(d, d, 3, s), D2Conv(d, o, 1)

    def forward(self, x):
        y = self.conv3(self.conv2(self.conv1(x).relu()).relu())
        return (y + (x if self.shortcut is None else self.shortcut(x))).relu()


class D2Res(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.ModuleDict({"conv1": D2Conv(3, 64, 7, 2)})
        for n, (i, d, s) in enumerate([(64, 8, 1), (256, 16, 2)], 2):
            o = 256 * 2 ** (n - 2)
            self.add_module(f"res{n}", nn.Sequential(D2Block(i, d, o, s), D2Block(o, d, o, 1)))

    def forward(self, x):
        return self.res3(self.res2(F.max_pool2d(self.stem["conv1"](x).relu(), 3, 2, 1)))


def tv_res(seed):
    tv = torchvision.models.resnet
    m = tv.ResNet(tv.Bottleneck, [2, 2, 1, 1], num_classes=5, width_per_group=8)
    del m.layer3, m.layer4, m.fc, m.avgpool
    shake(m, seed)
    for name, b in m.named_buffers():
        if name.endswith("running_mean"):
            b.mul_(0.1)  # else nothing passes the ReLUs
    return m


def o_d2(s):
    rules = [
        (r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}"),
        (r"^(conv1|bn1)", r"stem.\1"),
        (r"bn(\d)", r"conv\1.norm"),
        (r"downsample\.0", "shortcut"),
        (r"downsample\.1", "shortcut.norm"),
    ]
    return renamed(s, rules)


port(
    "resnet: torchvision (two stages) -> own (detectron2 style, norms inside their convolutions, res2 and res3)",
    "vision",
    family="resnet",
    source=lambda: tv_res(23),
    target=lambda: shake(D2Res(), 24),
    inputs=noise(2, 3, 32, 32),
    run_source=lambda m, x: m.layer2(m.layer1(m.maxpool(m.bn1(m.conv1(x)).clamp_min(0)))),
    run_target=lambda m, x: m(x),
    oracle=o_d2,
    note="a norm is a child of its convolution; stages are numbered from 2; the shortcut comes first",
)


# ---------------------------------------------------------------- patchtst: transformers -> own


class PTLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn_ff, self.bn_att = nn.BatchNorm1d(D), nn.BatchNorm1d(D)
        self.mha = nn.MultiheadAttention(D, H, batch_first=True)
        self.ff1, self.ff2 = nn.Conv1d(D, M, 1), nn.Conv1d(M, D, 1)

    def forward(self, x):
        y = self.bn_att(x.mT).mT
        x = x + self.mha(y, y, y, need_weights=False)[0]
        return x + self.ff2(F.gelu(self.ff1(self.bn_ff(x.mT)))).mT


class PTOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.forecast = nn.Conv2d(1, 5, (4, D))
        self.layers = nn.ModuleList(PTLayer() for _ in range(L))
        self.patch, self.where = nn.Conv1d(1, D, 6, 6), par(4, D)

    def forward(self, x):
        b, _, c = x.shape
        mu, sd = x.mean(1, keepdim=True), (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        z = self.patch(((x - mu) / sd).mT.reshape(b * c, 1, -1)).mT + self.where
        for layer in self.layers:
            z = layer(z)
        return self.forecast(z[:, None]).view(b, c, -1).mT * sd + mu


def o_pt(s):
    a = "model.encoder."
    out = {"patch.weight": s[a + "embedder.input_embedding.weight"][:, None]}
    out["patch.bias"] = s[a + "embedder.input_embedding.bias"]
    out["where"] = s[a + "positional_encoder.position_enc"]
    out["forecast.weight"], out["forecast.bias"] = (
        s["head.projection.weight"].view(5, 1, 4, D),
        s["head.projection.bias"],
    )
    for i in range(L):
        a, b = f"model.encoder.layers.{i}.", f"layers.{i}."
        for n in (*WB, "running_mean", "running_var"):
            out[f"{b}bn_att.{n}"] = s[f"{a}norm_sublayer1.batchnorm.{n}"]
            out[f"{b}bn_ff.{n}"] = s[f"{a}norm_sublayer3.batchnorm.{n}"]
        for w in WB:
            out[f"{b}mha.in_proj_{w}"] = torch.cat([s[f"{a}self_attn.{c}_proj.{w}"] for c in "qkv"])
            out[f"{b}mha.out_proj.{w}"] = s[f"{a}self_attn.out_proj.{w}"]
            for x, y in ((0, 1), (3, 2)):
                v = s[f"{a}ff.{x}.{w}"]
                out[f"{b}ff{y}.{w}"] = v[..., None] if v.ndim == 2 else v
    return out


PTST = {"num_input_channels": 3, "context_length": 24, "patch_length": 6, "patch_stride": 6, "num_hidden_layers": L}
PTST |= {"d_model": D, "num_attention_heads": H, "ffn_dim": M, "prediction_length": 5, "scaling": "std", "loss": "mse"}
PTST["pooling_type"] = None
port(
    "patchtst: transformers PatchTSTForPrediction -> own (patches and forecast as convolutions, nn.MultiheadAttention)",
    "timeseries",
    family="patchtst",
    source=lambda: hf(T.PatchTSTForPrediction, T.PatchTSTConfig, 25, **PTST),
    target=lambda: shake(PTOwn(), 26),
    inputs=noise(2, 24, 3),
    run_source=lambda m, x: m(past_values=x).prediction_outputs,
    run_target=lambda m, x: m(x),
    oracle=o_pt,
    note="the flattened head is a convolution over the whole map; the second norm is registered first",
)
