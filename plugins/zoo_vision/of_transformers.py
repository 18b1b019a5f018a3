"""Models of transformers, by the model_type of their config.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

import zoo
from zoo_vision.family import TRANSFORMERS, Family
from zoo_vision.running import SIZES, fill, first_tokens, hidden_inputs, pixel_inputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from surgery import Checkpoint

_VARIANTS = ("plain", "shortest", "longest")
_ANY_SIZE = ("resnet", "convnext", "convnextv2")
_POOLERS = ("vit", "deit", "swin")  # their classes take add_pooling_layer
_TOKENS = {"vit": ("class_token",), "deit": ("class_token", "distillation_token"), "dinov2": ("class_token",)}

# Names of a running model -> those of published files. transformers renames on load and on save; an older one does not.
_RENAMED: Mapping[str, str] = {
    r"(^|\.)layers\.(\d+)\.(?=attention|layernorm|mlp)": r"\1encoder.layer.\2.",
    r"attention\.relative_position_bias\.": "attention.self.",
    r"encoder\.layers\.(\d+)\.(.*)attention\.(q|k|v)_proj": r"encoder.layers.\1.\2attention.self.\3_proj",
    r"encoder\.layer\.(\d+)\.attention\.(q|k|v)_proj": r"encoder.layer.\1.attention.attention.\2_proj",
    r"q_proj": "query",
    r"k_proj": "key",
    r"v_proj": "value",
    r"attention\.o_proj": "attention.output.dense",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
}


def published(name: str, *, mlp: bool = True) -> str:
    """The name that a tensor has in published files.

    >>> published("vit.layers.3.attention.o_proj.bias")
    'vit.encoder.layer.3.attention.output.dense.bias'
    >>> published("encoder.layers.0.blocks.1.attention.q_proj.weight")
    'encoder.layers.0.blocks.1.attention.self.query.weight'
    """
    for pattern, replacement in _RENAMED.items():
        if mlp or not pattern.startswith("mlp"):
            name = re.sub(pattern, replacement, name)
    return name


def configured(config: Mapping[str, Any]) -> PretrainedConfig:
    """As transformers reads it; attention in plain operations."""
    made: PretrainedConfig = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    made._attn_implementation = "eager"
    return made


def probe(family: Family, part: str, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    known = configured(config)
    kind = str(config["model_type"])
    if kind not in family.bodies:
        raise zoo.ZooError(
            f"config.json says that the model_type is {kind}, and {family.name} of transformers is "
            + (" or ".join(family.bodies) or "not known here"),
            kind="weights",
        )
    image = known.image_size if kind not in _ANY_SIZE else SIZES[1]
    height, width = map(int, image if isinstance(image, (list, tuple)) else (image, image))
    pixels = pixel_inputs(
        SIZES if kind in _ANY_SIZE else (height,), int(known.num_channels), width if width != height else 0
    )
    if part == "head":
        return _head(known, kind, family.bodies[kind], (height, width), checkpoint)
    body = family.bodies[kind]
    prefix = f"{body}." if any(name.startswith(f"{body}.") for name in checkpoint) else ""
    model = zoo.unfilled(lambda: made(known, kind, checkpoint if part == "whole" else None))
    if part == "whole":
        filled(model, checkpoint)
        return _whole(model, body if _headed(checkpoint) else "", pixels)
    if part in ("patch", "stem"):
        (name,) = {each for each in family.pieces[TRANSFORMERS][part] if "." not in each and hasattr(model, each)}
        piece: nn.Module = model.get_submodule(name)
        filled(piece, checkpoint, f"{prefix}{name}.")
        return zoo.PartProbe(piece, _embedded, pixels, _VARIANTS, ("embeddings",))
    if not hasattr(model, "layernorm") or f"{prefix}layernorm.weight" not in checkpoint:
        model.layernorm = nn.Identity()  # behind the pooling, and so the head's
    filled(model, checkpoint, prefix)
    probe = zoo.PartProbe(model, _last, pixels, _VARIANTS, ("last_hidden_state",))
    return first_tokens(probe, _TOKENS.get(kind, ()))


class Given(nn.Module):
    """In the place of a body: what it is called with is taken for the last hidden state. The library's own class for
    classification does the rest; what pools does so in the body, and here."""

    def __init__(self, kind: str, layernorm: nn.Module | None) -> None:
        super().__init__()
        self.pooled = _POOLED.get(kind)
        self.answer: Any = transformers.modeling_outputs.BaseModelOutputWithPooling
        if kind == "swin":
            self.answer = transformers.models.swin.modeling_swin.SwinModelOutput
        if layernorm is not None:
            self.layernorm = layernorm

    def forward(self, pixel_values: Tensor, **_: object) -> Any:
        pooled = self.pooled(pixel_values) if self.pooled is not None else None
        if pooled is not None and hasattr(self, "layernorm"):
            pooled = self.layernorm(pooled)
        return self.answer(last_hidden_state=pixel_values, pooler_output=pooled)


_POOLED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "swin": lambda tokens: tokens.mean(1),
    "resnet": lambda features: features.mean((2, 3), keepdim=True),
    "convnext": lambda features: features.mean((2, 3)),
    "convnextv2": lambda features: features.mean((2, 3)),
}


def _head(
    known: PretrainedConfig, kind: str, body: str, image: tuple[int, int], checkpoint: Checkpoint
) -> zoo.PartProbe:
    """From the last hidden state to logits."""

    def build() -> nn.Module:
        model = made(known, kind, checkpoint)
        inner = model.get_submodule(body)
        behind = getattr(inner, "layernorm", None) if kind.startswith("convnext") else None
        setattr(model, body, Given(kind, behind))
        return model

    model = zoo.unfilled(build)
    filled(model, checkpoint)
    with torch.device("meta"):
        shape = made(known, kind, None)(torch.empty(1, known.num_channels, *image)).last_hidden_state.shape[1:]
    return zoo.PartProbe(
        model, lambda m, x: (m(x["hidden_states"]).logits,), hidden_inputs(shape), ("plain", "shortest"), ("logits",)
    )


def filled(module: nn.Module, checkpoint: Checkpoint, prefix: str = "") -> None:
    """Fill it by the names of published files."""

    def at(name: str) -> str:
        for spelled in (prefix + name, published(prefix + name), published(prefix + name, mlp=False)):
            if spelled in checkpoint:
                return spelled
        return published(prefix + name)

    fill(module, checkpoint, at)


def _headed(checkpoint: Checkpoint) -> bool:
    return any("classifier." in name for name in checkpoint)


def made(known: PretrainedConfig, kind: str, checkpoint: Checkpoint | None) -> nn.Module:
    """A body without pooling, or what the checkpoint's tensors ask for."""
    config_class = type(known)
    body: Callable[..., nn.Module] = transformers.MODEL_MAPPING[config_class]
    if checkpoint is None or not _headed(checkpoint):
        if kind not in _POOLERS:
            return body(known)
        return body(known, add_pooling_layer=checkpoint is not None and "pooler.dense.weight" in checkpoint)
    last = next(name for name in checkpoint if name.endswith("weight") and "classifier." in name)
    known.num_labels = int(checkpoint[last].shape[0])
    if kind == "deit" and "distillation_classifier.weight" in checkpoint:
        return transformers.DeiTForImageClassificationWithTeacher(known)
    return getattr(transformers, body.__name__.removesuffix("Model") + "ForImageClassification")(known)


# ---------------------------------------------------------------------------------------------------- running


def _embedded(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    found = module(x["pixel_values"])
    return (found[0] if isinstance(found, tuple) else found,)


def _last(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (module(x["pixel_values"]).last_hidden_state,)


def _whole(model: nn.Module, body: str, pixels: Callable[[int, str], dict[str, Tensor]]) -> zoo.PartProbe:
    if not body:
        return zoo.PartProbe(model, _last, pixels, _VARIANTS, ("last_hidden_state",))

    def run(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        hook = module.get_submodule(body).register_forward_hook(
            lambda _module, _args, answer: kept.append(answer.last_hidden_state)
        )
        try:
            logits = module(x["pixel_values"]).logits
        finally:
            hook.remove()
        return kept[0], logits

    return zoo.PartProbe(model, run, pixels, _VARIANTS, ("last_hidden_state", "logits"))
