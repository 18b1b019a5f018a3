"""Tiny seeded models of real libraries, built from config, with the inputs of one run: bodies to reshape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Body = tuple[nn.Module, Any]

_PLAIN = {"use_cache": False, "return_dict": False}


def unsettled(model: nn.Module, seed: int = 1) -> nn.Module:
    """Eval mode; no bias is zero any more, no gain one, no statistic at its start."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in model.state_dict().items():
        if not t.is_floating_point():
            continue
        if "running_var" in name:
            t.uniform_(0.5, 1.5, generator=generator)
        else:
            t.add_(torch.randn(t.shape, generator=generator) * 0.15)
    return model.eval()


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(seed))


def image(size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def gpt2() -> Body:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), {"input_ids": ids(), **_PLAIN}


def bert() -> Body:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=16,
    )
    return BertModel(config), {"input_ids": ids(), "return_dict": False}


def t5() -> Body:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=24, d_kv=5, d_ff=40, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(config), {"input_ids": ids(), "decoder_input_ids": ids(1), **_PLAIN}


def llama(heads: int = 6, kv_heads: int = 2, head_dim: int = 4) -> Body:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    return LlamaForCausalLM(config), {"input_ids": ids(), **_PLAIN}


def llama_mha() -> Body:
    return llama(heads=4, kv_heads=4, head_dim=6)


def neox() -> Body:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
    )
    return GPTNeoXForCausalLM(config), {"input_ids": ids(), **_PLAIN}


def vit() -> Body:
    import timm

    name = "vit_tiny_patch16_224"
    model = timm.create_model(name, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=5)
    return model, image()


def resnet() -> Body:
    import torchvision

    return torchvision.models.resnet18(num_classes=5), image(64)


def resnext() -> Body:
    import torchvision

    model = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, groups=4, width_per_group=8
    )
    return model, image(64)


def swin() -> Body:
    import torchvision

    return torchvision.models.swin_transformer.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5
    ), image()


def encoder() -> Body:
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    return nn.TransformerEncoderLayer(24, 4, 40, batch_first=True), x


def convnext() -> Body:
    import timm

    model = timm.create_model("convnext_atto", depths=(2, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5)
    return model, image(64)


def depthwise() -> Body:
    import torchvision

    return torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=5), image()


class Recurrent(nn.Module):
    """Two layers of an LSTM between projections."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(5, 8), nn.Linear(6, 3)
        self.lstm = nn.LSTM(8, 6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        got: Tensor = self.out(self.lstm(self.embed(x))[0])
        return got


def lstm() -> Body:
    return Recurrent(), torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))


class UNet(nn.Module):
    """Down and up again: a group norm, transposed convolutions, and channels joined from two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8)
        self.deep, self.up = nn.Conv2d(8, 12, 3, 2, 1), nn.ConvTranspose2d(12, 8, 2, 2)
        self.join, self.out = nn.Conv2d(16, 6, 3, 1, 1), nn.ConvTranspose2d(6, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.norm(self.down(x)))
        second = torch.relu(self.up(torch.relu(self.deep(first))))
        got: Tensor = self.out(torch.relu(self.join(torch.cat([second, first], dim=1))))
        return got


def unet() -> Body:
    return UNet(), image(16)


def densenet() -> Body:
    import torchvision

    return torchvision.models.DenseNet(8, (2, 2), 8, num_classes=5), image()


def beit() -> Body:
    import timm

    name = "beit_base_patch16_224"
    model = timm.create_model(name, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=5)
    return model, image()


def whisper() -> Body:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=60,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
    return WhisperModel(config), {"input_features": features, "decoder_input_ids": ids(), **_PLAIN}


BODIES: dict[str, Callable[[], Body]] = {
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "llama": llama,
    "neox": neox,
    "vit": vit,
    "resnet": resnet,
    "resnext": resnext,
    "swin": swin,
    "convnext": convnext,
    "depthwise": depthwise,
}


def body(name: str) -> Body:
    """A model and its arguments, seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, example = BODIES[name]() if name in BODIES else globals()[name]()
    return unsettled(model), example
