"""Encoders of series as one writes them for oneself, in the forms that neuralforecast's models have, each with a head
of its own that is still to be trained. `joined`: query, key and value in one matrix."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, INNER, LENGTH = 8, 2, 12, 24


class Mix(nn.Module):
    """Query, key and value of a sequence [B, T, width], each [B, T, heads, width / heads]."""

    def __init__(self, joined: bool, heads: int = HEADS) -> None:
        super().__init__()
        self.joined, self.heads = joined, heads
        if joined:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.joined:
            return self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return tuple(map_(x).unflatten(-1, (self.heads, -1)) for map_ in (self.query, self.key, self.value))


class BatchNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------- PatchTST


class PatchBlock(nn.Module):
    """Attention whose scores are added to those of the block before."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.mix, self.out, self.norm_attn = Mix(joined), nn.Linear(WIDTH, WIDTH), BatchNorm(WIDTH)
        self.up, self.down, self.norm_ff = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH), BatchNorm(WIDTH)

    def forward(self, x: Tensor, before: Tensor | float) -> tuple[Tensor, Tensor]:
        q, k, v = self.mix(x)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1]) + before
        x = self.norm_attn(x + self.out(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)))
        return self.norm_ff(x + self.down(F.gelu(self.up(x)))), scores


class MyPatchTST(nn.Module):
    def __init__(self, joined: bool = True, classes: int = 3) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.patch = nn.Linear(6, WIDTH)
        self.place = nn.Parameter(torch.zeros(8, WIDTH))
        self.blocks = nn.ModuleList(PatchBlock(joined) for _ in range(2))
        self.judge = nn.Linear(WIDTH, classes)

    def forward(self, series: Tensor) -> Tensor:
        spread = (series.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = (series - series[:, -1:]) / spread * self.gain + self.shift
        x = F.pad(x.transpose(1, 2), (0, 3), mode="replicate").unfold(-1, 6, 3)[:, 0]
        x, scores = self.patch(x) + self.place, 0.0
        for block in self.blocks:
            x, scores = block(x, scores)
        return self.judge(x.mean(1))


# ---------------------------------------------------------------------------------------------------- Informer


class Layer(nn.Module):
    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.mix, self.out, self.norm1 = Mix(joined), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down, self.norm2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x)
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        # As the library lays it out for its next map: head by head, and not step by step.
        y = torch.einsum("bhqk,bkhd->bhqd", weights, v).reshape(x.shape)
        x = self.norm1(x + self.out(y))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Halve(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(WIDTH, WIDTH, 3), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.pad(x.transpose(1, 2), (2, 2), mode="circular"))
        return F.max_pool1d(F.elu(self.norm(y)), 3, 2, 1).transpose(1, 2)


class MyInformer(nn.Module):
    def __init__(self, joined: bool = True, classes: int = 3) -> None:
        super().__init__()
        self.token = nn.Conv1d(1, WIDTH, 3, bias=False)
        self.place = nn.Parameter(torch.zeros(1, 5000, WIDTH), requires_grad=False)
        self.layers = nn.ModuleList(Layer(joined) for _ in range(2))
        self.halve = Halve()
        self.norm = nn.LayerNorm(WIDTH)
        self.judge = nn.Linear(WIDTH, classes)

    def forward(self, series: Tensor) -> Tensor:
        x = self.token(F.pad(series.transpose(1, 2), (1, 1), mode="circular")).transpose(1, 2)
        x = x + self.place[:, : x.shape[1]]
        return self.judge(self.norm(self.layers[1](self.halve(self.layers[0](x)))).mean(1))


# ---------------------------------------------------------------------------------------------------- Autoformer


def season(x: Tensor, window: int = 5) -> Tensor:
    """What is left of a series without its moving average."""
    ends = (window - 1) // 2
    return x - F.avg_pool1d(F.pad(x.transpose(1, 2), (ends, ends), mode="replicate"), window, 1).transpose(1, 2)


class Shift(nn.Module):
    """Attention to the series itself at the delays where it is most like itself."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.mix, self.out = Mix(joined, heads=1), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each[:, :, 0] for each in self.mix(x))
        length = x.shape[1]
        spectrum = torch.fft.rfft(q, dim=1) * torch.fft.rfft(k, dim=1).conj()
        agreement = torch.fft.irfft(spectrum, n=length, dim=1).mean(-1)
        score, delay = agreement.topk(int(3 * math.log(length)), dim=1)
        at = (torch.arange(length)[None, None] + delay[:, :, None]) % length
        rows = torch.arange(len(x))[:, None, None]
        x = season(x + self.out(torch.einsum("bk,bktd->btd", score.softmax(-1), v[rows, at])))
        return season(x + self.down(F.gelu(self.up(x))))


class MyAutoformer(nn.Module):
    def __init__(self, joined: bool = True, classes: int = 3) -> None:
        super().__init__()
        self.token = nn.Conv1d(1, WIDTH, 3, bias=False)
        self.layers = nn.ModuleList(Shift(joined) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.judge = nn.Linear(WIDTH, classes)

    def forward(self, series: Tensor) -> Tensor:
        x = self.token(F.pad(series.transpose(1, 2), (1, 1), mode="circular")).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return self.judge((x - x.mean(1, keepdim=True)).amax(1))
