"""Further cases: vision, in the styles of those who port weights (research code, deployment code, other libraries)."""

from __future__ import annotations

import math
import re
from functools import partial

import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers as T
from torch import nn

from tests.further_cases.vision import (
    BN,
    IMG,
    LN6,
    NC,
    WB,
    D,
    H,
    L,
    M,
    P,
    call,
    copy,
    flat,
    heads,
    hf_cfg,
    hidden,
    images,
    logits,
    timm_vit,
    unheads,
    wake,
)
from tests.graft_matrix.core import case, shake

G = IMG // P  # patches a side


def style(number, name, **kw):
    case(name=f"styles vision {number:02d}, {name}", modality="vision", **kw)


def zeros(*shape):
    return nn.Parameter(torch.zeros(shape))


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def silu(x):
    return x * torch.sigmoid(x)


# ---------------------------------------------------------------- 1 Swin V2: torchvision -> timm


def tv_swin2(seed):
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    kw = {"num_classes": NC, "stochastic_depth_prob": 0.0, "norm_layer": nn.LayerNorm}
    kw |= {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    m = shake(torchvision.models.SwinTransformer([2, 2], 16, [2, 1], [2, 4], [4, 4], **kw), seed)
    with torch.no_grad():
        for n, p in m.named_parameters():
            if n.endswith("logit_scale"):
                p.add_(1.5)
    return m


def timm_swin2(seed):
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    kw = {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "window_size": 4, "num_classes": NC}
    return shake(SwinTransformerV2(img_size=IMG, patch_size=2, drop_path_rate=0.0, **kw), seed)


def o_swin2(s):
    out = {}
    for k, v in s.items():
        if k.endswith(("relative_position_index", "relative_coords_table")):
            continue
        k = k.replace("features.0.0", "patch_embed.proj").replace("features.0.2", "patch_embed.norm")
        k = re.sub(r"^head\.", "head.fc.", k)
        k = re.sub(r"^features\.(1|3)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.", k)
        k = k.replace("features.2.", "layers.1.downsample.").replace("mlp.3", "mlp.fc2")
        k = re.sub(r"(?<!cpb_)mlp\.0", "mlp.fc1", k)
        if k.endswith("qkv.bias"):
            out[k.replace("qkv.bias", "q_bias")], _, out[k.replace("qkv.bias", "v_bias")] = v.chunk(3)
        else:
            out[k] = v
    return out


style(
    1,
    "swin-v2: torchvision -> timm",
    family="swin",
    source=lambda: tv_swin2(1),
    target=lambda: timm_swin2(2),
    inputs=images(),
    run_source=call,
    run_target=call,
    oracle=o_swin2,
    note="a fused bias whose key third is ignored becomes a query and a value bias; mergings move a stage on",
)


# ---------------------------------------------------------------- 2 EfficientNetV2: timm -> torchvision

BN3 = partial(nn.BatchNorm2d, eps=1e-3)


def timm_effnet(arch, stem, last, seed, size=64):
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    kw = {"num_classes": NC, "num_features": last, "stem_size": stem, "act_layer": nn.SiLU, "norm_layer": BN3}
    return wake(EfficientNet(decode_arch_def([[a] for a in arch]), **kw, round_chs_fn=lambda c: c), seed, size)


def tv_effnet2(seed):
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    rows = [
        FusedMBConvConfig(1, 3, 1, 8, 8, 2),
        FusedMBConvConfig(4, 3, 2, 8, 16, 2),
        MBConvConfig(4, 3, 2, 16, 24, 2),
        MBConvConfig(6, 3, 1, 24, 32, 1),
    ]
    return wake(EfficientNet(rows, 0.0, 0.0, norm_layer=BN3, last_channel=48, num_classes=NC), seed)


def o_effnet2(s):
    fused = {"conv": "0.0", "conv_exp": "0.0", "conv_pwl": "1.0"}
    fused |= {"bn1": "0.1", "bn2": "1.1"}
    mb = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "3.0", "bn3": "3.1"}
    mb |= {"se.conv_reduce": "2.fc1", "se.conv_expand": "2.fc2"}
    top = {"conv_stem": "features.0.0", "bn1": "features.0.1", "conv_head": "features.5.0", "bn2": "features.5.1"}
    top["classifier"] = "classifier.1"
    out = {}
    for k, v in s.items():
        k, end = k.rsplit(".", 1)
        if m := re.match(r"blocks\.(\d)\.(\d)\.(.*)", k):
            names = fused if int(m[1]) < 2 else mb
            k = f"features.{int(m[1]) + 1}.{m[2]}.block.{names[m[3]]}"
        else:
            k = top[k]
        out[f"{k}.{end}"] = v
    return out


style(
    2,
    "efficientnet-v2: timm -> torchvision",
    family="efficientnet",
    source=lambda: timm_effnet(
        ["cn_r2_k3_s1_e1_c8_skip", "er_r2_k3_s2_e4_c16", "ir_r2_k3_s2_e4_c24_se0.25", "ir_r1_k3_s1_e6_c32_se0.25"],
        *(8, 48, 3),
    ),
    target=lambda: tv_effnet2(4),
    inputs=images(64),
    run_source=call,
    run_target=call,
    oracle=o_effnet2,
    note="three kinds of block, named by role in one and numbered in the other",
)


# ---------------------------------------------------------------- 3 MobileNetV2: timm -> transformers


def hf_mobile2(seed):
    cfg = T.MobileNetV2Config(depth_multiplier=0.35, num_labels=NC, tf_padding=False, layer_norm_eps=1e-5)
    return wake(T.MobileNetV2ForImageClassification(cfg), seed)


def o_mobile2(s):
    b = "mobilenet_v2."
    out, n = {}, 0
    copy(s, out, [("conv_stem", b + "conv_stem.first_conv.convolution"), ("classifier", "classifier")])
    copy(s, out, [("conv_head", b + "conv_1x1.convolution")])
    copy(s, out, [("bn1", b + "conv_stem.first_conv.normalization"), ("bn2", b + "conv_1x1.normalization")], BN)
    for k in sorted({m[0] for m in (re.match(r"blocks\.\d\.\d", k) for k in s) if m}):
        if k == "blocks.0.0":
            to, names = b + "conv_stem.", {"conv_dw": "conv_3x3", "conv_pw": "reduce_1x1"}
        else:
            to, names = f"{b}layer.{n}.", {"conv_pw": "expand_1x1", "conv_dw": "conv_3x3", "conv_pwl": "reduce_1x1"}
            n += 1
        for i, (x, y) in enumerate(names.items()):
            copy(s, out, [(f"{k}.{x}", f"{to}{y}.convolution")])
            copy(s, out, [(f"{k}.bn{i + 1}", f"{to}{y}.normalization")], BN)
    return out


style(
    3,
    "mobilenet-v2: timm -> transformers",
    family="mobilenet",
    source=lambda: wake(timm.create_model("mobilenetv2_035", num_classes=NC), 5),
    target=lambda: hf_mobile2(6),
    inputs=images(64),
    run_source=call,
    run_target=logits,
    oracle=o_mobile2,
    note="the first block hides in the stem; blocks by stage become one flat list; bn1 to bn3 take different roles",
)


# ---------------------------------------------------------------- 4 ResNet: torchvision -> functional, ParameterDict


class FunctionalResNet(nn.Module):
    """wide-resnet style: no layers at all, only parameters and statistics by name, and functions."""

    def __init__(self):
        super().__init__()
        self.params, self.stats = nn.ParameterDict(), nn.Module()
        self.blocks = [("g0_b0", 64, 64, 1), ("g0_b1", 64, 64, 1), ("g1_b0", 64, 128, 2), ("g1_b1", 128, 128, 1)]
        self.conv("stem", 3, 64, 7)
        for n, i, o, stride in self.blocks:
            self.conv(n + "_conv0", i, o, 3)
            self.conv(n + "_conv1", o, o, 3)
            if stride > 1:
                self.conv(n + "_convdim", i, o, 1)

    def conv(self, n, i, o, k):
        self.params[n] = zeros(o, i, k, k)
        self.params[n + "_gamma"], self.params[n + "_beta"] = zeros(o), zeros(o)
        self.stats.register_buffer(n + "_running_mean", torch.zeros(o))
        self.stats.register_buffer(n + "_running_var", torch.ones(o))

    def apply_conv(self, n, x, stride=1):
        p, w = self.params, self.params[n]
        x = F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)
        mean, var = getattr(self.stats, n + "_running_mean"), getattr(self.stats, n + "_running_var")
        return F.batch_norm(x, mean, var, p[n + "_gamma"], p[n + "_beta"])

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.apply_conv("stem", x, 2)), 3, 2, 1)
        for n, _, _, stride in self.blocks:
            y = self.apply_conv(n + "_conv1", F.relu(self.apply_conv(n + "_conv0", x, stride)))
            x = F.relu(y + (self.apply_conv(n + "_convdim", x, stride) if stride > 1 else x))
        return x


def o_functional(s):
    out = {}
    names = {"conv1": "stem", "bn1": "stem"}
    for g in range(2):
        for b in range(2):
            a, t = f"layer{g + 1}.{b}.", f"g{g}_b{b}_"
            names |= {a + f"{n}{i + 1}": f"{t}conv{i}" for n in ("conv", "bn") for i in range(2)}
            names |= {a + f"downsample.{i}": t + "convdim" for i in range(2)}
    for k, v in s.items():
        k, end = k.rsplit(".", 1)
        if k in names and v.ndim == 4:
            out["params." + names[k]] = v
        elif k in names and end in WB:
            out[f"params.{names[k]}_{'gamma' if end == 'weight' else 'beta'}"] = v
        elif k in names and v.ndim:
            out[f"stats.{names[k]}_{end}"] = v
    return out


def tv_resnet_two_stages(m, x):
    return m.layer2(m.layer1(m.maxpool(m.relu(m.bn1(m.conv1(x))))))


def tv_resnet(seed):
    from torchvision.models.resnet import BasicBlock, ResNet

    return wake(ResNet(BasicBlock, [2, 2, 1, 1], num_classes=NC), seed)


style(
    4,
    "resnet: torchvision (two of four stages) -> own (F.conv2d and F.batch_norm on a ParameterDict)",
    family="resnet",
    source=lambda: tv_resnet(7),
    target=lambda: wake(shake(FunctionalResNet(), 8), 8),
    inputs=images(64),
    run_source=tv_resnet_two_stages,
    run_target=call,
    oracle=o_functional,
    note="parameters and running statistics in different containers; half of the source stays unused",
)


# ---------------------------------------------------------------- 5 ResNet: SimCLR body -> transformers

WIDTHS, DEPTHS = (16, 24, 32, 40), (1, 2, 1, 1)


class Basic(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()),
            nn.Sequential(nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)),
        )
        self.idpath = nn.Sequential()
        if i != o:
            self.idpath = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        return F.relu(self.convs(x) + self.idpath(x))


class SimCLR(nn.Module):
    """A fastai-like Sequential body under a projection head, as a LightningModule holds them."""

    def __init__(self):
        super().__init__()
        stem = [nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        stages, i = [], 16
        for n, (o, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
            stages.append(
                nn.Sequential(*[Basic(i if b == 0 else o, o, 2 if n and b == 0 else 1) for b in range(depth)])
            )
            i = o
        self.backbone = nn.Sequential(*stem, *stages)
        self.projector = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 16))

    def forward(self, x):
        return self.projector(self.backbone(x).mean((2, 3)))


def o_simclr(s):
    out = {}
    copy(s, out, [("backbone.0", "embedder.embedder.convolution")])
    copy(s, out, [("backbone.1", "embedder.embedder.normalization")], BN)
    for n, depth in enumerate(DEPTHS):
        for b in range(depth):
            f, t = f"backbone.{4 + n}.{b}.", f"encoder.stages.{n}.layers.{b}."
            for x, y in (("convs.0", "layer.0"), ("convs.1", "layer.1"), ("idpath", "shortcut")):
                copy(s, out, [(f"{f}{x}.0", f"{t}{y}.convolution")])
                copy(s, out, [(f"{f}{x}.1", f"{t}{y}.normalization")], BN)
    return out


def hf_resnet(seed):
    kw = {"embedding_size": 16, "hidden_sizes": list(WIDTHS), "depths": list(DEPTHS), "layer_type": "basic"}
    return wake(T.ResNetModel(T.ResNetConfig(**kw)), seed)


style(
    5,
    "resnet: own SimCLR module (Sequential body, projector) -> transformers ResNetModel",
    family="resnet",
    source=lambda: wake(SimCLR(), 9),
    target=lambda: hf_resnet(10),
    inputs=images(64),
    run_source=lambda m, x: m.backbone(x).mean((2, 3)),
    run_target=lambda m, x: m(x).pooler_output.flatten(1),
    oracle=o_simclr,
    note="only numbers in the source; convolutions and norms told apart by shape; a projector to leave behind",
)


# ---------------------------------------------------------------- 6 ConvNeXt: own -> timm


class LayerNorm2d(nn.Module):
    """The research repository's channels-first norm."""

    def __init__(self, d):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(1, d, 1, 1)), zeros(1, d, 1, 1)

    def forward(self, x):
        mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - mean) * (var + 1e-6).rsqrt() * self.g + self.b


class NeXtBlock(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.scale = nn.Conv2d(d, d, 1, groups=d, bias=False)  # a layer scale
        self.mix, self.norm = nn.Conv2d(d, d, 7, padding=3, groups=d), LayerNorm2d(d)
        self.mlp = nn.Sequential(nn.Conv2d(d, 4 * d, 1), nn.GELU(), nn.Conv2d(4 * d, d, 1))

    def forward(self, x):
        return x + self.scale(self.mlp(self.norm(self.mix(x))))


class Segmenter(nn.Module):
    """A pyramid's encoder with a 1x1 lateral convolution a level."""

    def __init__(self, dims=(8, 16, 24, 32), depths=(1, 2, 1, 1)):
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(d, 8, 1) for d in dims])
        self.downs, self.levels = nn.ModuleList(), nn.ModuleList()
        for i, (d, n) in enumerate(zip(dims, depths, strict=True)):
            if i:
                self.downs.append(nn.Sequential(LayerNorm2d(dims[i - 1]), nn.Conv2d(dims[i - 1], d, 2, 2)))
            else:
                self.downs.append(nn.Sequential(nn.Conv2d(3, d, 4, 4), LayerNorm2d(d)))
            self.levels.append(nn.Sequential(*[NeXtBlock(d) for _ in range(n)]))

    def encode(self, x):
        maps = []
        for down, level in zip(self.downs, self.levels, strict=True):
            x = level(down(x))
            maps.append(x)
        return maps

    def forward(self, x):
        return [f(y) for f, y in zip(self.lateral, self.encode(x), strict=True)]


def timm_next(seed):
    kw = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32), "features_only": True}
    return shake(timm.create_model("convnext_atto", conv_mlp=False, use_grn=False, ls_init_value=1.0, **kw), seed)


def o_next(s):
    out = {}

    def norm(a, b):
        out[b + ".weight"], out[b + ".bias"] = s[a + ".g"].flatten(), s[a + ".b"].flatten()

    copy(s, out, [("downs.0.0", "stem_0")])
    norm("downs.0.1", "stem_1")
    for i, n in enumerate((1, 2, 1, 1)):
        if i:
            norm(f"downs.{i}.0", f"stages_{i}.downsample.0")
            copy(s, out, [(f"downs.{i}.1", f"stages_{i}.downsample.1")])
        for j in range(n):
            a, b = f"levels.{i}.{j}.", f"stages_{i}.blocks.{j}."
            out[b + "gamma"] = s[a + "scale.weight"].flatten()
            copy(s, out, [(a + "mix", b + "conv_dw")])
            norm(a + "norm", b + "norm")
            for x, y in (("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2")):
                out[f"{b}{y}.weight"], out[f"{b}{y}.bias"] = s[f"{a}{x}.weight"][..., 0, 0], s[f"{a}{x}.bias"]
    return out


style(
    6,
    "convnext: own pyramid encoder (var/mean norms, layer scale as a depthwise conv) -> timm features_only",
    family="convnext",
    source=lambda: shake(Segmenter(), 11),
    target=lambda: timm_next(12),
    inputs=images(64),
    run_source=lambda m, x: flat(m.encode(x)),
    run_target=lambda m, x: flat(m(x)),
    oracle=o_next,
    note="[1, C, 1, 1] norms and [C, 1, 1, 1] scales become vectors; 1x1 convolutions become Linear",
)


# ---------------------------------------------------------------- 7 DeiT III: timm -> own (packed, einsum)


class PackedViT(nn.Module):
    """Every layer's parameter in one [depth, ...] tensor (a scan's layout); patches by reshape and einsum."""

    def __init__(self):
        super().__init__()
        self.patch_kernel, self.patch_bias = zeros(P, P, 3, D), zeros(D)
        self.cls, self.grid = zeros(D), zeros(G, G, D)
        self.ln_scale, self.ln_shift = zeros(L, 2, D), zeros(L, 2, D)
        self.wqkv, self.bqkv = zeros(L, 3, D, H, D // H), zeros(L, 3, H, D // H)
        self.wo, self.bo = zeros(L, H, D // H, D), zeros(L, D)
        self.w_up, self.b_up, self.w_down, self.b_down = zeros(L, D, M), zeros(L, M), zeros(L, M, D), zeros(L, D)
        self.layer_scale = zeros(L, 2, D)
        self.out_norm, self.out = LN6(D), nn.Linear(D, NC)

    def norm(self, x, i, j):
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.ln_scale[i, j] + self.ln_shift[i, j]

    def forward(self, x):
        x = x.unflatten(3, (G, P)).unflatten(2, (G, P))
        x = torch.einsum("bcypxq,pqcd->byxd", x, self.patch_kernel) + self.patch_bias + self.grid
        x = torch.cat([self.cls.expand(len(x), 1, D), x.flatten(1, 2)], 1)
        for i in range(L):
            y = self.norm(x, i, 0)
            q, k, v = torch.einsum("bnd,sdhe->sbhne", y, self.wqkv[i]) + self.bqkv[i][:, None, :, None]
            a = torch.einsum("bhne,bhme->bhnm", q, k) * (D // H) ** -0.5
            a = (a - a.amax(-1, keepdim=True)).exp()
            y = torch.einsum("bhnm,bhme->bnhe", a / a.sum(-1, keepdim=True), v)
            x = x + self.layer_scale[i, 0] * (torch.einsum("bnhe,hed->bnd", y, self.wo[i]) + self.bo[i])
            y = gelu(self.norm(x, i, 1) @ self.w_up[i] + self.b_up[i]) @ self.w_down[i] + self.b_down[i]
            x = x + self.layer_scale[i, 1] * y
        return self.out(self.out_norm(x)[:, 0])


def o_deit3(s):
    def stack(n):
        return torch.stack([s[f"blocks.{i}.{n}"] for i in range(L)])

    def pair(a, b):
        return torch.stack([stack(a), stack(b)], 1)

    out = {"patch_kernel": s["patch_embed.proj.weight"].permute(2, 3, 1, 0), "patch_bias": s["patch_embed.proj.bias"]}
    out |= {"cls": s["cls_token"].flatten(), "grid": s["pos_embed"].reshape(G, G, D)}
    out |= {"ln_scale": pair("norm1.weight", "norm2.weight"), "ln_shift": pair("norm1.bias", "norm2.bias")}
    out["wqkv"] = stack("attn.qkv.weight").reshape(L, 3, H, D // H, D).permute(0, 1, 4, 2, 3)
    out["bqkv"] = stack("attn.qkv.bias").reshape(L, 3, H, D // H)
    out |= {"wo": stack("attn.proj.weight").mT.reshape(L, H, D // H, D), "bo": stack("attn.proj.bias")}
    out |= {"w_up": stack("mlp.fc1.weight").mT, "b_up": stack("mlp.fc1.bias")}
    out |= {"w_down": stack("mlp.fc2.weight").mT, "b_down": stack("mlp.fc2.bias")}
    out["layer_scale"] = pair("ls1.gamma", "ls2.gamma")
    copy(s, out, [("norm", "out_norm"), ("head", "out")])
    return out


style(
    7,
    "deit-3: timm (layer scale, no position for the class token) -> own (packed [depth, ...] parameters, einsum)",
    family="deit",
    source=lambda: timm_vit(13, no_embed_class=True, init_values=0.5),
    target=lambda: shake(PackedViT(), 14),
    inputs=images(),
    run_source=call,
    run_target=call,
    oracle=o_deit3,
    note="a tensor a kind for all layers, heads as axes, kernels as [p, p, c, d], positions as a grid",
)


# ---------------------------------------------------------------- 8 BEiT: transformers -> own (bias precomputed)


class BiasBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = zeros(H, G * G + 1, G * G + 1)  # computed once from the table, for deployment
        self.to_q, self.to_k, self.to_v = nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, D)
        self.to_out = nn.Linear(D, D)
        self.ff = nn.Sequential(LN6(D), nn.Linear(D, M), nn.GELU(), nn.Linear(M, D))
        self.pre = LN6(D)
        self.scales = nn.ParameterList([torch.ones(D), torch.ones(D)])

    def forward(self, x):
        y = self.pre(x)
        q, k, v = (heads(f(y)) for f in (self.to_q, self.to_k, self.to_v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        x = x + self.scales[0] * self.to_out(unheads(y))
        return x + self.scales[1] * self.ff(x)


class BiasViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[BiasBlock() for _ in range(L)])
        self.token, self.to_patch = zeros(1, 1, D), nn.Linear(3 * P * P, D)
        self.norm, self.new_head = LN6(D), nn.Linear(D, 5)

    def features(self, x):
        x = self.to_patch(F.unfold(x, P, stride=P).mT)
        x = self.blocks(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
        return self.norm(x[:, 1:].mean(1))

    def forward(self, x):
        return self.new_head(self.features(x))


def beit_index():
    at = torch.stack(torch.meshgrid(torch.arange(G), torch.arange(G), indexing="ij")).flatten(1)
    d = at[:, :, None] - at[:, None] + G - 1
    n = (2 * G - 1) ** 2
    index = torch.full((G * G + 1, G * G + 1), n)
    index[1:, 1:] = d[0] * (2 * G - 1) + d[1]
    index[1:, 0], index[0, 0] = n + 1, n + 2
    return index


def o_beit(s):
    out = {"token": s["embeddings.cls_token"]}
    p = "embeddings.patch_embeddings.projection."
    out["to_patch.weight"], out["to_patch.bias"] = s[p + "weight"].flatten(1), s[p + "bias"]
    copy(s, out, [("pooler.layernorm", "norm")])
    for i in range(L):
        a, b = f"layers.{i}.", f"blocks.{i}."
        table = s[a + "relative_position_bias.relative_position_bias_table"]
        out[b + "bias"] = table[beit_index()].permute(2, 0, 1)
        for j in range(2):
            out[f"{b}scales.{j}"] = s[f"{a}lambda_{j + 1}"]
        pairs = [(f"attention.{n}_proj", f"to_{n}") for n in "qkv"] + [("attention.o_proj", "to_out")]
        pairs += [("layernorm_before", "pre"), ("layernorm_after", "ff.0"), ("mlp.fc1", "ff.1"), ("mlp.fc2", "ff.3")]
        copy(s, out, [(a + x, b + y) for x, y in pairs])
    return out


def hf_beit(seed):
    kw = {"use_relative_position_bias": True, "use_mean_pooling": True, "layer_scale_init_value": 0.5}
    return shake(T.BeitModel(hf_cfg(T.BeitConfig, **kw)), seed)


style(
    8,
    "beit: transformers BeitModel -> own (relative bias precomputed as [heads, N, N], unfold, fresh head)",
    family="beit",
    source=lambda: hf_beit(15),
    target=lambda: shake(BiasViT(), 16),
    inputs=images(),
    run_source=lambda m, x: m(x).pooler_output,
    run_target=lambda m, x: m.features(x),
    oracle=o_beit,
    note="the table is gathered by an index that is nowhere in the state; a norm after the mean of the patches",
)


# ---------------------------------------------------------------- 9 DINOv2: own (positions as a grid) -> transformers

MS = 64  # transformers' hidden width for a SwiGLU of ratio 2


class DinoBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma_attn, self.gamma_ffn = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        self.ln_attn, self.ln_ffn = LN6(D), LN6(D)
        self.kv, self.q, self.o = nn.Linear(D, 2 * D), nn.Linear(D, D), nn.Linear(D, D)
        self.w_gate, self.w_value, self.w_out = nn.Linear(D, MS), nn.Linear(D, MS), nn.Linear(MS, D)

    def forward(self, x):
        y = self.ln_attn(x)
        k, v = self.kv(y).unflatten(-1, (2, H, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(heads(self.q(y)), k, v)
        x = x + self.o(unheads(y)) * self.gamma_attn
        y = self.ln_ffn(x)
        return x + self.w_out(silu(self.w_gate(y)) * self.w_value(y)) * self.gamma_ffn


class DepthNet(nn.Module):
    """A depth estimator over a DINOv2 trunk: class token already joined with its position, positions as a map."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Conv2d(D, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))
        self.trunk = nn.Module()
        self.trunk.token, self.trunk.pos_map = zeros(1, D), zeros(1, D, G, G)
        self.trunk.patchify = nn.Conv2d(3, D, P, P)
        self.trunk.depth = nn.ModuleDict({f"block_{i}": DinoBlock() for i in range(L)})
        self.trunk.final = LN6(D)

    def tokens(self, x):
        t = self.trunk
        x = (t.patchify(x) + t.pos_map).flatten(2).mT
        x = torch.cat([t.token.expand(len(x), 1, D), x], 1)
        for b in t.depth.values():
            x = b(x)
        return t.final(x)

    def forward(self, x):
        return self.decoder(self.tokens(x)[:, 1:].mT.unflatten(2, (G, G)))


def o_dino(s):
    token, pos = s["trunk.token"], s["trunk.pos_map"].flatten(2).mT
    out = {"embeddings.cls_token": token[None], "embeddings.mask_token": torch.zeros(1, D)}
    out["embeddings.position_embeddings"] = F.pad(pos, (0, 0, 1, 0))
    copy(s, out, [("trunk.patchify", "embeddings.patch_embeddings.projection"), ("trunk.final", "layernorm")])
    for i in range(L):
        a, b = f"trunk.depth.block_{i}.", f"encoder.layer.{i}."
        for e in WB:
            out[f"{b}attention.k_proj.{e}"], out[f"{b}attention.v_proj.{e}"] = s[f"{a}kv.{e}"].chunk(2)
        pairs = [("q", "attention.q_proj"), ("o", "attention.o_proj"), ("ln_attn", "norm1"), ("ln_ffn", "norm2")]
        pairs += [("w_gate", "mlp.gate_proj"), ("w_value", "mlp.up_proj"), ("w_out", "mlp.down_proj")]
        copy(s, out, [(a + x, b + y) for x, y in pairs])
        out[b + "layer_scale1.lambda1"], out[b + "layer_scale2.lambda1"] = s[a + "gamma_attn"], s[a + "gamma_ffn"]
    return out


def hf_dino(seed):
    kw = {"image_size": IMG, "patch_size": P, "layer_norm_eps": 1e-6, "use_swiglu_ffn": True, "mlp_ratio": 2}
    cfg = T.Dinov2Config(hidden_size=D, num_hidden_layers=L, num_attention_heads=H, **kw)
    return shake(T.Dinov2Model(cfg), seed)


style(
    9,
    "dinov2: own depth estimator (class token joined with its position, positions [1, D, H, W]) -> transformers",
    family="dinov2",
    source=lambda: shake(DepthNet(), 17),
    target=lambda: hf_dino(18),
    inputs=images(),
    run_source=lambda m, x: m.tokens(x),
    run_target=hidden,
    oracle=o_dino,
    note="only the sum of class token and its position is known; a mask token that nothing uses; k and v fused",
)


# ---------------------------------------------------------------- 10 ViT: torchvision -> transformers


def tv_vit(seed):
    return shake(torchvision.models.VisionTransformer(IMG, P, L, H, D, M, num_classes=NC), seed)


def o_tv_vit(s):
    out = {"vit.embeddings.cls_token": s["class_token"]}
    out["vit.embeddings.position_embeddings"] = s["encoder.pos_embedding"]
    copy(s, out, [("conv_proj", "vit.embeddings.patch_embeddings.projection"), ("encoder.ln", "vit.layernorm")])
    copy(s, out, [("heads.head", "classifier")])
    for i in range(L):
        a, b = f"encoder.layers.encoder_layer_{i}.", f"vit.layers.{i}."
        for e in WB:
            for n, v in zip("qkv", s[f"{a}self_attention.in_proj_{e}"].chunk(3), strict=True):
                out[f"{b}attention.{n}_proj.{e}"] = v
        pairs = [("self_attention.out_proj", "attention.o_proj"), ("mlp.0", "mlp.fc1"), ("mlp.3", "mlp.fc2")]
        pairs += [("ln_1", "layernorm_before"), ("ln_2", "layernorm_after")]
        copy(s, out, [(a + x, b + y) for x, y in pairs])
    return out


style(
    10,
    "vit: torchvision -> transformers ViTForImageClassification",
    family="vit",
    source=lambda: tv_vit(19),
    target=lambda: shake(T.ViTForImageClassification(hf_cfg(T.ViTConfig)), 20),
    inputs=images(),
    run_source=call,
    run_target=logits,
    oracle=o_tv_vit,
    note="in_proj_weight splits into three; encoder_layer_N",
)


# ---------------------------------------------------------------- 11 EfficientNet: own (words) -> timm

EFF = [(1, 3, 1, 8, 8), (6, 3, 2, 8, 12), (6, 5, 2, 12, 16), (6, 5, 1, 16, 16)]  # expand, kernel, stride, in, out


class ConvNorm(nn.Module):
    def __init__(self, i, o, k=1, stride=1, groups=1, act=True):
        super().__init__()
        self.norm, self.act = BN3(o), act
        self.conv = nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return silu(x) if self.act else x


class MBConv(nn.Module):
    def __init__(self, e, k, stride, i, o):
        super().__init__()
        self.steps = nn.ModuleDict()
        self.steps["project"] = ConvNorm(i * e, o, act=False)
        self.steps["depthwise"] = ConvNorm(i * e, i * e, k, stride, i * e)
        if e > 1:
            self.steps["expand"] = ConvNorm(i, i * e)
        self.squeeze, self.excite = nn.Linear(i * e, i // 4), nn.Linear(i // 4, i * e)
        self.skip = stride == 1 and i == o

    def forward(self, x):
        y = self.steps["expand"](x) if "expand" in self.steps else x
        y = self.steps["depthwise"](y)
        gate = torch.sigmoid(self.excite(silu(self.squeeze(y.mean((2, 3))))))
        y = self.steps["project"](y * gate[..., None, None])
        return x + y if self.skip else y


class OwnEffNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Linear(48, NC)
        self.stages = nn.ModuleDict(
            {n: MBConv(*row) for n, row in zip(("one", "two", "three", "four"), EFF, strict=True)}
        )
        self.entry, self.exit = ConvNorm(3, 8, 3, 2), ConvNorm(16, 48)

    def forward(self, x):
        x = self.entry(x)
        for stage in self.stages.values():
            x = stage(x)
        return self.logits(self.exit(x).mean((2, 3)))


def o_effnet(s):
    out = {}
    copy(s, out, [("entry.conv", "conv_stem"), ("exit.conv", "conv_head"), ("logits", "classifier")])
    copy(s, out, [("entry.norm", "bn1"), ("exit.norm", "bn2")], BN)
    for i, n in enumerate(("one", "two", "three", "four")):
        a, b = f"stages.{n}.", f"blocks.{i}.0."
        names = {"depthwise": "conv_dw", "project": "conv_pw"}
        if i:
            names = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
        for j, (x, y) in enumerate(names.items()):
            copy(s, out, [(f"{a}steps.{x}.conv", b + y)])
            copy(s, out, [(f"{a}steps.{x}.norm", f"{b}bn{j + 1}")], BN)
        for x, y in (("squeeze", "conv_reduce"), ("excite", "conv_expand")):
            out[f"{b}se.{y}.weight"], out[f"{b}se.{y}.bias"] = s[f"{a}{x}.weight"][..., None, None], s[f"{a}{x}.bias"]
    return out


style(
    11,
    "efficientnet: own (ModuleDict of words, project first, Linear squeeze) -> timm",
    family="efficientnet",
    source=lambda: wake(OwnEffNet(), 21),
    target=lambda: timm_effnet(
        [
            "ds_r1_k3_s1_e1_c8_se0.25",
            "ir_r1_k3_s2_e6_c12_se0.25",
            "ir_r1_k5_s2_e6_c16_se0.25",
            "ir_r1_k5_s1_e6_c16_se0.25",
        ],
        *(8, 48, 22),
    ),
    inputs=images(64),
    run_source=call,
    run_target=call,
    oracle=o_effnet,
    note="conv_pw means project in the first block and expand in the others; Linear becomes a 1x1 convolution",
)


# ---------------------------------------------------------------- 12 MobileNetV3: torchvision -> own U-Net encoder

MOB3 = [  # in, kernel, expanded, out, squeeze, activation, stride
    (16, 3, 16, 16, True, "RE", 2),
    (16, 3, 48, 24, False, "RE", 2),
    (24, 5, 64, 24, True, "HS", 1),
    (24, 5, 96, 32, True, "HS", 2),
]


def tv_mobile3(seed):
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    rows = [InvertedResidualConfig(*r, 1, 1) for r in MOB3]
    return wake(MobileNetV3(rows, last_channel=64, num_classes=NC), seed)


def hswish(x):
    return x * (x + 3).clamp(0, 6) / 6


class Bottleneck3(nn.Module):
    """Convolutions in one list, norms in another; squeeze-excite as two matrices."""

    def __init__(self, i, k, e, o, se, act, stride):
        super().__init__()
        shapes = ([(i, e, 1, 1, 1)] if e != i else []) + [(e, e, k, stride, e), (e, o, 1, 1, 1)]
        self.bns = nn.ModuleList([nn.BatchNorm2d(s[1], eps=1e-3) for s in shapes])
        self.convs = nn.ModuleList([nn.Conv2d(a, b, k, s, k // 2, groups=g, bias=False) for a, b, k, s, g in shapes])
        self.act, self.skip = (F.relu if act == "RE" else hswish), stride == 1 and i == o
        if se:
            r = max(8, round(e / 4 / 8) * 8)
            self.se_down, self.se_down_b, self.se_up, self.se_up_b = zeros(e, r), zeros(r), zeros(r, e), zeros(e)

    def forward(self, x):
        y = x
        for c, b in zip(self.convs[:-1], self.bns[:-1], strict=True):
            y = self.act(b(c(y)))
        if hasattr(self, "se_up"):
            z = F.relu(y.mean((2, 3)) @ self.se_down + self.se_down_b) @ self.se_up + self.se_up_b
            y = y * ((z + 3).clamp(0, 6) / 6)[:, :, None, None]
        y = self.bns[-1](self.convs[-1](y))
        return x + y if self.skip else y


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ModuleList([nn.Conv2d(a + b, b, 3, padding=1) for a, b in ((32, 24), (24, 16), (16, 16))])
        self.mask = nn.Conv2d(16, 1, 1)
        self.first, self.first_bn = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16, eps=1e-3)
        self.down = nn.ModuleList([Bottleneck3(*row) for row in MOB3])

    def encode(self, x):
        maps = [hswish(self.first_bn(self.first(x)))]
        for b in self.down:
            maps.append(b(maps[-1]))
        return maps

    def forward(self, x):
        full, half, _, quarter, x = self.encode(x)
        for conv, skip in zip(self.up, (quarter, half, full), strict=True):
            x = F.relu(conv(torch.cat([F.interpolate(x, size=skip.shape[2:]), skip], 1)))
        return self.mask(x)


def tv_mobile3_maps(m, x):
    maps = []
    for f in m.features[:5]:
        x = f(x)
        maps.append(x)
    return flat(maps)


def o_mobile3(s):
    out = {}
    copy(s, out, [("features.0.0", "first")])
    copy(s, out, [("features.0.1", "first_bn")], BN)
    for i, (_, _, _, _, se, _, _) in enumerate(MOB3):
        a, b = f"features.{i + 1}.block.", f"down.{i}."
        parts = [0, 1, 2, 3] if i else [0, 1, 2]  # the first does not expand
        if se:
            n = parts.pop(-2)
            for x, y in (("fc1", "se_down"), ("fc2", "se_up")):
                out[b + y], out[f"{b}{y}_b"] = s[f"{a}{n}.{x}.weight"][..., 0, 0].T, s[f"{a}{n}.{x}.bias"]
        else:
            parts = parts[:-1]
        for j, n in enumerate(parts):
            copy(s, out, [(f"{a}{n}.0", f"{b}convs.{j}")])
            copy(s, out, [(f"{a}{n}.1", f"{b}bns.{j}")], BN)
    return out


style(
    12,
    "mobilenet-v3: torchvision -> own U-Net (hard swish by hand, squeeze-excite as x @ W, fresh decoder)",
    family="mobilenet",
    source=lambda: tv_mobile3(23),
    target=lambda: wake(UNet(), 24),
    inputs=images(64),
    run_source=tv_mobile3_maps,
    run_target=lambda m, x: flat(m.encode(x)),
    oracle=o_mobile3,
    note="pairs of convolution and norm become two lists; a decoder and a mask head that have no source",
)


# ---------------------------------------------------------------- 13 Swin: own (mmseg names) -> transformers

WIN = 4


class WindowMSA(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.h = h
        self.relative_position_bias_table = zeros((2 * WIN - 1) ** 2, h)
        at = torch.arange(WIN * WIN)
        row, col = at // WIN, at % WIN
        index = (row[:, None] - row + WIN - 1) * (2 * WIN - 1) + col[:, None] - col + WIN - 1
        self.register_buffer("relative_position_index", index)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x, mask):  # windows, tokens, channels
        q, k, v = (heads(t, self.h) for t in self.qkv(x).chunk(3, -1))
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        a = (q * q.shape[-1] ** -0.5) @ k.mT + bias
        if mask is not None:
            a = a + mask.to(a).repeat(len(x) // len(mask), 1, 1)[:, None]
        return self.proj(unheads(a.softmax(-1) @ v))


def to_windows(x):
    return x.unflatten(2, (-1, WIN)).unflatten(1, (-1, WIN)).transpose(2, 3).flatten(0, 2).flatten(1, 2)


class SwinBlock(nn.Module):
    def __init__(self, d, h, shift):
        super().__init__()
        self.shift = shift
        self.norm1 = nn.LayerNorm(d)
        self.attn = nn.Module()
        self.attn.w_msa = WindowMSA(d, h)
        self.norm2 = nn.LayerNorm(d)
        self.ffn = nn.Module()
        self.ffn.layers = nn.Sequential(nn.Sequential(nn.Linear(d, 4 * d), nn.GELU()), nn.Linear(4 * d, d))

    def forward(self, x):  # batch, height, width, channels
        b, n, _, d = x.shape
        y, mask, s = self.norm1(x), None, self.shift
        if s:
            y = y.roll((-s, -s), (1, 2))
            zone = (torch.arange(n) >= n - WIN).long() + (torch.arange(n) >= n - s).long()
            zone = to_windows((3 * zone[:, None] + zone)[None, :, :, None])[..., 0]
            mask = (zone[:, :, None] != zone[:, None]) * -100.0
        y = self.attn.w_msa(to_windows(y), mask)
        y = y.reshape(b, n // WIN, n // WIN, WIN, WIN, d).transpose(2, 3).reshape(b, n, n, d)
        x = x + (y.roll((s, s), (1, 2)) if s else y)
        return x + self.ffn.layers(self.norm2(x))


class Merging(nn.Module):
    """nn.Unfold puts the channel before the place in the window."""

    def __init__(self, d):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * d), nn.Linear(4 * d, 2 * d, bias=False)

    def forward(self, x):
        n = x.shape[1] // 2
        return self.reduction(self.norm(F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).mT)).unflatten(1, (n, n))


class MMSwin(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.decode_head = nn.Conv2d(32, 7, 1)
        self.backbone.patch_embed = nn.Module()
        self.backbone.patch_embed.projection = nn.Conv2d(3, 16, 2, 2)
        self.backbone.patch_embed.norm = nn.LayerNorm(16)
        self.backbone.stages = nn.ModuleList()
        for d, h, depth in ((16, 2, 2), (32, 4, 2)):
            stage = nn.Module()
            stage.blocks = nn.ModuleList([SwinBlock(d, h, WIN // 2 * (i % 2)) for i in range(depth)])
            stage.downsample = Merging(d) if d == 16 else None
            self.backbone.stages.append(stage)
        self.backbone.norm1 = nn.LayerNorm(32)

    def tokens(self, x):
        m = self.backbone
        x = m.patch_embed.norm(m.patch_embed.projection(x).permute(0, 2, 3, 1))
        for stage in m.stages:
            for b in stage.blocks:
                x = b(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return m.norm1(x)

    def forward(self, x):
        return self.decode_head(self.tokens(x).permute(0, 3, 1, 2))


def o_mmswin(s):
    def places(v):  # [..., channel, row, column] -> [..., column, row, channel]
        return v.unflatten(-1, (16, 2, 2)).transpose(-3, -1).flatten(-3)

    a, out = "backbone.", {}
    copy(
        s,
        out,
        [
            (a + f"patch_embed.{x}", f"embeddings.{y}")
            for x, y in (("projection", "patch_embeddings.projection"), ("norm", "norm"))
        ],
    )
    copy(s, out, [(a + "norm1", "layernorm")])
    for n in ("norm.weight", "norm.bias", "reduction.weight"):
        out["encoder.layers.0.downsample." + n] = places(s[f"{a}stages.0.downsample.{n}"])
    for i in range(2):
        for j in range(2):
            f, t = f"{a}stages.{i}.blocks.{j}.", f"encoder.layers.{i}.blocks.{j}."
            for e in WB:
                for n, v in zip("qkv", s[f"{f}attn.w_msa.qkv.{e}"].chunk(3), strict=True):
                    out[f"{t}attention.{n}_proj.{e}"] = v
            n = "relative_position_bias_table"
            out[f"{t}attention.relative_position_bias.{n}"] = s[f"{f}attn.w_msa.{n}"]
            pairs = [("attn.w_msa.proj", "attention.o_proj"), ("norm1", "layernorm_before")]
            pairs += [("norm2", "layernorm_after"), ("ffn.layers.0.0", "mlp.fc1"), ("ffn.layers.1", "mlp.fc2")]
            copy(s, out, [(f + x, t + y) for x, y in pairs])
    return out


def hf_swin(seed):
    kw = {"image_size": IMG, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    return shake(T.SwinModel(T.SwinConfig(window_size=WIN, drop_path_rate=0.0, **kw)), seed)


style(
    13,
    "swin: own segmenter (mmseg names, merging by unfold) -> transformers SwinModel",
    family="swin",
    source=lambda: shake(MMSwin(), 25),
    target=lambda: hf_swin(26),
    inputs=images(),
    run_source=lambda m, x: m.tokens(x).flatten(1, 2),
    run_target=hidden,
    oracle=o_mmswin,
    note="the merging's four places are in another order, channel first: norm and matrix want a permutation",
)
