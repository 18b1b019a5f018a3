"""Targets as a person writes them. A switch makes a slip in the code of one block; without it they are right."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, FFN, LAYERS, TIME = 32, 4, 48, 2, 9
HEAD = WIDTH // HEADS
tanh_gelu = partial(F.gelu, approximate="tanh")
Act = Callable[[Tensor], Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(
        self, *, bias: bool = True, scale: float = HEAD**-0.5, axis: int = -1, mask: str = "", heads: str = "first"
    ) -> None:
        super().__init__()
        self.scale, self.axis, self.mask, self.heads = scale, axis, mask, heads
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if self.heads == "last":
            return x.view(b, t, HEAD, HEADS).permute(0, 3, 1, 2)
        return x.view(b, t, HEADS, HEAD).transpose(1, 2)

    def forward(self, x: Tensor, hide: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = q @ k.transpose(-1, -2) * self.scale
        if bias is not None:
            scores = scores + bias
        if self.mask == "causal":
            t = x.shape[1]
            causal = torch.ones(t, t, dtype=torch.bool).triu(1)
            hide = causal if hide is None else hide | causal
        if hide is not None and self.mask != "none":
            scores = scores.masked_fill(~hide if self.mask == "inverted" else hide, torch.finfo(scores.dtype).min)
        y = scores.softmax(self.axis) @ v
        return self.out(y.transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self, act: Act, *, bias: bool = True, drop: float = 0.0, forget: str = "") -> None:
        super().__init__()
        self.act, self.drop, self.forget = act, drop, forget
        self.up, self.down = nn.Linear(WIDTH, FFN, bias=bias), nn.Linear(FFN, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.up.weight) if self.forget == "up" else self.up(x)
        y = self.act(y)
        if self.drop:
            y = F.dropout(y, self.drop)
        return F.linear(y, self.down.weight) if self.forget == "down" else self.down(y)


class Block(nn.Module):
    def __init__(
        self,
        norm: Callable[[], nn.Module],
        *,
        act: Act = F.gelu,
        pre: bool = True,
        skip: bool = True,
        bias: bool = True,
        drop: float = 0.0,
        forget: str = "",
        cast: bool = False,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.pre, self.skip, self.cast = pre, skip, cast
        self.norm1, self.att = norm(), Attention(bias=bias, **attention)
        self.norm2, self.ffn = norm(), FeedForward(act, bias=bias, drop=drop, forget=forget)

    def forward(self, x: Tensor, hide: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if self.cast:
            x = x.to(torch.bfloat16).to(x.dtype)
        if self.pre:
            x = x + self.att(self.norm1(x), hide, bias)
            y = self.ffn(self.norm2(x))
            return x + y if self.skip else y
        x = self.norm1(x + self.att(x, hide, bias))
        y = self.ffn(x)
        return self.norm2(x + y if self.skip else y)


def stack(norm: Callable[..., nn.Module], slip: dict[str, Any], at: int = 1, **right: Any) -> nn.ModuleList:
    """The blocks; that of number `at` with the slip."""
    blocks = []
    for i in range(LAYERS):
        options = {**right, **(slip if i == at else {})}
        kind, eps = options.pop("norm", norm), options.pop("eps", None)
        blocks.append(Block(partial(kind, WIDTH) if eps is None else partial(kind, WIDTH, eps=eps), **options))
    return nn.ModuleList(blocks)


class Bert(nn.Module):
    def __init__(self, *, off: int = 0, first_eps: float = 1e-12, **slip: Any) -> None:
        super().__init__()
        self.off = off
        self.words, self.places, self.kinds = nn.Embedding(53, WIDTH), nn.Embedding(16, WIDTH), nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=first_eps)
        self.blocks = stack(partial(nn.LayerNorm, eps=1e-12), slip, pre=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]) + self.off
        x = self.norm(self.words(ids) + self.places(places) + self.kinds(torch.zeros_like(ids)))
        for block in self.blocks:
            x = block(x, (mask == 0)[:, None, None, :])
        return x


class Gpt(nn.Module):
    def __init__(self, *, off: int = 0, final: bool = True, **slip: Any) -> None:
        super().__init__()
        self.off, self.final = off, final
        self.words, self.places = nn.Embedding(53, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = stack(nn.LayerNorm, slip, act=tanh_gelu, mask="causal")
        self.last = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 53, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places.weight[self.off : self.off + ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x) if self.final else x)


class Vit(nn.Module):
    """Query, key and value in one linear map."""

    class Fused(nn.Module):
        def __init__(self, scale: float = HEAD**-0.5, axis: int = -1, order: str = "qkv", heads: str = "first") -> None:
            super().__init__()
            self.scale, self.axis, self.order, self.heads = scale, axis, order, heads
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, *_: Any) -> Tensor:
            b, t, _w = x.shape
            if self.heads == "last":
                parts = self.qkv(x).view(b, t, HEADS, 3, HEAD).permute(3, 0, 2, 1, 4)
            else:
                parts = self.qkv(x).view(b, t, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
            q, k, v = (parts[self.order.index(c)] for c in "qkv")
            y = (q * self.scale @ k.transpose(-1, -2)).softmax(self.axis) @ v
            return self.out(y.transpose(1, 2).reshape(b, t, WIDTH))

    def __init__(self, *, pool: str = "cls", final_eps: float = 1e-6, **slip: Any) -> None:
        super().__init__()
        self.pool = pool
        self.patch = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.cls, self.places = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.zeros(1, 17, WIDTH))
        fused = {k: slip.pop(k) for k in ("scale", "axis", "order", "heads") if k in slip}
        self.blocks = stack(partial(nn.LayerNorm, eps=1e-6), slip)
        for i, block in enumerate(self.blocks):
            block.att = Vit.Fused(**(fused if i == 1 else {}))
        self.last = nn.LayerNorm(WIDTH, eps=final_eps)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, img: Tensor) -> Tensor:
        x = self.patch(img).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        x = self.last(x)
        return self.head(x[:, 0] if self.pool == "cls" else x.mean(1))


class ClipText(nn.Module):
    """Sequence first, as CLIP runs it."""

    def __init__(self, *, pool: str = "end", off: int = 0, **slip: Any) -> None:
        super().__init__()
        self.pool, self.off = pool, off
        self.words, self.places = nn.Embedding(60, WIDTH), nn.Parameter(torch.zeros(12, WIDTH))
        self.blocks = stack(nn.LayerNorm, slip, mask="causal")
        self.last = nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.zeros(WIDTH, 24))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places.roll(-self.off, 0)
        for block in self.blocks:
            x = block(x)
        x = self.last(x)
        at = ids.argmax(-1) if self.pool == "end" else torch.full((len(ids),), ids.shape[1] - 1)
        return x[torch.arange(len(ids)), at] @ self.proj


class Whisper(nn.Module):
    def __init__(self, *, pad: str = "zeros", off: int = 0, **slip: Any) -> None:
        super().__init__()
        self.off = off
        self.conv1 = nn.Conv1d(10, WIDTH, 3, padding=1, padding_mode=pad)
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, stride=2)
        angle = torch.arange(TIME + 4)[:, None] * torch.exp(-math.log(10000) / 15 * torch.arange(16))
        self.register_buffer("waves", torch.cat([angle.sin(), angle.cos()], 1), persistent=False)
        self.blocks = stack(nn.LayerNorm, slip)
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, mel: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)
        x = x + self.waves[self.off : self.off + TIME]
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class T5(nn.Module):
    """The encoder: no scale, a table of relative distances, root-mean-square norms."""

    def __init__(self, *, buckets: int = 8, **slip: Any) -> None:
        super().__init__()
        self.words, self.near = nn.Embedding(53, WIDTH), nn.Embedding(8, HEADS)
        self.blocks = stack(RMSNorm, slip, act=F.relu, bias=False, scale=1.0)
        self.last = RMSNorm(WIDTH)

    def bucket(self, apart: Tensor) -> Tensor:
        n = apart.abs()
        far = 2 + (torch.log(n.float().clamp(min=1) / 2) / math.log(20 / 2) * 2).long()
        return (apart > 0).long() * 4 + torch.where(n < 2, n, far.clamp(max=3))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        t = torch.arange(ids.shape[1])
        bias = self.near(self.bucket(t[None, :] - t[:, None])).permute(2, 0, 1)[None]
        x = self.words(ids)
        for block in self.blocks:
            x = block(x, (mask == 0)[:, None, None, :], bias)
        return self.last(x)


class Basic(nn.Module):
    def __init__(
        self,
        a: int,
        b: int,
        *,
        eps: float = 1e-5,
        act: Act = F.relu,
        pad: str = "zeros",
        skip: bool = True,
        batch: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        self.act, self.skip, self.batch = act, skip, batch
        stride = 2 if down else 1
        self.c1 = nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False, padding_mode=pad)
        self.c2 = nn.Conv2d(b, b, 3, padding=1, bias=False)
        self.n1, self.n2 = nn.BatchNorm2d(b, eps=eps), nn.BatchNorm2d(b, eps=eps)
        self.short = nn.Sequential(nn.Conv2d(a, b, 1, stride=2, bias=False), nn.BatchNorm2d(b)) if down else None

    def norm(self, n: nn.BatchNorm2d, x: Tensor) -> Tensor:
        if self.batch:  # the statistics of what comes in
            return F.batch_norm(x, None, None, n.weight, n.bias, training=True, eps=n.eps)
        return n(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n2(self.c2(self.act(self.norm(self.n1, self.c1(x)))))
        if self.skip:
            y = y + (x if self.short is None else self.short(x))
        return F.relu(y)


class Resnet(nn.Module):
    def __init__(self, *, pool: str = "mean", **slip: Any) -> None:
        super().__init__()
        self.pool = pool
        self.stem, self.norm = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8)
        widths = [(8, 8), (8, 16), (16, 24), (24, 32)]
        at = 0 if "skip" in slip or "pad" in slip else 1
        self.stages = nn.ModuleList(
            Basic(a, b, down=i > 0, **(slip if i == at else {})) for i, (a, b) in enumerate(widths)
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)) if self.pool == "mean" else x.amax((2, 3)))


class Mobile(nn.Module):
    """Two inverted residuals with squeeze and excitation, as in EfficientNet."""

    class Inverted(nn.Module):
        def __init__(
            self,
            *,
            act: Act = F.silu,
            eps: float = 1e-5,
            pad: str = "zeros",
            skip: bool = True,
            gate: Act = torch.sigmoid,
        ) -> None:
            super().__init__()
            self.act, self.skip, self.gate = act, skip, gate
            conv = partial(nn.Conv2d, bias=False)
            self.expand, self.deep = conv(8, 16, 1), conv(16, 16, 3, padding=1, groups=16, padding_mode=pad)
            self.shrink = conv(16, 8, 1)
            self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
            self.n1, self.n2, self.n3 = (nn.BatchNorm2d(c, eps=eps) for c in (16, 16, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.n2(self.deep(self.act(self.n1(self.expand(x))))))
            y = y * self.gate(self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
            y = self.n3(self.shrink(y))
            return y + x if self.skip else y

    def __init__(self, **slip: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mobile.Inverted(**(slip if i == 1 else {})) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Patches(nn.Module):
    """PatchTST's encoder: scaled series in patches, batch norm in post-norm blocks."""

    def __init__(self, *, std: str = "whole", off: int = 0, **slip: Any) -> None:
        super().__init__()
        self.std, self.off = std, off
        self.patch = nn.Linear(8, WIDTH)
        self.places = nn.Parameter(torch.zeros(7, WIDTH))
        self.blocks = stack(Over, slip, pre=False)

    def forward(self, y: Tensor) -> Tensor:
        b, _, c = y.shape
        var = y.var(1, keepdim=True, unbiased=self.std == "sample")
        y = ((y - y.mean(1, keepdim=True)) / torch.sqrt(var + 1e-5)).transpose(1, 2).flatten(0, 1)
        x = self.patch(y.unfold(1, 8, 4)) + self.places.roll(-self.off, 0)
        for block in self.blocks:
            x = block(x)
        return x.reshape(b, c, 7, WIDTH)


class Over(nn.BatchNorm1d):
    """Over batch and time; `layer`: a layer norm with this norm's gain, which a person may take it for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class OverBatch(Over):
    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        return F.batch_norm(y, None, None, self.weight, self.bias, training=True, eps=self.eps).transpose(1, 2)


class OverLayer(Over):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class Lstm(nn.Module):
    def __init__(self, *, candidate: Act = torch.tanh, forget_bias: float = 0.0) -> None:
        super().__init__()
        self.candidate, self.forget_bias = candidate, forget_bias
        self.seen, self.state = nn.Linear(5, 32), nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 8)
        out = []
        for t in range(x.shape[1]):
            i, f, g, o = (self.seen(x[:, t]) + self.state(h)).chunk(4, -1)
            c = (f + self.forget_bias).sigmoid() * c + i.sigmoid() * self.candidate(g)
            h = o.sigmoid() * c.tanh()
            out.append(h)
        return torch.stack(out, 1)


class Positions(nn.Module):
    """wav2vec 2.0's convolutional positions: an even kernel, one step too many at the end."""

    def __init__(self, *, trim: str = "end", act: Act = F.gelu) -> None:
        super().__init__()
        self.trim, self.act = trim, act
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(WIDTH, WIDTH, 6, padding=3, groups=4), dim=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.transpose(1, 2))
        return x + self.act(y[..., :-1] if self.trim == "end" else y[..., 1:]).transpose(1, 2)
