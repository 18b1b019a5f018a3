"""The sizes of a vision model that a target may have otherwise: image, patch, window, channels of the input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo import Pictures, Sizes, joined, labelled

if TYPE_CHECKING:
    from surgery import Checkpoint

Pair = tuple[int, int]
_HEADS = tuple(
    f"{name}.{end}" for name in ("head", "head.fc", "fc", "classifier", "head_dist") for end in ("weight", "bias")
)
_BIAS = "relative_position_bias_table"


def sizes(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Sizes | None:
    """By the library that the configuration is of; torchvision's transformer says its sizes by its tensors."""
    found: Pictures | None = None
    if isinstance(config.get("architecture"), str):
        found = _timm(checkpoint, config)
    elif isinstance(config.get("model_type"), str):
        found = _transformers(checkpoint, config)
    elif "encoder.pos_embedding" in checkpoint and "conv_proj.weight" in checkpoint:
        found = _torchvision(checkpoint)
    return joined(found.sizes() if found is not None else None, _classes(checkpoint, config))


def _classes(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Sizes | None:
    """Rows of a head by the names of its classes: those of the configuration; ImageNet's where there are as many."""
    heads = tuple(name for name in checkpoint if name in _HEADS)
    counts = {checkpoint[name].shape[0] for name in heads}
    if len(counts) != 1:
        return None
    (count,) = counts
    if isinstance(config.get("model_type"), str):
        given = config.get("id2label") or {}
        named = [str(given[key]) for key in sorted(given, key=int)]
        namings = [named, [name.split(",")[0] for name in named]] if len(named) == count else []
        return labelled(namings, heads, lambda theirs: {("id2label",): dict(enumerate(theirs)), ("label2id",): None})
    if not isinstance(config.get("architecture"), str):
        return None
    from timm.data import ImageNetInfo

    given = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names") or []
    named = list(given) if isinstance(given, (list, tuple)) else [given[key] for key in sorted(given, key=int)]
    namings = [named] if len(named) == count else []
    if not namings and count == 1000:
        known = ImageNetInfo("imagenet-1k")
        described = [known.index_to_description(i) for i in range(count)]
        namings = [described, [name.split(",")[0] for name in described], known.label_names()]
    return labelled(namings, heads, lambda theirs: {("num_classes",): len(theirs)})


def _timm(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Pictures | None:
    from zoo_vision import of_timm

    made: Any = of_timm.configured(config)
    model = made.bare
    first = model.pretrained_cfg.get("first_conv") or ()
    names = (first,) if isinstance(first, str) else tuple(first)
    stem = tuple(name for name in (f"{each}.weight" for each in names) if name in checkpoint)
    if not stem:
        return None
    embed = getattr(model, "patch_embed", None)
    image = tuple(getattr(embed, "img_size", None) or model.pretrained_cfg["input_size"][-2:])
    patch = tuple(getattr(embed, "patch_size", None) or checkpoint[stem[0]].shape[2:])

    def configured(image: Pair, patch: Pair, channels: int, window: int) -> Mapping[tuple[str, ...], Any]:
        changed: dict[tuple[str, ...], Any] = {
            ("model_args", "in_chans"): channels,
            ("pretrained_cfg", "input_size"): [channels, *image],
        }
        if embed is not None:
            changed["model_args", "img_size"] = list(image)
        if embed is not None and patch != layout.patch:
            changed["model_args", "patch_size"] = list(patch) if patch[0] != patch[1] else patch[0]
        if window != layout.window:
            changed["model_args", "window_size"] = window
        return changed

    positions = "pos_embed" if "pos_embed" in checkpoint and embed is not None else ""
    biases = tuple(name for name in checkpoint if name.endswith(_BIAS) and "layers." in name)
    grid = math.prod(n // p for n, p in zip(image, patch, strict=True)) if positions else 0
    layout = Pictures(
        checkpoint,
        image=(image[0], image[1]),
        patch=(patch[0], patch[1]),
        channels=int(checkpoint[stem[0]].shape[1]),
        configured=configured,
        stem=stem,
        positions=positions,
        prefix=checkpoint[positions].shape[1] - grid if positions else 0,
        biases=biases,
        window=_side(checkpoint, biases),
        patches=embed is not None and tuple(checkpoint[stem[0]].shape[2:]) == patch,
    )
    return layout


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _side(checkpoint: Checkpoint, biases: tuple[str, ...]) -> int:
    return max(((math.isqrt(checkpoint[name].shape[0]) + 1) // 2 for name in biases), default=0)


def _transformers(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Pictures | None:
    ends = (
        "embeddings.patch_embeddings.projection.weight",
        "embedder.embedder.convolution.weight",
        "embeddings.patch_embeddings.weight",
    )
    stem = tuple(name for name in checkpoint if name.endswith(ends))[:1]
    if not stem:
        return None
    kernel = checkpoint[stem[0]].shape
    patched = stem[0].endswith("projection.weight")
    positions = next((name for name in checkpoint if name.endswith("embeddings.position_embeddings")), "")
    biases = tuple(name for name in checkpoint if name.endswith(_BIAS))
    image = _pair(config.get("image_size", 224))
    patch = (kernel[2], kernel[3])

    def configured(image: Pair, patch: Pair, channels: int, window: int) -> Mapping[tuple[str, ...], Any]:
        changed: dict[tuple[str, ...], Any] = {("num_channels",): channels}
        if positions or biases:
            changed["image_size",] = image[0] if image[0] == image[1] else list(image)
            changed["patch_size",] = patch[0]
        if biases:
            changed["window_size",] = window
        return changed

    grid = (image[0] // patch[0]) * (image[1] // patch[1])
    return Pictures(
        checkpoint,
        image=image,
        patch=patch,
        channels=kernel[1],
        configured=configured,
        stem=stem,
        positions=positions,
        prefix=checkpoint[positions].shape[1] - grid if positions else 0,
        biases=biases,
        window=_side(checkpoint, biases),
        square=bool(biases),
        patches=patched,
    )


def _torchvision(checkpoint: Checkpoint) -> Pictures:
    """The model is built from its tensors' shapes; images are square, and of three channels."""
    kernel = checkpoint["conv_proj.weight"].shape
    side = math.isqrt(checkpoint["encoder.pos_embedding"].shape[1] - 1) * kernel[2]

    def configured(image: Pair, patch: Pair, channels: int, window: int) -> Mapping[tuple[str, ...], Any]:
        return {}

    return Pictures(
        checkpoint,
        image=(side, side),
        patch=(kernel[2], kernel[3]),
        channels=kernel[1],
        configured=configured,
        stem=("conv_proj.weight",),
        positions="encoder.pos_embedding",
        prefix=1,
        square=True,
    )
