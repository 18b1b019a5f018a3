"""ResNet and what has its form. timm and torchvision name its tensors alike, and compute the same."""

from __future__ import annotations

from zoo import Source
from zoo_vision.family import TIMM, TORCHVISION, TRANSFORMERS, Family, both, hub

_STAGES = ("layer1", "layer2", "layer3", "layer4")

FAMILY = Family(
    name="resnet",
    prefixes=("resnet", "resnext", "wide_resnet", "seresnet", "seresnext", "ecaresnet", "test_resnet"),
    not_from=("resnetv2_", "resnetaa", "resnetrs"),
    layouts={
        TIMM: ("conv1*.weight", "layer1.0.conv1.weight", "layer1.0.bn1.running_mean", "layer4.0.conv1.weight"),
        TRANSFORMERS: (
            "*embedder.embedder.convolution.weight",
            "*encoder.stages.0.layers.0.layer.*",
        ),
    },
    pieces={
        TIMM: {
            "stem": ("conv1", "bn1"),
            "body": ("conv1", "bn1", *_STAGES),
            "head": ("fc",),
        },
        TRANSFORMERS: {
            "stem": both("resnet", "embedder"),
            "body": both("resnet", "embedder", "encoder"),
            "head": ("classifier",),
        },
    },
    bodies={"resnet": "resnet"},
    candidates={
        # Without a configuration the common form is what is built; it is torchvision's, and timm's of the same name.
        TORCHVISION: (
            *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d"),
            *("resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
        ),
        TIMM: ("resnet18d", "resnet34d", "resnet50d", "resnet101d", "resnet26"),
    },
)

# Weights that torchvision trained have its licence, as timm's registry states for each.
_TORCHVISION_18, _TORCHVISION_50, _TORCHVISION_WIDE = (
    (Source("hub", f"timm/{model}.tv_in1k", licence="bsd-3-clause"),)
    for model in ("resnet18", "resnet50", "wide_resnet50_2")
)

ENTRIES = (
    FAMILY.entry(
        {
            "18": hub("resnet18.a1_in1k"),
            "34": hub("resnet34.a1_in1k"),
            "50": hub("resnet50.a1_in1k"),
            "101": hub("resnet101.a1h_in1k"),
            "152": hub("resnet152.a1h_in1k"),
            "18-torchvision": _TORCHVISION_18,
            "50-torchvision": _TORCHVISION_50,
            "50d": hub("resnet50d.ra2_in1k"),
            "next50": hub("resnext50_32x4d.a1h_in1k"),
            "wide50": _TORCHVISION_WIDE,
        },
        "50",
        "apache-2.0",
    ),
)

stem_probe = FAMILY.probe("stem")
body_probe = FAMILY.probe("body")
head_probe = FAMILY.probe("head")
whole_probe = FAMILY.probe("whole")
