"""Targets that are almost the reference: one detail makes another function of them, which must never be called proven.

Every target here takes all of the reference's weights by shape, and computes nearly the same values with them. Beside
each family stands the target without the slip, which must be proven: refusing everything is no way to pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from tests.pairs import shaken

WIDTH, HEADS, FFN, TIME, STATE = 32, 4, 48, 9, 8
tanh_gelu = partial(F.gelu, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


# -- what a person writes ---------------------------------------------------------------------------------------------
class Attention(nn.Module):
    def __init__(self, heads: int, *, scale: float | None = None, axis: int = -1) -> None:
        super().__init__()
        self.heads, self.axis = heads, axis
        self.scale = (WIDTH // heads) ** -0.5 if scale is None else scale
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, hide: Tensor | None) -> Tensor:
        b, t, d = x.shape
        q, k, v = (m(x).view(b, t, self.heads, d // self.heads).transpose(1, 2) for m in (self.q, self.k, self.v))
        scores = self.scale * q @ k.transpose(-1, -2)
        if hide is not None:
            scores = scores.masked_fill(hide, torch.finfo(scores.dtype).min)
        return self.out((scores.softmax(self.axis) @ v).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(
        self,
        *,
        act: Callable[[Tensor], Tensor] = F.gelu,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        pre: bool = True,
        skip: str = "both",
        heads: int = HEADS,
        dropout: float = 0.0,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.act, self.pre, self.skip = act, pre, skip
        self.att = Attention(heads, **attention)
        self.norm_att, self.norm_ffn = norm(WIDTH), norm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)
        self.drop = nn.Dropout(dropout)

    def ffn(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.up(x))))

    def forward(self, x: Tensor, hide: Tensor | None = None) -> Tensor:
        if self.pre:
            x = x + self.drop(self.att(self.norm_att(x), hide))
            return self.ffn(self.norm_ffn(x)) + (x if self.skip == "both" else 0)
        x = self.norm_att(x + self.drop(self.att(x, hide)))
        return self.norm_ffn(self.ffn(x) + (x if self.skip == "both" else 0))


class OwnBert(nn.Module):
    """Post-norm, padding hidden, the first token pooled."""

    def __init__(
        self, *, eps: float = 1e-12, masked: bool = True, pool: str = "cls", off: int = 0, **block: Any
    ) -> None:
        super().__init__()
        self.masked, self.pool, self.off = masked, pool, off
        self.words, self.places = nn.Embedding(53, WIDTH), nn.Embedding(16, WIDTH)
        self.kinds = nn.Embedding(2, WIDTH)
        norm = block.pop("norm", partial(nn.LayerNorm, eps=eps))
        self.norm = norm(WIDTH)
        self.block = Block(norm=norm, **{"pre": False, **block})
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        places = (torch.arange(ids.shape[1]) - self.off).clamp(min=0)
        x = self.norm(self.words(ids) + self.places(places) + self.kinds(torch.zeros_like(ids)))
        x = self.block(x, (mask == 0)[:, None, None, :] if self.masked else None)
        pooled = x[:, 0] if self.pool == "cls" else x.mean(1)
        return x, torch.tanh(self.pooler(pooled))


class OwnGPT(nn.Module):
    def __init__(self, *, causal: bool = True, final: bool = True, tied: bool = False, **block: Any) -> None:
        super().__init__()
        self.causal = causal
        self.words, self.places = nn.Embedding(53, WIDTH), nn.Embedding(16, WIDTH)
        self.block = Block(**{"act": tanh_gelu, **block})
        self.last = block.get("norm", nn.LayerNorm)(WIDTH) if final else nn.Identity()
        self.head = nn.Linear(WIDTH, 53, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        t = ids.shape[1]
        x = self.words(ids) + self.places(torch.arange(t))
        hide = torch.ones(t, t, dtype=torch.bool).triu(1)
        return self.head(self.last(self.block(x, hide if self.causal else None)))


class OwnViT(nn.Module):
    def __init__(self, *, eps: float = 1e-6, pool: str = "cls", final: bool = True, **block: Any) -> None:
        super().__init__()
        self.pool = pool
        self.patch = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.cls, self.places = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.zeros(1, 17, WIDTH))
        norm = partial(nn.LayerNorm, eps=eps)
        self.block = Block(norm=norm, **block)
        self.last = norm(WIDTH) if final else nn.Identity()
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, img: Tensor) -> Tensor:
        x = self.patch(img).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.places
        x = self.last(self.block(x))
        return self.head(x[:, 0] if self.pool == "cls" else x.mean(1))


class OwnMobile(nn.Module):
    """A stem, an inverted residual with a skip and one with a stride, as in MobileNetV2."""

    def __init__(
        self,
        *,
        act: Callable[[Tensor], Tensor] = F.relu6,
        eps: float = 1e-5,
        pad: str = "zeros",
        dilation: int = 1,
        strided: str = "depthwise",
        skip: bool = True,
    ) -> None:
        super().__init__()
        self.act, self.skip = act, skip
        point, depth = (2, 1) if strided == "point" else (1, 2)
        conv = partial(nn.Conv2d, bias=False)
        self.a1, self.b1 = conv(8, 16, 1), conv(8, 16, 1, stride=point)
        self.a2 = conv(16, 16, 3, padding=dilation, dilation=dilation, padding_mode=pad, groups=16)
        self.b2 = conv(16, 16, 3, padding=1, groups=16, stride=depth)
        self.a3, self.b3 = conv(16, 8, 1), conv(16, 12, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, eps=eps) for c in (16, 16, 8, 16, 16, 12))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norms
        y = self.act(n[1](self.a2(self.act(n[0](self.a1(x))))))
        x = n[2](self.a3(y)) + (x if self.skip else 0)
        return n[5](self.b3(self.act(n[4](self.b2(self.act(n[3](self.b1(x))))))))


class OwnClipText(nn.Module):
    def __init__(self, *, pool: str = "end", causal: bool = True, **block: Any) -> None:
        super().__init__()
        self.pool, self.causal = pool, causal
        self.words, self.places = nn.Embedding(60, WIDTH), nn.Parameter(torch.zeros(12, WIDTH))
        self.block = Block(**block)
        self.last = nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.zeros(WIDTH, 24))

    def forward(self, ids: Tensor) -> Tensor:
        hide = torch.ones(12, 12, dtype=torch.bool).triu(1) if self.causal else None
        x = self.last(self.block(self.words(ids) + self.places, hide))
        at = ids.argmax(-1) if self.pool == "end" else torch.full((len(ids),), 11)
        return x[torch.arange(len(ids)), at] @ self.proj


class OwnWhisper(nn.Module):
    def __init__(
        self, *, final: bool = True, early: bool = False, table: str = "halves", pad: str = "zeros", **block: Any
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(10, WIDTH, 3, padding=1, stride=2 if early else 1, padding_mode=pad)
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, stride=1 if early else 2)
        angle = torch.arange(TIME)[:, None] * torch.exp(-math.log(10000) / 15 * torch.arange(16))
        waves = torch.cat([angle.sin(), angle.cos()], 1)
        woven = torch.stack([angle.sin(), angle.cos()], 2).flatten(1)
        self.register_buffer("waves", waves if table == "halves" else woven, persistent=False)
        self.act = block.get("act", F.gelu)
        self.block = Block(**block)
        self.last = nn.LayerNorm(WIDTH) if final else nn.Identity()

    def forward(self, mel: Tensor) -> Tensor:
        x = self.act(self.conv2(self.act(self.conv1(mel)))).transpose(1, 2)
        return self.last(self.block(x + self.waves))


class OwnPositions(nn.Module):
    """wav2vec 2.0's convolutional positions: an even kernel, one step too many at the end."""

    def __init__(self, *, trim: str = "end", act: Callable[[Tensor], Tensor] = F.gelu, groups: int = 4) -> None:
        super().__init__()
        self.trim, self.act = trim, act
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(WIDTH, WIDTH, 6, padding=3, groups=groups), dim=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.transpose(1, 2))
        return x + self.act(y[..., :-1] if self.trim == "end" else y[..., 1:]).transpose(1, 2)


class OwnLSTM(nn.Module):
    def __init__(self, *, candidate: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.candidate = candidate
        self.seen, self.state = nn.Linear(5, 4 * STATE), nn.Linear(STATE, 4 * STATE)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), STATE)
        out = []
        for t in range(x.shape[1]):
            i, f, g, o = (self.seen(x[:, t]) + self.state(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * self.candidate(g)
            h = o.sigmoid() * c.tanh()
            out.append(h)
        return torch.stack(out, 1)


class OwnGRU(nn.Module):
    def __init__(self, *, reset: str = "after") -> None:
        super().__init__()
        self.reset = reset
        self.seen, self.state = nn.Linear(5, 3 * STATE), nn.Linear(STATE, 3 * STATE)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), STATE)
        out = []
        for t in range(x.shape[1]):
            r, z, n = self.seen(x[:, t]).chunk(3, -1)
            hr, hz, hn = self.state(h).chunk(3, -1)
            r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
            if self.reset == "before":
                n = (n + F.linear(r * h, self.state.weight[2 * STATE :], self.state.bias[2 * STATE :])).tanh()
            else:
                n = (n + r * hn).tanh()
            h = (1 - z) * n + z * h
            out.append(h)
        return torch.stack(out, 1)


class OwnPatches(nn.Module):
    """PatchTST's encoder: scaled series in patches, batch norm in a post-norm block."""

    def __init__(self, *, norm: str = "batch", std: str = "whole", step: int = 4, eps: float = 1e-5) -> None:
        super().__init__()
        self.std, self.step = std, step
        self.patch = nn.Linear(8, WIDTH)
        self.places = nn.Parameter(torch.zeros(7, WIDTH))
        self.att = Attention(HEADS)
        kind = partial(nn.BatchNorm1d, eps=eps) if norm == "batch" else partial(nn.LayerNorm, eps=eps)
        self.norm1, self.norm2 = kind(WIDTH), kind(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.transpose(1, 2)).transpose(1, 2) if isinstance(norm, nn.BatchNorm1d) else norm(x)

    def forward(self, y: Tensor) -> Tensor:
        b, _, c = y.shape
        var = y.var(1, keepdim=True, unbiased=self.std == "sample")
        y = ((y - y.mean(1, keepdim=True)) / torch.sqrt(var + 1e-5)).transpose(1, 2).flatten(0, 1)
        y = y.unfold(1, 8, self.step)[:, :7]  # three steps apart there are more patches, of which it takes as many
        x = self.patch(y) + self.places
        x = self.normed(self.norm1, x + self.att(x, None))
        x = self.normed(self.norm2, x + self.down(F.gelu(self.up(x))))
        return x.reshape(b, c, 7, WIDTH)


class RMSNorm(nn.Module):
    """It has a bias, so that it has a place for everything that a layer norm holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias


# -- the libraries' ---------------------------------------------------------------------------------------------------
def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def awake(module: nn.Module, *shape: int) -> nn.Module:
    """Running statistics that fit the data, or what follows a batch norm is dead or never beyond 6."""
    shaken(module)
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for n in norms:
            n.weight.add_(1.5)
            n.momentum = None
        module.train()(torch.randn(shape, generator=rng(0)))
        for n in norms:
            n.running_mean += 0.2 * torch.randn(n.running_mean.shape, generator=rng(1))
            n.running_var *= 0.3 + 0.6 * torch.rand(n.running_var.shape, generator=rng(2))
    return module.eval()


def bert() -> nn.Module:
    t = pytest.importorskip("transformers")
    config = t.BertConfig(
        vocab_size=53,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=16,
    )
    return t.BertModel(config)


def gpt() -> nn.Module:
    t = pytest.importorskip("transformers")
    config = t.GPT2Config(
        vocab_size=53, n_embd=WIDTH, n_layer=1, n_head=HEADS, n_inner=FFN, n_positions=16, tie_word_embeddings=False
    )
    return t.GPT2LMHeadModel(config)


def vit() -> nn.Module:
    v = pytest.importorskip("timm.models.vision_transformer")
    return v.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=WIDTH, depth=1, num_heads=HEADS, mlp_ratio=FFN / WIDTH, num_classes=5
    )


def mobile() -> nn.Module:
    m = pytest.importorskip("torchvision.models.mobilenetv2")
    return nn.Sequential(m.InvertedResidual(8, 8, 1, 2), m.InvertedResidual(8, 12, 2, 2))


def clip() -> nn.Module:
    m = pytest.importorskip("open_clip.model")
    v = m.CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=8, image_size=16)
    t = m.CLIPTextCfg(context_length=12, vocab_size=60, width=WIDTH, heads=HEADS, layers=1, mlp_ratio=FFN / WIDTH)
    return m.CLIP(24, v, t)


def whisper() -> nn.Module:
    m = pytest.importorskip("whisper.model")
    made = m.AudioEncoder(10, TIME, WIDTH, HEADS, 1)
    made.blocks[0].mlp[0], made.blocks[0].mlp[2] = m.Linear(WIDTH, FFN), m.Linear(FFN, WIDTH)
    return made


def positions() -> nn.Module:
    m = pytest.importorskip("torchaudio.models.wav2vec2.components")
    return m.ConvolutionalPositionalEmbedding(WIDTH, 6, 4)


def patches() -> nn.Module:
    t = pytest.importorskip("transformers")
    config = t.PatchTSTConfig(
        num_input_channels=2,
        context_length=32,
        patch_length=8,
        patch_stride=4,
        num_hidden_layers=1,
        d_model=WIDTH,
        num_attention_heads=HEADS,
        ffn_dim=FFN,
        share_embedding=True,
        scaling="std",
        pre_norm=False,
    )
    return t.PatchTSTModel(config)


# -- inputs -----------------------------------------------------------------------------------------------------------
def padded(seed: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 53, (3, TIME), generator=rng(seed))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[2, 3:] = 0
    return ids, mask


def ended(seed: int) -> Tensor:
    """The end token has the largest id, and stands in another place in each row."""
    ids = torch.randint(1, 58, (3, 12), generator=rng(seed))
    for row, end in enumerate((6, 9, 10)):
        ids[row, end], ids[row, end + 1 :] = 59, 0
    return ids


def noise(*shape: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(shape, generator=rng(seed))


def call(module: nn.Module, x: Any) -> Any:
    return module(*x) if isinstance(x, tuple) else module(x)


def run_bert(module: nn.Module, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    out = module(input_ids=x[0], attention_mask=x[1])
    return out.last_hidden_state, out.pooler_output


@dataclass(frozen=True)
class Family:
    reference: Callable[[], nn.Module]
    own: Callable[..., nn.Module]
    inputs: Callable[[int], Any]
    run: Callable[[nn.Module, Any], Any] = call
    finish: Callable[[nn.Module], nn.Module] = shaken


FAMILIES = {
    "text bert": Family(bert, OwnBert, padded, run_bert),
    "text gpt2": Family(gpt, OwnGPT, lambda s: padded(s)[0], lambda m, x: m(x).logits),
    "vision vit": Family(vit, OwnViT, noise(2, 3, 16, 16)),
    "vision mobilenet": Family(
        mobile, OwnMobile, lambda s: 2 * noise(2, 8, 10, 10)(s), finish=lambda m: awake(m, 8, 8, 10, 10)
    ),
    "clip text": Family(clip, OwnClipText, ended, lambda m, x: m.encode_text(x)),
    "audio whisper": Family(whisper, OwnWhisper, noise(2, 10, 2 * TIME)),
    "audio positions": Family(positions, OwnPositions, noise(2, 11, WIDTH), lambda m, x: x + m(x)),
    "series lstm": Family(lambda: nn.LSTM(5, STATE, batch_first=True), OwnLSTM, noise(2, 2, 5), lambda m, x: m(x)[0]),
    "series gru": Family(lambda: nn.GRU(5, STATE, batch_first=True), OwnGRU, noise(2, 2, 5), lambda m, x: m(x)[0]),
    "series patchtst": Family(patches, OwnPatches, noise(3, 32, 2), lambda m, x: m(past_values=x).last_hidden_state),
}

RIGHT: dict[str, dict[str, Any]] = {
    "text bert": {},
    "text bert dropout": {"dropout": 0.5},
    "text gpt2": {},
    "vision vit": {},
    "vision mobilenet": {},
    "clip text": {},
    "audio whisper": {},
    "audio positions": {},
    "series lstm": {},
    "series patchtst": {},
}

MISSES: dict[str, dict[str, Any]] = {
    "text bert / GELU by tanh": {"act": tanh_gelu},
    "text bert / ReLU": {"act": F.relu},
    "text bert / eps 1e-5": {"eps": 1e-5},
    "text bert / eps 1e-6": {"eps": 1e-6},
    "text bert / no residual": {"skip": "first"},
    "text bert / pre-norm": {"pre": True},
    "text bert / two heads": {"heads": 2},
    "text bert / padding seen": {"masked": False},
    "text bert / no scale": {"scale": 1.0},
    "text bert / softmax over queries": {"axis": -2},
    "text bert / mean pooling": {"pool": "mean"},
    "text bert / positions off by one": {"off": 1},
    "text gpt2 / GELU by erf": {"act": F.gelu},
    "text gpt2 / not causal": {"causal": False},
    "text gpt2 / no final norm": {"final": False},
    "text gpt2 / RMSNorm": {"norm": RMSNorm},
    "text gpt2 / tied head": {"tied": True},
    "vision vit / eps 1e-5": {"eps": 1e-5},
    "vision vit / quick GELU": {"act": quick_gelu},
    "vision vit / post-norm": {"pre": False},
    "vision vit / mean pooling": {"pool": "mean"},
    "vision vit / no final norm": {"final": False},
    "vision vit / eight heads": {"heads": 8},
    "vision mobilenet / ReLU": {"act": F.relu},
    "vision mobilenet / batch norm eps": {"eps": 1e-3},
    "vision mobilenet / reflected border": {"pad": "reflect"},
    "vision mobilenet / dilated": {"dilation": 2},
    "vision mobilenet / stride in the wrong convolution": {"strided": "point"},
    "vision mobilenet / no residual": {"skip": False},
    "clip text / quick GELU": {"act": quick_gelu},
    "clip text / last token": {"pool": "last"},
    "clip text / not causal": {"causal": False},
    "audio whisper / GELU by tanh": {"act": tanh_gelu},
    "audio whisper / early stride": {"early": True},
    "audio whisper / sine table in pairs": {"table": "pairs"},
    "audio whisper / circular border": {"pad": "circular"},
    "audio positions / trimmed at the start": {"trim": "start"},
    "series lstm / sigmoid candidate": {"candidate": torch.sigmoid},
    "series gru / reset before": {"reset": "before"},
    "series patchtst / layer norm": {"norm": "layer"},
    "series patchtst / sample deviation": {"std": "sample"},
    "series patchtst / three steps apart": {"step": 3},
}


@cache
def reference(family: str) -> nn.Module:
    torch.manual_seed(1)
    f = FAMILIES[family]
    return f.finish(f.reference()).eval()


def made(name: str, options: dict[str, Any]) -> tuple[nn.Module, surgery.Probe, nn.Module]:
    """(reference, probe, target) of a case: the family's name is how the case's begins."""
    family = next(f for f in FAMILIES if name.startswith(f))
    f, source = FAMILIES[family], reference(family)
    torch.manual_seed(2)
    return source, surgery.Probe(source, f.run, call, f.inputs), shaken(f.own(**options))


@pytest.mark.parametrize("name", RIGHT)
def test_without_the_slip_it_is_proven(name: str) -> None:
    source, probe, target = made(name, RIGHT[name])
    target.train()  # a module in training is proven as it will be used: dropout is no slip
    report = surgery.graft(source.state_dict(), target, probe=probe)
    assert report.verdict == "proven"
    assert all(m.training for m in target.modules())
    with torch.no_grad():
        x = probe.inputs(77)  # type: ignore[operator]
        expected, got = probe.run_reference(source, x), call(target.eval(), x)
    for a, b in zip(*((o if isinstance(o, tuple) else (o,)) for o in (expected, got)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MISSES)
def test_a_near_miss_is_refused(name: str) -> None:
    source, probe, target = made(name, MISSES[name])
    target.train(mode=len(name) % 2 == 0)
    flags = {n: m.training for n, m in target.named_modules()}
    before = {n: (t, t.detach().clone()) for n, t in target.state_dict(keep_vars=True).items()}
    with pytest.raises(surgery.GraftError) as caught:
        surgery.graft(source.state_dict(), target, probe=probe)
    report = caught.value.report
    assert report is not None
    assert report.verdict.rank < surgery.Verdict("consistent").rank
    after = target.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for n, (tensor, value) in before.items():
        assert after[n] is tensor
        assert torch.equal(tensor, value)
    assert {n: m.training for n, m in target.named_modules()} == flags
    message = str(caught.value)
    assert message.startswith(f"{report.verdict}, and consistent is required: ")
    assert "\n" not in message
    assert "tensor(" not in message
    assert len(message) < 600
    assert caught.value.hint
