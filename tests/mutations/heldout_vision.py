"""The second set's vision models: Swin by einsum, ConvNeXt as functions, DeiT of torch's own layers, CLIP's image tower
sequence first, SqueezeNet as one nn.Sequential, bottlenecks with a folded-out batch norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.defects import Slip
from tests.mutations.heldout_base import Family, awake, call, noise, rng, slips_of
from tests.pairs import shaken

D, H, FF = 32, 4, 56
K = D // H


# -- Swin -------------------------------------------------------------------------------------------------------------
def swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return shaken(
        SwinTransformer(
            img_size=16,
            patch_size=2,
            window_size=4,
            embed_dim=16,
            depths=(2, 1),
            num_heads=(2, 4),
            num_classes=5,
            mlp_ratio=2.0,
        )
    )


def windows(x: Tensor) -> Tensor:
    b, h, w, c = x.shape
    return x.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)


def back(x: Tensor, h: int, w: int) -> Tensor:
    return x.view(-1, h // 4, w // 4, 4, 4, x.shape[-1]).permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, x.shape[-1])


class SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, shift: int, slip: str = "") -> None:
        super().__init__()
        self.heads, self.shift, self.slip = heads, shift, slip
        self.ln1, self.ln2 = nn.LayerNorm(width, eps=1e-6 if slip == "eps" else 1e-5), nn.LayerNorm(width)
        self.to_qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.zeros(7, 7, heads))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def bias(self) -> Tensor:
        at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None, :] + 3
        if self.slip == "distance turned":
            apart = at[:, None, :] - at[:, :, None] + 3
        y, x = apart
        if self.slip == "columns first":
            y, x = x, y
        return self.table[y, x].permute(2, 0, 1)

    def seen(self, h: int, w: int) -> Tensor:
        region = torch.zeros(1, h, w, 1)
        cuts = (slice(0, -4), slice(-4, -self.shift), slice(-self.shift, None))
        for i, a in enumerate(cuts):
            for j, b in enumerate(cuts):
                region[:, a, b] = 3 * i + j
        n = windows(region)[..., 0]
        return (n[:, :, None] != n[:, None, :]) * -100.0

    def attend(self, x: Tensor) -> Tensor:
        s = self.slip
        b, h, w, c = x.shape
        if self.shift and s != "no shift":
            n = self.shift if s == "shift the other way" else -self.shift
            x = x.roll((n, n), (1, 2))
        q, k, v = self.to_qkv(windows(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        a = torch.einsum("nqhd,nkhd->nhqk", q, k)
        if s == "bias before the scale":
            a = (a + self.bias()) * q.shape[-1] ** -0.5
        else:
            a = a * q.shape[-1] ** -0.5
            a = a if s == "no bias" else a + self.bias()
        if self.shift and s not in ("no mask", "no shift"):
            m = self.seen(h, w)
            a = (a.view(b, len(m), self.heads, 16, 16) + m[None, :, None]).flatten(0, 1)
        y = torch.einsum("nhqk,nkhd->nqhd", a.softmax(-1), v).flatten(2)
        y = back(self.out(y), h, w)
        if self.shift and s not in ("not turned back", "no shift"):
            n = -self.shift if s == "shift the other way" else self.shift
            y = y.roll((n, n), (1, 2))
        return y

    def forward(self, x: Tensor) -> Tensor:
        if self.slip == "post norm":
            x = x + self.ln1(self.attend(x))
            return x + self.ln2(self.fc2(F.gelu(self.fc1(x))))
        x = x + self.attend(self.ln1(x))
        y = self.fc1(self.ln2(x))
        return x + self.fc2(F.gelu(y, approximate="tanh" if self.slip == "gelu tanh" else "none"))


class Swin(nn.Module):
    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.patch, self.norm0 = nn.Conv2d(3, 16, 2, stride=2), nn.LayerNorm(16)
        self.one = nn.Sequential(SwinBlock(16, 2, 0), SwinBlock(16, 2, 2, slip))
        self.merge_norm, self.merge = nn.LayerNorm(64), nn.Linear(64, 32, bias=False)
        self.two = SwinBlock(32, 4, 0)
        self.last, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, img: Tensor) -> Tensor:
        s = self.slip
        x = self.norm0(self.patch(img).permute(0, 2, 3, 1))
        x = self.one(x)
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        if s == "merged in rows":
            parts[1], parts[2] = parts[2], parts[1]
        x = torch.cat(parts, -1)
        x = self.merge(x if s == "merged without norm" else self.merge_norm(x))
        x = self.two(x)
        if s == "mean before norm":
            return self.head(self.last(x.mean((1, 2))))
        x = self.last(x)
        return self.head(x.amax((1, 2)) if s == "max" else x.mean((1, 2)))


SB = "one.1"
SWIN = slips_of(
    "swin",
    ("eps", "eps", (f"{SB}.ln1",), ("eps",)),
    ("GELU variant", "gelu tanh", (SB,), ("gelu", "activation")),
    ("position table turned", "distance turned", (SB,), ("position offset", "position", "transposed", "sign")),
    ("position table turned", "columns first", (SB,), ("position offset", "position", "transposed", "layout")),
    ("window shift missing", "no shift", (SB,), ("shift", "shifted", "position offset", "position")),
    ("window shift turned", "shift the other way", (SB,), ("shift", "shifted", "position offset", "position", "sign")),
    ("window shift not undone", "not turned back", (SB,), ("shift", "shifted", "position offset", "position")),
    ("bias inside the scale", "bias before the scale", (SB,), ("scale",)),
    (
        "position bias missing",
        "no bias",
        (SB,),
        ("position", "missing bias", "missing term", "mask", "position offset"),
    ),
    ("mask missing", "no mask", (SB,), ("mask",)),
    ("pre/post norm", "post norm", (SB,), ("pre/post norm",)),
    (
        "flatten order",
        "merged in rows",
        ("", "merge_norm", "merge"),
        ("layout", "block order", "head order", "flatten order"),
    ),
    ("norm missing", "merged without norm", ("", "merge"), ("pre/post norm", "missing norm")),
    ("pooling before norm", "mean before norm", ("", "last"), ("pooling", "pre/post norm")),
    ("pooling", "max", ("",), ("pooling",)),
)


# -- ConvNeXt ---------------------------------------------------------------------------------------------------------
def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, patch_size=2, num_labels=5)
    return shaken(ConvNextForImageClassification(config))


def last_norm(x: Tensor, n: nn.Module, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], n.weight, n.bias, eps)


class Affine(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))


class NextBlock(nn.Module):
    def __init__(self, c: int, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.dw_w, self.dw_b = nn.Parameter(torch.randn(c, 1, 7, 7)), nn.Parameter(torch.randn(c))
        self.ln = Affine(c)
        self.pw1_w, self.pw1_b = nn.Parameter(torch.randn(4 * c, c, 1, 1)), nn.Parameter(torch.randn(4 * c))
        self.pw2_w, self.pw2_b = nn.Parameter(torch.randn(c, 4 * c, 1, 1)), nn.Parameter(torch.randn(c))
        self.gamma = nn.Parameter(torch.ones(c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        s = self.slip
        c = x.shape[1]
        if s == "reflect":
            y = F.conv2d(F.pad(x, (3, 3, 3, 3), mode="reflect"), self.dw_w, self.dw_b, groups=c)
        elif s == "dilated":
            y = F.conv2d(x, self.dw_w, self.dw_b, padding=6, dilation=2, groups=c)
        elif s == "shifted padding":
            y = F.conv2d(F.pad(x, (4, 2, 4, 2)), self.dw_w, self.dw_b, groups=c)
        else:
            y = F.conv2d(x, self.dw_w, None if s == "no depthwise bias" else self.dw_b, padding=3, groups=c)
        u = y.mean(1, keepdim=True)
        if s == "statistics over space":
            u = y.mean((1, 2, 3), keepdim=True)
        v = (y - u).pow(2).mean(1, keepdim=True)
        if s == "unbiased":
            v = y.var(1, keepdim=True)
        y = (y - u) / (v.sqrt() + 1e-6 if s == "eps outside" else (v + 1e-6).sqrt())
        y = y * self.ln.weight[:, None, None] + self.ln.bias[:, None, None]
        y = F.conv2d(y, self.pw1_w, self.pw1_b)
        y = F.silu(y) if s == "silu" else F.gelu(y, approximate="tanh" if s == "gelu tanh" else "none")
        y = F.conv2d(y, self.pw2_w, self.pw2_b)
        if s == "gamma squared":
            y = y * self.gamma * self.gamma
        elif s != "no gamma":
            y = y * self.gamma
        if s == "cast":
            y = y.half().float()
        return y if s == "no residual" else x + y


class Next(nn.Module):
    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.stem, self.stem_ln = nn.Conv2d(3, 8, 2, stride=2), Affine(8)
        self.first = NextBlock(8)
        self.down_ln, self.down = Affine(8), nn.Conv2d(8, 16, 2, stride=2)
        self.rest = nn.Sequential(NextBlock(16, slip), NextBlock(16))
        self.last_ln, self.head = nn.LayerNorm(16, eps=1e-6 if slip == "last eps" else 1e-12), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        s = self.slip
        x = last_norm(self.stem(x).permute(0, 2, 3, 1), self.stem_ln, 1e-6).permute(0, 3, 1, 2)
        x = self.first(x)
        y = last_norm(x.permute(0, 2, 3, 1), self.down_ln, 1e-5 if s == "down eps" else 1e-6).permute(0, 3, 1, 2)
        x = self.down(x if s == "down without norm" else y)
        x = self.rest(x)
        if s == "norm before mean":
            return self.head(self.last_ln(x.permute(0, 2, 3, 1)).mean((1, 2)))
        x = x.amax((2, 3)) if s == "max" else x.mean((2, 3))
        return self.head(self.last_ln(x))


R0 = "rest.0"
NORMS = ("normalisation", "statistics", "mean", "variance")
CONVNEXT = slips_of(
    "convnext",
    ("padding mode", "reflect", (R0,), ("padding mode",)),
    ("dilation", "dilated", (R0,), ("padding mode", "dilation", "stride")),
    ("padding on one side", "shifted padding", (R0,), ("padding mode", "padding", "position offset", "shifted")),
    ("bias missing", "no depthwise bias", (R0,), ("missing bias",)),
    ("another norm", "statistics over space", (R0,), NORMS),
    ("unbiased variance", "unbiased", (R0,), (*NORMS, "scale")),
    ("eps outside of the root", "eps outside", (R0,), ("eps", "normalisation")),
    ("activation", "silu", (R0,), ("activation",)),
    ("GELU variant", "gelu tanh", (R0,), ("gelu", "activation")),
    ("gain missing", "no gamma", (R0,), ("scale", "missing gain", "scaled", "missing scale")),
    ("gain twice", "gamma squared", (R0,), ("scale", "scaled", "duplicated", "missing gain")),
    ("cast inside", "cast", (R0,), ("dtype cast",)),
    ("residual missing", "no residual", (R0,), ("missing residual",)),
    ("eps", "last eps", ("last_ln",), ("eps",)),
    ("eps", "down eps", ("",), ("eps",)),
    ("norm missing", "down without norm", ("", "down"), ("pre/post norm", "missing norm")),
    ("pooling before norm", "norm before mean", ("", "last_ln"), ("pooling", "pre/post norm")),
    ("pooling", "max", ("",), ("pooling",)),
)


# -- DeiT -------------------------------------------------------------------------------------------------------------
def deit() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return shaken(
        VisionTransformerDistilled(
            img_size=16, patch_size=4, embed_dim=D, depth=2, num_heads=H, mlp_ratio=FF / D, num_classes=5
        )
    )


class Deit(nn.Module):
    """Patches by a linear map, layers of torch."""

    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.patch = nn.Linear(48, D)
        self.cls, self.dist = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
        self.pos = nn.Parameter(torch.zeros(18, D))
        of: dict[str, Any] = {
            "eps": {"layer_norm_eps": 1e-5},
            "post norm": {"norm_first": False},
            "quick gelu": {"activation": lambda x: x * torch.sigmoid(1.702 * x)},
        }.get(slip, {})
        same = {"dropout": 0.0, "activation": F.gelu, "batch_first": True, "norm_first": True, "layer_norm_eps": 1e-6}
        layers = [nn.TransformerEncoderLayer(D, H, FF, **{**same, **o}) for o in ({}, of)]
        self.body = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.heads = nn.ModuleDict({"cls": nn.Linear(D, 5), "dist": nn.Linear(D, 5)})

    def forward(self, img: Tensor) -> Tensor:
        s = self.slip
        b = len(img)
        x = img.unfold(2, 4, 4).unfold(3, 4, 4)  # b, 3, 4, 4, 4, 4
        x = x.permute(0, 3, 2, 1, 4, 5) if s == "grid turned" else x.permute(0, 2, 3, 1, 4, 5)
        if s == "pixels turned":
            x = x.transpose(-1, -2)
        if s == "channels last":
            x = x.permute(0, 1, 2, 4, 5, 3)
        x = self.patch(x.reshape(b, 16, 48))
        cls, dist = self.cls.expand(b, 1, -1), self.dist.expand(b, 1, -1)
        if s == "tokens swapped":
            cls, dist = dist, cls
        if s == "positions before the tokens":
            x = torch.cat([cls, dist, x + self.pos[2:]], 1)
        elif s == "positions one late":
            x = torch.cat([cls, dist, x + self.pos[1:17]], 1)
        elif s == "tokens last":
            x = torch.cat([x, cls, dist], 1) + self.pos
        else:
            x = torch.cat([cls, dist, x], 1) + self.pos
        for i, layer in enumerate(self.body):
            causal = torch.ones(18, 18).triu(1).bool() if s == "causal" and i == 1 else None
            x = layer(x, src_mask=causal)
        x = x if s == "no last norm" else self.norm(x)
        a, c = (0, 1) if s != "tokens last" else (-2, -1)
        if s == "class alone":
            return self.heads["cls"](x[:, 0])
        if s == "reads a patch":
            c = 2
        y = self.heads["cls"](x[:, a]) + self.heads["dist"](x[:, c])
        return y if s == "heads summed" else y / 2


D1 = "body.1"
DEIT = slips_of(
    "deit",
    ("eps", "eps", (f"{D1}.norm1",), ("eps",)),
    ("pre/post norm", "post norm", (D1,), ("pre/post norm",)),
    ("GELU variant", "quick gelu", ("", D1), ("gelu", "activation")),
    (
        "flatten order",
        "grid turned",
        ("", "patch"),
        ("layout", "transposed", "flatten order", "position offset", "head order"),
    ),
    ("flatten order", "pixels turned", ("", "patch"), ("layout", "transposed", "flatten order", "head order")),
    ("flatten order", "channels last", ("", "patch"), ("layout", "transposed", "flatten order", "head order")),
    ("tokens swapped", "tokens swapped", ("",), ("swapped tensors", "block order", "position offset")),
    (
        "positions missing",
        "positions before the tokens",
        ("",),
        ("position offset", "position", "missing term", "missing bias"),
    ),
    ("position offset", "positions one late", ("",), ("position offset",)),
    ("tokens at the end", "tokens last", ("",), ("position offset", "block order", "position")),
    ("causal mask too many", "causal", ("", f"{D1}.self_attn", D1), ("mask",)),
    ("norm missing", "no last norm", ("", "heads.cls", "heads.dist"), ("pre/post norm", "missing norm")),
    ("head missing", "class alone", ("",), ("missing term", "missing residual", "pooling", "scale")),
    ("pooling", "reads a patch", ("",), ("pooling", "position offset")),
    ("scale of the mean", "heads summed", ("",), ("scale",)),
)


# -- CLIP's image tower -----------------------------------------------------------------------------------------------
def clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=D,
        intermediate_size=FF,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=H,
        image_size=16,
        patch_size=4,
        hidden_act="quick_gelu",
    )
    return shaken(CLIPVisionModelWithProjection(config))


class Quick(nn.Module):
    def __init__(self, by: float = 1.702) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.by * x).sigmoid()


class ResBlock(nn.Module):
    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.attn = nn.MultiheadAttention(
            D, 8 if slip == "eight heads" else H, dropout=0.2 if slip == "dropout" else 0.0
        )
        self.ln_1, self.ln_2 = nn.LayerNorm(D, eps=1e-6 if slip == "eps" else 1e-5), nn.LayerNorm(D)
        act: nn.Module = {"gelu": nn.GELU(), "silu": nn.SiLU(), "other number": Quick(1.7)}.get(slip, Quick())
        self.mlp = nn.Sequential()
        for name, m in (("c_fc", nn.Linear(D, FF)), ("act", act), ("c_proj", nn.Linear(FF, D))):
            self.mlp.add_module(name, m)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        key = x if self.slip == "key not normed" else y
        if self.slip == "dropout":
            self.attn.train()
        if self.slip == "batch first":
            y = y.transpose(0, 1)
            z = self.attn(y, y, y, need_weights=False)[0].transpose(0, 1)
        else:
            z = self.attn(y, key, y, need_weights=False)[0]
        x = x + z
        return x + self.mlp(self.ln_2(x))


class ClipImage(nn.Module):
    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.conv1 = nn.Conv2d(3, D, 4, stride=4, bias=False)
        self.token, self.pos = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(17, D))
        self.ln_pre, self.ln_post = nn.LayerNorm(D), nn.LayerNorm(D)
        self.blocks = nn.Sequential(ResBlock(), ResBlock(slip))
        self.proj = nn.Parameter(torch.randn(D, 12))

    def forward(self, img: Tensor) -> Tensor:
        s = self.slip
        x = self.conv1(img)
        x = x.transpose(2, 3).flatten(2) if s == "grid turned" else x.flatten(2)
        x = x.permute(2, 0, 1)  # tokens first
        token = self.token.expand(1, x.shape[1], -1)
        x = torch.cat([x, token] if s == "token last" else [token, x]) + self.pos[:, None]
        if s == "token first, positions turned":
            x = torch.cat([token, x[1:] - self.pos[1:, None] + self.pos[1:, None].flip(0)])
        x = x if s == "no first norm" else self.ln_pre(x)
        if s == "first norm is the last":
            x = self.ln_post(torch.cat([token, self.conv1(img).flatten(2).permute(2, 0, 1)]) + self.pos[:, None])
        x = self.blocks(x)
        x = x.mean(0) if s == "mean" else x[1] if s == "first patch" else x[-1 if s == "token last" else 0]
        x = x if s == "no last norm" else self.ln_post(x)
        x = x @ self.proj
        return F.normalize(x, dim=-1) if s == "normalised" else x


CB = "blocks.1"
CLIP = slips_of(
    "clip image",
    ("eps", "eps", (f"{CB}.ln_1",), ("eps",)),
    ("number of heads", "eight heads", (f"{CB}.attn",), ("head order", "scale", "heads")),
    ("GELU variant", "gelu", (f"{CB}.mlp.act",), ("gelu", "activation")),
    ("activation", "silu", (f"{CB}.mlp.act",), ("activation", "gelu")),
    ("GELU variant", "other number", (f"{CB}.mlp.act",), ("gelu", "activation", "scale", "constant")),
    ("dropout left on", "dropout", (f"{CB}.attn",), ("dropout",)),
    ("batch first", "batch first", (f"{CB}.attn", CB), ("layout", "batch first", "axis", "transposed")),
    (
        "norm missing",
        "key not normed",
        (CB, f"{CB}.attn"),
        ("pre/post norm", "missing norm", "wrong input", "wrong tensor"),
    ),
    ("flatten order", "grid turned", ("", "conv1"), ("layout", "transposed", "flatten order", "position offset")),
    ("tokens at the end", "token last", ("",), ("position offset", "block order", "position")),
    ("position offset", "token first, positions turned", ("",), ("position offset", "position", "constant")),
    ("norm missing", "no first norm", ("", "blocks.0.", "blocks.0"), ("pre/post norm", "missing norm")),
    (
        "norm of another place",
        "first norm is the last",
        ("", "ln_post"),
        ("swapped layers", "duplicated", "swapped tensors", "wrong tensor"),
    ),
    ("norm missing", "no last norm", ("",), ("pre/post norm", "missing norm")),
    ("pooling", "mean", ("",), ("pooling",)),
    ("pooling", "first patch", ("",), ("pooling", "position offset")),
    ("norm too many", "normalised", ("",), ("pre/post norm", "normalisation", "scale")),
)


# -- SqueezeNet -------------------------------------------------------------------------------------------------------
def squeeze() -> nn.Module:
    from torchvision.models.squeezenet import Fire

    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(12, 4, 8, 8),
        Fire(16, 4, 10, 10),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(20 * 16, 7),
    )
    return shaken(net)


class FireBlock(nn.Module):
    def __init__(self, a: int, s: int, e: int, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.c = nn.ModuleDict(
            {
                "s": nn.Conv2d(a, s, 1),
                "e1": nn.Conv2d(s, e, 1),
                "e3": nn.Conv2d(s, e, 3, padding=1, padding_mode="replicate" if slip == "replicate" else "zeros"),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.c["s"](x)
        x = F.leaky_relu(x) if self.slip == "leaky" else x if self.slip == "no squeeze relu" else F.relu(x)
        both = [self.c["e1"](x), self.c["e3"](x)]
        if self.slip == "expands turned":
            both.reverse()
        y = torch.cat(both, 1)
        return F.relu6(y) if self.slip == "relu6" else F.relu(y)


class Squeeze(nn.Module):
    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.slip = slip
        self.stem = nn.Conv2d(3, 12, 3, stride=2)
        if slip == "relu missing":
            act: nn.Module = nn.Identity()
        else:
            act = nn.ReLU()
        pool: Callable[..., nn.Module] = nn.AvgPool2d if slip == "average" else nn.MaxPool2d
        self.features = nn.Sequential(
            self.stem,
            act,
            nn.MaxPool2d(3, 2, padding=1) if slip == "padded pool" else pool(3, 2, ceil_mode=True),
            FireBlock(12, 4, 8),
            FireBlock(16, 4, 10, slip),
            nn.MaxPool2d(3, 2, ceil_mode=True),
        )
        self.classifier = nn.Linear(320, 7)

    def forward(self, x: Tensor) -> Tensor:
        s = self.slip
        if s == "pixel scale":
            x = x * 255.0
        if s == "channels turned":
            x = x.flip(1)
        if s == "pixel mean":
            x = (x - 0.5) / 0.5
        x = self.features(x)
        if s == "flattened channels last":
            x = x.permute(0, 2, 3, 1)
        if s == "flattened columns first":
            x = x.transpose(2, 3)
        y = self.classifier(x.flatten(1))
        return y.softmax(-1) if s == "softmax at the end" else y


F4 = "features.4"
SQUEEZE = slips_of(
    "squeezenet",
    ("padding mode", "replicate", (f"{F4}.c.e3",), ("padding mode",)),
    ("activation", "leaky", (F4,), ("activation",)),
    ("activation missing", "no squeeze relu", (F4, f"{F4}.c.e1", f"{F4}.c.e3"), ("activation",)),
    ("activation", "relu6", (F4,), ("activation",)),
    ("activation missing", "relu missing", ("features.1", "features.2", "features"), ("activation",)),
    ("concatenation order", "expands turned", (F4,), ("block order", "swapped tensors", "concatenation order")),
    ("pooling", "average", ("features.2",), ("pooling",)),
    ("pooling padding", "padded pool", ("features.2",), ("pooling", "padding mode", "padding")),
    ("input scale", "pixel scale", ("", "stem"), ("scale", "input")),
    ("input scale", "pixel mean", ("", "stem"), ("scale", "input", "constant", "normalisation")),
    (
        "channel order",
        "channels turned",
        ("", "stem"),
        ("block order", "input", "layout", "channel order", "head order"),
    ),
    (
        "flatten order",
        "flattened channels last",
        ("", "classifier"),
        ("layout", "transposed", "flatten order", "head order"),
    ),
    (
        "flatten order",
        "flattened columns first",
        ("", "classifier"),
        ("layout", "transposed", "flatten order", "head order"),
    ),
    ("softmax too many", "softmax at the end", ("",), ("activation", "softmax")),
)


# -- bottlenecks ------------------------------------------------------------------------------------------------------
def bottlenecks() -> nn.Module:
    from torchvision.models.resnet import Bottleneck

    def down(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 1, stride=2, bias=False), nn.BatchNorm2d(b))

    net = nn.Sequential(Bottleneck(16, 4), Bottleneck(16, 6, stride=2, downsample=down(16, 24)), Bottleneck(24, 6))
    return awake(net, torch.randn(8, 16, 9, 9, generator=rng(3)), call)


class Neck(nn.Module):
    """Batch norms by hand, over plain parameters and buffers."""

    def __init__(self, a: int, c: int, out: int, stride: int, slip: str = "") -> None:
        super().__init__()
        self.stride, self.slip = stride, slip
        self.w1, self.w2, self.w3 = (
            nn.Parameter(torch.randn(*s)) for s in ((c, a, 1, 1), (c, c, 3, 3), (out, c, 1, 1))
        )
        widths = [c, c, out]
        if stride > 1:
            self.w0 = nn.Parameter(torch.randn(out, a, 1, 1))
            widths.append(out)
        for i, n in enumerate(widths, 1):
            self.register_parameter(f"g{i}", nn.Parameter(torch.ones(n)))
            self.register_parameter(f"b{i}", nn.Parameter(torch.zeros(n)))
            self.register_buffer(f"mean{i}", torch.zeros(n))
            self.register_buffer(f"var{i}", torch.ones(n))

    def norm(self, x: Tensor, i: int) -> Tensor:
        s = self.slip
        mean, var = getattr(self, f"mean{i}"), getattr(self, f"var{i}")
        if s == "batch statistics" and i == 2:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        if s == "statistics of another" and i == 2:
            mean, var = self.mean1, self.var1
        if s == "blended statistics" and i == 2:
            mean = 0.9 * mean + 0.1 * x.mean((0, 2, 3))
        if s == "deviation for variance" and i == 2:
            var = var.sqrt()
        if s == "mean missing" and i == 2:
            mean = torch.zeros_like(mean)
        shape = (1, -1, 1, 1)
        eps = 1e-3 if s == "eps" and i == 2 else 1e-5
        root = var.sqrt() + eps if s == "eps outside" and i == 2 else (var + eps).sqrt()
        y = (x - mean.view(shape)) / root.view(shape)
        return y * getattr(self, f"g{i}").view(shape) + getattr(self, f"b{i}").view(shape)

    def forward(self, x: Tensor) -> Tensor:
        s = self.slip
        early = s == "stride early"
        y = F.relu(self.norm(F.conv2d(x, self.w1, stride=self.stride if early else 1), 1))
        y = self.norm(F.conv2d(y, self.w2, stride=1 if early else self.stride, padding=1), 2)
        y = y if s == "relu missing" else F.relu(y)
        y = self.norm(F.conv2d(y, self.w3), 3)
        if self.stride > 1:
            if s == "pooled shortcut":
                x = self.norm(F.conv2d(F.avg_pool2d(x, 2, 2, ceil_mode=True), self.w0), 4)
            else:
                x = self.norm(F.conv2d(x, self.w0, stride=self.stride), 4)
            if s == "shortcut rectified":
                x = F.relu(x)
        return F.relu(y) + x if s == "relu before the sum" else F.relu(y + x)


class Necks(nn.Module):
    def __init__(self, slip: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Neck(16, 4, 16, 1), Neck(16, 6, 24, 2, slip), Neck(24, 6, 24, 1)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


STATS = ("statistics", "normalisation", "mean", "variance")
NECKS = slips_of(
    "bottlenecks",
    ("batch statistics", "batch statistics", (CB,), STATS),
    (
        "statistics of another norm",
        "statistics of another",
        (CB,),
        (*STATS, "swapped tensors", "duplicated", "swapped layers", "wrong tensor"),
    ),
    ("blended statistics", "blended statistics", (CB,), STATS),
    ("statistics of another norm", "deviation for variance", (CB,), (*STATS, "eps")),
    ("statistics missing", "mean missing", (CB,), (*STATS, "offset", "missing bias", "constant")),
    ("eps", "eps", (CB,), ("eps",)),
    ("eps outside of the root", "eps outside", (CB,), ("eps", "normalisation")),
    ("stride", "stride early", (CB,), ("stride",)),
    ("activation missing", "relu missing", (CB,), ("activation",)),
    ("pooling", "pooled shortcut", (CB,), ("pooling", "stride")),
    ("activation too many", "shortcut rectified", (CB,), ("activation",)),
    ("activation too many", "relu before the sum", (CB,), ("activation",)),
)

FAMILIES = [
    Family("swin", swin, Swin, noise(2, 3, 16, 16)),
    Family("convnext", convnext, Next, noise(2, 3, 32, 32), lambda m, x: m(x).logits),
    Family("deit", deit, Deit, noise(2, 3, 16, 16)),
    Family("clip image", clip, ClipImage, noise(2, 3, 16, 16), lambda m, x: m(x).image_embeds),
    Family("squeezenet", squeeze, Squeeze, noise(2, 3, 33, 33, size=2.0)),
    Family("bottlenecks", bottlenecks, Necks, noise(2, 16, 9, 9)),
]
SLIPS: list[Slip] = [*SWIN, *CONVNEXT, *DEIT, *CLIP, *SQUEEZE, *NECKS]
