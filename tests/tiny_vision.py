"""Tiny models of every family of vision models, made and saved by timm in the form that is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Row:
    """An entry, the architecture of timm that stands for it at tiny size, and the example's arguments for that size."""

    entry: str
    architecture: str
    part: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sets: Mapping[str, Any] = field(default_factory=dict)
    classes: int = 7

    def __str__(self) -> str:
        return self.entry


_PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4}
_SIZES = {"side": 32, "patch": 8, "width": 16, "depth": 2, "heads": 4}
_WINDOWS = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}

ROWS = (
    Row("vit", "vit_tiny_patch16_224", "encoder", _PLAIN, {**_SIZES, "wide": 64}),
    Row("deit", "deit_tiny_distilled_patch16_224", "encoder", _PLAIN, _SIZES),
    Row(
        "dinov2",
        "vit_small_patch14_dinov2",
        "encoder",
        {**_PLAIN, "img_size": 28, "patch_size": 14},
        {"side": 28, "dim": 16, "depth": 2, "heads": 4},
        classes=0,
    ),
    Row(
        "swin",
        "swin_tiny_patch4_window7_224",
        "encoder",
        _WINDOWS,
        {"side": 32, "window": 4, "dim": 8, "depths": (2, 2), "heads": (2, 4)},
    ),
    Row(
        "resnet",
        "resnet50",
        "body",
        {"layers": (1, 2, 1, 1), "channels": (8, 12, 16, 20)},
        {"widths": (8, 12, 16, 20), "depths": (1, 2, 1, 1)},
    ),
    Row(
        "resnetv2",
        "resnetv2_50",
        "body",
        {"layers": (1, 2, 1, 1), "channels": (32, 64, 96, 128), "stem_chs": 16},
        {"stem": 16, "widths": (8, 16, 24, 32), "depths": (1, 2, 1, 1)},
    ),
    Row("efficientnet", "efficientnet_b0", "body"),
    Row(
        "convnext",
        "convnext_tiny",
        "body",
        {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20)},
        {"dims": (8, 12, 16, 20), "depths": (1, 1, 2, 1)},
    ),
)


def shaken(model: nn.Module) -> nn.Module:
    """With no bias zero and no norm the identity; norms of batches know what comes to them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            model.train()
            call = getattr(model, "forward_features", model)
            call(torch.randn(8, 3, 64, 64))
        for norm in norms:
            norm.momentum = 0.1
    return model.eval()


def save(row: Row, folder: Path) -> nn.Module:
    """As timm saves a model for the hub: config.json and model.safetensors."""
    import timm
    from timm.models import save_for_hf

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = shaken(timm.create_model(row.architecture, num_classes=row.classes, **row.arguments))
    save_for_hf(model, folder, model_args=dict(row.arguments), safe_serialization=True)
    return model
