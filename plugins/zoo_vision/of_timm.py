"""Models of timm: by their config.json, or by an architecture's name and what the tensors' shapes say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

import zoo
from zoo_vision.running import SIZES, Built

if TYPE_CHECKING:
    from surgery import Checkpoint
_KNOWN = {field.name for field in fields(PretrainedCfg)}


def arguments(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(architecture, arguments of timm.create_model), as a config.json on the hub has them. Nothing is pretrained."""
    given = dict(config.get("pretrained_cfg") or {})
    if "num_classes" in config:
        given["num_classes"] = config["num_classes"]
    known = {name: _plain(value) for name, value in given.items() if name in _KNOWN}
    kept: dict[str, Any] = {name: _plain(value) for name, value in (config.get("model_args") or {}).items()}
    kept.setdefault("num_classes", known.get("num_classes"))
    architecture = str(config["architecture"])
    if not timm.is_model(architecture):
        raise zoo.ZooError(
            f"config.json says that the architecture is {architecture}, which timm {timm.__version__} does not have",
            kind="weights",
            hint="pip install --upgrade timm; or graft with --static, which runs nothing",
        )
    return architecture, {"pretrained": False, "pretrained_cfg": known, **kept}


def _plain(value: Any) -> Any:
    """JSON has lists where timm has tuples."""
    return tuple(_plain(each) for each in value) if isinstance(value, list) else value


def configured(config: Mapping[str, Any]) -> Built:
    """The model that a config.json describes."""
    architecture, kept = arguments(config)
    return _built(architecture, kept)


def _built(architecture: str, kept: Mapping[str, Any], at: Callable[[str], str] = str) -> Built:
    def build() -> nn.Module:
        model: nn.Module = timm.create_model(architecture, **kept)
        return model

    with torch.device("meta"):
        model: Any = build()
    known: Mapping[str, Any] = model.pretrained_cfg
    side = _fixed(model, known)
    return Built(
        build,
        features_of,
        head_of,
        (side,) if side else SIZES,
        int(known.get("input_size", (3,))[0]),
        at,
        int(getattr(model, "num_classes", 0)),
        model,
        tokens=tokens(model),
    )


def tokens(model: Any) -> tuple[str, ...]:
    """What stands before the patches in the features of such a model. Registers mean nothing by themselves."""
    if getattr(model, "cls_token", None) is None or getattr(model, "norm", None) is None:
        return ()
    return ("class_token", "distillation_token") if getattr(model, "dist_token", None) is not None else ("class_token",)


def _fixed(model: Any, known: Mapping[str, Any]) -> int:
    """The side of the images that a model is made for; 0 where it takes others as well."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        return int(size[0])
    return int(known["input_size"][-1]) if known.get("fixed_input_size") else 0


def features_of(model: Any, pixels: Tensor) -> Tensor:
    features: Tensor = model.forward_features(pixels)
    return features


def head_of(model: Any, features: Tensor) -> Tensor:
    logits: Tensor = model.forward_head(features)
    return logits


# ---------------------------------------------------------------------------------------------------- unlabelled


def candidates(names: Iterable[str], checkpoint: Checkpoint) -> Iterator[tuple[str, Built]]:
    """The architectures, each with as many classes and for images of the size that the tensors say."""
    kept: dict[str, Any] = {"pretrained": False, "num_classes": _classes(checkpoint)}
    for name in filter(lambda name: _could_be(name, checkpoint), names):
        sized = {**kept, **_sized(name, checkpoint)}
        yield name, _built(name, sized)


def _could_be(name: str, checkpoint: Checkpoint) -> bool:
    """Whether it is worth building: of EfficientNets, the lite ones have no squeezing, and all others do."""
    if "efficientnet" not in name or not any("blocks." in each for each in checkpoint):
        return True
    return any("se_reduce" in each or ".se." in each for each in checkpoint) != ("lite" in name)


def _classes(checkpoint: Checkpoint) -> int:
    for name in ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight", "_fc.weight"):
        if name in checkpoint:
            return int(checkpoint[name].shape[0])
    return 0


def _sized(architecture: str, checkpoint: Checkpoint) -> dict[str, int]:
    """A vision transformer has a row of its table of positions for each patch."""
    if "pos_embed" not in checkpoint or "patch_embed.proj.weight" not in checkpoint:
        return {}
    rows, patch = checkpoint["pos_embed"].shape[1], checkpoint["patch_embed.proj.weight"].shape[-1]
    side = int(rows**0.5)  # up to a few rows for the class, the teacher
    return {"img_size": side * patch} if 0 <= rows - side * side <= 2 else {}


_IN_BLOCK = {
    "conv_pw": "_expand_conv",
    "conv_dw": "_depthwise_conv",
    "conv_pwl": "_project_conv",
    "se.conv_reduce": "_se_reduce",
    "se.conv_expand": "_se_expand",
    "bn1": "_bn0",
    "bn2": "_bn1",
    "bn3": "_bn2",
}
# The first blocks do not expand: timm counts their convolutions and norms from one less.
_IN_FIRST = {**_IN_BLOCK, "conv_pw": "_project_conv", "bn1": "_bn1", "bn2": "_bn2"}
_AROUND = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}


def efficientnet_pytorch(names: Iterable[str], checkpoint: Checkpoint) -> Iterator[tuple[str, Built]]:
    """The package efficientnet_pytorch has TensorFlow's function, and counts its blocks without stages.

    >>> at = efficientnet_pytorch_names([1, 2])
    >>> at("blocks.1.1.bn3.weight"), at("blocks.0.0.conv_pw.weight"), at("bn2.bias")
    ('_blocks.2._bn2.weight', '_blocks.0._project_conv.weight', '_bn1.bias')
    """
    for name, made in candidates(names, checkpoint):
        bare: Any = made.bare
        yield name, replace(made, at=efficientnet_pytorch_names([len(stage) for stage in bare.blocks]))


def efficientnet_pytorch_names(stages: list[int]) -> Callable[[str], str]:
    """timm's names -> that package's, for stages of so many blocks."""
    starts = [sum(stages[:i]) for i in range(len(stages))]

    def at(name: str) -> str:
        found = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.((?:se\.)?\w+)(\..*)?", name)
        if found is None:
            top, dot, rest = name.partition(".")
            return _AROUND.get(top, f"_{top}") + dot + rest
        stage, block, inner, rest = int(found[1]), int(found[2]), found[3], found[4] or ""
        table = _IN_FIRST if stage == 0 else _IN_BLOCK
        return f"_blocks.{starts[stage] + block}.{table[inner]}{rest}"

    return at
