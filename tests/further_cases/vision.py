"""Further cases: vision. Eight between libraries, eight between a library and a module as a person would write it."""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise

import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers as T
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from tests.graft_matrix.core import State, case, shake

torch.set_num_threads(1)
T.utils.logging.set_verbosity_error()
T.utils.logging.disable_progress_bar()

D, L, H, M, P, IMG, NC = 48, 3, 4, 96, 8, 32, 10  # width, depth, heads, mlp, patch, image, classes
LN5, LN6 = partial(nn.LayerNorm, eps=1e-5), partial(nn.LayerNorm, eps=1e-6)
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
WB = ("weight", "bias")


def images(size=IMG, n=2):
    """Blobs of colour plus noise: a convnet sees no difference between images of noise."""

    def make(seed):
        g = torch.Generator().manual_seed(seed)
        blobs = F.interpolate(torch.randn(n, 3, 4, 4, generator=g), (size, size), mode="bilinear", align_corners=False)
        return 1.5 * blobs + 0.5 * torch.randn(n, 3, size, size, generator=g)

    return make


def wake(m, seed, size=64):
    """shake(), and running statistics measured on images, then jittered: else a deep convnet ignores its input."""
    shake(m, seed)
    norms = [x for x in m.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]
    keep = [b.momentum for b in norms]
    for b in norms:
        b.reset_running_stats()
        b.momentum = None
        b.train()
    with torch.no_grad():
        m(images(size, 8)(seed))
        g = torch.Generator().manual_seed(seed)
        for b, momentum in zip(norms, keep, strict=True):
            b.running_mean += 0.2 * b.running_var.sqrt() * torch.randn(b.running_mean.shape, generator=g)
            b.running_var *= 0.7 + 0.6 * torch.rand(b.running_var.shape, generator=g)
            b.momentum = momentum
    return m.eval()


def call(m, x):
    return m(x)


def logits(m, x):
    return m(x).logits


def hidden(m, x):
    return m(x).last_hidden_state


def flat(maps):
    return torch.cat([f.flatten(1) for f in maps], 1)


def ren(s: State, *rules) -> State:
    """Rename keys by (pattern, replacement) pairs, all applied in turn."""
    out = {}
    for k, v in s.items():
        for a, b in rules:
            k = re.sub(a, b, k)
        out[k] = v
    return out


def copy(s: State, out: State, pairs, ends=WB) -> None:
    for a, b in pairs:
        for e in ends:
            if f"{a}.{e}" in s:
                out[f"{b}.{e}"] = s[f"{a}.{e}"]


def timm_vit(seed, cls=TimmViT, **kw):
    kw = {"mlp_ratio": M / D, "num_classes": NC, "norm_layer": LN6, **kw}
    return shake(cls(img_size=IMG, patch_size=P, embed_dim=D, depth=L, num_heads=H, **kw), seed)


def hf_cfg(cls, **kw):
    kw = {"intermediate_size": M, "layer_norm_eps": 1e-6, "num_labels": NC, **kw}
    return cls(
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=H,
        image_size=IMG,
        patch_size=P,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **kw,
    )


def heads(x: Tensor, h: int = H) -> Tensor:
    return x.unflatten(-1, (h, -1)).transpose(-3, -2)


def unheads(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).flatten(-2)


# ---------------------------------------------------------------- 1 ResNet: timm features -> detection body

STAGES = (2, 1, 2, 1)


class Detector(nn.Module):
    """The start of a detector: torchvision's ResNet with frozen norms under a pyramid, and a small box head."""

    def __init__(self):
        super().__init__()
        from torchvision.models.detection.backbone_utils import BackboneWithFPN
        from torchvision.models.resnet import BasicBlock, ResNet
        from torchvision.ops import FrozenBatchNorm2d

        net = ResNet(BasicBlock, list(STAGES), norm_layer=FrozenBatchNorm2d)
        self.box_head = nn.Conv2d(32, 4, 1)
        self.backbone = BackboneWithFPN(net, {f"layer{i}": str(i - 1) for i in (1, 2, 3)}, [64, 128, 256], 32)

    def forward(self, x):
        return [self.box_head(f) for f in self.backbone(x).values()]


case(
    name="resnet: timm features_only -> torchvision body with frozen norms in a detector",
    modality="vision",
    family="resnet",
    source=lambda: wake(timm.create_model("resnet18", features_only=True, layers=STAGES, out_indices=(1, 2, 3)), 101),
    target=lambda: shake(Detector(), 102),
    inputs=images(64),
    run_source=lambda m, x: flat(m(x)),
    run_target=lambda m, x: flat(m.backbone.body(x).values()),
    oracle=lambda s: {f"backbone.body.{k}": v for k, v in s.items() if "num_batches" not in k},
    note="FrozenBatchNorm2d holds all four tensors as buffers and has no counter; pyramid and head are fresh",
)


# ---------------------------------------------------------------- 2 EfficientNet: transformers -> timm features

HALF = (1, 1, 1, 2, 2, 2, 1)


def hf_eff(seed):
    cfg = T.EfficientNetConfig(
        width_coefficient=0.5,
        depth_coefficient=0.5,
        hidden_dim=640,
        image_size=64,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
    )
    return wake(T.EfficientNetModel(cfg), seed)


def timm_eff_features(seed):
    from timm.models.efficientnet import _gen_efficientnet

    kw = {"channel_multiplier": 0.5, "depth_multiplier": 0.5, "bn_eps": 1e-3, "pad_type": "same"}
    return wake(_gen_efficientnet("tf_efficientnet_b0", pretrained=False, features_only=True, **kw), seed)


def o_eff(s):
    t = {"conv_stem.weight": s["embeddings.convolution.weight"]}
    copy(s, t, [("embeddings.batchnorm", "bn1")], BN)
    i = 0
    for st, n in enumerate(HALF):
        for j in range(n):
            a, b, first = f"encoder.blocks.{i}.", f"blocks.{st}.{j}.", st == 0
            pairs = [
                ("expansion.expand_conv", "conv_pw"),
                ("expansion.expand_bn", "bn1"),
                ("depthwise_conv.depthwise_conv", "conv_dw"),
                ("depthwise_conv.depthwise_norm", "bn1" if first else "bn2"),
                ("squeeze_excite.reduce", "se.conv_reduce"),
                ("squeeze_excite.expand", "se.conv_expand"),
                ("projection.project_conv", "conv_pw" if first else "conv_pwl"),
                ("projection.project_bn", "bn2" if first else "bn3"),
            ]
            copy(s, t, [(a + x, b + y) for x, y in pairs], BN)
            i += 1
    return t


def hf_eff_maps(m, x):
    states = m(x, output_hidden_states=True).hidden_states
    return flat([states[i] for i in (1, 2, 3, 7, 10)])


case(
    name="efficientnet: transformers -> timm features_only",
    modality="vision",
    family="efficientnet",
    source=lambda: hf_eff(103),
    target=lambda: timm_eff_features(104),
    inputs=images(64),
    run_source=hf_eff_maps,
    run_target=lambda m, x: flat(m(x)),
    oracle=o_eff,
    note="a flat list of blocks becomes stages; the same name (conv_pw, bn1) means another layer in the first stage; "
    "the source's top conv has no place",
)


# ---------------------------------------------------------------- 3 ConvNeXt V2: timm -> transformers

DIMS, DEPTHS = (16, 24, 32, 48), (1, 2, 2, 1)


def timm_convnext(seed, **kw):
    from timm.models.convnext import ConvNeXt

    return shake(ConvNeXt(depths=DEPTHS, dims=DIMS, num_classes=NC, **kw), seed)


def hf_convnext2(seed):
    cfg = T.ConvNextV2Config(hidden_sizes=list(DIMS), depths=list(DEPTHS), num_labels=NC, layer_norm_eps=1e-6)
    return shake(T.ConvNextV2ForImageClassification(cfg), seed)


def o_convnext2(s):
    t = ren(
        s,
        (r"^stem\.0", "convnextv2.embeddings.patch_embeddings"),
        (r"^stem\.1", "convnextv2.embeddings.layernorm"),
        (r"^stages\.(\d)\.blocks\.(\d)", r"convnextv2.encoder.stages.\1.layers.\2"),
        (r"^stages\.(\d)\.downsample", r"convnextv2.encoder.stages.\1.downsampling_layer"),
        (r"^head\.norm", "convnextv2.layernorm"),
        (r"^head\.fc", "classifier"),
        (r"\.conv_dw", ".dwconv"),
        (r"\.norm\.", ".layernorm."),
        (r"mlp\.fc(\d)", r"pwconv\1"),
        (r"mlp\.grn", "grn"),
    )
    return {k: v[None, None, None] if ".grn." in k else v for k, v in t.items()}


case(
    name="convnext-v2: timm -> transformers",
    modality="vision",
    family="convnext",
    source=lambda: timm_convnext(105, use_grn=True, ls_init_value=None),
    target=lambda: hf_convnext2(106),
    inputs=images(64),
    run_source=call,
    run_target=logits,
    oracle=o_convnext2,
    note="response normalisation [C] -> [1, 1, 1, C]; downsampling in its stage in both, the last norm inside the head",
)


# ---------------------------------------------------------------- 4 Swin: torchvision -> timm

SWIN_DEPTHS, SWIN_HEADS, WIN = (2, 2, 2), (2, 4, 4), 4


def tv_swin(seed):
    heads_ = list(SWIN_HEADS)
    m = torchvision.models.SwinTransformer(
        [2, 2], 16, list(SWIN_DEPTHS), heads_, [WIN, WIN], stochastic_depth_prob=0.0, num_classes=NC
    )
    return shake(m, seed)


def timm_swin(seed):
    from timm.models.swin_transformer import SwinTransformer

    m = SwinTransformer(
        img_size=IMG,
        patch_size=2,
        embed_dim=16,
        depths=SWIN_DEPTHS,
        num_heads=SWIN_HEADS,
        window_size=WIN,
        num_classes=NC,
        drop_path_rate=0.0,
        norm_layer=LN5,
    )
    return shake(m, seed)


def o_swin(s):
    out = {}
    for k, v in s.items():
        if k.endswith("relative_position_index"):
            continue
        k = re.sub(r"^features\.0\.0", "patch_embed.proj", k)
        k = re.sub(r"^features\.0\.2", "patch_embed.norm", k)
        k = re.sub(r"^head\.", "head.fc.", k)
        m = re.match(r"features\.(\d)\.(.*)", k)
        if m and int(m[1]) % 2:
            k = f"layers.{int(m[1]) // 2}.blocks.{m[2]}".replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")
        elif m:
            k = f"layers.{int(m[1]) // 2}.downsample.{m[2]}"
        out[k] = v
    return out


case(
    name="swin: torchvision -> timm",
    modality="vision",
    family="swin",
    source=lambda: tv_swin(107),
    target=lambda: timm_swin(108),
    inputs=images(),
    run_source=call,
    run_target=call,
    oracle=o_swin,
    note="features.N: odd ones are stages, even ones the mergings, which move into the stage that follows; integer "
    "index buffers in the source only",
)


# ---------------------------------------------------------------- 5 DINOv2 (SwiGLU): timm -> transformers

DINO_RULES = (
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^cls_token", "embeddings.cls_token"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"attn\.proj", "attention.o_proj"),
    (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
    (r"mlp\.fc2", "mlp.down_proj"),
)


def timm_dino_swiglu(seed):
    from timm.layers import SwiGLUPacked

    kw = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 128 / D}
    return timm_vit(seed, init_values=0.5, num_classes=0, **kw)


def hf_dino(seed, **kw):
    cfg = T.Dinov2Config(
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=H,
        mlp_ratio=M // D,
        image_size=IMG,
        patch_size=P,
        layer_norm_eps=1e-6,
        **kw,
    )
    return shake(T.Dinov2Model(cfg), seed)


def o_dino_swiglu(s):
    s, out = dict(s), {}
    for i in range(L):
        for w in WB:
            for n, t in zip("qkv", s.pop(f"blocks.{i}.attn.qkv.{w}").chunk(3), strict=True):
                out[f"encoder.layer.{i}.attention.{n}_proj.{w}"] = t
            for n, t in zip(("gate", "up"), s.pop(f"blocks.{i}.mlp.fc1.{w}").chunk(2), strict=True):
                out[f"encoder.layer.{i}.mlp.{n}_proj.{w}"] = t
    return {**out, **ren(s, *DINO_RULES)}


case(
    name="dinov2: timm (packed SwiGLU) -> transformers",
    modality="vision",
    family="dinov2",
    source=lambda: timm_dino_swiglu(109),
    target=lambda: hf_dino(110, use_swiglu_ffn=True),
    inputs=images(),
    run_source=lambda m, x: m.forward_features(x),
    run_target=hidden,
    oracle=o_dino_swiglu,
    note="fc1 splits into gate and up, qkv into three; layer scales; a mask token that eval does not use",
)


# ---------------------------------------------------------------- 6 BEiT: timm -> transformers


def timm_beit(seed):
    from timm.models.beit import Beit

    m = Beit(
        img_size=IMG,
        patch_size=P,
        embed_dim=D,
        depth=L,
        num_heads=H,
        mlp_ratio=M / D,
        num_classes=NC,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        init_values=0.5,
        norm_layer=LN6,
    )
    return shake(m, seed)


def hf_beit(seed):
    cfg = hf_cfg(T.BeitConfig, use_relative_position_bias=True, use_mean_pooling=True, layer_scale_init_value=0.5)
    return shake(T.BeitForImageClassification(cfg), seed)


def o_beit(s):
    s, out = dict(s), {}
    for i in range(L):
        a, b = f"blocks.{i}.attn.", f"beit.layers.{i}.attention."
        for n, t in zip("qkv", s.pop(f"{a}qkv.weight").chunk(3), strict=True):
            out[f"{b}{n}_proj.weight"] = t
        out[f"{b}q_proj.bias"], out[f"{b}v_proj.bias"] = s.pop(f"{a}q_bias"), s.pop(f"{a}v_bias")
    rest = ren(
        s,
        (r"^cls_token", "beit.embeddings.cls_token"),
        (r"^patch_embed\.proj", "beit.embeddings.patch_embeddings.projection"),
        (r"^blocks\.", "beit.layers."),
        (r"attn\.proj", "attention.o_proj"),
        (r"attn\.relative", "relative_position_bias.relative"),
        (r"gamma_", "lambda_"),
        (r"\.norm1", ".layernorm_before"),
        (r"\.norm2", ".layernorm_after"),
        (r"^fc_norm", "beit.pooler.layernorm"),
        (r"^head", "classifier"),
    )
    return {**out, **rest}


case(
    name="beit: timm -> transformers",
    modality="vision",
    family="beit",
    source=lambda: timm_beit(111),
    target=lambda: hf_beit(112),
    inputs=images(),
    run_source=call,
    run_target=logits,
    oracle=o_beit,
    note="a bias-free fused qkv with a query and a value bias beside it, and no key bias anywhere; a table of relative "
    "positions; mean pooling",
)


# ---------------------------------------------------------------- 7 MAE encoder: transformers -> timm


def hf_mae(seed):
    cfg = hf_cfg(
        T.ViTMAEConfig,
        mask_ratio=0.0,
        decoder_num_hidden_layers=2,
        decoder_hidden_size=D,
        decoder_num_attention_heads=H,
        decoder_intermediate_size=M,
    )
    return shake(T.ViTMAEForPreTraining(cfg), seed)


def run_mae(m, x):
    order = torch.linspace(0, 1, (IMG // P) ** 2, dtype=x.dtype)  # keeps all patches, in order
    return m.vit(x, noise=order.expand(len(x), -1)).last_hidden_state


def o_mae(s):
    s = {k.removeprefix("vit."): v for k, v in s.items() if k.startswith("vit.")}
    out = {}
    for i in range(L):
        for w in WB:
            out[f"blocks.{i}.attn.qkv.{w}"] = torch.cat([s.pop(f"layers.{i}.attention.{n}_proj.{w}") for n in "qkv"])
    rest = ren(
        s,
        (r"^embeddings\.cls_token", "cls_token"),
        (r"^embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^layers\.", "blocks."),
        (r"attention\.o_proj", "attn.proj"),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"^layernorm", "norm"),
    )
    return {**out, **rest}


case(
    name="vit-mae: transformers (pretraining model) -> timm trunk",
    modality="vision",
    family="vit",
    source=lambda: hf_mae(113),
    target=lambda: timm_vit(114, num_classes=0),
    inputs=images(),
    run_source=run_mae,
    run_target=lambda m, x: m.forward_features(x),
    oracle=o_mae,
    note="the decoder has layers of the same names and shapes as the encoder, and is not wanted",
)


# ---------------------------------------------------------------- 8 MobileNetV3: timm -> torchvision

V3 = ((16, 3, 16, 16, True, "RE", 2), (16, 3, 64, 24, False, "RE", 2), (24, 5, 96, 24, True, "HS", 1))  # torchvision's


def timm_v3(seed):
    from timm.models._efficientnet_blocks import SqueezeExcite
    from timm.models._efficientnet_builder import decode_arch_def, round_channels
    from timm.models.mobilenetv3 import MobileNetV3

    arch = [
        ["ds_r1_k3_s2_e1_c16_se0.25_nre"],
        ["ir_r1_k3_s2_e4_c24_nre", "ir_r1_k5_s1_e4_c24_se0.25"],
        ["cn_r1_k1_s1_c144"],
    ]
    m = MobileNetV3(
        decode_arch_def(arch),
        num_classes=NC,
        num_features=64,
        stem_size=16,
        act_layer=nn.Hardswish,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
        se_layer=partial(SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU, rd_round_fn=round_channels),
    )
    return wake(m, seed)


def tv_v3(seed):
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    return wake(MobileNetV3([InvertedResidualConfig(*c, 1, 1.0) for c in V3], 64, num_classes=NC, dropout=0.0), seed)


def o_v3(s):
    t = {"classifier.0.weight": s["conv_head.weight"].flatten(1), "classifier.0.bias": s["conv_head.bias"]}
    se = [("se.conv_reduce", "fc1"), ("se.conv_expand", "fc2")]
    copy(s, t, [("conv_stem", "features.0.0"), ("bn1", "features.0.1"), ("classifier", "classifier.3")], BN)
    copy(s, t, [("blocks.2.0.conv", "features.4.0"), ("blocks.2.0.bn1", "features.4.1")], BN)
    layers = [
        ("blocks.0.0.", ["conv_dw", "bn1", se, "conv_pw", "bn2"]),
        ("blocks.1.0.", ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]),
        ("blocks.1.1.", ["conv_pw", "bn1", "conv_dw", "bn2", se, "conv_pwl", "bn3"]),
    ]
    for i, (a, parts) in enumerate(layers):
        k = 0
        for p in parts:
            if p is se:
                copy(s, t, [(a + x, f"features.{i + 1}.block.{k}.{y}") for x, y in se], BN)
                k += 1
            else:
                copy(s, t, [(a + p, f"features.{i + 1}.block.{k}.{int(p.startswith('bn'))}")], BN)
                k += p.startswith("bn")
    return t


case(
    name="mobilenet-v3: timm -> torchvision",
    modality="vision",
    family="mobilenet",
    source=lambda: timm_v3(115),
    target=lambda: tv_v3(116),
    inputs=images(64),
    run_source=call,
    run_target=call,
    oracle=o_v3,
    note="the 1x1 conv after pooling becomes the first Linear of the classifier; blocks with and without "
    "squeeze-excite and expansion count differently",
)


# ---------------------------------------------------------------- 9 ViT: own (lucidrains style) -> timm


class Patchify(nn.Module):
    """b c (h p1) (w p2) -> b (h w) (p1 p2 c)"""

    def forward(self, x):
        x = x.unflatten(2, (-1, P)).unflatten(4, (-1, P))  # b c h p1 w p2
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class PreNorm(nn.Module):
    def __init__(self, dim, fn):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x):
        return self.fn(self.norm(x))


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.0))

    def forward(self, x):
        q, k, v = (heads(t) for t in self.to_qkv(x).chunk(3, -1))
        dots = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return self.to_out(unheads(dots.softmax(-1) @ v))


class FeedForward(nn.Module):
    def __init__(self, dim, hid):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hid), nn.GELU(), nn.Dropout(0.0), nn.Linear(hid, dim), nn.Dropout(0.0))

    def forward(self, x):
        return self.net(x)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.ModuleList([PreNorm(D, Attention(D)), PreNorm(D, FeedForward(D, M))]) for _ in range(L)]
        )

    def forward(self, x):
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return x


class LucidViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_patch_embedding = nn.Sequential(Patchify(), nn.Linear(3 * P * P, D))
        self.pos_embedding = nn.Parameter(torch.randn(1, (IMG // P) ** 2 + 1, D))
        self.cls_token = nn.Parameter(torch.randn(1, 1, D))
        self.transformer = Transformer()
        self.mlp_head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, NC))

    def forward(self, img):
        x = self.to_patch_embedding(img)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        return self.mlp_head(self.transformer(x)[:, 0])


def o_lucid(s):
    pixels = s["to_patch_embedding.1.weight"].unflatten(1, (P, P, 3))
    t = {"cls_token": s["cls_token"], "pos_embed": s["pos_embedding"]}
    t["patch_embed.proj.weight"] = pixels.permute(0, 3, 1, 2)
    t["patch_embed.proj.bias"] = s["to_patch_embedding.1.bias"]
    copy(s, t, [("mlp_head.0", "norm"), ("mlp_head.1", "head")])
    for i in range(L):
        a, b = f"transformer.layers.{i}.", f"blocks.{i}."
        pairs = [
            ("0.norm", "norm1"),
            ("0.fn.to_qkv", "attn.qkv"),
            ("0.fn.to_out.0", "attn.proj"),
            ("1.norm", "norm2"),
            ("1.fn.net.0", "mlp.fc1"),
            ("1.fn.net.3", "mlp.fc2"),
        ]
        copy(s, t, [(a + x, b + y) for x, y in pairs])
    return t


case(
    name="vit: own (vit-pytorch style, PreNorm, rearranged pixels) -> timm",
    modality="vision",
    family="vit",
    source=lambda: shake(LucidViT(), 117),
    target=lambda: timm_vit(118, qkv_bias=False, norm_layer=LN5),
    inputs=images(),
    run_source=call,
    run_target=call,
    oracle=o_lucid,
    note="patches are (p1 p2 c) columns, colour fastest, and become a convolution; no qkv bias; last norm in the head",
)


# ---------------------------------------------------------------- 10 ViT: own (big_vision layout) -> transformers


def param(*shape):
    return nn.Parameter(torch.randn(*shape) * 0.1)


def node(**kw):
    m = nn.Module()
    for k, v in kw.items():
        setattr(m, k, v)
    return m


class BigVisionViT(nn.Module):
    """A ViT read from a Flax checkpoint: its tree of names and its layouts ([d, heads, d_head] kernels, HWIO convs)."""

    def __init__(self):
        super().__init__()
        dh = D // H
        self.cls, self.pos_embedding = param(1, 1, D), param(1, (IMG // P) ** 2 + 1, D)
        self.embedding = node(kernel=param(P, P, 3, D), bias=param(D))
        self.Transformer = nn.Module()
        for i in range(L):
            proj = {n: node(bias=param(H, dh), kernel=param(D, H, dh)) for n in ("key", "query", "value")}
            b = node(
                LayerNorm_0=node(bias=param(D), scale=nn.Parameter(torch.ones(D))),
                LayerNorm_1=node(bias=param(D), scale=nn.Parameter(torch.ones(D))),
                MlpBlock_0=node(
                    Dense_0=node(bias=param(M), kernel=param(D, M)), Dense_1=node(bias=param(D), kernel=param(M, D))
                ),
                MultiHeadDotProductAttention_0=node(**proj, out=node(bias=param(D), kernel=param(H, dh, D))),
            )
            setattr(self.Transformer, f"encoderblock_{i}", b)
        self.Transformer.encoder_norm = node(bias=param(D), scale=nn.Parameter(torch.ones(D)))

    def forward(self, img):
        def norm(n, x):
            return F.layer_norm(x, (D,), n.scale, n.bias, 1e-6)

        x = F.conv2d(img, self.embedding.kernel.permute(3, 2, 0, 1), self.embedding.bias, stride=P)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        for i in range(L):
            b = getattr(self.Transformer, f"encoderblock_{i}")
            a, y = b.MultiHeadDotProductAttention_0, norm(b.LayerNorm_0, x)
            q, k, v = (torch.einsum("btd,dhe->bthe", y, n.kernel) + n.bias for n in (a.query, a.key, a.value))
            w = torch.einsum("bqhe,bkhe->bhqk", q / (D // H) ** 0.5, k).softmax(-1)
            x = x + torch.einsum("bqhe,hed->bqd", torch.einsum("bhqk,bkhe->bqhe", w, v), a.out.kernel) + a.out.bias
            y, m = norm(b.LayerNorm_1, x), b.MlpBlock_0
            x = x + F.gelu(y @ m.Dense_0.kernel + m.Dense_0.bias) @ m.Dense_1.kernel + m.Dense_1.bias
        return norm(self.Transformer.encoder_norm, x)


def o_big_vision(s):
    t = {
        "vit.embeddings.cls_token": s["cls"],
        "vit.embeddings.position_embeddings": s["pos_embedding"],
        "vit.embeddings.patch_embeddings.projection.weight": s["embedding.kernel"].permute(3, 2, 0, 1),
        "vit.embeddings.patch_embeddings.projection.bias": s["embedding.bias"],
        "vit.layernorm.weight": s["Transformer.encoder_norm.scale"],
        "vit.layernorm.bias": s["Transformer.encoder_norm.bias"],
    }
    for i in range(L):
        a, b = f"Transformer.encoderblock_{i}.", f"vit.layers.{i}."
        m = a + "MultiHeadDotProductAttention_0."
        for n in ("query", "key", "value"):
            t[f"{b}attention.{n[0]}_proj.weight"] = s[f"{m}{n}.kernel"].flatten(1).T
            t[f"{b}attention.{n[0]}_proj.bias"] = s[f"{m}{n}.bias"].flatten()
        t[f"{b}attention.o_proj.weight"] = s[f"{m}out.kernel"].flatten(0, 1).T
        t[f"{b}attention.o_proj.bias"] = s[f"{m}out.bias"]
        for j, n in enumerate(("before", "after")):
            t[f"{b}layernorm_{n}.weight"] = s[f"{a}LayerNorm_{j}.scale"]
            t[f"{b}layernorm_{n}.bias"] = s[f"{a}LayerNorm_{j}.bias"]
            t[f"{b}mlp.fc{j + 1}.weight"] = s[f"{a}MlpBlock_0.Dense_{j}.kernel"].T
            t[f"{b}mlp.fc{j + 1}.bias"] = s[f"{a}MlpBlock_0.Dense_{j}.bias"]
    return t


case(
    name="vit: own (Flax big_vision layout) -> transformers",
    modality="vision",
    family="vit",
    source=lambda: shake(BigVisionViT(), 119),
    target=lambda: shake(T.ViTForImageClassification(hf_cfg(T.ViTConfig)), 120),
    inputs=images(),
    run_source=call,
    run_target=lambda m, x: m.vit(x).last_hidden_state,
    oracle=o_big_vision,
    note="kernels [d, heads, d_head] and [heads, d_head, d], biases [heads, d_head], HWIO patches, key before query",
)


# ---------------------------------------------------------------- 11 DeiT: timm -> own nn.TransformerEncoder


class TorchDeiT(nn.Module):
    """Around nn.TransformerEncoder; the two extra tokens hold their positions already, as after training they can."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            D, H, M, 0.0, activation="gelu", batch_first=True, norm_first=True, layer_norm_eps=1e-6
        )
        self.heads = nn.ModuleDict({"teacher": nn.Linear(D, NC), "label": nn.Linear(D, NC)})
        self.prefix = nn.Parameter(torch.zeros(2, D))
        self.grid = nn.Parameter(torch.zeros(D, IMG // P, IMG // P))
        self.stem = nn.Conv2d(3, D, P, P)
        self.encoder = nn.TransformerEncoder(layer, L, norm=nn.LayerNorm(D, eps=1e-6), enable_nested_tensor=False)

    def forward(self, img):
        x = (self.stem(img) + self.grid).flatten(2).transpose(1, 2)
        x = self.encoder(torch.cat([self.prefix.expand(len(x), -1, -1), x], 1))
        return (self.heads["label"](x[:, 0]) + self.heads["teacher"](x[:, 1])) / 2


def timm_deit(seed):
    from timm.models.deit import VisionTransformerDistilled

    return timm_vit(seed, VisionTransformerDistilled)


def o_deit(s):
    pos = s["pos_embed"][0]
    t = {"prefix": torch.cat([s["cls_token"][0], s["dist_token"][0]]) + pos[:2]}
    t["grid"] = pos[2:].T.unflatten(1, (IMG // P, IMG // P))
    copy(s, t, [("patch_embed.proj", "stem"), ("norm", "encoder.norm")])
    copy(s, t, [("head", "heads.label"), ("head_dist", "heads.teacher")])
    for i in range(L):
        a, b = f"blocks.{i}.", f"encoder.layers.{i}."
        for w in WB:
            t[f"{b}self_attn.in_proj_{w}"] = s[f"{a}attn.qkv.{w}"]
        pairs = [("attn.proj", "self_attn.out_proj"), ("mlp.fc1", "linear1"), ("mlp.fc2", "linear2")]
        copy(s, t, [(a + x, b + y) for x, y in [*pairs, ("norm1", "norm1"), ("norm2", "norm2")]])
    return t


case(
    name="deit: timm (distilled) -> own around torch.nn.TransformerEncoder",
    modality="vision",
    family="deit",
    source=lambda: timm_deit(121),
    target=lambda: shake(TorchDeiT(), 122),
    inputs=images(),
    run_source=call,
    run_target=call,
    oracle=o_deit,
    note="class and distillation tokens are summed with their positions into one parameter; the other positions become "
    "a [d, h, w] grid; two heads, the teacher's first",
)


# ---------------------------------------------------------------- 12 MobileNetV2: transformers -> own (Keras layout)


class KConv(nn.Module):
    """Conv2D or DepthwiseConv2D without bias, padding 'same' as TensorFlow has it."""

    def __init__(self, i, o, k=1, stride=1, depthwise=False):
        super().__init__()
        self.k, self.stride, self.depthwise = k, stride, depthwise
        if depthwise:
            self.depthwise_kernel = param(k, k, i, 1)
        else:
            self.kernel = param(k, k, i, o)

    def forward(self, x):
        pad = []
        for n in (x.shape[3], x.shape[2]):
            p = max((-(-n // self.stride) - 1) * self.stride + self.k - n, 0)
            pad += [p // 2, p - p // 2]
        x = F.pad(x, pad)
        if self.depthwise:
            return F.conv2d(x, self.depthwise_kernel.permute(2, 3, 0, 1), stride=self.stride, groups=x.shape[1])
        return F.conv2d(x, self.kernel.permute(3, 2, 0, 1), stride=self.stride)


class KNorm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))
        self.register_buffer("moving_mean", torch.zeros(c))
        self.register_buffer("moving_variance", torch.ones(c))

    def forward(self, x):
        scale = self.gamma * torch.rsqrt(self.moving_variance + 1e-3)
        shift = self.beta - self.moving_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


MULT = 0.35


def hf_mobile2(seed):
    cfg = T.MobileNetV2Config(image_size=64, depth_multiplier=MULT, finegrained_output=False, tf_padding=True)
    return wake(T.MobileNetV2Model(cfg), seed)


class KerasMobileNetV2(nn.Module):
    """Layers by their Keras names, in one flat dictionary."""

    REPEATS = ((1, 16, 1), (2, 24, 2), (3, 32, 2), (4, 64, 2), (3, 96, 1), (3, 160, 2), (1, 320, 1))

    def __init__(self):
        super().__init__()

        def width(c):
            n = max(8, int(c * MULT + 4) // 8 * 8)
            return n + 8 if n < 0.9 * c * MULT else n

        self.blocks, layers, i = [], {}, width(32)
        layers["Conv1"], layers["bn_Conv1"] = KConv(3, i, 3, 2), KNorm(i)
        for n, c, s in self.REPEATS:
            for j in range(n):
                name = f"block_{len(self.blocks)}_" if self.blocks else "expanded_conv_"
                e, o, stride = 6 * i if self.blocks else i, width(c), s if j == 0 else 1
                if self.blocks:
                    layers[name + "expand"], layers[name + "expand_BN"] = KConv(i, e), KNorm(e)
                layers[name + "depthwise"] = KConv(e, e, 3, stride, depthwise=True)
                layers[name + "depthwise_BN"] = KNorm(e)
                layers[name + "project"], layers[name + "project_BN"] = KConv(e, o), KNorm(o)
                self.blocks.append((name, stride == 1 and i == o))
                i = o
        last = width(1280)
        layers["Conv_1"], layers["Conv_1_bn"] = KConv(i, last), KNorm(last)
        self.layers = nn.ModuleDict(layers)

    def forward(self, x):
        m = self.layers
        x = F.relu6(m["bn_Conv1"](m["Conv1"](x)))
        for name, skip in self.blocks:
            y = F.relu6(m[name + "expand_BN"](m[name + "expand"](x))) if name + "expand" in m else x
            y = F.relu6(m[name + "depthwise_BN"](m[name + "depthwise"](y)))
            y = m[name + "project_BN"](m[name + "project"](y))
            x = x + y if skip else y
        return F.relu6(m["Conv_1_bn"](m["Conv_1"](x)))


KERAS_BN = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def o_keras(s):
    names = [("conv_stem.first_conv", "Conv1", "bn_Conv1"), ("conv_1x1", "Conv_1", "Conv_1_bn")]
    names += [("conv_stem.conv_3x3", "expanded_conv_depthwise", "expanded_conv_depthwise_BN")]
    names += [("conv_stem.reduce_1x1", "expanded_conv_project", "expanded_conv_project_BN")]
    for i in range(16):
        for a, b in (("expand_1x1", "expand"), ("conv_3x3", "depthwise"), ("reduce_1x1", "project")):
            names.append((f"layer.{i}.{a}", f"block_{i + 1}_{b}", f"block_{i + 1}_{b}_BN"))
    t = {}
    for a, conv, norm in names:
        w = s[f"{a}.convolution.weight"]
        if "depthwise" in conv:
            t[f"layers.{conv}.depthwise_kernel"] = w.permute(2, 3, 0, 1)
        else:
            t[f"layers.{conv}.kernel"] = w.permute(2, 3, 1, 0)
        for x, y in KERAS_BN.items():
            t[f"layers.{norm}.{y}"] = s[f"{a}.normalization.{x}"]
    return t


case(
    name="mobilenet-v2: transformers -> own (Keras layout)",
    modality="vision",
    family="mobilenet",
    source=lambda: hf_mobile2(123),
    target=lambda: shake(KerasMobileNetV2(), 124),
    inputs=images(64),
    run_source=hidden,
    run_target=call,
    oracle=o_keras,
    note="HWIO and HWC1 kernels, gamma/beta/moving_*; the first block is inside the source's stem; block_10 sorts "
    "before block_2; many blocks of equal shapes",
)


# ---------------------------------------------------------------- 13 ResNet: transformers -> own, norms folded


class FoldedBlock(nn.Module):
    def __init__(self, i, o, s):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(i, o, 3, s, 1), nn.Conv2d(o, o, 3, 1, 1)
        self.proj = nn.Conv2d(i, o, 1, s) if s != 1 or i != o else None

    def forward(self, x):
        y = self.c2(F.relu(self.c1(x)))
        return F.relu(y + (x if self.proj is None else self.proj(x)))


class FoldedResNet(nn.Module):
    """For deployment: every batch norm has gone into the convolution before it."""

    def __init__(self, dims=(16, 24, 32), depths=(1, 2, 2)):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 7, 2, 3)
        self.stages, i = nn.ModuleList(), 16
        for k, (c, n) in enumerate(zip(dims, depths, strict=True)):
            self.stages.append(
                nn.Sequential(*[FoldedBlock(i if j == 0 else c, c, 2 if k and j == 0 else 1) for j in range(n)])
            )
            i = c
        self.fc = nn.Linear(i, NC)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        for st in self.stages:
            x = st(x)
        return self.fc(x.mean((2, 3)))


def hf_basic(seed):
    cfg = T.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32], depths=[1, 2, 2], layer_type="basic", num_labels=NC
    )
    return wake(T.ResNetForImageClassification(cfg), seed)


def fold(s, a, b, out, eps=1e-5):
    n = a + ".normalization."
    scale = s[n + "weight"].double() / (s[n + "running_var"].double() + eps).sqrt()
    out[b + ".weight"] = (s[a + ".convolution.weight"].double() * scale[:, None, None, None]).float()
    out[b + ".bias"] = (s[n + "bias"].double() - s[n + "running_mean"].double() * scale).float()


def o_folded(s):
    t = {"fc.weight": s["classifier.1.weight"], "fc.bias": s["classifier.1.bias"]}
    fold(s, "resnet.embedder.embedder", "stem", t)
    for i, n in enumerate((1, 2, 2)):
        for j in range(n):
            a, b = f"resnet.encoder.stages.{i}.layers.{j}.", f"stages.{i}.{j}."
            fold(s, a + "layer.0", b + "c1", t)
            fold(s, a + "layer.1", b + "c2", t)
            if a + "shortcut.convolution.weight" in s:
                fold(s, a + "shortcut", b + "proj", t)
    return t


case(
    name="resnet: transformers -> own for deployment (norms folded into convolutions)",
    modality="vision",
    family="resnet",
    source=lambda: hf_basic(125),
    target=lambda: shake(FoldedResNet(), 126),
    inputs=images(64),
    run_source=logits,
    run_target=call,
    oracle=o_folded,
    note="every conv weight and bias is computed from a conv and the four tensors of its norm; shortcut last",
)


# ---------------------------------------------------------------- 14 ConvNeXt: torchvision -> own U-Net encoder


class ChannelNorm(nn.Module):
    """Layer norm over the channels of an image."""

    def __init__(self, c):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(1, c, 1, 1)), nn.Parameter(torch.zeros(1, c, 1, 1))

    def forward(self, x):
        mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-6) * self.g + self.b


class NextBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.dw = nn.Conv2d(c, c, 7, padding=3, groups=c)
        self.norm = ChannelNorm(c)
        self.expand, self.squeeze = nn.Conv2d(c, 4 * c, 1), nn.Conv2d(4 * c, c, 1)
        self.scale = nn.Parameter(torch.ones(1, c, 1, 1))

    def forward(self, x):
        return x + self.scale * self.squeeze(F.gelu(self.expand(self.norm(self.dw(x)))))


class UNeXt(nn.Module):
    """A U-Net whose encoder is a ConvNeXt of convolutions only."""

    def __init__(self):
        super().__init__()
        d = DIMS
        self.up = nn.ModuleList([nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(d)])
        self.mask = nn.Conv2d(d[0], 2, 1)
        self.down = nn.ModuleList([nn.Sequential(nn.Conv2d(3, d[0], 4, 4), ChannelNorm(d[0]))])
        self.down += [nn.Sequential(ChannelNorm(a), nn.Conv2d(a, b, 2, 2)) for a, b in pairwise(d)]
        self.levels = nn.ModuleList(
            [nn.Sequential(*[NextBlock(c) for _ in range(n)]) for c, n in zip(d, DEPTHS, strict=True)]
        )

    def encode(self, x):
        maps = []
        for down, level in zip(self.down, self.levels, strict=True):
            x = level(down(x))
            maps.append(x)
        return maps

    def forward(self, x):
        *skips, x = self.encode(x)
        for up, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = up(x) + skip
        return self.mask(x)


def tv_convnext(seed):
    from torchvision.models.convnext import CNBlockConfig

    nxt = [*DIMS[1:], None]
    blocks = [CNBlockConfig(*c) for c in zip(DIMS, nxt, DEPTHS, strict=True)]
    return shake(torchvision.models.ConvNeXt(blocks, num_classes=NC, layer_scale=0.5), seed)


def tv_maps(m, x):
    maps = []
    for i, f in enumerate(m.features):
        x = f(x)
        maps += [x] if i % 2 else []
    return flat(maps)


def o_unext(s):
    t = {}

    def norm(a, b):
        t[b + ".g"], t[b + ".b"] = s[a + ".weight"][None, :, None, None], s[a + ".bias"][None, :, None, None]

    copy(s, t, [("features.0.0", "down.0.0")])
    norm("features.0.1", "down.0.1")
    for i, n in enumerate(DEPTHS):
        if i:
            norm(f"features.{2 * i}.0", f"down.{i}.0")
            copy(s, t, [(f"features.{2 * i}.1", f"down.{i}.1")])
        for j in range(n):
            a, b = f"features.{2 * i + 1}.{j}.", f"levels.{i}.{j}."
            copy(s, t, [(a + "block.0", b + "dw")])
            norm(a + "block.2", b + "norm")
            for x, y in (("block.3", "expand"), ("block.5", "squeeze")):
                t[f"{b}{y}.weight"], t[f"{b}{y}.bias"] = s[f"{a}{x}.weight"][:, :, None, None], s[f"{a}{x}.bias"]
            t[b + "scale"] = s[a + "layer_scale"][None]
    return t


case(
    name="convnext: torchvision -> own U-Net encoder of 1x1 convolutions (four feature maps)",
    modality="vision",
    family="convnext",
    source=lambda: tv_convnext(127),
    target=lambda: shake(UNeXt(), 128),
    inputs=images(64),
    run_source=tv_maps,
    run_target=lambda m, x: flat(m.encode(x)),
    oracle=o_unext,
    note="Linear becomes a 1x1 conv, norms [C] -> [1, C, 1, 1] named g and b; decoder fresh and first",
)


# ---------------------------------------------------------------- 15 Swin: timm -> own


class WindowAttention(nn.Module):
    def __init__(self, c, h):
        super().__init__()
        self.h = h
        self.to_q, self.to_kv, self.to_out = nn.Linear(c, c), nn.Linear(c, 2 * c), nn.Linear(c, c)
        self.bias = nn.Parameter(torch.zeros(h, 2 * WIN - 1, 2 * WIN - 1))

    def forward(self, x, mask):
        at = torch.stack(torch.meshgrid(torch.arange(WIN), torch.arange(WIN), indexing="ij"), -1).reshape(-1, 2)
        rel = at[:, None] - at[None] + WIN - 1
        q, k, v = (heads(t, self.h) for t in (self.to_q(x), *self.to_kv(x).chunk(2, -1)))
        dots = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + self.bias[:, rel[..., 0], rel[..., 1]]
        if mask is not None:
            dots = dots.masked_fill(mask[:, None], float("-inf"))
        return self.to_out(unheads(dots.softmax(-1) @ v))


def windows(x):
    """[b, h, w, c] -> [b, number of windows, tokens, c]"""
    return x.unflatten(1, (-1, WIN)).unflatten(3, (-1, WIN)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def unwindows(x, h):
    return x.unflatten(1, (h // WIN, -1)).unflatten(3, (WIN, WIN)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


class SwinLayer(nn.Module):
    def __init__(self, c, h, side, shifted):
        super().__init__()
        self.shift = WIN // 2 if shifted and side > WIN else 0
        self.attn_norm, self.attn = nn.LayerNorm(c), WindowAttention(c, h)
        self.ff_norm, self.ff = nn.LayerNorm(c), nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))

    def forward(self, x):
        y, s, side, mask = self.attn_norm(x), self.shift, x.shape[1], None
        if s:
            y = y.roll((-s, -s), (1, 2))
            part = (torch.arange(side) >= side - WIN).long() + (torch.arange(side) >= side - s).long()
            ids = windows((3 * part[:, None] + part[None])[None, :, :, None])[0, :, :, 0]
            mask = ids[:, :, None] != ids[:, None]
        y = unwindows(self.attn(windows(y), mask), side)
        x = x + (y.roll((s, s), (1, 2)) if s else y)
        return x + self.ff(self.ff_norm(x))


class Merge(nn.Module):
    """Patch merging by pixel_unshuffle."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.lin = nn.LayerNorm(4 * c), nn.Linear(4 * c, 2 * c, bias=False)

    def forward(self, x):
        return self.lin(self.norm(F.pixel_unshuffle(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)))


class OwnSwin(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.proj_norm = nn.Conv2d(3, 16, 2, 2), nn.LayerNorm(16)
        net, c, side = [], 16, IMG // 2
        for i, (n, h) in enumerate(zip(SWIN_DEPTHS, SWIN_HEADS, strict=True)):
            if i:
                net.append(Merge(c))
                c, side = 2 * c, side // 2
            net += [SwinLayer(c, h, side, bool(j % 2)) for j in range(n)]
        self.net = nn.ModuleList(net)
        self.norm, self.fc = nn.LayerNorm(c), nn.Linear(c, NC)

    def forward(self, img):
        x = self.proj_norm(self.proj(img).permute(0, 2, 3, 1))
        for layer in self.net:
            x = layer(x)
        return self.fc(self.norm(x).mean((1, 2)))


def o_own_swin(s):
    t, k = {}, 0
    copy(s, t, [("patch_embed.proj", "proj"), ("patch_embed.norm", "proj_norm"), ("norm", "norm"), ("head.fc", "fc")])
    for i, n in enumerate(SWIN_DEPTHS):
        if i:
            for x in ("norm.weight", "norm.bias", "reduction.weight"):
                v = s[f"layers.{i}.downsample.{x}"].unflatten(-1, (2, 2, -1))  # column, row, channel
                t[f"net.{k}.{x.replace('reduction', 'lin')}"] = v.movedim((-1, -2, -3), (-3, -2, -1)).flatten(-3)
            k += 1
        for j in range(n):
            a, b = f"layers.{i}.blocks.{j}.", f"net.{k}."
            for w in WB:
                v = s[f"{a}attn.qkv.{w}"]
                t[f"{b}attn.to_q.{w}"], t[f"{b}attn.to_kv.{w}"] = v[: len(v) // 3], v[len(v) // 3 :]
            t[b + "attn.bias"] = s[a + "attn.relative_position_bias_table"].T.unflatten(1, (2 * WIN - 1, 2 * WIN - 1))
            pairs = [("attn.proj", "attn.to_out"), ("norm1", "attn_norm"), ("norm2", "ff_norm")]
            copy(s, t, [(a + x, b + y) for x, y in [*pairs, ("mlp.fc1", "ff.0"), ("mlp.fc2", "ff.2")]])
            k += 1
    return t


case(
    name="swin: timm -> own (flat list, q and kv, bias grid, merging by pixel_unshuffle)",
    modality="vision",
    family="swin",
    source=lambda: timm_swin(129),
    target=lambda: shake(OwnSwin(), 130),
    inputs=images(),
    run_source=call,
    run_target=call,
    oracle=o_own_swin,
    note="the relative table becomes a grid a head; the columns of the merging, and its norm, are in another order; "
    "blocks and mergings share one list",
)


# ---------------------------------------------------------------- 16 DINOv2: transformers -> own, layer scale folded


class FoldedDino(nn.Module):
    """A feature extractor for deployment: layer scales are multiplied into the linear layers before them."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, D, P, P)
        self.cls, self.pos = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros((IMG // P) ** 2 + 1, D))
        self.blocks = nn.ModuleList()
        for _ in range(L):
            b = node(ln1=nn.LayerNorm(D, eps=1e-6), qkv=nn.Linear(D, 3 * D), out=nn.Linear(D, D))
            b.ln2, b.up, b.down = nn.LayerNorm(D, eps=1e-6), nn.Linear(D, M), nn.Linear(M, D)
            self.blocks.append(b)
        self.ln = nn.LayerNorm(D, eps=1e-6)

    def forward(self, img):
        x = self.patch(img).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.pos
        for b in self.blocks:
            q, k, v = (heads(t) for t in b.qkv(b.ln1(x)).chunk(3, -1))
            x = x + b.out(unheads(F.scaled_dot_product_attention(q, k, v)))
            x = x + b.down(F.gelu(b.up(b.ln2(x))))
        return self.ln(x)


def o_folded_dino(s):
    t = {"cls": s["embeddings.cls_token"][0, 0], "pos": s["embeddings.position_embeddings"][0]}
    copy(s, t, [("embeddings.patch_embeddings.projection", "patch"), ("layernorm", "ln")])
    for i in range(L):
        a, b = f"encoder.layer.{i}.", f"blocks.{i}."
        copy(s, t, [(a + "norm1", b + "ln1"), (a + "norm2", b + "ln2"), (a + "mlp.fc1", b + "up")])
        for w in WB:
            t[f"{b}qkv.{w}"] = torch.cat([s[f"{a}attention.{n}_proj.{w}"] for n in "qkv"])
            for j, (x, y) in enumerate((("attention.o_proj", "out"), ("mlp.fc2", "down"))):
                g = s[f"{a}layer_scale{j + 1}.lambda1"]
                t[f"{b}{y}.{w}"] = s[f"{a}{x}.{w}"] * (g[:, None] if w == "weight" else g)
    return t


case(
    name="dinov2: transformers -> own for deployment (layer scale folded)",
    modality="vision",
    family="dinov2",
    source=lambda: hf_dino(131, layerscale_value=0.5),
    target=lambda: shake(FoldedDino(), 132),
    inputs=images(),
    run_source=hidden,
    run_target=call,
    oracle=o_folded_dino,
    note="out and down are products of a Linear and a layer scale; class token [d], positions [n, d]",
)
