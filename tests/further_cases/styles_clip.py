"""Further cases: clip, in more of the styles that people write."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import transformers as T
from torch import nn

from tests.further_cases.clip import (
    CTX,
    EOT,
    PATCH,
    SIZE,
    TEXT,
    VISION,
    WB,
    D,
    E,
    H,
    L,
    V,
    case,
    fuse,
    joint,
    move,
    openai_clip,
    pairs,
    run_clip,
)
from tests.graft_matrix.core import shake

DH, N = D // H, (SIZE // PATCH) ** 2


def par(*shape) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def quick(x):
    return x / (1 + torch.exp(-1.702 * x))


# ---------------------------------------------------------- 1 CLIP image tower, patches cut out, one position table


class CutBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.qkv_b, self.out = par(3, D, D), par(3, 1, 1, D), nn.Linear(D, D)
        self.fc = nn.ModuleList([nn.Linear(D, 4 * D), nn.Linear(4 * D, D)])
        self.ln = nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(D)])

    def forward(self, x):
        q, k, v = (torch.einsum("btd,ned->nbte", self.ln[0](x), self.qkv) + self.qkv_b).unflatten(-1, (H, DH))
        w = torch.einsum("bthd,bshd->bhts", q * DH**-0.5, k)
        w = torch.exp(w - torch.logsumexp(w, -1, keepdim=True))
        x = x + self.out(torch.einsum("bhts,bshd->bthd", w, v).flatten(2))
        return x + self.fc[1](quick(self.fc[0](self.ln[1](x))))


class CutVision(nn.Module):
    """Patches are cut out of [B, H, W, 3] as (row, column, channel); the class token is row 0 of the positions."""

    def __init__(self):
        super().__init__()
        self.to_space, self.patch = par(D, E), par(PATCH * PATCH * 3, D)
        self.where = par(1 + N, D)
        self.blocks = nn.Sequential(*(CutBlock() for _ in range(L)))
        self.ln_in, self.ln_out = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x):
        g = SIZE // PATCH
        x = x.reshape(-1, g, PATCH, g, PATCH, 3).transpose(2, 3).reshape(len(x), N, -1) @ self.patch
        x = F.pad(x, (0, 0, 1, 0)) + self.where
        return self.ln_out(self.blocks(self.ln_in(x))[:, 0]) @ self.to_space


def vision_to_cut(s):
    v = "vision_model."
    where = s[v + "embeddings.position_embedding.weight"].clone()
    where[0] += s[v + "embeddings.class_embedding"]
    out = {
        "where": where,
        "patch": s[v + "embeddings.patch_embedding.weight"].permute(2, 3, 1, 0).reshape(-1, D),
        "to_space": s["visual_projection.weight"].T,
        **move(s, {v + "pre_layrnorm": "ln_in", v + "post_layernorm": "ln_out"}),
    }
    for i in range(L):
        a, b = f"{v}encoder.layers.{i}.", f"blocks.{i}."
        out[b + "qkv"] = torch.stack([s[f"{a}self_attn.{n}_proj.weight"] for n in "qkv"])
        out[b + "qkv_b"] = torch.stack([s[f"{a}self_attn.{n}_proj.bias"] for n in "qkv"])[:, None, None]
        names = {"self_attn.out_proj": "out", "mlp.fc1": "fc.0", "mlp.fc2": "fc.1", "layer_norm1": "ln.0"}
        out.update(move(s, {a + x: b + y for x, y in {**names, "layer_norm2": "ln.1"}.items()}))
    return out


def hf_vision(seed):
    c = T.CLIPVisionConfig(**VISION, hidden_act="quick_gelu", projection_dim=E)
    return shake(T.CLIPVisionModelWithProjection(c), seed)


case(
    name="cut-clip-vision: transformers -> own (patches [h w c, d], class token inside the positions, qkv [3, d, d])",
    family="clip-vision",
    note="class token plus its position is one row; patch kernel turned and flattened; softmax by logsumexp; NHWC",
    source=lambda: hf_vision(101),
    target=lambda: shake(CutVision(), 102),
    inputs=pairs(),
    run_source=lambda m, x: m(pixel_values=x["image"]).image_embeds,
    run_target=lambda m, x: m(x["image"].permute(0, 2, 3, 1)),
    oracle=vision_to_cut,
)

# ------------------------------------------------------------------ 2 CLIP text tower, own -> transformers


class PromptBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"kv": nn.Linear(D, 2 * D), "merge": nn.Linear(D, D), "q": nn.Linear(D, D)})
        self.feed = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        self.norm = nn.LayerNorm(D)

    def forward(self, x, mask):
        a, y = self.attention, self.norm(x)
        q, (k, v) = a["q"](y), a["kv"](y).chunk(2, -1)
        q, k, v = (z.unflatten(-1, (H, DH)).transpose(1, 2) for z in (q, k, v))
        x = x + a["merge"](F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x + self.feed(x)


class PromptEncoder(nn.Module):
    """Text conditioning of a small diffusion model; cached float mask; also holds the pipeline's time embedding."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((CTX, CTX), -1e9).triu(1))
        self.time = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.words, self.places = par(V, D), par(1, CTX, D)
        self.trunk = nn.ModuleList(PromptBlock() for _ in range(L))
        self.done = nn.LayerNorm(D)
        self.to_clip = nn.Linear(D, E, bias=False)

    def encode(self, ids):
        x = F.one_hot(ids, V).to(self.words.dtype) @ self.words + self.places
        for block in self.trunk:
            x = block(x, self.mask)
        return self.to_clip(self.done(x)[ids == EOT])


def prompt_to_hf(s):
    t = "text_model."
    out = {
        t + "embeddings.token_embedding.weight": s["words"],
        t + "embeddings.position_embedding.weight": s["places"][0],
        **move(s, {"done": t + "final_layer_norm", "to_clip": "text_projection"}),
    }
    for i in range(L):
        a, b = f"trunk.{i}.", f"{t}encoder.layers.{i}."
        for w in WB:
            k, v = s[f"{a}attention.kv.{w}"].chunk(2)
            out[f"{b}self_attn.k_proj.{w}"], out[f"{b}self_attn.v_proj.{w}"] = k, v
        names = {
            "attention.q": "self_attn.q_proj",
            "attention.merge": "self_attn.out_proj",
            "norm": "layer_norm1",
            "feed.0": "layer_norm2",
            "feed.1": "mlp.fc1",
            "feed.3": "mlp.fc2",
        }
        out.update(move(s, {a + x: b + y for x, y in names.items()}))
    return out


def hf_text(seed):
    c = T.CLIPTextConfig(**TEXT, intermediate_size=4 * D, hidden_act="gelu", projection_dim=E)
    return shake(T.CLIPTextModelWithProjection(c), seed)


case(
    name="prompt-clip-text: own (q and kv, one-hot words, cached float mask) -> transformers with projection",
    family="clip-text",
    note="source also holds two d x d layers of a time embedding; kv split in two; norm inside the feed-forward",
    source=lambda: shake(PromptEncoder(), 103),
    target=lambda: hf_text(104),
    inputs=pairs(),
    run_source=lambda m, x: m.encode(x["ids"]),
    run_target=lambda m, x: m(input_ids=x["ids"]).text_embeds,
    oracle=prompt_to_hf,
)

# ----------------------------------------------------------------------------- 3 whole CLIP in MLX's layout


VW = 64  # the heads of OpenAI's image towers are 64 wide


class MlxAttention(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.query_proj, self.key_proj, self.value_proj, self.out_proj = (nn.Linear(d, d) for _ in range(4))
        self.h = h

    def forward(self, x, mask):
        q, k, v = (f(x).unflatten(-1, (self.h, -1)) for f in (self.query_proj, self.key_proj, self.value_proj))
        w = (q.permute(0, 2, 1, 3) * math.sqrt(1 / q.shape[-1])) @ k.permute(0, 2, 3, 1)
        w = torch.softmax(w if mask is None else w + mask, -1)
        return self.out_proj((w @ v.transpose(1, 2)).transpose(1, 2).flatten(2))


class MlxLayer(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.attention = MlxAttention(d, h)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.linear1, self.linear2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x, mask=None):
        x = x + self.attention(self.layer_norm1(x), mask)
        return x + self.linear2(quick(self.linear1(self.layer_norm2(x))))


class MlxTower(nn.Module):
    def __init__(self, vision):
        super().__init__()
        d, h = (VW, 1) if vision else (D, H)
        if vision:
            self.class_embedding, self.patch_embedding = par(d), par(d, PATCH, PATCH, 3)
            self.pre_layernorm = nn.LayerNorm(d)
        else:
            self.token_embedding = nn.Embedding(V, d)
        self.position_embedding = nn.Embedding(N + 1 if vision else CTX, d)
        self.layers = nn.ModuleList(MlxLayer(d, h) for _ in range(L))
        self.final_layernorm = nn.LayerNorm(d)


class MlxCLIP(nn.Module):
    """Conv weights [out, h, w, in], channels last; logits are scaled cosines."""

    def __init__(self):
        super().__init__()
        self.text_model, self.vision_model = MlxTower(False), MlxTower(True)
        self.visual_projection, self.text_projection = (nn.Linear(d, E, bias=False) for d in (VW, D))
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def encode_text(self, ids):
        m = self.text_model
        x = m.token_embedding(ids) + m.position_embedding.weight[: ids.shape[1]]
        mask = torch.full((CTX, CTX), -1e9, dtype=x.dtype, device=x.device).triu(1)
        for layer in m.layers:
            x = layer(x, mask)
        x = m.final_layernorm(x)[torch.arange(len(ids)), ids.argmax(-1)]
        return self.text_projection(x)

    def encode_image(self, image):
        m = self.vision_model
        x = F.conv2d(image.permute(0, 3, 1, 2), m.patch_embedding.permute(0, 3, 1, 2), stride=PATCH)
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        x = torch.cat([m.class_embedding.expand(len(x), 1, VW), x], 1) + m.position_embedding.weight
        x = m.pre_layernorm(x)
        for layer in m.layers:
            x = layer(x)
        return self.visual_projection(m.final_layernorm(x[:, 0]))

    def forward(self, image, ids):
        return joint(self.encode_image(image), self.encode_text(ids), self.logit_scale.exp())


def openai_to_mlx(s):
    out = {
        "logit_scale": s["logit_scale"],
        "text_projection.weight": s["text_projection"].T,
        "visual_projection.weight": s["visual.proj"].T,
        "text_model.position_embedding.weight": s["positional_embedding"],
        "vision_model.position_embedding.weight": s["visual.positional_embedding"],
        "vision_model.class_embedding": s["visual.class_embedding"],
        "vision_model.patch_embedding": s["visual.conv1.weight"].permute(0, 2, 3, 1),
        **move(
            s,
            {
                "token_embedding": "text_model.token_embedding",
                "ln_final": "text_model.final_layernorm",
                "visual.ln_pre": "vision_model.pre_layernorm",
                "visual.ln_post": "vision_model.final_layernorm",
            },
        ),
    }
    names = {"attn.out_proj": "attention.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    names.update({"mlp.c_fc": "linear1", "mlp.c_proj": "linear2"})
    for src, dst in (("", "text_model."), ("visual.", "vision_model.")):
        for i in range(L):
            a, b = f"{src}transformer.resblocks.{i}.", f"{dst}layers.{i}."
            for w in WB:
                for n, x in zip(("query", "key", "value"), s[f"{a}attn.in_proj_{w}"].chunk(3), strict=True):
                    out[f"{b}attention.{n}_proj.{w}"] = x
            out.update(move(s, {a + x: b + y for x, y in names.items()}))
    return out


case(
    name="mlx-clip: openai CLIP -> own (MLX layout, channels last)",
    family="clip",
    note="patch weight [out, h, w, in]; in_proj in three; raw projections to Linear; text tower first",
    source=lambda: openai_clip(105, vwidth=VW),
    target=lambda: shake(MlxCLIP(), 106),
    inputs=pairs(),
    run_source=run_clip,
    run_target=lambda m, x: m(x["image"].permute(0, 2, 3, 1), x["ids"]),
    oracle=openai_to_mlx,
)

# ------------------------------------------------------------------- 4 SigLIP, own Lightning-like -> transformers


def torch_tower():
    layer = nn.TransformerEncoderLayer(D, H, 2 * D, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, L, nn.LayerNorm(D, eps=1e-6), enable_nested_tensor=False)


class LitSigLIP(nn.Module):
    """torch's own layers; the pool's key and value widths are given, so that its matrices are in one piece or three
    as torch decides."""

    def __init__(self):
        super().__init__()
        self.caption = nn.ModuleDict({"embed": nn.Embedding(V, D), "tower": torch_tower(), "out": nn.Linear(D, D)})
        self.caption_pos = par(CTX, D)
        self.picture = nn.ModuleDict({"tower": torch_tower(), "stem": nn.Conv2d(3, D, PATCH, PATCH)})
        self.picture_pos, self.seed = par(D, N), par(D)
        self.pool = nn.MultiheadAttention(D, H, kdim=D, vdim=D, batch_first=True)
        self.pool_mlp = nn.Sequential(nn.LayerNorm(D, eps=1e-6), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.temperature, self.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-2.0))

    def forward(self, image, ids):
        p, c = self.picture, self.caption
        x = p["tower"]((p["stem"](image).flatten(2) + self.picture_pos).mT)
        x = self.pool(self.seed.expand(len(x), 1, D), x, x, need_weights=False)[0]
        a = F.normalize((x + self.pool_mlp(x))[:, 0], dim=-1)
        b = F.normalize(c["out"](c["tower"](c["embed"](ids) + self.caption_pos)[:, -1]), dim=-1)
        return torch.cat([a, b, F.logsigmoid(a @ b.T * self.temperature.exp() + self.shift)], 1)


def lit_to_siglip(s):
    v, t = "vision_model.", "text_model."
    out = {
        "logit_scale": s["temperature"][None],
        "logit_bias": s["shift"][None],
        v + "embeddings.position_embedding.weight": s["picture_pos"].T,
        t + "embeddings.position_embedding.weight": s["caption_pos"],
        v + "head.probe": s["seed"][None, None],
        **{f"{v}head.attention.in_proj_{w}": s[f"pool.in_proj_{w}"] for w in WB},
        **move(
            s,
            {
                "picture.stem": v + "embeddings.patch_embedding",
                "picture.tower.norm": v + "post_layernorm",
                "caption.embed": t + "embeddings.token_embedding",
                "caption.tower.norm": t + "final_layer_norm",
                "caption.out": t + "head",
                "pool.out_proj": v + "head.attention.out_proj",
                "pool_mlp.0": v + "head.layernorm",
                "pool_mlp.1": v + "head.mlp.fc1",
                "pool_mlp.3": v + "head.mlp.fc2",
            },
        ),
    }
    names = {"self_attn.out_proj": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2"}
    names.update({"linear1": "mlp.fc1", "linear2": "mlp.fc2"})
    for src, dst in (("picture.", v), ("caption.", t)):
        for i in range(L):
            a, b = f"{src}tower.layers.{i}.", f"{dst}encoder.layers.{i}."
            for w in WB:
                for n, x in zip("qkv", s[f"{a}self_attn.in_proj_{w}"].chunk(3), strict=True):
                    out[f"{b}self_attn.{n}_proj.{w}"] = x
            out.update(move(s, {a + x: b + y for x, y in names.items()}))
    return out


def hf_siglip(seed):
    text = {**TEXT, "intermediate_size": 2 * D, "projection_size": D, "hidden_act": "gelu"}
    vision = {**VISION, "intermediate_size": 2 * D, "hidden_act": "gelu"}
    return shake(T.SiglipModel(T.SiglipConfig(text_config=text, vision_config=vision)), seed)


def run_siglip(m, x):
    o = m(input_ids=x["ids"], pixel_values=x["image"])
    return torch.cat([o.image_embeds, o.text_embeds, F.logsigmoid(o.logits_per_image)], 1)


case(
    name="lit-siglip: own two towers (torch.nn.TransformerEncoder, log-sigmoid) -> transformers SiglipModel",
    family="siglip",
    note="positions [d, n] turned; scalars to vectors of one; in_proj split in the towers, kept whole in the pool",
    source=lambda: shake(LitSigLIP(), 107),
    target=lambda: hf_siglip(108),
    inputs=pairs(),
    run_source=lambda m, x: m(x["image"], x["ids"]),
    run_target=run_siglip,
    oracle=lit_to_siglip,
)

# ------------------------------------------------------------------- 5 SigLIP image tower -> torchvision's Encoder


class VisionEncoder(nn.Module):
    """torchvision's Encoder (it adds the positions), a Linear on unfolded patches, an own pool."""

    def __init__(self):
        from torchvision.models.vision_transformer import Encoder

        super().__init__()
        self.encoder = Encoder(N, L, H, D, 2 * D, 0.0, 0.0)
        self.patch = nn.Linear(3 * PATCH * PATCH, D)
        self.q, self.kv, self.o, self.query = par(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D), par(D)
        self.q_bias = par(D)
        self.mlp = nn.ModuleDict(
            {"down": nn.Linear(2 * D, D), "norm": nn.LayerNorm(D, 1e-6), "up": nn.Linear(D, 2 * D)}
        )

    def forward(self, image):
        x = self.encoder(self.patch(F.unfold(image, PATCH, stride=PATCH).mT))
        k, v = self.kv(x).unflatten(-1, (2 * H, DH)).chunk(2, 2)
        q = (self.query @ self.q + self.q_bias).view(H, DH)
        w = (torch.einsum("hd,bshd->bhs", q, k) / DH**0.5).softmax(-1)
        y = self.o(torch.einsum("bhs,bshd->bhd", w, v).flatten(1))
        return y + self.mlp["down"](F.gelu(self.mlp["up"](self.mlp["norm"](y))))


def siglip_to_tv(s):
    s = {k.removeprefix("vision_model."): v for k, v in s.items()}
    w, c = s["head.attention.in_proj_weight"], s["head.attention.in_proj_bias"]
    out = {
        "encoder.pos_embedding": s["embeddings.position_embedding.weight"][None],
        "patch.weight": s["embeddings.patch_embedding.weight"].flatten(1),
        "patch.bias": s["embeddings.patch_embedding.bias"],
        "query": s["head.probe"][0, 0],
        "q": w[:D].T,
        "q_bias": c[:D],
        "kv.weight": w[D:],
        "kv.bias": c[D:],
        **move(
            s,
            {
                "post_layernorm": "encoder.ln",
                "head.attention.out_proj": "o",
                "head.layernorm": "mlp.norm",
                "head.mlp.fc1": "mlp.up",
                "head.mlp.fc2": "mlp.down",
            },
        ),
    }
    names = {"self_attn.out_proj": "self_attention.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    names.update({"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"})
    for i in range(L):
        a, b = f"encoder.layers.{i}.", f"encoder.layers.encoder_layer_{i}."
        out.update(fuse(s, [f"{a}self_attn.{n}_proj" for n in "qkv"], b + "self_attention.in_proj", "_"))
        out.update(move(s, {a + x: b + y for x, y in names.items()}))
    return out


def hf_siglip_vision(seed):
    c = T.SiglipVisionConfig(**{**VISION, "intermediate_size": 2 * D, "hidden_act": "gelu"})
    return shake(T.SiglipVisionModel(c), seed)


case(
    name="tv-siglip-vision: transformers SiglipVisionModel -> torchvision Encoder with an own pool",
    family="siglip-vision",
    note="patch conv to Linear on unfold; pool in_proj to a raw q and a Linear kv; encoder_layer_0 names",
    source=lambda: hf_siglip_vision(109),
    target=lambda: shake(VisionEncoder(), 110),
    inputs=pairs(),
    run_source=lambda m, x: m(pixel_values=x["image"]).pooler_output,
    run_target=lambda m, x: m(x["image"]),
    oracle=siglip_to_tv,
)

# --------------------------------------------------------------------- 6 ALIGN's image tower -> own EfficientNet

EFF = [(32, 16, 3, 1, 1, 1), (16, 24, 5, 2, 6, 2)]  # in, out, kernel, stride, expansion, repeats


def unit(cin, cout, k=1, groups=1, stride=1, act=True):
    pad = k // 2 if stride == 1 else 0
    parts = [nn.Conv2d(cin, cout, k, stride, pad, groups=groups, bias=False), nn.BatchNorm2d(cout, eps=1e-3)]
    return nn.Sequential(*parts, *([nn.SiLU()] if act else []))


class MbConv(nn.Module):
    def __init__(self, cin, cout, k, stride, grow, skip):
        super().__init__()
        wide = cin * grow
        self.se_out, self.se_in = nn.Linear(max(1, cin // 4), wide), nn.Linear(wide, max(1, cin // 4))
        self.shrink = unit(wide, cout, act=False)
        self.depth = unit(wide, wide, k, wide, stride)
        self.grow = unit(cin, wide) if grow > 1 else nn.Identity()
        self.pad, self.skip = ((k // 2 - 1, k // 2) * 2 if stride == 2 else (0,) * 4), skip

    def forward(self, x):
        y = self.depth(F.pad(self.grow(x), self.pad))
        gate = torch.sigmoid(self.se_out(F.silu(self.se_in(y.mean((2, 3))))))
        y = self.shrink(y * gate[..., None, None])
        return x + y if self.skip else y


class OwnAlignVision(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList()
        for cin, cout, k, stride, grow, n in EFF:
            first = MbConv(cin, cout, k, stride, grow, False)
            self.stages.append(nn.Sequential(first, *(MbConv(cout, cout, k, 1, grow, True) for _ in range(n - 1))))
        self.stem = unit(3, 32, 3, stride=2)

    def forward(self, image):
        x = self.stem(F.pad(image, (0, 1, 0, 1)))
        for stage in self.stages:
            x = stage(x)
        return x


def align_to_own(s):
    def put(conv, bn, dst):
        out = {f"{dst}.0.weight": s[conv + ".weight"]}
        return {**out, **{f"{dst}.1.{k}": s[f"{bn}.{k}"] for k in (*WB, "running_mean", "running_var")}}

    out, i = put("embeddings.convolution", "embeddings.batchnorm", "stem"), 0
    for j, (*_, grow, n) in enumerate(EFF):
        for r in range(n):
            a, b = f"encoder.blocks.{i}.", f"stages.{j}.{r}."
            if grow > 1:
                out.update(put(a + "expansion.expand_conv", a + "expansion.expand_bn", b + "grow"))
            d = a + "depthwise_conv.depthwise_"
            out.update(put(d + "conv", d + "norm", b + "depth"))
            out.update(put(a + "projection.project_conv", a + "projection.project_bn", b + "shrink"))
            for x, y in (("reduce", "se_in"), ("expand", "se_out")):
                out[f"{b}{y}.weight"] = s[f"{a}squeeze_excite.{x}.weight"][..., 0, 0]
                out[f"{b}{y}.bias"] = s[f"{a}squeeze_excite.{x}.bias"]
            i += 1
    return out


def hf_align_vision(seed):
    cin, cout, k, stride, grow, n = (list(x) for x in zip(*EFF, strict=True))
    c = T.AlignVisionConfig(
        image_size=SIZE,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        in_channels=cin,
        out_channels=cout,
        kernel_sizes=k,
        strides=stride,
        expand_ratios=grow,
        num_block_repeats=n,
        depthwise_padding=[],
        hidden_dim=cout[-1],
    )
    return shake(T.AlignVisionModel(c), seed)


case(
    name="own-align-vision: transformers AlignVisionModel -> own EfficientNet (stages, Linear squeeze-excite)",
    family="align-vision",
    note="flat block list into stages; 1x1 convolutions to Linear; batch statistics; stem registered last",
    source=lambda: hf_align_vision(111),
    target=lambda: shake(OwnAlignVision(), 112),
    inputs=pairs(),
    run_source=lambda m, x: m(pixel_values=x["image"]).last_hidden_state,
    run_target=lambda m, x: m(x["image"]),
    oracle=align_to_own,
)
