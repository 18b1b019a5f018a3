"""ViT, the plain vision transformer, as timm, torchvision and transformers have it."""

from __future__ import annotations

from zoo_vision.family import JAX, TIMM, TORCHVISION, TRANSFORMERS, Family, both, hub

# Pieces of every plain transformer of timm. What stands before the blocks is embedded already.
TIMM_PATCH = ("patch_embed", "cls_token", "reg_token", "dist_token", "pos_embed", "norm_pre")
TIMM_PIECES = {
    "patch": TIMM_PATCH,
    "encoder": (*TIMM_PATCH, "blocks", "norm"),
    "head": ("fc_norm", "head", "head_dist"),
}

FAMILY = Family(
    name="vit",
    prefixes=("vit_", "flexivit_", "test_vit"),
    layouts={
        TIMM: ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"),
        TORCHVISION: ("conv_proj.weight", "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"),
        TRANSFORMERS: (
            "*embeddings.patch_embeddings.projection.weight",
            "*encoder.layer.0.attention.attention.query.weight",
            "*encoder.layer.0.layernorm_before.weight",
        ),
        # Google's own files, by which the model was first published.
        JAX: ("embedding/kernel", "Transformer/encoderblock_0/*"),
    },
    pieces={
        TIMM: TIMM_PIECES,
        TORCHVISION: {
            "patch": ("conv_proj", "class_token", "encoder.pos_embedding"),
            "encoder": ("conv_proj", "class_token", "encoder"),
            "head": ("heads",),
        },
        TRANSFORMERS: {
            "patch": both("vit", "embeddings"),
            "encoder": both("vit", "embeddings", "encoder", "layernorm"),
            "head": ("classifier",),
        },
        JAX: {
            "patch": ("embedding/*", "cls", "Transformer/posembed_input/*"),
            "encoder": ("embedding/*", "cls", "Transformer/*"),
            "head": ("head/*", "pre_logits/*"),
        },
    },
    bodies={"vit": "vit"},
    candidates={
        TIMM: (
            *("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224"),
            *("vit_small_patch32_224", "vit_base_patch32_224", "vit_large_patch32_224", "vit_base_patch8_224"),
            *("vit_huge_patch14_224", "vit_large_patch14_224"),
        ),
        TORCHVISION: ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"),
    },
    # BEiT and its like; CLIP's towers, which normalise before the first block.
    never=(
        "blocks.0.attn.q_bias",
        "blocks.0.attn.relative_position_bias_table",
        "norm_pre.weight",
        "dist_token",
        "*distillation_token",
        "conv_root/kernel",  # Google's hybrids, whose patches are cut from a ResNet's features
    ),
)

ENTRIES = (
    FAMILY.entry(
        {
            "tiny": hub("vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
            "small": hub("vit_small_patch16_224.augreg_in21k_ft_in1k"),
            "base": hub("vit_base_patch16_224.augreg_in21k_ft_in1k"),
            "base-384": hub("vit_base_patch16_384.augreg_in21k_ft_in1k"),
            "base-32": hub("vit_base_patch32_224.augreg_in21k_ft_in1k"),
            "base-in21k": hub("vit_base_patch16_224.augreg_in21k"),
            "large": hub("vit_large_patch16_224.augreg_in21k_ft_in1k"),
            "huge-in21k": hub("vit_huge_patch14_224.orig_in21k"),
        },
        "base",
        "apache-2.0",
    ),
)

patch_probe = FAMILY.probe("patch")
encoder_probe = FAMILY.probe("encoder")
head_probe = FAMILY.probe("head")
whole_probe = FAMILY.probe("whole")
