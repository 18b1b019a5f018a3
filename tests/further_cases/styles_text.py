"""Further cases: text, in more of the styles that people write."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.further_cases.text import (
    BERT,
    BUCKETS,
    DH,
    DISTIL,
    DISTIL_TO_BERT,
    FAR,
    FF,
    GPT2,
    ROBERTA,
    TH,
    TK,
    D,
    H,
    L,
    P,
    V,
    bucket,
    case,
    curated,
    hf,
    hf_t5,
    layers,
    merge,
    move,
    run_curated,
    split,
    tokens,
)
from tests.graft_matrix.core import shake

ATT = ("query", "key", "value")


def par(*shape) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def pars(**shapes) -> nn.ParameterDict:
    return nn.ParameterDict({k: par(*(s if isinstance(s, tuple) else (s,))) for k, s in shapes.items()})


def soft(x: Tensor) -> Tensor:
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


# ------------------------------------------------------------------------------- 1 BERT, all layers in one array


class ScanBert(nn.Module):
    """What a port from a scanned JAX model looks like: every weight is [layers, ...], kernels keep their axes."""

    def __init__(self):
        super().__init__()
        self.embed = pars(tok=(V, D), pos=(P, D), seg=(2, D), scale=D, shift=D)
        qkv = {f"w{n}": (L, D, H, DH) for n in "qkv"} | {f"b{n}": (L, H, DH) for n in "qkv"}
        norms = {f"{n}_{w}": (L, D) for n in ("attn_norm", "ffn_norm") for w in ("scale", "shift")}
        self.stack = pars(
            **qkv, wo=(L, H, DH, D), bo=(L, D), w1=(L, D, FF), b1=(L, FF), w2=(L, FF, D), b2=(L, D), **norms
        )
        self.pool = pars(w=(D, D), b=D)

    @staticmethod
    def norm(x, scale, shift):
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-12) * scale + shift

    def forward(self, ids, types):
        e, s = self.embed, self.stack
        x = F.one_hot(ids, V).to(e["tok"].dtype) @ e["tok"] + e["pos"][: ids.shape[1]]
        x = self.norm(x + F.one_hot(types, 2).to(x.dtype) @ e["seg"], e["scale"], e["shift"])
        for i in range(L):
            q, k, v = (torch.einsum("btd,dhk->bthk", x, s[f"w{n}"][i]) + s[f"b{n}"][i] for n in "qkv")
            w = soft(torch.einsum("bthd,bshd->bhts", q, k) / DH**0.5)
            y = torch.einsum("bhts,bshd,hdo->bto", w, v, s["wo"][i]) + s["bo"][i]
            x = self.norm(x + y, s["attn_norm_scale"][i], s["attn_norm_shift"][i])
            y = x @ s["w1"][i] + s["b1"][i]
            y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2))) @ s["w2"][i] + s["b2"][i]
            x = self.norm(x + y, s["ffn_norm_scale"][i], s["ffn_norm_shift"][i])
        return x, torch.tanh(x[:, 0] @ self.pool["w"] + self.pool["b"])


def both(h, p):
    return torch.cat([h, p[:, None]], 1)


def bert_to_scan(s):
    e = "embeddings."
    out = {
        "embed.tok": s[e + "word_embeddings.weight"],
        "embed.pos": s[e + "position_embeddings.weight"],
        "embed.seg": s[e + "token_type_embeddings.weight"],
        "embed.scale": s[e + "LayerNorm.weight"],
        "embed.shift": s[e + "LayerNorm.bias"],
        "pool.w": s["pooler.dense.weight"].T,
        "pool.b": s["pooler.dense.bias"],
    }

    def every(name):
        return torch.stack([s[f"encoder.layer.{i}.{name}"] for i in range(L)])

    for n in ATT:
        out[f"stack.w{n[0]}"] = every(f"attention.self.{n}.weight").mT.unflatten(-1, (H, DH))
        out[f"stack.b{n[0]}"] = every(f"attention.self.{n}.bias").unflatten(-1, (H, DH))
    out["stack.wo"] = every("attention.output.dense.weight").mT.unflatten(1, (H, DH))
    out["stack.bo"] = every("attention.output.dense.bias")
    for a, b in (("intermediate.dense", "1"), ("output.dense", "2")):
        out["stack.w" + b], out["stack.b" + b] = every(a + ".weight").mT, every(a + ".bias")
    for a, b in (("attention.output", "attn"), ("output", "ffn")):
        out[f"stack.{b}_norm_scale"] = every(a + ".LayerNorm.weight")
        out[f"stack.{b}_norm_shift"] = every(a + ".LayerNorm.bias")
    return out


case(
    name="scan-bert: transformers BertModel -> own (all layers in [L, ...] arrays, one-hot embeddings)",
    family="bert-encoder",
    note="stacks of turned kernels [L, d, heads, d_head]; softmax, norm and gelu written out; pooler",
    source=lambda: hf("BertModel", "BertConfig", 101, **BERT),
    target=lambda: shake(ScanBert(), 102),
    inputs=tokens(P),
    run_source=lambda m, x: both(*m(input_ids=x["ids"], token_type_ids=x["types"])[:2]),
    run_target=lambda m, x: both(*m(x["ids"], x["types"])),
    oracle=bert_to_scan,
)

# ---------------------------------------------------------------------------- 2 ALBERT into a training module


class SharedNet(nn.Module):
    def __init__(self):
        super().__init__()
        gelu = functools.partial(F.gelu, approximate="tanh")
        self.layer = nn.TransformerEncoderLayer(D, H, FF, 0.0, gelu, layer_norm_eps=1e-12, batch_first=True)
        self.up = nn.Linear(16, D)
        self.register_buffer("steps", torch.arange(P)[None], persistent=False)
        self.table = nn.ParameterDict({"segment": par(2, 16), "place": par(P, 16), "word": par(V, 16)})
        self.table_norm = nn.LayerNorm(16, eps=1e-12)

    def forward(self, ids, types):
        t = self.table
        x = F.embedding(ids, t["word"]) + F.embedding(types, t["segment"])
        x = self.up(self.table_norm(x + F.embedding(self.steps[:, : ids.shape[1]], t["place"])))
        for _ in range(3):
            x = self.layer(x)
        return x


class LitReview(nn.Module):
    """A LightningModule in all but base class: net, a fresh head, class weights for the loss."""

    def __init__(self):
        super().__init__()
        self.register_buffer("class_weight", torch.tensor([0.3, 0.7, 1.1]))
        self.net, self.head = SharedNet(), nn.Sequential(nn.Dropout(0.1), nn.Linear(D, 3))

    def forward(self, ids, types):
        return self.head(self.net(ids, types).mean(1))


def albert_to_lit(s):
    e, a = "embeddings.", "encoder.albert_layer_groups.0.albert_layers.0."
    out = {
        "net.table.word": s[e + "word_embeddings.weight"],
        "net.table.place": s[e + "position_embeddings.weight"],
        "net.table.segment": s[e + "token_type_embeddings.weight"],
        **move(s, {e + "LayerNorm": "net.table_norm", "encoder.embedding_hidden_mapping_in": "net.up"}),
    }
    for w in ("weight", "bias"):
        out[f"net.layer.self_attn.in_proj_{w}"] = torch.cat([s[f"{a}attention.{n}.{w}"] for n in ATT])
    names = {
        "attention.dense": "self_attn.out_proj",
        "attention.LayerNorm": "norm1",
        "full_layer_layer_norm": "norm2",
        "ffn": "linear1",
        "ffn_output": "linear2",
    }
    return {**out, **move(s, {a + x: "net.layer." + y for x, y in names.items()})}


def hf_albert(seed):
    kw = {**BERT, "num_hidden_layers": 3, "embedding_size": 16, "layer_norm_eps": 1e-12}
    return hf("AlbertModel", "AlbertConfig", seed, **kw)


case(
    name="lit-albert: transformers AlbertModel -> own Lightning-like module (one torch layer used three times)",
    family="albert",
    note="shared layer; narrow embeddings as raw parameters; in_proj; fresh head, class weights in a buffer",
    source=lambda: hf_albert(103),
    target=lambda: shake(LitReview(), 104),
    inputs=tokens(P),
    run_source=lambda m, x: m(input_ids=x["ids"], token_type_ids=x["types"]).last_hidden_state,
    run_target=lambda m, x: m.net(x["ids"], x["types"]),
    oracle=albert_to_lit,
)

# ----------------------------------------------------------------------------- 3 RoBERTa classifier, functional


class FunctionalLayer(nn.Module):
    """[T, B, D]; attention by torch's own function on raw matrices, one bias vector for q, k and v."""

    def __init__(self):
        super().__init__()
        self.wk, self.wv, self.wq = par(D, D), par(D, D), par(D, D)
        self.qkv_bias, self.wo, self.wo_bias = par(3 * D), par(D, D), par(D)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.ffn = nn.Sequential(nn.Linear(D, FF), nn.GELU(), nn.Linear(FF, D))

    def forward(self, x, pad):
        y, _ = F.multi_head_attention_forward(
            x,
            x,
            x,
            D,
            H,
            None,
            self.qkv_bias,
            None,
            None,
            False,
            0.0,
            self.wo,
            self.wo_bias,
            training=False,
            key_padding_mask=pad,
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=self.wq,
            k_proj_weight=self.wk,
            v_proj_weight=self.wv,
        )
        x = self.norms[0](x + y)
        return self.norms[1](x + self.ffn(x))


class ToxicityServer(nn.Module):
    """Positions count from 0; there is one segment, so no table for it; gives log-probabilities."""

    def __init__(self):
        super().__init__()
        self.emb, self.pos = nn.Embedding(V, D), nn.Embedding(P, D)
        self.emb_norm = nn.LayerNorm(D)
        self.body = nn.ModuleList(FunctionalLayer() for _ in range(L))
        self.score = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3))

    def forward(self, ids, mask):
        x = self.emb_norm(self.emb(ids) + self.pos.weight[: ids.shape[1]]).transpose(0, 1)
        for layer in self.body:
            x = layer(x, mask == 0)
        z = self.score(x[0])
        return z - z.logsumexp(-1, keepdim=True)


def roberta_to_server(s):
    e = "roberta.embeddings."
    out = {
        "emb.weight": s[e + "word_embeddings.weight"],
        "pos.weight": s[e + "position_embeddings.weight"][2:] + s[e + "token_type_embeddings.weight"],
        **move(s, {e + "LayerNorm": "emb_norm", "classifier.dense": "score.0", "classifier.out_proj": "score.2"}),
    }
    for i in range(L):
        a, b = f"roberta.encoder.layer.{i}.attention.", f"body.{i}."
        out.update({f"{b}w{n[0]}": s[f"{a}self.{n}.weight"] for n in ATT})
        out[b + "qkv_bias"] = torch.cat([s[f"{a}self.{n}.bias"] for n in ATT])
        out[b + "wo"], out[b + "wo_bias"] = s[a + "output.dense.weight"], s[a + "output.dense.bias"]
    names = {
        "attention.output.LayerNorm": "norms.0",
        "output.LayerNorm": "norms.1",
        "intermediate.dense": "ffn.0",
        "output.dense": "ffn.2",
    }
    return {**out, **layers(s, "roberta.encoder.layer.{}.", "body.{}.", names)}


case(
    name="server-roberta: transformers RobertaForSequenceClassification -> own (F.multi_head_attention_forward)",
    family="roberta",
    note="raw wk, wv, wq, one bias for all three; positions from 0 with the segment row added; log-probabilities",
    source=lambda: hf("RobertaForSequenceClassification", "RobertaConfig", 105, **ROBERTA, num_labels=3),
    target=lambda: shake(ToxicityServer(), 106),
    inputs=tokens(P),
    run_source=lambda m, x: m(input_ids=x["ids"], attention_mask=x["mask"]).logits.log_softmax(-1),
    run_target=lambda m, x: m(x["ids"], x["mask"]),
    oracle=roberta_to_server,
)

# -------------------------------------------------------------------------- 4 DistilBERT -> curated-transformers


def distil_to_curated(s):
    e = "embeddings."
    names = {
        "attention.q_lin": "mha.query",
        "attention.k_lin": "mha.key",
        "attention.v_lin": "mha.value",
        "attention.out_lin": "mha.output",
        "sa_layer_norm": "attn_residual_layer_norm",
        "ffn.lin1": "ffn.intermediate",
        "ffn.lin2": "ffn.output",
        "output_layer_norm": "ffn_residual_layer_norm",
    }
    assert set(names) == set(DISTIL_TO_BERT)
    return {
        **layers(s, "transformer.layer.{}.", "layers.{}.", names),
        **move(
            s,
            {
                e + "word_embeddings": e + "piece_embeddings",
                e + "position_embeddings": e + "position_embeddings",
                e + "LayerNorm": e + "embed_output_layer_norm",
            },
        ),
        e + "type_embeddings.weight": torch.zeros(2, D),
    }


case(
    name="curated-distilbert: transformers DistilBertModel -> curated-transformers BERT encoder",
    family="distilbert",
    note="segment row 0 has no source and must be zero; norms last in each of the target's layers",
    source=lambda: hf("DistilBertModel", "DistilBertConfig", 107, **DISTIL, pad_token_id=0),
    target=lambda: curated("BERT", 108, n_positions=P),
    inputs=tokens(P),
    run_source=lambda m, x: m(input_ids=x["ids"]).last_hidden_state,
    run_target=lambda m, x: run_curated(m, x, types=False),
    oracle=distil_to_curated,
)

# ------------------------------------------------------------------- 5 GPT-2 as an inference engine keeps it


class EngineGPT(nn.Module):
    """Flat names with dots turned into underscores, kernels [in, out], q, k, v on a middle axis."""

    def __init__(self):
        super().__init__()
        self.model_wte, self.model_wpe = par(V, D), par(P, D)
        self.final_gamma, self.final_beta = nn.Parameter(torch.ones(D)), par(D)
        self.layers = nn.ModuleList()
        for _ in range(L):
            p = pars(qkv_kernel=(D, 3, D), qkv_bias=(3, D), dense_kernel=(D, D), dense_bias=D)
            p.update(pars(up_kernel=(D, 4 * D), up_bias=4 * D, down_kernel=(4 * D, D), down_bias=D))
            for n in ("pre_attn", "pre_ffn"):
                p[n + "_beta"], p[n + "_gamma"] = par(D), nn.Parameter(torch.ones(D))
            self.layers.append(p)
        self.register_buffer("causal", torch.ones(P, P, dtype=torch.bool).tril())

    def forward(self, ids):
        t = ids.shape[1]
        x = self.model_wte[ids] + self.model_wpe[:t]
        for p in self.layers:
            y = F.layer_norm(x, (D,), p["pre_attn_gamma"], p["pre_attn_beta"])
            q, k, v = (split(z) for z in (torch.einsum("btd,dce->btce", y, p["qkv_kernel"]) + p["qkv_bias"]).unbind(2))
            a = (q @ k.mT / DH**0.5).masked_fill(~self.causal[:t, :t], -1e4).softmax(-1)
            x = x + merge(a @ v) @ p["dense_kernel"] + p["dense_bias"]
            y = F.layer_norm(x, (D,), p["pre_ffn_gamma"], p["pre_ffn_beta"]) @ p["up_kernel"] + p["up_bias"]
            y = y * torch.sigmoid(2 * 0.7978845608028654 * (y + 0.044715 * y.pow(3)))
            x = x + y @ p["down_kernel"] + p["down_bias"]
        return F.layer_norm(x, (D,), self.final_gamma, self.final_beta) @ self.model_wte.T


def engine_to_gpt2(s):
    t = "transformer."
    out = {
        t + "wte.weight": s["model_wte"],
        "lm_head.weight": s["model_wte"],
        t + "wpe.weight": s["model_wpe"],
        t + "ln_f.weight": s["final_gamma"],
        t + "ln_f.bias": s["final_beta"],
    }
    for i in range(L):
        a, b = f"layers.{i}.", f"{t}h.{i}."
        for x, y in (("qkv", "attn.c_attn"), ("dense", "attn.c_proj"), ("up", "mlp.c_fc"), ("down", "mlp.c_proj")):
            out[f"{b}{y}.weight"], out[f"{b}{y}.bias"] = (
                s[f"{a}{x}_kernel"].reshape(len(s[f"{a}{x}_kernel"]), -1),
                s[f"{a}{x}_bias"].flatten(),
            )
        for x, y in (("pre_attn", "ln_1"), ("pre_ffn", "ln_2")):
            out[f"{b}{y}.weight"], out[f"{b}{y}.bias"] = s[f"{a}{x}_gamma"], s[f"{a}{x}_beta"]
    return out


case(
    name="engine-gpt2: own (FasterTransformer-like arrays [d, 3, d]) -> transformers GPT2LMHeadModel",
    family="gpt2",
    note="flat parameter names; kernels already [in, out]; beta before gamma; tied by use, head by name in the target",
    source=lambda: shake(EngineGPT(), 109),
    target=lambda: hf("GPT2LMHeadModel", "GPT2Config", 110, **GPT2),
    inputs=tokens(P),
    run_source=lambda m, x: m(x["ids"]),
    run_target=lambda m, x: m(input_ids=x["ids"]).logits,
    oracle=engine_to_gpt2,
)

# ------------------------------------------------------------------- 6 GPT-2, blocks by word, baddbmm, log-probs


class HandNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.b, self.g = par(D), nn.Parameter(torch.ones(D))

    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(
            x.var(-1, unbiased=False, keepdim=True) + 1e-5
        ) * self.g + self.b


class WordBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.write = nn.ModuleDict({"narrow": nn.Linear(4 * D, D), "wide": nn.Linear(D, 4 * D), "before": HandNorm()})
        names = ("output", "value", "key", "query")
        self.read = nn.ModuleDict({"before": HandNorm(), **{n: nn.Linear(D, D) for n in names}})

    def forward(self, x, mask):
        r, w = self.read, self.write
        y = r["before"](x)
        q, k, v = (split(r[n](y)).flatten(0, 1) for n in ATT)
        a = torch.baddbmm(mask.expand(len(q), -1, -1), q, k.mT, beta=1.0, alpha=1 / math.sqrt(DH)).softmax(-1)
        x = x + r["output"](merge(torch.bmm(a, v).unflatten(0, (-1, H))))
        y = w["wide"](w["before"](x))
        return x + w["narrow"](0.5 * y * (1.0 + torch.erf(y * 0.7071067811865476)))


class WordGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({n: WordBlock() for n in ("lower", "upper")})
        self.register_buffer("mask", torch.full((P, P), float("-inf")).triu(1))
        self.places, self.words, self.after = nn.Embedding(P, D), nn.Embedding(V, D), HandNorm()

    def forward(self, ids):
        t = ids.shape[1]
        x = self.words(ids) + self.places.weight[None, :t]
        for block in self.blocks.values():
            x = block(x, self.mask[:t, :t])
        z = torch.einsum("btd,vd->btv", self.after(x), self.words.weight)
        return z - torch.logsumexp(z, -1, keepdim=True)


def gpt2_to_words(s):
    def norm(a, b):
        return {b + ".g": s[a + ".weight"], b + ".b": s[a + ".bias"]}

    t = "transformer."
    out = {
        "words.weight": s[t + "wte.weight"],
        "places.weight": s[t + "wpe.weight"],
        **norm(t + "ln_f", "after"),
    }
    for i, n in enumerate(("lower", "upper")):
        a, b = f"{t}h.{i}.", f"blocks.{n}."
        w, c = s[a + "attn.c_attn.weight"].chunk(3, 1), s[a + "attn.c_attn.bias"].chunk(3)
        for j, m in enumerate(ATT):
            out[f"{b}read.{m}.weight"], out[f"{b}read.{m}.bias"] = w[j].T, c[j]
        for x, y in (("attn.c_proj", "read.output"), ("mlp.c_fc", "write.wide"), ("mlp.c_proj", "write.narrow")):
            out[f"{b}{y}.weight"], out[f"{b}{y}.bias"] = s[f"{a}{x}.weight"].T, s[f"{a}{x}.bias"]
        out.update({**norm(a + "ln_1", b + "read.before"), **norm(a + "ln_2", b + "write.before")})
    return out


case(
    name="words-gpt2: transformers GPT2LMHeadModel (exact gelu) -> own (blocks named by word, baddbmm, log-probs)",
    family="gpt2",
    note="o, v, k, q order of square Linears; feed-forward before attention and down before up; -inf mask buffer",
    source=lambda: hf("GPT2LMHeadModel", "GPT2Config", 111, **GPT2, activation_function="gelu"),
    target=lambda: shake(WordGPT(), 112),
    inputs=tokens(P),
    run_source=lambda m, x: m(input_ids=x["ids"]).logits.log_softmax(-1),
    run_target=lambda m, x: m(x["ids"]),
    oracle=gpt2_to_words,
)

# --------------------------------------------------------------------------- 7 T5 encoder with fused projections


class FusedT5Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)
        self.qkv_proj, self.o_proj = nn.Linear(D, 3 * TH * TK, bias=False), nn.Linear(TH * TK, D, bias=False)
        self.gate_up_proj, self.down_proj = nn.Linear(D, 2 * FF, bias=False), nn.Linear(FF, D, bias=False)

    def forward(self, x, bias):
        q, k, v = (split(y, TH) for y in self.qkv_proj(self.input_layernorm(x)).chunk(3, -1))
        x = x + self.o_proj(merge(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)))
        gate, up = self.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, -1)
        return x + self.down_proj(F.gelu(gate, approximate="tanh") * up)


class T5Embedder(nn.Module):
    """Sentence vectors as a serving library computes them; the bias table is [heads, buckets]."""

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(V, D),
                "layers": nn.ModuleList(FusedT5Layer() for _ in range(L)),
                "norm": nn.RMSNorm(D, eps=1e-6),
            }
        )
        self.rel_bias = par(TH, BUCKETS)

    def forward(self, ids, mask):
        p = torch.arange(ids.shape[1], device=ids.device)
        where = F.one_hot(bucket(p[None] - p[:, None], True), BUCKETS).to(self.rel_bias.dtype)
        bias = torch.einsum("qkn,hn->hqk", where, self.rel_bias)[None]
        bias = bias + (1.0 - mask[:, None, None].to(bias.dtype)) * -1e9
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = layer(x, bias)
        return pooled(self.model["norm"](x), mask)


def pooled(h, mask):
    w = mask[..., None].to(h.dtype)
    return (h * w).sum(1) / w.sum(1)


def t5_to_embedder(s):
    out = {
        "model.embed_tokens.weight": s["shared.weight"],
        "model.norm.weight": s["encoder.final_layer_norm.weight"],
        "rel_bias": s["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].T,
    }
    for i in range(L):
        a, b = f"encoder.block.{i}.layer.", f"model.layers.{i}."
        m = a + "1.DenseReluDense."
        out[b + "qkv_proj.weight"] = torch.cat([s[f"{a}0.SelfAttention.{n}.weight"] for n in "qkv"])
        out[b + "o_proj.weight"] = s[a + "0.SelfAttention.o.weight"]
        out[b + "gate_up_proj.weight"] = torch.cat([s[m + "wi_0.weight"], s[m + "wi_1.weight"]])
        out[b + "down_proj.weight"] = s[m + "wo.weight"]
        out[b + "input_layernorm.weight"] = s[a + "0.layer_norm.weight"]
        out[b + "post_attention_layernorm.weight"] = s[a + "1.layer_norm.weight"]
    return out


T5 = {
    "d_model": D,
    "num_layers": L,
    "relative_attention_num_buckets": BUCKETS,
    "relative_attention_max_distance": FAR,
    "d_kv": TK,
    "num_heads": TH,
    "d_ff": FF,
}

case(
    name="fused-t5: transformers T5EncoderModel (v1.1) -> own serving encoder (qkv, gate_up, table [heads, buckets])",
    family="t5-encoder",
    note="gate and up in one matrix, 36 wide attention in a 48 wide model; SDPA with a float mask; masked mean",
    source=lambda: hf("T5EncoderModel", "T5Config", 113, **T5, feed_forward_proj="gated-gelu"),
    target=lambda: shake(T5Embedder(), 114),
    inputs=tokens(P),
    run_source=lambda m, x: pooled(m(input_ids=x["ids"], attention_mask=x["mask"]).last_hidden_state, x["mask"]),
    run_target=lambda m, x: m(x["ids"], x["mask"]),
    oracle=t5_to_embedder,
)

# ------------------------------------------------------- 8 T5 with the keys and values of the memory in one matrix


def rms(x, g):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * g


def attend(q, k, v, bias=0.0):
    return merge(soft(split(q) @ split(k).mT + bias) @ split(v))


class Stack(nn.Module):
    def __init__(self, cross):
        super().__init__()
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(D)) for _ in range((3 if cross else 2) * L + 1))
        self.relative = nn.Embedding(BUCKETS, H)
        lin = functools.partial(nn.Linear, bias=False)
        self.qkv, self.out = (nn.ModuleList(lin(D, n * D) for _ in range(L)) for n in (3, 1))
        self.up, self.down = (nn.ModuleList(lin(a, b) for _ in range(L)) for a, b in ((D, FF), (FF, D)))
        self.cross = cross
        if cross:
            self.memory_kv = lin(D, 2 * L * D)  # of all layers: k0, v0, k1, v1, ...
            self.memory_q, self.memory_out = (nn.ModuleList(lin(D, D) for _ in range(L)) for _ in range(2))

    def forward(self, x, memory=None):
        p = torch.arange(x.shape[1], device=x.device)
        bias = self.relative(bucket(p[None] - p[:, None], not self.cross)).permute(2, 0, 1)
        if self.cross:
            bias = bias.masked_fill(p[None] > p[:, None], -1e9)
            kv = self.memory_kv(memory).chunk(2 * L, -1)
        g = iter(self.gains)
        for i in range(L):
            x = x + self.out[i](attend(*self.qkv[i](rms(x, next(g))).chunk(3, -1), bias))
            if self.cross:
                y = attend(self.memory_q[i](rms(x, next(g))), kv[2 * i], kv[2 * i + 1])
                x = x + self.memory_out[i](y)
            x = x + self.down[i](F.relu(self.up[i](rms(x, next(g)))))
        return rms(x, next(g))


class OneMemoryT5(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.say, self.table = Stack(False), Stack(True), nn.Embedding(V, D)

    def forward(self, ids, dec):
        y = self.say(self.table(dec), self.read(self.table(ids)))
        return F.linear(y * D**-0.5, self.table.weight)


def t5_to_one_memory(s):
    out = {"table.weight": s["shared.weight"]}
    for a, b, n in (("encoder.", "read.", 2), ("decoder.", "say.", 3)):
        out[b + "relative.weight"] = s[a + "block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        out[f"{b}gains.{n * L}"] = s[a + "final_layer_norm.weight"]
        for i in range(L):
            p = f"{a}block.{i}.layer."
            out.update({f"{b}gains.{n * i + j}": s[f"{p}{j}.layer_norm.weight"] for j in range(n)})
            out[f"{b}qkv.{i}.weight"] = torch.cat([s[f"{p}0.SelfAttention.{c}.weight"] for c in "qkv"])
            out[f"{b}out.{i}.weight"] = s[p + "0.SelfAttention.o.weight"]
            out[f"{b}up.{i}.weight"] = s[f"{p}{n - 1}.DenseReluDense.wi.weight"]
            out[f"{b}down.{i}.weight"] = s[f"{p}{n - 1}.DenseReluDense.wo.weight"]
    p = "decoder.block.{}.layer.1.EncDecAttention.{}.weight"
    out["say.memory_kv.weight"] = torch.cat([s[p.format(i, c)] for i in range(L) for c in "kv"])
    for i in range(L):
        out[f"say.memory_q.{i}.weight"] = s[p.format(i, "q")]
        out[f"say.memory_out.{i}.weight"] = s[p.format(i, "o")]
    return out


case(
    name="memory-t5: transformers T5ForConditionalGeneration -> own (cross k, v of all layers in one matrix)",
    family="t5",
    note="k0, v0, k1, v1 stacked; gains in a ParameterList, two a layer here and three there; lists by kind",
    source=lambda: hf_t5(115, d_kv=DH, num_heads=H, d_ff=FF, feed_forward_proj="relu"),
    target=lambda: shake(OneMemoryT5(), 116),
    inputs=tokens(P),
    run_source=lambda m, x: m(input_ids=x["ids"], decoder_input_ids=x["dec"]).logits,
    run_target=lambda m, x: m(x["ids"], x["dec"]),
    oracle=t5_to_one_memory,
)

# ---------------------------------------------------------------------------- 9 MiniLM, own -> transformers


class MiniLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(D, FF), nn.GELU(), nn.Dropout(0.1), nn.Linear(FF, D))
        self.mlp_norm, self.att_norm = nn.LayerNorm(D, eps=1e-12), nn.LayerNorm(D, eps=1e-12)
        self.att = nn.MultiheadAttention(D, H, batch_first=True)

    def forward(self, x, mask):
        x = self.att_norm(x + self.att(x, x, x, attn_mask=mask, need_weights=False)[0])
        return self.mlp_norm(x + self.mlp(x))


class MiniSearch(nn.Module):
    """Knows no segments; the first token is the sentence."""

    def __init__(self):
        super().__init__()
        self.position, self.token = par(P, D), nn.Embedding(V, D)
        self.blocks = nn.ModuleList(MiniLayer() for _ in range(L))
        self.first_norm = nn.LayerNorm(D, eps=1e-12)

    def forward(self, ids, mask):
        x = self.first_norm(self.token(ids) + self.position[: ids.shape[1]])
        hide = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(mask == 0, -1e9)
        hide = hide[:, None].expand(-1, ids.shape[1], -1).repeat_interleave(H, 0)
        for block in self.blocks:
            x = block(x, hide)
        return x[:, 0]


def alike(e):
    return torch.cat([F.normalize(e, dim=-1), F.cosine_similarity(e[:, None], e[None], dim=-1)], -1)


def mini_to_bert(s):
    e = "embeddings."
    out = {
        e + "word_embeddings.weight": s["token.weight"],
        e + "position_embeddings.weight": s["position"],
        e + "token_type_embeddings.weight": torch.zeros(2, D),
        **move(s, {"first_norm": e + "LayerNorm"}),
    }
    for i in range(L):
        for w in ("weight", "bias"):
            for n, x in zip(ATT, s[f"blocks.{i}.att.in_proj_{w}"].chunk(3), strict=True):
                out[f"encoder.layer.{i}.attention.self.{n}.{w}"] = x
    names = {
        "att.out_proj": "attention.output.dense",
        "att_norm": "attention.output.LayerNorm",
        "mlp.0": "intermediate.dense",
        "mlp.3": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }
    return {**out, **layers(s, "blocks.{}.", "encoder.layer.{}.", names)}


case(
    name="search-minilm: own (torch attention, no segments, cosine of first tokens) -> transformers BertModel",
    family="minilm",
    note="in_proj split in three; the used segment row must be zero; pooler has no source; padding",
    source=lambda: shake(MiniSearch(), 117),
    target=lambda: hf("BertModel", "BertConfig", 118, **BERT),
    inputs=tokens(P),
    run_source=lambda m, x: alike(m(x["ids"], x["mask"])),
    run_target=lambda m, x: alike(m(input_ids=x["ids"], attention_mask=x["mask"]).last_hidden_state[:, 0]),
    oracle=mini_to_bert,
)

# ------------------------------------------------------------- 10 LSTM tagger, one matrix a gate -> torch.nn.LSTM

U = 24


class BookCell(nn.Module):
    """As a textbook writes it: f, i, o and the candidate c, each with W for the input, U for the state, and b."""

    def __init__(self, cin):
        super().__init__()
        for g in "fioc":
            setattr(self, "W_" + g, par(cin, U))
            setattr(self, "U_" + g, par(U, U))
            setattr(self, "b_" + g, par(U))

    def gate(self, g, x, h):
        return x @ getattr(self, "W_" + g) + h @ getattr(self, "U_" + g) + getattr(self, "b_" + g)

    def forward(self, xs):
        h = c = xs.new_zeros(len(xs), U)
        out = []
        for x in xs.unbind(1):
            f, i, o = (torch.sigmoid(self.gate(g, x, h)) for g in "fio")
            c = f * c + i * torch.tanh(self.gate("c", x, h))
            h = o * torch.tanh(c)
            out.append(h)
        return torch.stack(out, 1)


class BookTagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.E = par(V, D)
        self.right_to_left = nn.ModuleList([BookCell(D), BookCell(2 * U)])
        self.left_to_right = nn.ModuleList([BookCell(D), BookCell(2 * U)])
        self.W_tag, self.b_tag = par(2 * U, 9), par(9)

    def forward(self, ids):
        x = self.E[ids]
        for a, b in zip(self.left_to_right, self.right_to_left, strict=True):
            x = torch.cat([a(x), b(x.flip(1)).flip(1)], -1)
        return torch.log_softmax(x @ self.W_tag + self.b_tag, -1)


class TorchTagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.lstm = nn.LSTM(D, U, 2, batch_first=True, bidirectional=True)
        self.hidden2tag = nn.Linear(2 * U, 9)

    def forward(self, ids):
        return F.log_softmax(self.hidden2tag(self.lstm(self.embedding(ids))[0]), -1)


def book_tagger(seed):
    m = shake(BookTagger(), seed)
    with torch.no_grad():  # strong enough that the past shows
        for p in m.parameters():
            p.mul_(3.0 if p.ndim == 2 else 1.0)
    return m


def book_to_torch(s):
    out = {
        "embedding.weight": s["E"],
        "hidden2tag.weight": s["W_tag"].T,
        "hidden2tag.bias": s["b_tag"],
    }
    for side, end in (("left_to_right", ""), ("right_to_left", "_reverse")):
        for j in range(2):
            for a, b, turn in (("W_", "weight_ih", True), ("U_", "weight_hh", True), ("b_", "bias_ih", False)):
                x = [s[f"{side}.{j}.{a}{g}"] for g in "ifco"]
                out[f"lstm.{b}_l{j}{end}"] = torch.cat([w.T for w in x] if turn else x)
            out[f"lstm.bias_hh_l{j}{end}"] = torch.zeros(4 * U)
    return out


case(
    name="book-lstm: own two-way tagger (one matrix a gate, x @ W) -> torch.nn.LSTM (bidirectional, log-probs)",
    family="lstm",
    note="twelve tensors a cell into four; gates f, i, o, c against i, f, g, o; backward first; a second bias of zeros",
    source=lambda: book_tagger(119),
    target=lambda: shake(TorchTagger(), 120),
    inputs=tokens(12),
    run_source=lambda m, x: m(x["ids"]),
    run_target=lambda m, x: m(x["ids"]),
    oracle=book_to_torch,
)
