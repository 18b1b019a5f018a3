"""Further cases: clip."""

from __future__ import annotations

import functools
import math
import re

import clip.model as openai
import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor, nn

from tests.graft_matrix import core
from tests.graft_matrix.core import State, shake

torch.set_num_threads(1)
V, CTX, EOT, E, L, H, D, PATCH, SIZE = 60, 12, 59, 24, 2, 4, 48, 8, 32
WB = ("weight", "bias")


def case(source, target, **kw):
    """Fixes the constructors' own randomness too."""

    def fixed(build, seed):
        def make():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return build()

        return make

    return core.case(modality="clip", source=fixed(source, 3000), target=fixed(target, 4000), **kw)


def pairs(size: int = SIZE, n: int = 3):
    """Images, and token ids that end in EOT (the largest id) at various places and are then padded with 0."""

    def make(seed: int):
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, EOT - 1, (n, CTX), generator=g)
        for row in ids:
            k = int(torch.randint(CTX // 2, CTX, (1,), generator=g))
            row[k], row[k + 1 :] = EOT, 0
        return {"image": torch.randn(n, 3, size, size, generator=g), "ids": ids}

    return make


def joint(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    a, b = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    return torch.cat([a.flatten(), b.flatten(), ((a @ b.T) * scale + bias).flatten() / 10])


def run_clip(m, x):
    return joint(m.encode_image(x["image"]), m.encode_text(x["ids"]), m.logit_scale.exp())


def run_hf(m, x):
    o = m(input_ids=x["ids"], pixel_values=x["image"])
    return torch.cat([o.image_embeds.flatten(), o.text_embeds.flatten(), o.logits_per_image.flatten() / 10])


def move(s: State, names: dict[str, str]) -> State:
    return {f"{b}.{w}": s[f"{a}.{w}"] for a, b in names.items() for w in WB if f"{a}.{w}" in s}


def fuse(s: State, names: list[str], dst: str, sep: str = ".") -> State:
    return {f"{dst}{sep}{w}": torch.cat([s[f"{n}.{w}"] for n in names]) for w in WB}


# -------------------------------------------------------------------------------------------------- library models


def openai_clip(seed, layers=L, vwidth=D, size=SIZE):
    return shake(openai.CLIP(E, size, layers, vwidth, PATCH, CTX, V, D, H, L).float(), seed)


def open_clip_model(seed, custom=False, quick=False):
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    v = CLIPVisionCfg(layers=L, width=D, head_width=64 if quick else D // H, patch_size=PATCH, image_size=SIZE)
    v.width = 64 if quick else D  # OpenAI's heads are always 64 wide
    t = CLIPTextCfg(context_length=CTX, vocab_size=V, width=D, heads=H, layers=L)
    return shake((CustomTextCLIP if custom else CLIP)(E, v, t, quick_gelu=quick), seed)


TEXT = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "max_position_embeddings": CTX,
    "pad_token_id": 0,
    "bos_token_id": EOT - 1,
    "eos_token_id": EOT,
}
VISION = {
    "hidden_size": D,
    "intermediate_size": 4 * D,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "image_size": SIZE,
    "patch_size": PATCH,
}

# ============================================================================================== library -> library


def custom_to_openai(s):
    return {re.sub(r"^text\.", "", k): v for k, v in s.items()}


case(
    name="clip: open_clip (custom text, quick_gelu) -> openai",
    family="clip",
    note="only the text tower's prefix differs; both towers' blocks share leaf names; one is 64 wide, one 48",
    source=lambda: open_clip_model(1, custom=True, quick=True),
    target=lambda: openai_clip(2, vwidth=64),
    inputs=pairs(),
    run_source=run_clip,
    run_target=run_clip,
    oracle=custom_to_openai,
)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def timm_clip(seed):
    from timm.models.vision_transformer import VisionTransformer

    return shake(
        VisionTransformer(
            img_size=SIZE,
            patch_size=PATCH,
            embed_dim=D,
            depth=L,
            num_heads=H,
            num_classes=E,
            pre_norm=True,
            act_layer=QuickGELU,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-5),
        ),
        seed,
    )


def vision_to_timm(s):
    v = "vision_model."
    pos = s[v + "embeddings.position_embedding.weight"]
    out = {
        "cls_token": s[v + "embeddings.class_embedding"].view(1, 1, D),
        "pos_embed": pos[None],
        "patch_embed.proj.weight": s[v + "embeddings.patch_embedding.weight"],
        "head.weight": s["visual_projection.weight"],
        "head.bias": torch.zeros(E),
        **move(s, {v + "pre_layrnorm": "norm_pre", v + "post_layernorm": "norm"}),
    }
    for i in range(L):
        a, b = f"{v}encoder.layers.{i}.", f"blocks.{i}."
        out.update(fuse(s, [f"{a}self_attn.{n}_proj" for n in "qkv"], b + "attn.qkv"))
        out.update(
            move(
                s,
                {
                    a + "self_attn.out_proj": b + "attn.proj",
                    a + "layer_norm1": b + "norm1",
                    a + "layer_norm2": b + "norm2",
                    a + "mlp.fc1": b + "mlp.fc1",
                    a + "mlp.fc2": b + "mlp.fc2",
                },
            )
        )
    return out


case(
    name="clip-vision: transformers -> timm VisionTransformer (pre_norm, quick gelu)",
    family="clip-vision",
    note="qkv fused from k, v, q order; projection becomes a classifier whose bias has no source and must be zero",
    source=lambda: shake(
        T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(**VISION, projection_dim=E, hidden_act="quick_gelu")), 3
    ),
    target=lambda: timm_clip(4),
    inputs=pairs(),
    run_source=lambda m, x: m(x["image"]).image_embeds,
    run_target=lambda m, x: m(x["image"]),
    oracle=vision_to_timm,
)


def hf_align(seed):
    text = {**TEXT, "intermediate_size": 2 * D}
    vision = {
        "kernel_sizes": [3, 3],
        "in_channels": [32, 16],
        "out_channels": [16, 24],
        "depthwise_padding": [],
        "strides": [1, 2],
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 2],
        "hidden_dim": 48,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "image_size": SIZE,
    }
    return shake(T.AlignModel(T.AlignConfig(text_config=text, vision_config=vision, projection_dim=E)), seed)


class CuratedText(nn.Module):
    """A text tower out of curated-transformers' BERT and a projection; the image side is a plain convnet."""

    def __init__(self):
        super().__init__()
        from curated_transformers.models import BERTConfig, BERTEncoder

        self.image = nn.Sequential(
            nn.Conv2d(3, 32, 4, 4),
            nn.BatchNorm2d(32),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, E),
        )
        self.bert = BERTEncoder(
            BERTConfig(
                hidden_width=D,
                embedding_width=D,
                intermediate_width=2 * D,
                n_attention_heads=H,
                n_hidden_layers=L,
                n_pieces=V,
                n_positions=CTX,
                model_max_length=CTX,
            )
        )
        self.to_shared = nn.Linear(D, E)

    def text(self, ids):
        from curated_transformers.layers.attention import AttentionMask

        x = self.bert(ids, AttentionMask(torch.ones_like(ids, dtype=torch.bool))).last_hidden_layer_state
        return F.normalize(self.to_shared(x[:, 0]), dim=-1)

    def forward(self, image, ids):
        return F.normalize(self.image(image), dim=-1) @ self.text(ids).T


def align_to_curated(s):
    e, f = "text_model.embeddings.", "bert.embeddings."
    out = move(
        s,
        {
            "text_projection": "to_shared",
            e + "word_embeddings": f + "piece_embeddings",
            e + "position_embeddings": f + "position_embeddings",
            e + "LayerNorm": f + "embed_output_layer_norm",
            e + "token_type_embeddings": f + "type_embeddings",
        },
    )
    for i in range(L):
        a, b = f"text_model.encoder.layer.{i}.", f"bert.layers.{i}."
        names = {
            "attention.self.query": "mha.query",
            "attention.self.key": "mha.key",
            "attention.self.value": "mha.value",
            "attention.output.dense": "mha.output",
            "attention.output.LayerNorm": "attn_residual_layer_norm",
            "intermediate.dense": "ffn.intermediate",
            "output.dense": "ffn.output",
            "output.LayerNorm": "ffn_residual_layer_norm",
        }
        out.update(move(s, {a + x: b + y for x, y in names.items()}))
    return out


def run_align_text(m, x):
    h = m.text_model(input_ids=x["ids"]).last_hidden_state[:, 0]
    return F.normalize(m.text_projection(h), dim=-1)


case(
    name="align-text: transformers AlignModel -> curated-transformers BERT in own two-tower model",
    family="align-text",
    note="half of a two-tower source, whose EfficientNet and pooler are unused; projection has a bias",
    source=lambda: hf_align(5),
    target=lambda: shake(CuratedText(), 6),
    inputs=pairs(),
    run_source=run_align_text,
    run_target=lambda m, x: m.text(x["ids"]),
    oracle=align_to_curated,
)


class TorchTextTower(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, H, 4 * D, 0.0, QuickGELU(), batch_first=True, norm_first=True)
        self.tok, self.pos = nn.Embedding(V, D), nn.Parameter(torch.zeros(CTX, D))
        self.body = nn.TransformerEncoder(layer, L, enable_nested_tensor=False)
        self.norm, self.out = nn.LayerNorm(D), nn.Linear(D, E, bias=False)

    def forward(self, ids):
        hide = torch.ones(CTX, CTX, dtype=torch.bool, device=ids.device).triu(1)
        x = self.norm(self.body(self.tok(ids) + self.pos, mask=hide))
        return self.out(x[torch.arange(len(ids)), ids.argmax(-1)])


def openai_to_torch_text(s):
    out = {
        "tok.weight": s["token_embedding.weight"],
        "pos": s["positional_embedding"],
        "out.weight": s["text_projection"].T,
        **move(s, {"ln_final": "norm"}),
    }
    for i in range(L):
        a, b = f"transformer.resblocks.{i}.", f"body.layers.{i}."
        out.update({f"{b}self_attn.in_proj_{w}": s[f"{a}attn.in_proj_{w}"] for w in WB})
        out.update(
            move(
                s,
                {
                    a + "attn.out_proj": b + "self_attn.out_proj",
                    a + "ln_1": b + "norm1",
                    a + "ln_2": b + "norm2",
                    a + "mlp.c_fc": b + "linear1",
                    a + "mlp.c_proj": b + "linear2",
                },
            )
        )
    return out


case(
    name="clip-text: openai (whole model) -> torch.nn.TransformerEncoder (norm_first, causal)",
    family="clip-text",
    note="the text half of the source, which carries no prefix; raw projection to Linear; pooled at the end token",
    source=lambda: openai_clip(7, vwidth=64),
    target=lambda: shake(TorchTextTower(), 8),
    inputs=pairs(),
    run_source=lambda m, x: m.encode_text(x["ids"]),
    run_target=lambda m, x: m(x["ids"]),
    oracle=openai_to_torch_text,
)

# ================================================================================================= library -> own


def settle(m: nn.Module, seed: int, size: int) -> nn.Module:
    """Batch norms that fit what they see, so that the output depends on every layer."""
    x = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(seed))
    norms = [n for n in m.modules() if isinstance(n, nn.BatchNorm2d)]
    for n in norms:
        n.momentum = 1.0
    m.train()
    with torch.no_grad():
        m(x)
    for n in norms:
        n.momentum = 0.1
    return m.eval()


def conv_bn(i, o, k, stride=1):
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o))


class Res(nn.Module):
    def __init__(self, i, mid, stride):
        super().__init__()
        self.shortcut = nn.Sequential(nn.AvgPool2d(stride), *conv_bn(i, 4 * mid, 1))
        self.a, self.b, self.c = conv_bn(i, mid, 1), conv_bn(mid, mid, 3), conv_bn(mid, 4 * mid, 1)
        self.pool = nn.AvgPool2d(stride)

    def forward(self, x):
        y = self.c(self.pool(F.relu(self.b(F.relu(self.a(x))))))
        return F.relu(y + self.shortcut(x))


class AttendPool(nn.Module):
    """The mean is the only query; positions are kept as the map is, [1, d, n + 1]."""

    def __init__(self, d, n, heads):
        super().__init__()
        self.heads = heads
        self.where = nn.Parameter(torch.zeros(1, d, n + 1))
        self.to_kv, self.to_q, self.to_out = nn.Linear(d, 2 * d), nn.Linear(d, d), nn.Linear(d, E)

    def forward(self, x):
        x = x.flatten(2)
        x = (torch.cat([x.mean(2, keepdim=True), x], 2) + self.where).mT
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(x[:, :1]), *self.to_kv(x).chunk(2, -1))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).flatten(1))


class ClipResNet(nn.Module):
    def __init__(self, w=8, size=64):
        super().__init__()
        self.stem = nn.Sequential(
            conv_bn(3, w // 2, 3, 2),
            nn.ReLU(),
            conv_bn(w // 2, w // 2, 3),
            nn.ReLU(),
            conv_bn(w // 2, w, 3),
            nn.ReLU(),
            nn.AvgPool2d(2),
        )
        self.stages = nn.Sequential(Res(w, w, 1), Res(4 * w, 2 * w, 2), Res(8 * w, 4 * w, 2), Res(16 * w, 8 * w, 2))
        self.pool = AttendPool(32 * w, (size // 32) ** 2, H)

    def forward(self, x):
        return self.pool(self.stages(self.stem(x)))


def bn_to(s, conv, bn, dst):
    out = {f"{dst}.0.weight": s[f"{conv}.weight"]}
    return {**out, **{f"{dst}.1.{k}": s[f"{bn}.{k}"] for k in (*WB, "running_mean", "running_var")}}


def resnet_to_own(s):
    s = {k.removeprefix("visual."): v for k, v in s.items() if k.startswith("visual.")}
    out = {}
    for i in (1, 2, 3):
        out.update(bn_to(s, f"conv{i}", f"bn{i}", f"stem.{2 * i - 2}"))
    for j in range(4):
        a, b = f"layer{j + 1}.0.", f"stages.{j}."
        for i, n in enumerate("abc", 1):
            out.update(bn_to(s, f"{a}conv{i}", f"{a}bn{i}", b + n))
        short = bn_to(s, a + "downsample.0", a + "downsample.1", "x")
        out.update({f"{b}shortcut.{int(k[2]) + 1}{k[3:]}": v for k, v in short.items()})
    p = "attnpool."
    out.update(fuse(s, [p + "k_proj", p + "v_proj"], "pool.to_kv"))
    out.update(move(s, {p + "q_proj": "pool.to_q", p + "c_proj": "pool.to_out"}))
    return {**out, "pool.where": s[p + "positional_embedding"].T[None]}


def openai_resnet(seed):
    m = shake(openai.CLIP(E, 64, (1, 1, 1, 1), 8, None, CTX, V, D, H, L).float(), seed)
    settle(m.visual, seed, 64)
    return m


case(
    name="clip-vision: openai ModifiedResNet -> own (Sequential conv + norm, to_q/to_kv attention pool)",
    family="clip-vision",
    note="three-conv stem in a Sequential; shortcut registered first; batch statistics; positions transposed",
    source=lambda: openai_resnet(9),
    target=lambda: shake(ClipResNet(), 10),
    inputs=pairs(64),
    run_source=lambda m, x: m.encode_image(x["image"]),
    run_target=lambda m, x: m(x["image"]),
    oracle=resnet_to_own,
)


class CnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(D, H)
        self.ln_1 = nn.LayerNorm(D)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "gelu": QuickGELU(), "c_proj": nn.Linear(4 * D, D)})
        self.ln_2 = nn.LayerNorm(D)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp["c_proj"](self.mlp["gelu"](self.mlp["c_fc"](self.ln_2(x))))


class CnVisual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, D, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(D))
        self.positional_embedding = nn.Parameter(torch.zeros((SIZE // PATCH) ** 2 + 1, D))
        self.ln_pre, self.ln_post = nn.LayerNorm(D), nn.LayerNorm(D)
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*(CnBlock() for _ in range(L)))})
        self.proj = nn.Parameter(torch.zeros(D, E))

    def forward(self, x):
        x = self.conv1(x).flatten(2).permute(2, 0, 1)  # [T, B, D]
        x = torch.cat([self.class_embedding.expand(1, x.shape[1], D), x]) + self.positional_embedding[:, None]
        return self.ln_post(self.transformer["resblocks"](self.ln_pre(x))[0]) @ self.proj


class CnBertLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.dense, self.norm = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.LayerNorm(D, eps=1e-12)
        self.intermediate, self.output = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.output_norm = nn.LayerNorm(D, eps=1e-12)

    def forward(self, x, keep):
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D // H)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None])
        x = self.norm(x + self.dense(a.transpose(1, 2).flatten(2)))
        return self.output_norm(x + self.output(F.gelu(self.intermediate(x))))


class CnClip(nn.Module):
    """The image tower in OpenAI's layout, the text tower a BERT; both projections are raw."""

    def __init__(self):
        super().__init__()
        self.visual = CnVisual()
        self.bert = nn.ModuleDict(
            {
                "word": nn.Embedding(V, D),
                "position": nn.Embedding(CTX, D),
                "norm": nn.LayerNorm(D, eps=1e-12),
                "layers": nn.ModuleList(CnBertLayer() for _ in range(L)),
            }
        )
        self.text_projection = nn.Parameter(torch.zeros(D, E))
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))

    def encode_image(self, image):
        return self.visual(image)

    def encode_text(self, ids):
        b = self.bert
        x = b["norm"](b["word"](ids) + b["position"].weight[: ids.shape[1]])
        for layer in b["layers"]:
            x = layer(x, ids.ne(0))
        return x[:, 0] @ self.text_projection


def chinese_to_cn(s):
    v, e = "vision_model.", "text_model.embeddings."
    out = {
        "visual.class_embedding": s[v + "embeddings.class_embedding"],
        "logit_scale": s["logit_scale"],
        "visual.positional_embedding": s[v + "embeddings.position_embedding.weight"],
        "visual.proj": s["visual_projection.weight"].T,
        "text_projection": s["text_projection.weight"].T,
        **move(
            s,
            {
                v + "pre_layrnorm": "visual.ln_pre",
                v + "post_layernorm": "visual.ln_post",
                v + "embeddings.patch_embedding": "visual.conv1",
                e + "position_embeddings": "bert.position",
                e + "LayerNorm": "bert.norm",
            },
        ),
        "bert.word.weight": s[e + "word_embeddings.weight"] + s[e + "token_type_embeddings.weight"][0],
    }
    for i in range(L):
        a, b = f"{v}encoder.layers.{i}.", f"visual.transformer.resblocks.{i}."
        out.update(fuse(s, [f"{a}self_attn.{n}_proj" for n in "qkv"], b + "attn.in_proj", "_"))
        out.update(
            move(
                s,
                {
                    a + "self_attn.out_proj": b + "attn.out_proj",
                    a + "layer_norm1": b + "ln_1",
                    a + "layer_norm2": b + "ln_2",
                    a + "mlp.fc1": b + "mlp.c_fc",
                    a + "mlp.fc2": b + "mlp.c_proj",
                },
            )
        )
        a, b = f"text_model.encoder.layer.{i}.", f"bert.layers.{i}."
        out.update(fuse(s, [f"{a}attention.self.{n}" for n in ("query", "key", "value")], b + "qkv"))
        out.update(
            move(
                s,
                {
                    a + "attention.output.dense": b + "dense",
                    a + "attention.output.LayerNorm": b + "norm",
                    a + "intermediate.dense": b + "intermediate",
                    a + "output.dense": b + "output",
                    a + "output.LayerNorm": b + "output_norm",
                },
            )
        )
    return out


def hf_chinese(seed):
    text = {**TEXT, "intermediate_size": 2 * D}
    vision = {**VISION, "hidden_act": "quick_gelu"}
    cfg = T.ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=E)
    return shake(T.ChineseCLIPModel(cfg), seed)


def run_chinese(m, x):
    o = m(input_ids=x["ids"], pixel_values=x["image"], attention_mask=x["ids"].ne(0).long())
    return torch.cat([o.image_embeds.flatten(), o.text_embeds.flatten(), o.logits_per_image.flatten() / 10])


case(
    name="clip: transformers ChineseCLIPModel -> own (OpenAI image tower, fused BERT text tower)",
    family="clip",
    note="pre-norm in_proj blocks beside post-norm qkv ones; segment row 0 added to words; padding; raw projections",
    source=lambda: hf_chinese(11),
    target=lambda: shake(CnClip(), 12),
    inputs=pairs(),
    run_source=run_chinese,
    run_target=run_clip,
    oracle=chinese_to_cn,
)


class Dense(nn.Module):
    """A Flax layer: a kernel that keeps its axes and a bias."""

    def __init__(self, kernel, bias):
        super().__init__()
        self.bias, self.kernel = nn.Parameter(torch.zeros(bias)), nn.Parameter(torch.zeros(kernel))


class FlaxNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias, self.scale = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.ones(D))

    def forward(self, x):
        return F.layer_norm(x, (D,), self.scale, self.bias, 1e-6)


class FlaxAttention(nn.ModuleDict):
    def __init__(self):
        k = D // H
        super().__init__(
            {
                "key": Dense((D, H, k), (H, k)),
                "out": Dense((H, k, D), D),
                "query": Dense((D, H, k), (H, k)),
                "value": Dense((D, H, k), (H, k)),
            }
        )

    def forward(self, x, kv):
        q, k, v = (
            torch.einsum("btd,dhk->bhtk", y, self[n].kernel) + self[n].bias[:, None]
            for n, y in (("query", x), ("key", kv), ("value", kv))
        )
        w = torch.einsum("bhqk,bhsk->bhqs", q / math.sqrt(D // H), k).softmax(-1)
        return torch.einsum("bhqs,bhsk,hkd->bqd", w, v, self["out"].kernel) + self["out"].bias


class FlaxMlp(nn.ModuleDict):
    def __init__(self):
        super().__init__({"Dense_0": Dense((D, 4 * D), 4 * D), "Dense_1": Dense((4 * D, D), D)})

    def forward(self, x):
        a, b = self["Dense_0"], self["Dense_1"]
        return F.gelu(x @ a.kernel + a.bias, approximate="tanh") @ b.kernel + b.bias


class FlaxBlock(nn.ModuleDict):
    def __init__(self):
        super().__init__(
            {
                "LayerNorm_0": FlaxNorm(),
                "LayerNorm_1": FlaxNorm(),
                "MlpBlock_0": FlaxMlp(),
                "MultiHeadDotProductAttention_0": FlaxAttention(),
            }
        )

    def forward(self, x):
        y = self["LayerNorm_0"](x)
        x = x + self["MultiHeadDotProductAttention_0"](y, y)
        return x + self["MlpBlock_0"](self["LayerNorm_1"](x))


def flax_encoder():
    return nn.ModuleDict({"encoder_norm": FlaxNorm(), **{f"encoderblock_{i}": FlaxBlock() for i in range(L)}})


def run_encoder(m, x):
    for i in range(L):
        x = m[f"encoderblock_{i}"](x)
    return m["encoder_norm"](x)


class FlaxSigLIP(nn.Module):
    """SigLIP as its JAX checkpoint lays it out: kernels [d, heads, d_head], the patch kernel [h, w, 3, d]."""

    def __init__(self):
        super().__init__()
        self.b, self.t = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.img = nn.ModuleDict(
            {
                "MAPHead_0": nn.ModuleDict(
                    {
                        "LayerNorm_0": FlaxNorm(),
                        "MlpBlock_0": FlaxMlp(),
                        "MultiHeadDotProductAttention_0": FlaxAttention(),
                    }
                ),
                "Transformer": flax_encoder(),
                "embedding": Dense((PATCH, PATCH, 3, D), D),
            }
        )
        self.img_probe = nn.Parameter(torch.zeros(1, 1, D))
        self.img_pos = nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2, D))
        self.txt = nn.ModuleDict({"Encoder_0": flax_encoder(), "head": Dense((D, D), D)})
        self.txt_table, self.txt_pos = nn.Parameter(torch.zeros(V, D)), nn.Parameter(torch.zeros(1, CTX, D))

    def image(self, x):  # NHWC
        g, e = SIZE // PATCH, self.img["embedding"]
        x = x.reshape(-1, g, PATCH, g, PATCH, 3)
        x = torch.einsum("byhxwc,hwcd->byxd", x, e.kernel).flatten(1, 2) + e.bias
        x = run_encoder(self.img["Transformer"], x + self.img_pos)
        m = self.img["MAPHead_0"]
        x = m["MultiHeadDotProductAttention_0"](self.img_probe.expand(len(x), -1, -1), x)
        return (x + m["MlpBlock_0"](m["LayerNorm_0"](x)))[:, 0]

    def text(self, ids):
        x = run_encoder(self.txt["Encoder_0"], self.txt_table[ids] + self.txt_pos)
        return x[:, -1] @ self.txt["head"].kernel + self.txt["head"].bias

    def forward(self, image, ids):
        return joint(self.image(image), self.text(ids), self.t.exp(), self.b)


def flax_norm(s, a, b):
    return {b + ".scale": s[a + ".weight"], b + ".bias": s[a + ".bias"]}


def flax_mlp(s, a, b):
    out = {f"{b}.Dense_{i}.kernel": s[f"{a}.fc{i + 1}.weight"].T for i in (0, 1)}
    return {**out, **{f"{b}.Dense_{i}.bias": s[f"{a}.fc{i + 1}.bias"] for i in (0, 1)}}


def flax_attention(s, a, b):
    """a: prefix of q, k and v in one matrix or in three."""
    k = D // H
    if a + "in_proj_weight" in s:
        w, c = s[a + "in_proj_weight"].chunk(3), s[a + "in_proj_bias"].chunk(3)
    else:
        w, c = ([s[f"{a}{n}_proj.{x}"] for n in "qkv"] for x in WB)
    out = {}
    for i, n in enumerate(("query", "key", "value")):
        out[f"{b}.{n}.kernel"], out[f"{b}.{n}.bias"] = w[i].T.reshape(D, H, k), c[i].view(H, k)
    out[f"{b}.out.kernel"] = s[a + "out_proj.weight"].T.reshape(H, k, D)
    return {**out, f"{b}.out.bias": s[a + "out_proj.bias"]}


def siglip_to_flax(s):
    v, t, mha = "vision_model.", "text_model.", "MultiHeadDotProductAttention_0"
    out = {
        "t": s["logit_scale"],
        "b": s["logit_bias"],
        "txt_table": s[t + "embeddings.token_embedding.weight"],
        "txt_pos": s[t + "embeddings.position_embedding.weight"][None],
        "img_pos": s[v + "embeddings.position_embedding.weight"][None],
        "img_probe": s[v + "head.probe"],
        "txt.head.kernel": s[t + "head.weight"].T,
        "txt.head.bias": s[t + "head.bias"],
        "img.embedding.kernel": s[v + "embeddings.patch_embedding.weight"].permute(2, 3, 1, 0),
        "img.embedding.bias": s[v + "embeddings.patch_embedding.bias"],
        **flax_norm(s, v + "head.layernorm", "img.MAPHead_0.LayerNorm_0"),
        **flax_mlp(s, v + "head.mlp", "img.MAPHead_0.MlpBlock_0"),
        **flax_attention(s, v + "head.attention.", f"img.MAPHead_0.{mha}"),
    }
    for a, b, last in ((v, "img.Transformer.", "post_layernorm"), (t, "txt.Encoder_0.", "final_layer_norm")):
        out.update(flax_norm(s, a + last, b + "encoder_norm"))
        for i in range(L):
            p, q = f"{a}encoder.layers.{i}.", f"{b}encoderblock_{i}."
            out.update(
                {
                    **flax_norm(s, p + "layer_norm1", q + "LayerNorm_0"),
                    **flax_mlp(s, p + "mlp", q + "MlpBlock_0"),
                    **flax_norm(s, p + "layer_norm2", q + "LayerNorm_1"),
                    **flax_attention(s, p + "self_attn.", q + mha),
                }
            )
    return out


def hf_siglip(seed):
    act = {"hidden_act": "gelu_pytorch_tanh"}
    text = {**TEXT, "intermediate_size": 4 * D, "projection_size": D, **act}
    return shake(T.SiglipModel(T.SiglipConfig(text_config=text, vision_config={**VISION, **act})), seed)


case(
    name="siglip: transformers -> own (Flax layout, NHWC)",
    family="siglip",
    note="kernels [d, heads, d_head], [heads, d_head, d] and [h, w, c, d]; pool in_proj to three kernels; bias first",
    source=lambda: hf_siglip(13),
    target=lambda: shake(FlaxSigLIP(), 14),
    inputs=pairs(),
    run_source=run_hf,
    run_target=lambda m, x: m(x["image"].permute(0, 2, 3, 1), x["ids"]),
    oracle=siglip_to_flax,
)
