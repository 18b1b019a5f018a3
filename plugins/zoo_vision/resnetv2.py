"""ResNetV2: norms stand before the convolutions, and one more at the end. Those of BiT normalise groups of channels and
standardise their kernels, under the same names: which it is, only a configuration tells."""

from __future__ import annotations

from zoo_vision.family import TIMM, Family, hub

FAMILY = Family(
    name="resnetv2",
    prefixes=("resnetv2_",),
    layouts={
        TIMM: ("stem.conv*.weight", "stages.0.blocks.0.norm1.weight", "stages.0.blocks.0.conv1.weight", "norm.weight"),
    },
    pieces={
        TIMM: {"stem": ("stem",), "body": ("stem", "stages", "norm"), "head": ("head",)},
    },
    bodies={},
    candidates={
        TIMM: (
            *("resnetv2_18", "resnetv2_34", "resnetv2_50", "resnetv2_101", "resnetv2_152"),
            *("resnetv2_18d", "resnetv2_34d", "resnetv2_50d", "resnetv2_50d_gn", "resnetv2_50x1_bit"),
        ),
    },
)

ENTRIES = (
    FAMILY.entry(
        {
            "18": hub("resnetv2_18.ra4_e3600_r224_in1k"),
            "34": hub("resnetv2_34.ra4_e3600_r224_in1k"),
            "50": hub("resnetv2_50.a1h_in1k"),
            "101": hub("resnetv2_101.a1h_in1k"),
            "50-bit": hub("resnetv2_50x1_bit.goog_in21k_ft_in1k"),
            "101-bit": hub("resnetv2_101x1_bit.goog_in21k_ft_in1k"),
        },
        "50",
        "apache-2.0",
    ),
)

stem_probe = FAMILY.probe("stem")
body_probe = FAMILY.probe("body")
head_probe = FAMILY.probe("head")
whole_probe = FAMILY.probe("whole")
