"""DeiT: ViT's form, trained by distillation; those with a token for the teacher have a second head."""

from __future__ import annotations

from zoo_vision.family import TIMM, TRANSFORMERS, Family, both, hub
from zoo_vision.vit import TIMM_PIECES

FAMILY = Family(
    name="deit",
    prefixes=("deit_", "deit3_"),
    layouts={
        TIMM: ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"),
        TRANSFORMERS: ("*embeddings.distillation_token", "*encoder.layer.0.attention.attention.query.weight"),
    },
    pieces={
        TIMM: TIMM_PIECES,
        TRANSFORMERS: {
            "patch": both("deit", "embeddings"),
            "encoder": both("deit", "embeddings", "encoder", "layernorm"),
            "head": ("classifier", "cls_classifier", "distillation_classifier"),
        },
    },
    bodies={"deit": "deit"},
    candidates={
        TIMM: (
            *("deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224"),
            "deit_base_distilled_patch16_224",
        ),
    },
)

ENTRIES = (
    FAMILY.entry(
        {
            "tiny": hub("deit_tiny_patch16_224.fb_in1k"),
            "small": hub("deit_small_patch16_224.fb_in1k"),
            "base": hub("deit_base_patch16_224.fb_in1k"),
            "tiny-distilled": hub("deit_tiny_distilled_patch16_224.fb_in1k"),
            "small-distilled": hub("deit_small_distilled_patch16_224.fb_in1k"),
            "base-distilled": hub("deit_base_distilled_patch16_224.fb_in1k"),
            "3-small": hub("deit3_small_patch16_224.fb_in1k"),
            "3-base": hub("deit3_base_patch16_224.fb_in1k"),
            "3-large": hub("deit3_large_patch16_224.fb_in1k"),
        },
        "base",
        "apache-2.0",
    ),
)

patch_probe = FAMILY.probe("patch")
encoder_probe = FAMILY.probe("encoder")
head_probe = FAMILY.probe("head")
whole_probe = FAMILY.probe("whole")
