"""The libraries' own models, tiny and seeded, and for each the target that is grafted into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from tests.mutations import models
from tests.mutations.models import FFN, HEADS, LAYERS, TIME, WIDTH
from tests.pairs import plan_of, shaken


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def awake(module: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Any]) -> nn.Module:
    """Running statistics that fit the data, or what follows a batch norm is dead."""
    shaken(module)
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for n in norms:
            n.momentum = None
        run(module.train(), x)
        for n in norms:
            n.running_mean += 0.2 * torch.randn(n.running_mean.shape, generator=rng(1))
            n.running_var *= 0.6 + 0.6 * torch.rand(n.running_var.shape, generator=rng(2))
    return module.eval()


# -- references -------------------------------------------------------------------------------------------------------
def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=53,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=16,
    )
    return shaken(BertModel(config, add_pooling_layer=False))


def gpt(tied: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=53, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=FFN, n_positions=16, tie_word_embeddings=tied
    )
    return shaken(GPT2LMHeadModel(config))


def vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return shaken(
        VisionTransformer(
            img_size=16,
            patch_size=4,
            embed_dim=WIDTH,
            depth=LAYERS,
            num_heads=HEADS,
            mlp_ratio=FFN / WIDTH,
            num_classes=5,
        )
    )


def clip() -> nn.Module:
    from open_clip import model as m

    v = m.CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=8, image_size=16)
    t = m.CLIPTextCfg(context_length=12, vocab_size=60, width=WIDTH, heads=HEADS, layers=LAYERS, mlp_ratio=FFN / WIDTH)
    return shaken(m.CLIP(24, v, t))


def whisper() -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        num_mel_bins=10,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=FFN,
        max_source_positions=TIME,
    )
    made = WhisperEncoder(config)
    with torch.no_grad():
        waves = made.embed_positions.weight.clone()
        shaken(made)
        made.embed_positions.weight.copy_(waves)
    return made


def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=53,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=FFN,
        num_layers=LAYERS,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        feed_forward_proj="relu",
    )
    return shaken(T5EncoderModel(config))


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", num_labels=5
    )
    return awake(ResNetForImageClassification(config), 2 * torch.randn(8, 3, 64, 64, generator=rng(0)), call)


def mobile() -> nn.Module:
    from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite

    def block() -> nn.Module:
        return InvertedResidual(8, 8, exp_ratio=2.0, se_layer=SqueezeExcite, act_layer=nn.SiLU)

    return awake(nn.Sequential(block(), block()), torch.randn(8, 8, 10, 10, generator=rng(0)), call)


def patches() -> nn.Module:
    from transformers import PatchTSTConfig, PatchTSTModel

    config = PatchTSTConfig(
        num_input_channels=2,
        context_length=32,
        patch_length=8,
        patch_stride=4,
        num_hidden_layers=LAYERS,
        d_model=WIDTH,
        num_attention_heads=HEADS,
        ffn_dim=FFN,
        share_embedding=True,
        scaling="std",
        pre_norm=False,
    )
    return awake(PatchTSTModel(config), torch.randn(8, 32, 2, generator=rng(0)), lambda m, x: m(past_values=x))


def positions() -> nn.Module:
    from transformers import Wav2Vec2Config
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2PositionalConvEmbedding

    config = Wav2Vec2Config(hidden_size=WIDTH, num_conv_pos_embeddings=6, num_conv_pos_embedding_groups=4)
    return shaken(Wav2Vec2PositionalConvEmbedding(config))


# -- inputs -----------------------------------------------------------------------------------------------------------
def call(module: nn.Module, x: Any) -> Any:
    return module(*x) if isinstance(x, tuple) else module(x)


def hidden(module: nn.Module, x: tuple[Tensor, Tensor]) -> Tensor:
    return module(input_ids=x[0], attention_mask=x[1]).last_hidden_state


def padded(seed: int) -> tuple[Tensor, Tensor]:
    """Edges too: one sequence of full length, one short, one of a single token."""
    ids = torch.randint(0, 53, (3, TIME), generator=rng(seed))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[2, 1 + seed % 3 :] = 0
    return ids, mask


def ended(seed: int) -> Tensor:
    """The end token has the largest id, and stands in another place in each row."""
    ids = torch.randint(1, 58, (3, 12), generator=rng(seed))
    for row, end in enumerate((6, 9, 10)):
        ids[row, end], ids[row, end + 1 :] = 59, 0
    return ids


def noise(*shape: int, size: float = 1.0) -> Callable[[int], Tensor]:
    return lambda seed: size * torch.randn(shape, generator=rng(seed))


@dataclass(frozen=True)
class Family:
    name: str
    reference: Callable[[], nn.Module]
    target: Callable[..., nn.Module]
    inputs: Callable[[int], Any]
    run: Callable[[nn.Module, Any], Any] = call
    rows: Callable[[], dict[str, str]] | None = None  # the mapping by hand; none: the mapper finds it


FAMILIES = {
    f.name: f
    for f in (
        Family("bert", bert, models.Bert, padded, hidden),
        Family("gpt2", lambda: gpt(False), models.Gpt, lambda s: padded(s)[0], lambda m, x: m(x).logits),
        Family("gpt2 tied", lambda: gpt(True), models.Gpt, lambda s: padded(s)[0], lambda m, x: m(x).logits),
        Family("vit", vit, models.Vit, noise(2, 3, 16, 16)),
        Family("clip text", clip, models.ClipText, ended, lambda m, x: m.encode_text(x)),
        Family(
            "whisper encoder",
            whisper,
            models.Whisper,
            noise(2, 10, 2 * TIME),
            lambda m, x: m(x).last_hidden_state,
        ),
        Family("t5 encoder", t5, models.T5, padded, hidden),
        Family("resnet", resnet, models.Resnet, noise(2, 3, 64, 64, size=2.0), lambda m, x: m(x).logits),
        Family("efficientnet blocks", mobile, models.Mobile, noise(2, 8, 10, 10)),
        Family("patchtst", patches, models.Patches, noise(3, 32, 2), lambda m, x: m(past_values=x).last_hidden_state),
        Family(
            "lstm",
            lambda: shaken(nn.LSTM(5, 8, batch_first=True)),
            models.Lstm,
            noise(2, 3, 5),
            lambda m, x: m(x)[0],
        ),
        Family("wav2vec2 positions", positions, models.Positions, noise(2, 11, WIDTH), lambda m, x: x + m(x)),
    )
}


@dataclass(frozen=True)
class Right:
    """A correct graft: the reference, what a checkpoint of it holds, how both run, and the plan."""

    family: Family
    reference: nn.Module
    source: dict[str, Tensor]
    probe: surgery.Probe
    plan: surgery.Plan

    def target(self, **slip: Any) -> nn.Module:
        torch.manual_seed(2)
        return shaken(self.family.target(**slip)).eval()


def _family(name: str) -> Family:
    if name in FAMILIES:
        return FAMILIES[name]
    from tests.mutations.heldout_weights import HELDOUT

    return HELDOUT[name]


@cache
def right(name: str) -> Right:
    """The correct graft of a family, mapped and proven by surgery.graft."""
    family = _family(name)
    torch.manual_seed(1)
    reference = family.reference().eval()
    probe = surgery.Probe(reference, family.run, call, family.inputs)
    torch.manual_seed(2)
    target = shaken(family.target()).eval()
    source = {n: t.detach().clone() for n, t in reference.state_dict().items()}
    plan = plan_of(source, target, family.rows()) if family.rows is not None else None
    report = surgery.graft(source, target, probe=probe, plan=plan, require="proven")
    return Right(family, reference, source, probe, report.plan)
