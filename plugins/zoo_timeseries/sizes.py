"""The sizes of PatchTST that a target may have otherwise: length of a patch, step between patches, context."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoo import Body, Resized, Sizes

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import Checkpoint

Value = int | tuple[int, ...]
_PATCH, _STRIDE, _CONTEXT = "patch length", "patch stride", "context"
_PATCH_WORDS = ("patch_length", "patch_len", "patch_size", "patch")
_STRIDE_WORDS = ("patch_stride", "stride", "step")
_CONTEXT_WORDS = ("context_length", "seq_len", "context", "input_length", "input_size", "lookback")


@dataclass(frozen=True)
class _Series:
    checkpoint: Checkpoint
    embedding: tuple[str, ...]  # one, or one for each channel
    places: str
    patch: int
    stride: int
    context: int
    prefix: int
    channels: int

    @property
    def width(self) -> int:
        return self.checkpoint[self.embedding[0]].shape[0]


def patchtst(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Sizes | None:
    """In the layout of transformers, with its configuration."""
    embedding = tuple(
        name for name in checkpoint if "embedder.input_embedding" in name and len(checkpoint[name].shape) == 2
    )
    places = next((name for name in checkpoint if name.endswith("positional_encoder.position_enc")), "")
    if not embedding or not places or "context_length" not in config:
        return None
    patch = checkpoint[embedding[0]].shape[1]
    stride, context = int(config.get("patch_stride", 1)), int(config["context_length"])
    prefix = checkpoint[places].shape[0] - _count(context, patch, stride)
    channels = int(config.get("num_input_channels", 1))
    series = _Series(checkpoint, embedding, places, patch, stride, context, prefix, channels)
    values: dict[str, Value] = {_PATCH: patch, _STRIDE: stride, _CONTEXT: context}
    return Sizes(values, lambda body: _wanted(series, body), lambda wanted: _resized(series, wanted))


def _count(context: int, patch: int, stride: int) -> int:
    return (context - patch) // stride + 1


def _wanted(series: _Series, body: Body) -> Iterator[Mapping[str, Value]]:
    rows = {count - more for count in body.rows(series.width).values() for more in (0, series.prefix)}
    for patch in _patches(series, body):
        same = [patch] if series.stride == series.patch else [series.stride]
        strides = [*(each for each in body.words(*_STRIDE_WORDS) if isinstance(each, int)), *same, series.stride]
        past = body.inputs.get("past_values", ())
        contexts = [past[1]] if len(past) == 3 else [n for n in body.words(*_CONTEXT_WORDS) if isinstance(n, int)]
        for context in dict.fromkeys([*contexts, series.context]):
            for stride in dict.fromkeys(strides):
                if 0 < patch <= context and stride > 0 and _count(context, patch, stride) in rows:
                    yield {_PATCH: patch, _STRIDE: stride, _CONTEXT: context}


def _patches(series: _Series, body: Body) -> list[int]:
    """Lengths of patches, by the maps that give vectors of the model's width."""
    maps = _beside(series.width, (shape for name, shape in body.shapes.items() if name not in body.tables))
    if series.patch in maps:
        return [series.patch]
    said = [each for each in body.words(*_PATCH_WORDS) if isinstance(each, int) and each in maps]
    known = _beside(series.width, (each.shape for name, each in series.checkpoint.items() if name != series.places))
    return [*said, *sorted(maps - known)][:3]


def _beside(width: int, shapes: Iterable[tuple[int, ...]]) -> set[int]:
    """The other side of every matrix that has this side."""
    return {shape[0] if shape[1] == width else shape[1] for shape in shapes if len(shape) == 2 and width in shape}


def _resized(series: _Series, wanted: Mapping[str, Value]) -> Resized:
    patch, stride, context = (int(wanted[name]) for name in (_PATCH, _STRIDE, _CONTEXT))  # type: ignore[arg-type]
    rows: dict[str, str] = {}
    if patch != series.patch:
        rows |= {name: f"resize_patch_embed_1d({name}, to={patch})" for name in series.embedding}
    to = _count(context, patch, stride) + series.prefix
    if to != series.checkpoint[series.places].shape[0]:
        rows[series.places] = f"resize_pos_embed_1d({series.places}, to={to}, prefix={series.prefix})"
    config: dict[tuple[str, ...], Any] = {
        ("patch_length",): patch,
        ("patch_stride",): stride,
        ("context_length",): context,
    }

    def alike(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The end of one smooth series."""
        import torch
        from torch.nn.functional import interpolate

        draw = torch.Generator().manual_seed(seed)
        longest = max(context, series.context)
        whole = interpolate(torch.randn(2, series.channels, 12, generator=draw), longest, mode="linear").transpose(1, 2)
        return {"past_values": whole[:, -series.context :]}, {"past_values": whole[:, -context:]}

    return Resized(rows, config, alike)
