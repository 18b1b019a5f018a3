"""The second set's vision transformers: Swin by einsum, DeiT of torch's layers, CLIP's image tower sequence first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.defects import Slip
from tests.mutations.heldout_base import Family, noise, slips_of
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
        b, h, w, _ = x.shape
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


FAMILIES = [
    Family("swin", swin, Swin, noise(2, 3, 16, 16)),
    Family("deit", deit, Deit, noise(2, 3, 16, 16)),
    Family("clip image", clip, ClipImage, noise(2, 3, 16, 16), lambda m, x: m(x).image_embeds),
]
SLIPS: list[Slip] = [*SWIN, *DEIT, *CLIP]
