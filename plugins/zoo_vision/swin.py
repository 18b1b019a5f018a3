"""Swin: attention within windows that shift from block to block, in stages of ever fewer and wider tokens."""

from __future__ import annotations

from zoo_vision.family import TIMM, TORCHVISION, TRANSFORMERS, Family, both, hub

FAMILY = Family(
    name="swin",
    prefixes=("swin_",),
    layouts={
        TIMM: ("patch_embed.proj.weight", "layers.0.blocks.0.attn.relative_position_bias_table"),
        TORCHVISION: ("features.0.0.weight", "features.1.0.attn.relative_position_bias_table"),
        TRANSFORMERS: (
            "*embeddings.patch_embeddings.projection.weight",
            "*encoder.layers.0.blocks.0.attention.self.relative_position_bias_table",
        ),
    },
    pieces={
        TIMM: {
            "patch": ("patch_embed",),
            "encoder": ("patch_embed", "layers", "norm"),
            "head": ("head",),
        },
        TORCHVISION: {
            "patch": ("features.0",),
            "encoder": ("features", "norm"),
            "head": ("head",),
        },
        TRANSFORMERS: {
            "patch": both("swin", "embeddings"),
            "encoder": both("swin", "embeddings", "encoder", "layernorm"),
            "head": ("classifier",),
        },
    },
    bodies={"swin": "swin"},
    candidates={
        TIMM: (
            *("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224"),
            *("swin_large_patch4_window7_224", "swin_base_patch4_window12_384", "swin_large_patch4_window12_384"),
        ),
        TORCHVISION: ("swin_t", "swin_s", "swin_b"),
    },
)

ENTRIES = (
    FAMILY.entry(
        {
            "tiny": hub("swin_tiny_patch4_window7_224.ms_in1k"),
            "small": hub("swin_small_patch4_window7_224.ms_in1k"),
            "base": hub("swin_base_patch4_window7_224.ms_in1k"),
            "base-in22k": hub("swin_base_patch4_window7_224.ms_in22k_ft_in1k"),
            "large": hub("swin_large_patch4_window7_224.ms_in22k_ft_in1k"),
        },
        "tiny",
        "mit",
    ),
)

patch_probe = FAMILY.probe("patch")
encoder_probe = FAMILY.probe("encoder")
head_probe = FAMILY.probe("head")
whole_probe = FAMILY.probe("whole")
