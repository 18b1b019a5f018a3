"""The second set's convolutional nets: ConvNeXt as functions, SqueezeNet as one nn.Sequential, bottlenecks whose batch
norms are written by hand over plain parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.defects import Slip
from tests.mutations.heldout_base import Family, awake, call, noise, rng, slips_of
from tests.pairs import shaken


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


CB = "blocks.1"
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
    Family("convnext", convnext, Next, noise(2, 3, 32, 32), lambda m, x: m(x).logits),
    Family("squeezenet", squeeze, Squeeze, noise(2, 3, 33, 33, size=2.0)),
    Family("bottlenecks", bottlenecks, Necks, noise(2, 16, 9, 9)),
]
SLIPS: list[Slip] = [*CONVNEXT, *SQUEEZE, *NECKS]
