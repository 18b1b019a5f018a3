"""Further cases: text."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graft_matrix import core
from tests.graft_matrix.core import State, shake

torch.set_num_threads(1)
D, H, FF, L, V, P = 48, 4, 80, 2, 61, 20  # width, heads, feed-forward width, layers, vocabulary, positions
DH = D // H
WB = ("weight", "bias")


def case(source, target, **kw):
    """Fixes the constructors' own randomness too: shake adds to what a constructor drew for the biases."""

    def fixed(build, seed):
        def make():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return build()

        return make

    return core.case(modality="text", source=fixed(source, 3000), target=fixed(target, 4000), **kw)


def tokens(n: int, batch: int = 3):
    def make(seed: int):
        g = torch.Generator().manual_seed(seed)
        keep = torch.arange(n) < torch.randint(n // 2, n + 1, (batch, 1), generator=g)
        return {
            "ids": torch.randint(3, V, (batch, n), generator=g),
            "types": torch.randint(0, 2, (batch, n), generator=g),
            "dec": torch.randint(3, V, (batch, 9), generator=g),
            "mask": keep.long(),
            "x": torch.randn(batch, n, D, generator=g),
        }

    return make


def move(s: State, pairs: dict[str, str]) -> State:
    """Weight and bias of each module, where there is one, under the other name."""
    return {f"{b}.{w}": s[f"{a}.{w}"] for a, b in pairs.items() for w in WB if f"{a}.{w}" in s}


def layers(s: State, src: str, dst: str, pairs: dict[str, str], n: int = L) -> State:
    out = {}
    for i in range(n):
        out.update(move(s, {src.format(i) + a: dst.format(i) + b for a, b in pairs.items()}))
    return out


def split(x: Tensor, h: int = H) -> Tensor:
    return x.unflatten(-1, (h, -1)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


# -------------------------------------------------------------------------------------------------- library models


def hf(cls: str, config: str, seed: int, **kw) -> nn.Module:
    import transformers

    quiet = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return shake(getattr(transformers, cls)(getattr(transformers, config)(**{"vocab_size": V, **quiet, **kw})), seed)


BERT = {
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "intermediate_size": FF,
    "max_position_embeddings": P,
    "pad_token_id": 0,
}
ROBERTA = {**BERT, "max_position_embeddings": P + 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
GPT2 = {"n_embd": D, "n_layer": L, "n_head": H, "n_positions": P}


def curated(kind: str, seed: int, **kw) -> nn.Module:
    from curated_transformers import models

    size = {"hidden_width": D, "embedding_width": D, "intermediate_width": FF, "n_attention_heads": H, "n_pieces": V}
    config = getattr(models, kind + "Config")(**{**size, "n_hidden_layers": L, "model_max_length": P, **kw})
    return shake(getattr(models, kind + "Encoder")(config), seed)


def run_curated(m, x, types=True):
    from curated_transformers.layers.attention import AttentionMask

    mask = AttentionMask(torch.ones_like(x["ids"], dtype=torch.bool))
    return m(x["ids"], mask, type_ids=x["types"] if types else None).last_hidden_layer_state


def run_hidden(m, x):
    return m(input_ids=x["ids"]).last_hidden_state


def run_hidden_types(m, x):
    return m(input_ids=x["ids"], token_type_ids=x["types"]).last_hidden_state


CURATED_TO_BERT = {
    "mha.query": "attention.self.query",
    "mha.key": "attention.self.key",
    "mha.value": "attention.self.value",
    "mha.output": "attention.output.dense",
    "attn_residual_layer_norm": "attention.output.LayerNorm",
    "ffn.intermediate": "intermediate.dense",
    "ffn.output": "output.dense",
    "ffn_residual_layer_norm": "output.LayerNorm",
}
CURATED_EMB = {
    "embeddings.piece_embeddings": "embeddings.word_embeddings",
    "embeddings.type_embeddings": "embeddings.token_type_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.embed_output_layer_norm": "embeddings.LayerNorm",
}


def flip(d: dict[str, str]) -> dict[str, str]:
    return {b: a for a, b in d.items()}


# ============================================================================================== library -> library


def curated_to_bert(s):
    return {**move(s, CURATED_EMB), **layers(s, "layers.{}.", "encoder.layer.{}.", CURATED_TO_BERT)}


def ppb_bert(seed):
    import pytorch_pretrained_bert as ppb

    return shake(ppb.BertModel(ppb.BertConfig(V, D, L, H, FF, max_position_embeddings=P)), seed)


case(
    name="bert: curated-transformers -> pytorch-pretrained-bert",
    family="bert-encoder",
    note="norms last in each of the source's layers; the target's pooler has no source",
    source=lambda: curated("BERT", 1, n_positions=P),
    target=lambda: ppb_bert(2),
    inputs=tokens(P),
    run_source=run_curated,
    run_target=lambda m, x: m(x["ids"], x["types"], output_all_encoded_layers=False)[0],
    oracle=curated_to_bert,
)

case(
    name="roberta: curated-transformers -> transformers XLMRobertaModel",
    family="roberta",
    note="positions start at 2 on both sides; one-row type table",
    source=lambda: curated("RoBERTa", 3, n_positions=P + 2),
    target=lambda: hf("XLMRobertaModel", "XLMRobertaConfig", 4, **ROBERTA),
    inputs=tokens(P),
    run_source=lambda m, x: run_curated(m, x, types=False),
    run_target=run_hidden,
    oracle=curated_to_bert,
)


def electra_to_curated(s):
    pairs = {**flip(CURATED_EMB), "embeddings_project": "embeddings.projection"}
    return {**move(s, pairs), **layers(s, "encoder.layer.{}.", "layers.{}.", flip(CURATED_TO_BERT))}


case(
    name="bert: transformers ElectraModel (narrow embeddings) -> curated-transformers",
    family="bert-encoder",
    note="embeddings 16 wide and projected after their norm",
    source=lambda: hf("ElectraModel", "ElectraConfig", 5, **BERT, embedding_size=16),
    target=lambda: curated("BERT", 6, n_positions=P, embedding_width=16),
    inputs=tokens(P),
    run_source=run_hidden_types,
    run_target=run_curated,
    oracle=electra_to_curated,
)

DISTIL_TO_BERT = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
DISTIL = {"dim": D, "hidden_dim": FF, "n_layers": L, "n_heads": H, "max_position_embeddings": P}


def distil_to_bert_mlm(s):
    e = "embeddings."
    out = layers(s, "distilbert.transformer.layer.{}.", "bert.encoder.layer.{}.", DISTIL_TO_BERT)
    out.update(
        move(s, {f"distilbert.{e}{n}": f"bert.{e}{n}" for n in ("word_embeddings", "position_embeddings", "LayerNorm")})
    )
    out.update(
        move(
            s,
            {
                "vocab_transform": "cls.predictions.transform.dense",
                "vocab_layer_norm": "cls.predictions.transform.LayerNorm",
                "vocab_projector": "cls.predictions.decoder",
            },
        )
    )
    out["cls.predictions.bias"] = s["vocab_projector.bias"]
    out["bert.embeddings.token_type_embeddings.weight"] = torch.zeros(2, D)
    return out


case(
    name="distilbert: transformers DistilBertForMaskedLM -> transformers BertForMaskedLM",
    family="distilbert",
    note="the type table has no source and must be zero; head bias under two names; vocab_* head",
    source=lambda: hf("DistilBertForMaskedLM", "DistilBertConfig", 7, **DISTIL, pad_token_id=0),
    target=lambda: hf("BertForMaskedLM", "BertConfig", 8, **BERT),
    inputs=tokens(P),
    run_source=lambda m, x: m(input_ids=x["ids"]).logits,
    run_target=lambda m, x: m(input_ids=x["ids"]).logits,
    oracle=distil_to_bert_mlm,
)


class TorchGPT(nn.Module):
    """A decoder-only model out of torch.nn.TransformerEncoder: pre-norm, causal mask, an untied output layer."""

    def __init__(self):
        super().__init__()
        gelu = functools.partial(F.gelu, approximate="tanh")
        layer = nn.TransformerEncoderLayer(D, H, 4 * D, 0.0, gelu, batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, L, nn.LayerNorm(D), enable_nested_tensor=False)
        self.word, self.position = nn.Embedding(V, D), nn.Embedding(P, D)
        self.generator = nn.Linear(D, V)

    def forward(self, ids):
        t = ids.shape[1]
        hide = torch.ones(t, t, dtype=torch.bool, device=ids.device).triu(1)
        x = self.word(ids) + self.position(torch.arange(t, device=ids.device))
        return self.generator(self.transformer(x, mask=hide, is_causal=True))


def gpt2_to_torch(s):
    out = {
        "word.weight": s["transformer.wte.weight"],
        "position.weight": s["transformer.wpe.weight"],
        "generator.weight": s["lm_head.weight"],
        "generator.bias": torch.zeros(V),
        **move(s, {"transformer.ln_f": "transformer.norm"}),
    }
    for i in range(L):
        a, b = f"transformer.h.{i}.", f"transformer.layers.{i}."
        out.update(move(s, {a + "ln_1": b + "norm1", a + "ln_2": b + "norm2"}))
        out[b + "self_attn.in_proj_weight"] = s[a + "attn.c_attn.weight"].T
        out[b + "self_attn.in_proj_bias"] = s[a + "attn.c_attn.bias"]
        for x, y in (("attn.c_proj", "self_attn.out_proj"), ("mlp.c_fc", "linear1"), ("mlp.c_proj", "linear2")):
            out[f"{b}{y}.weight"], out[f"{b}{y}.bias"] = s[f"{a}{x}.weight"].T, s[f"{a}{x}.bias"]
    return out


case(
    name="gpt2: transformers -> torch.nn.TransformerEncoder (norm_first, causal)",
    family="gpt2",
    note="Conv1D to Linear; tied head to an untied Linear whose bias has no source and must be zero",
    source=lambda: hf("GPT2LMHeadModel", "GPT2Config", 9, **GPT2),
    target=lambda: shake(TorchGPT(), 10),
    inputs=tokens(P),
    run_source=lambda m, x: m(input_ids=x["ids"]).logits,
    run_target=lambda m, x: m(x["ids"]),
    oracle=gpt2_to_torch,
)

# ================================================================================================ library <-> own


class MiniAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(D, 3 * D)
        self.c_proj = nn.Linear(D, D)
        self.register_buffer("bias", torch.tril(torch.ones(P, P)).view(1, 1, P, P))

    def forward(self, x):
        t = x.shape[1]
        q, k, v = (split(y) for y in self.c_attn(x).split(D, dim=2))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        return self.c_proj(merge(F.softmax(att, dim=-1) @ v))


class MiniBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(D), MiniAttention(), nn.LayerNorm(D)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "c_proj": nn.Linear(4 * D, D)})

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        y = self.mlp.c_fc(self.ln_2(x))
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        return x + self.mlp.c_proj(y)


class MiniGPT(nn.Module):
    """Karpathy's way: GPT-2's own names, nn.Linear where OpenAI has Conv1D, a mask buffer called bias, a tied head."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(V, D),
                "wpe": nn.Embedding(P, D),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList(MiniBlock() for _ in range(L)),
                "ln_f": nn.LayerNorm(D),
            }
        )
        self.lm_head = nn.Linear(D, V, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx):
        t = self.transformer
        x = t.drop(t.wte(idx) + t.wpe(torch.arange(idx.shape[1], device=idx.device)))
        for block in t.h:
            x = block(x)
        return self.lm_head(t.ln_f(x))


def gpt2_to_mini(s):
    turn = (".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight")
    return {k: v.T if k.endswith(turn) else v for k, v in s.items()}


case(
    name="gpt2: transformers -> own (minGPT style: same names, Linear, mask buffer)",
    family="gpt2",
    note="every name agrees, every weight must be transposed, c_proj is square; buffer named attn.bias; tied head",
    source=lambda: hf("GPT2LMHeadModel", "GPT2Config", 11, **GPT2),
    target=lambda: shake(MiniGPT(), 12),
    inputs=tokens(P),
    run_source=lambda m, x: m(input_ids=x["ids"]).logits,
    run_target=lambda m, x: m(x["ids"]),
    oracle=gpt2_to_mini,
)


class MegatronLayer(nn.Module):
    """[T, B, D]; the fused projection's rows go head by head: q, k, v of head 0, then of head 1, ..."""

    def __init__(self):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(D)
        self.self_attention = nn.ModuleDict({"query_key_value": nn.Linear(D, 3 * D), "dense": nn.Linear(D, D)})
        self.post_attention_layernorm = nn.LayerNorm(D)
        self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(D, 4 * D), "dense_4h_to_h": nn.Linear(4 * D, D)})

    def forward(self, x, mask):
        t, b, _ = x.shape
        mixed = self.self_attention.query_key_value(self.input_layernorm(x)).view(t, b, H, 3 * DH)
        q, k, v = (y.reshape(t, b * H, DH).transpose(0, 1) for y in mixed.chunk(3, -1))
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), beta=1.0, alpha=DH**-0.5)
        y = torch.bmm(scores.softmax(-1), v).transpose(0, 1).reshape(t, b, D)
        x = x + self.self_attention.dense(y)
        y = F.gelu(self.mlp.dense_h_to_4h(self.post_attention_layernorm(x)), approximate="tanh")
        return x + self.mlp.dense_4h_to_h(y)


class MegatronLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.ModuleDict(
            {"word_embeddings": nn.Embedding(V, D), "position_embeddings": nn.Embedding(P, D)}
        )
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(MegatronLayer() for _ in range(L)), "final_layernorm": nn.LayerNorm(D)}
        )

    def forward(self, ids):
        t = ids.shape[1]
        x = self.embedding.word_embeddings(ids) + self.embedding.position_embeddings.weight[:t]
        x = x.transpose(0, 1).contiguous()
        mask = torch.full((t, t), -10000.0, device=x.device, dtype=x.dtype).triu(1)
        for layer in self.encoder.layers:
            x = layer(x, mask)
        x = self.encoder.final_layernorm(x)
        return F.linear(x, self.embedding.word_embeddings.weight).transpose(0, 1)


def megatron_to_gpt2(s):
    out = {
        "transformer.wte.weight": s["embedding.word_embeddings.weight"],
        "transformer.wpe.weight": s["embedding.position_embeddings.weight"],
        "lm_head.weight": s["embedding.word_embeddings.weight"],
        **move(s, {"encoder.final_layernorm": "transformer.ln_f"}),
    }
    for i in range(L):
        a, b = f"encoder.layers.{i}.", f"transformer.h.{i}."
        out.update(move(s, {a + "input_layernorm": b + "ln_1", a + "post_attention_layernorm": b + "ln_2"}))
        w, c = s[a + "self_attention.query_key_value.weight"], s[a + "self_attention.query_key_value.bias"]
        out[b + "attn.c_attn.weight"] = w.view(H, 3, DH, D).transpose(0, 1).reshape(3 * D, D).T
        out[b + "attn.c_attn.bias"] = c.view(H, 3, DH).transpose(0, 1).reshape(-1)
        for x, y in (
            ("self_attention.dense", "attn.c_proj"),
            ("mlp.dense_h_to_4h", "mlp.c_fc"),
            ("mlp.dense_4h_to_h", "mlp.c_proj"),
        ):
            out[f"{b}{y}.weight"], out[f"{b}{y}.bias"] = s[f"{a}{x}.weight"].T, s[f"{a}{x}.bias"]
    return out


case(
    name="gpt2: own (Megatron layout, heads interleaved) -> transformers GPT2LMHeadModel",
    family="gpt2",
    note="q, k, v rows head by head, de-interleaved and transposed; [T, B, D]; mask of -10000",
    source=lambda: shake(MegatronLM(), 13),
    target=lambda: hf("GPT2LMHeadModel", "GPT2Config", 14, **GPT2),
    inputs=tokens(P),
    run_source=lambda m, x: m(x["ids"]),
    run_target=lambda m, x: m(input_ids=x["ids"]).logits,
    oracle=megatron_to_gpt2,
)

# -------------------------------------------------------------------------------------------------------------- T5

BUCKETS, FAR = 8, 20


def bucket(distance: Tensor, both: bool) -> Tensor:
    """T5's buckets of (key position - query position)."""
    n, start = BUCKETS, 0
    if both:
        n, start = n // 2, (distance > 0).long() * (n // 2)
        distance = distance.abs()
    else:
        distance = (-distance).clamp_min(0)
    exact = n // 2
    far = exact + (torch.log(distance.clamp_min(1) / exact) / math.log(FAR / exact) * (n - exact)).long()
    return start + torch.where(distance < exact, distance, far.clamp_max(n - 1))


def hf_t5(seed, **kw):
    size = {"d_model": D, "num_layers": L, "num_decoder_layers": L, "relative_attention_num_buckets": BUCKETS}
    return hf(
        "T5ForConditionalGeneration",
        "T5Config",
        seed,
        **size,
        relative_attention_max_distance=FAR,
        decoder_start_token_id=0,
        **kw,
    )


class Dense(nn.Module):
    """A Flax DenseGeneral: the kernel keeps its axes."""

    def __init__(self, *shape):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(shape))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


TH, TK = 3, 12  # T5's heads and their width: the inner width is not the model's


class FlaxAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.out, self.query, self.value = (
            Dense(D, TH, TK),
            Dense(TH, TK, D),
            Dense(D, TH, TK),
            Dense(D, TH, TK),
        )

    def forward(self, x, kv, bias):
        q = torch.einsum("btd,dhk->bthk", x, self.query.kernel)
        k = torch.einsum("btd,dhk->bthk", kv, self.key.kernel)
        v = torch.einsum("btd,dhk->bthk", kv, self.value.kernel)
        w = torch.softmax(torch.einsum("bqhk,bshk->bhqs", q, k) + bias, -1)
        return torch.einsum("bqhk,hkd->bqd", torch.einsum("bhqs,bshk->bqhk", w, v), self.out.kernel)


class FlaxLayer(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        if decoder:
            self.encoder_decoder_attention = FlaxAttention()
            self.pre_cross_attention_layer_norm = Scale()
            self.pre_self_attention_layer_norm = Scale()
            self.self_attention = FlaxAttention()
        else:
            self.attention = FlaxAttention()
            self.pre_attention_layer_norm = Scale()
        self.decoder = decoder
        self.mlp = nn.ModuleDict({"wi": Dense(D, 2, FF), "wo": Dense(FF, D)})
        self.pre_mlp_layer_norm = Scale()

    def forward(self, x, bias, memory=None):
        if self.decoder:
            y = self.pre_self_attention_layer_norm(x)
            x = x + self.self_attention(y, y, bias)
            x = x + self.encoder_decoder_attention(self.pre_cross_attention_layer_norm(x), memory, 0.0)
        else:
            y = self.pre_attention_layer_norm(x)
            x = x + self.attention(y, y, bias)
        gate, up = torch.einsum("btd,dcf->cbtf", self.pre_mlp_layer_norm(x), self.mlp["wi"].kernel)
        return x + (F.gelu(gate, approximate="tanh") * up) @ self.mlp["wo"].kernel


class FlaxStack(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder
        self.relpos_bias = nn.ParameterDict({"rel_embedding": nn.Parameter(torch.zeros(TH, BUCKETS))})
        for i in range(L):
            setattr(self, f"layers_{i}", FlaxLayer(decoder))
        setattr(self, "decoder_norm" if decoder else "encoder_norm", Scale())

    def forward(self, x, memory=None):
        p = torch.arange(x.shape[1], device=x.device)
        bias = self.relpos_bias["rel_embedding"][:, bucket(p[None] - p[:, None], not self.decoder)]
        if self.decoder:
            bias = bias.masked_fill(p[None] > p[:, None], torch.finfo(x.dtype).min)
        for i in range(L):
            x = getattr(self, f"layers_{i}")(x, bias, memory)
        return getattr(self, "decoder_norm" if self.decoder else "encoder_norm")(x)


class FlaxT5(nn.Module):
    """T5 v1.1 as its JAX checkpoint lays it out: kernels [d, heads, d_head], gate and up in one [d, 2, ff]."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = FlaxStack(True), FlaxStack(False)
        self.token_embedder = nn.ParameterDict({"embedding": nn.Parameter(torch.zeros(V, D))})
        self.logits_dense = Dense(D, V)

    def forward(self, ids, dec):
        table = self.token_embedder["embedding"]
        return self.decoder(table[dec], self.encoder(table[ids])) @ self.logits_dense.kernel


def t5_attention(s, a, b):
    out = {f"{b}{n}.kernel": s[f"{a}{n[0]}.weight"].view(TH, TK, D).permute(2, 0, 1) for n in ("query", "key", "value")}
    return {**out, f"{b}out.kernel": s[f"{a}o.weight"].view(D, TH, TK).permute(1, 2, 0)}


def t5_to_flax(s):
    out = {"token_embedder.embedding": s["shared.weight"], "logits_dense.kernel": s["lm_head.weight"].T}
    for side in ("encoder", "decoder"):
        rel = s[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        out[f"{side}.relpos_bias.rel_embedding"] = rel.T
        out[f"{side}.{side}_norm.scale"] = s[f"{side}.final_layer_norm.weight"]
        own, last = ("", 1) if side == "encoder" else ("self_", 2)
        for i in range(L):
            a, b = f"{side}.block.{i}.layer.", f"{side}.layers_{i}."
            out.update(t5_attention(s, a + "0.SelfAttention.", f"{b}{own}attention."))
            out[f"{b}pre_{own}attention_layer_norm.scale"] = s[a + "0.layer_norm.weight"]
            if side == "decoder":
                out.update(t5_attention(s, a + "1.EncDecAttention.", b + "encoder_decoder_attention."))
                out[b + "pre_cross_attention_layer_norm.scale"] = s[a + "1.layer_norm.weight"]
            m = f"{a}{last}.DenseReluDense."
            out[b + "mlp.wi.kernel"] = torch.stack([s[m + "wi_0.weight"].T, s[m + "wi_1.weight"].T], 1)
            out[b + "mlp.wo.kernel"] = s[m + "wo.weight"].T
            out[b + "pre_mlp_layer_norm.scale"] = s[f"{a}{last}.layer_norm.weight"]
    return out


case(
    name="t5: transformers v1.1 (gated) encoder-decoder -> own (Flax layout)",
    family="t5",
    note="kernels [d, heads, d_head] and [heads, d_head, d]; wi_0, wi_1 stacked on a middle axis; decoder listed first",
    source=lambda: hf_t5(15, d_kv=TK, num_heads=TH, d_ff=FF, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    target=lambda: shake(FlaxT5(), 16),
    inputs=tokens(P),
    run_source=lambda m, x: m(input_ids=x["ids"], decoder_input_ids=x["dec"]).logits,
    run_target=lambda m, x: m(x["ids"], x["dec"]),
    oracle=t5_to_flax,
)


class GammaNorm(nn.Module):
    """The gain is stored as its distance from one."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(D))

    def forward(self, x):
        return F.rms_norm(x, (D,), eps=1e-6) * (1 + self.gamma)


class KvAttention(nn.Module):
    def __init__(self, own_bias):
        super().__init__()
        self.norm = GammaNorm()
        self.to_q, self.to_kv = nn.Linear(D, D, bias=False), nn.Linear(D, 2 * D, bias=False)
        self.to_out = nn.Linear(D, D, bias=False)
        self.rel_pos = nn.Embedding(BUCKETS, H) if own_bias else None

    def forward(self, x, context=None):
        y = self.norm(x)
        q, (k, v) = split(self.to_q(y)), (split(z) for z in self.to_kv(y if context is None else context).chunk(2, -1))
        sim = torch.einsum("bhid,bhjd->bhij", q, k)
        if self.rel_pos is not None:
            p = torch.arange(x.shape[1], device=x.device)
            sim = sim + self.rel_pos(bucket(p[None] - p[:, None], False)).permute(2, 0, 1)
            sim = sim.masked_fill(p[None] > p[:, None], -torch.finfo(sim.dtype).max)
        return x + self.to_out(merge(torch.einsum("bhij,bhjd->bhid", sim.softmax(-1), v)))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            GammaNorm(), nn.Linear(D, FF, bias=False), nn.ReLU(), nn.Dropout(0.1), nn.Linear(FF, D, bias=False)
        )

    def forward(self, x):
        return x + self.net(x)


class Captioner(nn.Module):
    """Image features in, text out; the text side is T5's decoder, the vision side is the user's own."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Sequential(nn.Linear(24, D), nn.LayerNorm(D))
        self.token_emb = nn.Embedding(V, D)
        self.layers = nn.ModuleList(
            nn.ModuleList([KvAttention(True), KvAttention(False), FeedForward()]) for _ in range(L)
        )
        self.final_norm = GammaNorm()
        self.to_logits = nn.Linear(D, V, bias=False)

    def decode(self, ids, context):
        x = self.token_emb(ids)
        for attn, cross, ff in self.layers:
            x = ff(cross(attn(x), context))
        return self.to_logits(self.final_norm(x))

    def forward(self, patches, ids):
        return self.decode(ids, self.patches(patches))


def t5_to_captioner(s):
    out = {
        "token_emb.weight": s["shared.weight"],
        "to_logits.weight": s["lm_head.weight"] * D**-0.5,
        "final_norm.gamma": s["decoder.final_layer_norm.weight"] - 1,
    }
    for i in range(L):
        a, b = f"decoder.block.{i}.layer.", f"layers.{i}."
        for j, kind in enumerate(("SelfAttention", "EncDecAttention")):
            p, q = f"{a}{j}.{kind}.", f"{b}{j}."
            out.update(
                {
                    q + "to_q.weight": s[p + "q.weight"],
                    q + "to_out.weight": s[p + "o.weight"],
                    q + "to_kv.weight": torch.cat([s[p + "k.weight"], s[p + "v.weight"]]),
                    q + "norm.gamma": s[f"{a}{j}.layer_norm.weight"] - 1,
                }
            )
        out[b + "0.rel_pos.weight"] = s["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        out.update(
            {
                b + "2.net.0.gamma": s[a + "2.layer_norm.weight"] - 1,
                b + "2.net.1.weight": s[a + "2.DenseReluDense.wi.weight"],
                b + "2.net.4.weight": s[a + "2.DenseReluDense.wo.weight"],
            }
        )
    return out


case(
    name="t5-decoder: transformers -> own captioner (to_q/to_kv, 1 + gamma, untied scaled head)",
    family="t5-decoder",
    note="only the decoder; one bias table copied into every layer; gains minus one; head is the table times d**-0.5",
    source=lambda: hf_t5(17, d_kv=DH, num_heads=H, d_ff=FF, feed_forward_proj="relu"),
    target=lambda: shake(Captioner(), 18),
    inputs=tokens(P),
    run_source=lambda m, x: m(encoder_outputs=(x["x"],), decoder_input_ids=x["dec"]).logits,
    run_target=lambda m, x: m.decode(x["dec"], x["x"]),
    oracle=t5_to_captioner,
)

# ---------------------------------------------------------------------------------------------------- MiniLM, RoBERTa


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a_2, self.b_2 = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        return self.a_2 * (x - mean) / torch.sqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-12) + self.b_2


class MultiHeaded(nn.Module):
    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, query, key, value, mask):
        n = query.size(0)
        query, key, value = (
            f(x).view(n, -1, H, DH).transpose(1, 2) for f, x in zip(self.linears[:3], (query, key, value), strict=True)
        )
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(DH)
        scores = scores.masked_fill(mask.unsqueeze(1) == 0, -1e9)
        x = torch.matmul(scores.softmax(dim=-1), value)
        return self.linears[-1](x.transpose(1, 2).contiguous().view(n, -1, D))


class Sublayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Norm()

    def forward(self, x, f):
        return self.norm(x + f(x))


class EncoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = MultiHeaded()
        self.feed_forward = nn.ModuleDict({"w_1": nn.Linear(D, FF), "w_2": nn.Linear(FF, D)})
        self.sublayer = nn.ModuleList([Sublayer(), Sublayer()])

    def forward(self, x, mask):
        x = self.sublayer[0](x, lambda y: self.self_attn(y, y, y, mask))
        return self.sublayer[1](x, lambda y: self.feed_forward["w_2"](F.gelu(self.feed_forward["w_1"](y))))


class SentenceEncoder(nn.Module):
    """In the manner of the Annotated Transformer; gives one unit vector a sentence. No segments: their row 0 is in
    the word table."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(L))
        self.lut, self.pe, self.norm = nn.Embedding(V, D), nn.Parameter(torch.zeros(1, P, D)), Norm()

    def forward(self, ids, mask):
        x = self.norm(self.lut(ids) + self.pe[:, : ids.size(1)])
        for layer in self.layers:
            x = layer(x, mask.unsqueeze(-2))
        m = mask.unsqueeze(-1).to(x.dtype)
        return F.normalize((x * m).sum(1) / m.sum(1), dim=-1)


def norm_to(s, a, b):
    return {b + ".a_2": s[a + ".weight"], b + ".b_2": s[a + ".bias"]}


def bert_to_sentence(s):
    e = "embeddings."
    out = {
        "lut.weight": s[e + "word_embeddings.weight"] + s[e + "token_type_embeddings.weight"][0],
        "pe": s[e + "position_embeddings.weight"][None],
        **norm_to(s, e + "LayerNorm", "norm"),
    }
    for i in range(L):
        a, b = f"encoder.layer.{i}.", f"layers.{i}."
        lin = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        out.update(move(s, {a + n: f"{b}self_attn.linears.{j}" for j, n in enumerate(lin)}))
        out.update(
            move(s, {a + "intermediate.dense": b + "feed_forward.w_1", a + "output.dense": b + "feed_forward.w_2"})
        )
        out.update(norm_to(s, a + "attention.output.LayerNorm", b + "sublayer.0.norm"))
        out.update(norm_to(s, a + "output.LayerNorm", b + "sublayer.1.norm"))
    return out


def run_minilm(m, x):
    h = m(input_ids=x["ids"], attention_mask=x["mask"]).last_hidden_state
    w = x["mask"].unsqueeze(-1).to(h.dtype)
    return F.normalize((h * w).sum(1) / w.sum(1), dim=-1)


case(
    name="minilm: transformers BertModel -> own sentence encoder (Annotated Transformer, masked mean)",
    family="minilm",
    note="linears.0-3; norms a_2/b_2; padding mask of -1e9; segment row 0 added to words (or positions); pooled output",
    source=lambda: hf("BertModel", "BertConfig", 19, **BERT),
    target=lambda: shake(SentenceEncoder(), 20),
    inputs=tokens(P),
    run_source=run_minilm,
    run_target=lambda m, x: m(x["ids"], x["mask"]),
    oracle=bert_to_sentence,
)


class FairLayer(nn.Module):
    """[T, B, D], heads folded into the batch, the query scaled before the product."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.ModuleDict({f"{n}_proj": nn.Linear(D, D) for n in ("k", "v", "q", "out")})
        self.self_attn_layer_norm = nn.LayerNorm(D)
        self.fc1, self.fc2 = nn.Linear(D, FF), nn.Linear(FF, D)
        self.final_layer_norm = nn.LayerNorm(D)

    def forward(self, x):
        t, b, _ = x.shape
        a = self.self_attn
        q = a["q_proj"](x) * DH**-0.5
        q, k, v = (y.contiguous().view(t, b * H, DH).transpose(0, 1) for y in (q, a["k_proj"](x), a["v_proj"](x)))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        x = self.self_attn_layer_norm(x + a["out_proj"](y.transpose(0, 1).contiguous().view(t, b, D)))
        return self.final_layer_norm(x + self.fc2(F.gelu(self.fc1(x))))


class FairHead(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.dense, self.layer_norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.weight, self.bias = weight, nn.Parameter(torch.zeros(V))

    def forward(self, x):
        return F.linear(self.layer_norm(F.gelu(self.dense(x))), self.weight, self.bias)


class FairRoberta(nn.Module):
    PAD = 1

    def __init__(self):
        super().__init__()
        self.sentence_encoder = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(V, D, self.PAD),
                "embed_positions": nn.Embedding(P + 2, D, self.PAD),
                "layernorm_embedding": nn.LayerNorm(D),
                "layers": nn.ModuleList(FairLayer() for _ in range(L)),
            }
        )
        self.lm_head = FairHead(self.sentence_encoder["embed_tokens"].weight)

    def forward(self, tokens):
        e = self.sentence_encoder
        keep = tokens.ne(self.PAD).int()
        positions = (torch.cumsum(keep, dim=1) * keep).long() + self.PAD
        x = e["layernorm_embedding"](e["embed_tokens"](tokens) + e["embed_positions"](positions)).transpose(0, 1)
        for layer in e["layers"]:
            x = layer(x)
        return self.lm_head(x.transpose(0, 1))


def roberta_to_fair(s):
    r, e = "roberta.embeddings.", "sentence_encoder."
    out = move(
        s,
        {
            r + "word_embeddings": e + "embed_tokens",
            r + "position_embeddings": e + "embed_positions",
            r + "LayerNorm": e + "layernorm_embedding",
            "lm_head.dense": "lm_head.dense",
            "lm_head.layer_norm": "lm_head.layer_norm",
        },
    )
    out.update({"lm_head.weight": s["lm_head.decoder.weight"], "lm_head.bias": s["lm_head.bias"]})
    names = {
        "attention.self.query": "self_attn.q_proj",
        "attention.self.key": "self_attn.k_proj",
        "attention.self.value": "self_attn.v_proj",
        "attention.output.dense": "self_attn.out_proj",
        "attention.output.LayerNorm": "self_attn_layer_norm",
        "intermediate.dense": "fc1",
        "output.dense": "fc2",
        "output.LayerNorm": "final_layer_norm",
    }
    return {**out, **layers(s, "roberta.encoder.layer.{}.", e + "layers.{}.", names)}


def hf_roberta_mlm(seed):
    m = hf("RobertaForMaskedLM", "RobertaConfig", seed, **ROBERTA)
    with torch.no_grad():  # as in every published checkpoint
        m.roberta.embeddings.token_type_embeddings.weight.zero_()
    return m


case(
    name="roberta: transformers RobertaForMaskedLM -> own (fairseq style, [T, B, D], tied head)",
    family="roberta-mlm",
    note="k, v, q, out order; final_layer_norm is the layer's second norm; head weight is a bare parameter, tied",
    source=lambda: hf_roberta_mlm(21),
    target=lambda: shake(FairRoberta(), 22),
    inputs=tokens(P),
    run_source=lambda m, x: m(input_ids=x["ids"]).logits,
    run_target=lambda m, x: m(x["ids"]),
    oracle=roberta_to_fair,
)

# ------------------------------------------------------------------------------------------------ LSTM language models


class WordLM(nn.Module):
    """The classic word language model, tied."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(V, D), nn.Linear(D, V)
        self.rnn = nn.LSTM(D, D, L)
        self.decoder.weight = self.encoder.weight

    def forward(self, ids):
        y, _ = self.rnn(self.encoder(ids.T))
        return self.decoder(y).transpose(0, 1)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.gates = nn.Linear(2 * D, 4 * D)

    def forward(self, x, h, c):
        z = self.gates(torch.cat([h, x], dim=-1))
        i, f, o = torch.sigmoid(z[:, : 3 * D]).chunk(3, -1)
        c = f * c + i * torch.tanh(z[:, 3 * D :])
        return o * torch.tanh(c), c


class StepLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.out_bias = nn.Parameter(torch.zeros(V))
        self.cells = nn.ModuleList(Cell() for _ in range(L))
        self.words = nn.Parameter(torch.zeros(V, D))

    def forward(self, ids):
        state = [(torch.zeros(len(ids), D).to(self.words),) * 2 for _ in self.cells]
        out = []
        for t in range(ids.shape[1]):
            x = self.words[ids[:, t]]
            for j, cell in enumerate(self.cells):
                state[j] = cell(x, *state[j])
                x = state[j][0]
            out.append(x @ self.words.T + self.out_bias)
        return torch.stack(out, 1)


def word_lm(seed):
    m = shake(WordLM(), seed)
    with torch.no_grad():  # strong enough that a step's output depends on the steps before
        m.encoder.weight.mul_(6.0)
        for n, p in m.rnn.named_parameters():
            p.mul_(3.0 if n.startswith("weight") else 1.0)
    return m


def lstm_to_steps(s):
    def ifog(w):
        i, f, g, o = w.chunk(4)
        return torch.cat([i, f, o, g])

    out = {"words": s["encoder.weight"], "out_bias": s["decoder.bias"]}
    for j in range(L):
        w = torch.cat([s[f"rnn.weight_hh_l{j}"], s[f"rnn.weight_ih_l{j}"]], 1)
        out[f"cells.{j}.gates.weight"] = ifog(w)
        out[f"cells.{j}.gates.bias"] = ifog(s[f"rnn.bias_ih_l{j}"] + s[f"rnn.bias_hh_l{j}"])
    return out


case(
    name="lstm: torch.nn.LSTM tied language model -> own cells (one Linear on [h, x], gates i, f, o, g)",
    family="lstm",
    note="two matrices side by side, hidden first; biases summed; last two gates swapped; tied table used as x @ W.T",
    source=lambda: word_lm(23),
    target=lambda: shake(StepLM(), 24),
    inputs=tokens(12),
    run_source=lambda m, x: m(x["ids"]),
    run_target=lambda m, x: m(x["ids"]),
    oracle=lstm_to_steps,
)
