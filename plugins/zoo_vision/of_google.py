"""Google's own files of ViT (.npz): run by timm's model, which timm's own loader fills from the file.

The shapes of the file say everything that the model is built with: the heads stand apart in the kernels of attention.
timm computes GELU exactly, and reads these files as what its published weights of the same names were made from.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import nn

import surgery
import zoo
from zoo_vision.of_timm import features_of, head_of
from zoo_vision.running import Built

if TYPE_CHECKING:
    from surgery import Checkpoint

_BLOCK = "Transformer/encoderblock_"
_POSITIONS = "Transformer/posembed_input/pos_embedding"


def names(checkpoint: Checkpoint) -> bool:
    """Whether the tensors, of the whole or of a part, are named as in these files: by paths with slashes."""
    return any("/" in name for name in checkpoint)


def made(checkpoint: Checkpoint, part: str) -> Built:
    """The model of a file, whichever part of it the checkpoint is a view of.

    Raises ZooError ("weights") where the file holds another form of the model than timm builds, or is no file.
    """
    path = _file(checkpoint)
    whole = surgery.open(path)
    arguments = _arguments(whole)
    if any(name.startswith("pre_logits/") for name in whole):
        if part in ("head", "whole"):
            raise zoo.ZooError(
                f"{checkpoint.source}: its head stands on a further layer (pre_logits), which timm's model has not",
                kind="weights",
                hint="graft its part encoder, as in file:NAME.npz#encoder; or with --static, which runs nothing",
            )
        arguments["num_classes"] = 0

    def build() -> nn.Module:
        # Any architecture of this form; its sizes are replaced, and how it is shown pictures is the files' own.
        model: Any = timm.create_model("vit_base_patch16_224", pretrained=False, **arguments)
        if not any(value.is_meta for value in model.parameters()):
            model.load_pretrained(str(path))
        return model

    side, classes = arguments["img_size"], arguments["num_classes"]
    return Built(build, features_of, head_of, (side,), 3, classes=classes, loads=True, tokens=("class_token",))


def _file(checkpoint: Checkpoint) -> Path:
    if len(checkpoint.files) == 1 and checkpoint.files[0].suffix == ".npz":
        return checkpoint.files[0]
    raise zoo.ZooError(
        f"{checkpoint.source}: these are the names of Google's .npz, which timm reads from the file alone",
        kind="weights",
        hint="name the .npz, as in file:NAME.npz; or graft with --static, which runs nothing",
    )


def _arguments(whole: Checkpoint) -> dict[str, Any]:
    """Of timm.create_model, by the shapes."""
    attention, wide = "MultiHeadDotProductAttention_1/query/kernel", "MlpBlock_3/Dense_0/kernel"
    needed = ("embedding/kernel", "cls", _POSITIONS, f"{_BLOCK}0/{attention}", f"{_BLOCK}0/{wide}")
    missing = [name for name in needed if name not in whole]
    if missing:
        raise zoo.ZooError(
            f"{whole.source} lacks {', '.join(missing)}, which Google's files of ViT have",
            kind="weights",
            hint="graft with --static, which runs nothing",
        )
    high, patch, channels, width = whole["embedding/kernel"].shape
    positions = whole[_POSITIONS].shape[1] - 1
    side = round(positions**0.5)
    if high != patch or channels != 3 or side * side != positions:
        raise zoo.ZooError(
            f"{whole.source}: patches of {high} x {patch} pixels with {channels} colours on {positions} places, where "
            "square ones of 3 colours on a square are known",
            kind="weights",
            hint="graft with --static, which runs nothing",
        )
    blocks = {name.split("/")[1] for name in whole if name.startswith(_BLOCK)}
    inner = whole[f"{_BLOCK}0/{wide}"].shape[1]
    return {
        "img_size": side * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": whole[f"{_BLOCK}0/{attention}"].shape[1],
        # timm rounds down what it multiplies out again.
        "mlp_ratio": (inner + 0.5) / width,
        "num_classes": whole["head/bias"].shape[0] if "head/bias" in whole else 0,
    }
