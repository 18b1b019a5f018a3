"""DINOv2: a vision transformer with scales on its branches, trained without labels; some with register tokens."""

from __future__ import annotations

from zoo_vision.family import TIMM, TRANSFORMERS, Family, both, hub
from zoo_vision.vit import TIMM_PIECES

_SIZES = ("small", "base", "large", "giant")
_PLAIN = {size: f"vit_{size}_patch14_dinov2" for size in _SIZES}
_REGISTERS = {f"{size}-reg": f"vit_{size}_patch14_reg4_dinov2" for size in _SIZES}
_MODELS = {**_PLAIN, **_REGISTERS}

FAMILY = Family(
    name="dinov2",
    prefixes=tuple(_MODELS.values()),
    layouts={
        TIMM: ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma"),
        TRANSFORMERS: (
            "*embeddings.patch_embeddings.projection.weight",
            "*encoder.layer.0.attention.attention.query.weight",
            "*encoder.layer.0.layer_scale1.lambda1",
        ),
    },
    pieces={
        TIMM: TIMM_PIECES,
        TRANSFORMERS: {
            "patch": both("dinov2", "embeddings"),
            "encoder": both("dinov2", "embeddings", "encoder", "layernorm"),
            "head": ("classifier",),
        },
    },
    bodies={"dinov2": "dinov2"},
    candidates={TIMM: tuple(_MODELS.values())},
    never=("dist_token", "norm_pre.weight"),
)

ENTRIES = (FAMILY.entry({tag: hub(f"{model}.lvd142m") for tag, model in _MODELS.items()}, "base", "apache-2.0"),)

patch_probe = FAMILY.probe("patch")
encoder_probe = FAMILY.probe("encoder")
head_probe = FAMILY.probe("head")
whole_probe = FAMILY.probe("whole")
