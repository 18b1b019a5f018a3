"""Models of torchvision. Its checkpoints come without a configuration: architectures are told by names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import zoo
from zoo_vision.running import SIZES, Built

if TYPE_CHECKING:
    from surgery import Checkpoint
# Shapes do not say how many heads a layer has: these are the widths that were published.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_LAST = ("heads.head.weight", "fc.weight", "head.weight", "classifier.1.weight", "classifier.2.weight")


def candidates(names: Iterable[str], checkpoint: Checkpoint) -> Iterator[tuple[str, Built]]:
    """The architectures, each with as many classes as the tensors say; none where torchvision is not installed."""
    wanted = tuple(names)
    if not wanted:
        return
    if wanted[0].startswith("vit_"):
        yield from _transformer(checkpoint)
        return
    torchvision = _torchvision(checkpoint)
    classes = next((int(checkpoint[name].shape[0]) for name in _LAST if name in checkpoint), 0)
    for name in wanted:
        build = partial(torchvision.models.get_model, name, weights=None, num_classes=classes or 1000)
        features, head = _RUNS[name.partition("_")[0].rstrip("0123456789")]
        # Swin makes its windows fit by padding, so it takes any size; so do the convolutional networks.
        yield name, Built(build, features, head, SIZES, 3, classes=classes)


def _torchvision(checkpoint: Checkpoint) -> Any:
    try:
        import torchvision
    except ImportError:
        raise zoo.ZooError(
            f"{checkpoint.source}: without a config.json it is compared with the models of torchvision, which is not "
            "installed",
            kind="extra",
            hint="pip install torchvision; or graft with --static, which runs nothing",
        ) from None
    return torchvision


def _transformer(checkpoint: Checkpoint) -> Iterator[tuple[str, Built]]:
    """ViT, by its shapes."""
    last = "heads.head.weight"
    if "conv_proj.weight" in checkpoint:
        width, channels, patch, _ = checkpoint["conv_proj.weight"].shape
        positions = checkpoint["encoder.pos_embedding"].shape[1]
    elif last in checkpoint:  # the head alone: what is below it is cut away, and any will do
        width, channels, patch, positions = checkpoint[last].shape[1], 3, 16, 2
    else:
        return
    layers = {name.split(".")[2] for name in checkpoint if name.startswith("encoder.layers.")}
    first = "encoder.layers.encoder_layer_0.mlp.0.weight"
    side = round((positions - 1) ** 0.5)
    if channels != 3 or width not in HEADS or side * side != positions - 1:
        return
    classes = int(checkpoint[last].shape[0]) if last in checkpoint else 0
    # A patch alone has no blocks, and any will do: they are cut away.
    wide = checkpoint[first].shape[0] if first in checkpoint else 4 * width

    def build() -> nn.Module:
        torchvision = _torchvision(checkpoint)
        model: nn.Module = torchvision.models.VisionTransformer(
            image_size=side * patch,
            patch_size=patch,
            num_layers=max(1, len(layers)),
            num_heads=HEADS[width],
            hidden_dim=width,
            mlp_dim=wide,
            num_classes=classes or 1000,
        )
        return model

    yield (
        "VisionTransformer",
        Built(build, _tokens, _first_token, (side * patch,), 3, classes=classes, tokens=("class_token",)),
    )


# ---------------------------------------------------------------------------------------------------- running


def _tokens(model: Any, pixels: Tensor) -> Tensor:
    """[B, 1 + N, C], the class first."""
    x = model._process_input(pixels)
    tokens = torch.cat([model.class_token.expand(x.shape[0], -1, -1), x], 1)
    encoded: Tensor = model.encoder(tokens)
    return encoded


def _first_token(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model.heads(tokens[:, 0])
    return logits


def _residual(model: Any, pixels: Tensor) -> Tensor:
    x = model.maxpool(model.relu(model.bn1(model.conv1(pixels))))
    features: Tensor = model.layer4(model.layer3(model.layer2(model.layer1(x))))
    return features


def _residual_head(model: Any, features: Tensor) -> Tensor:
    logits: Tensor = model.fc(model.avgpool(features).flatten(1))
    return logits


def _convolved(model: Any, pixels: Tensor) -> Tensor:
    features: Tensor = model.features(pixels)
    return features


def _pooled_flat(model: Any, features: Tensor) -> Tensor:
    logits: Tensor = model.classifier(model.avgpool(features).flatten(1))
    return logits


def _pooled(model: Any, features: Tensor) -> Tensor:
    logits: Tensor = model.classifier(model.avgpool(features))
    return logits


def _windows(model: Any, pixels: Tensor) -> Tensor:
    """[B, H, W, C]"""
    features: Tensor = model.norm(model.features(pixels))
    return features


def _windows_head(model: Any, features: Tensor) -> Tensor:
    logits: Tensor = model.head(features.mean((1, 2)))
    return logits


_Run = tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]
_RUNS: dict[str, _Run] = {
    "resnet": (_residual, _residual_head),
    "resnext": (_residual, _residual_head),
    "wide": (_residual, _residual_head),
    "efficientnet": (_convolved, _pooled_flat),
    "convnext": (_convolved, _pooled),
    "swin": (_windows, _windows_head),
}
