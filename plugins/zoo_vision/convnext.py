"""ConvNeXt: a convolutional network in the form of a transformer; V2 has another normalisation in its blocks."""

from __future__ import annotations

from zoo_vision.family import TIMM, TORCHVISION, TRANSFORMERS, Family, both, hub

FAMILY = Family(
    name="convnext",
    prefixes=("convnext_", "convnextv2_", "test_convnext"),
    layouts={
        TIMM: ("stem.0.weight", "stages.0.blocks.0.conv_dw.weight", "stages.0.blocks.0.mlp.fc1.weight"),
        TORCHVISION: ("features.0.0.weight", "features.1.0.layer_scale", "classifier.2.weight"),
        TRANSFORMERS: ("*embeddings.patch_embeddings.weight", "*encoder.stages.0.layers.0.dwconv.weight"),
    },
    pieces={
        TIMM: {"stem": ("stem",), "body": ("stem", "stages", "norm_pre"), "head": ("head",)},
        TORCHVISION: {"stem": ("features.0",), "body": ("features",), "head": ("classifier",)},
        # The last LayerNorm stands behind the pooling: it is the head's.
        TRANSFORMERS: {
            "stem": (*both("convnext", "embeddings"), *both("convnextv2", "embeddings")),
            "body": (*both("convnext", "embeddings", "encoder"), *both("convnextv2", "embeddings", "encoder")),
            "head": (*both("convnext", "layernorm"), *both("convnextv2", "layernorm"), "classifier"),
        },
    },
    bodies={"convnext": "convnext", "convnextv2": "convnextv2"},
    candidates={
        TIMM: (
            *("convnext_atto", "convnext_femto", "convnext_pico", "convnext_nano", "convnext_tiny", "convnext_small"),
            *("convnext_base", "convnext_large", "convnext_xlarge"),
            *("convnextv2_atto", "convnextv2_nano", "convnextv2_tiny", "convnextv2_base", "convnextv2_large"),
        ),
        TORCHVISION: ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
    },
)

ENTRIES = (
    FAMILY.entry(
        {
            "atto": hub("convnext_atto.d2_in1k"),
            "nano": hub("convnext_nano.in12k_ft_in1k"),
            "tiny": hub("convnext_tiny.fb_in1k"),
            "tiny-in12k": hub("convnext_tiny.in12k_ft_in1k"),
            "small": hub("convnext_small.fb_in1k"),
            "base": hub("convnext_base.fb_in1k"),
            "large": hub("convnext_large.fb_in1k"),
        },
        "tiny",
        "apache-2.0",
    ),
)

stem_probe = FAMILY.probe("stem")
body_probe = FAMILY.probe("body")
head_probe = FAMILY.probe("head")
whole_probe = FAMILY.probe("whole")
