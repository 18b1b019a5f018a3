"""The sizes of a model of pictures: image, patch, window, channels; for plugins, whatever library the model is of.

How such tensors are resized is published and the same everywhere; where they stand is the plugin's to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoo.sizes import Body, Resized, Sizes, Value, pair

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import Checkpoint

Pair = tuple[int, int]
_IMAGE, _PATCH, _CHANNELS, _WINDOW = "image", "patch", "channels", "window"
_IMAGE_WORDS = ("img_size", "image_size", "image", "img", "resolution", "input_size", "input_resolution", "side")
_PATCH_WORDS = ("patch_size", "patch", "kernel_size")
_WINDOW_WORDS = ("window_size", "window")


@dataclass(frozen=True)
class Pictures:
    """A model of pictures: where its checkpoint keeps what depends on their size, on patches, channels and windows.

    image, patch: (rows, columns) in pixels. stem: the convolutions that read the image. positions: learned ones of a
        grid, with `prefix` rows before it. biases: the tables of relative positions. window: in patches.
    configured: (image, patch, channels, window) -> what changes in the configuration.
    square: only such images can be configured. patches: the kernel of the stem is a patch, and may be another.
    any_channels: the model may be built for others. counts: tensors that only count the patches.
    """

    checkpoint: Checkpoint
    image: Pair
    patch: Pair
    channels: int
    configured: Callable[[Pair, Pair, int, int], Mapping[tuple[str, ...], Any]]
    stem: tuple[str, ...] = ()
    positions: str = ""
    prefix: int = 0
    biases: tuple[str, ...] = ()
    window: int = 0
    square: bool = False
    patches: bool = True
    any_channels: bool = True
    counts: tuple[str, ...] = ()

    def sizes(self) -> Sizes:
        """What a target may have otherwise."""
        values: dict[str, Value] = {_CHANNELS: self.channels}
        if self.positions or self.biases:
            values |= {_IMAGE: self.image, _PATCH: self.patch}
        if self.biases:
            values[_WINDOW] = self.window
        return Sizes(values, lambda body: _wanted(self, values, body), lambda wanted: _resized(self, wanted))

    @property
    def grid(self) -> Pair:
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]


# ---------------------------------------------------------------------------------------------------- what is wanted


def _wanted(layout: Pictures, values: Mapping[str, Value], body: Body) -> Iterator[Mapping[str, Value]]:
    for channels, patch in _stems(layout, body):
        if not (layout.positions or layout.biases):
            yield {_CHANNELS: channels}
            continue
        for window in _windows(layout, body):
            for image in _images(layout, patch, body):
                wanted: dict[str, Value] = {_CHANNELS: channels, _IMAGE: image, _PATCH: patch}
                if layout.biases:
                    wanted[_WINDOW] = window
                yield {name: value for name, value in wanted.items() if name in values}


def _stems(layout: Pictures, body: Body) -> list[tuple[int, Pair]]:
    """(channels, patch) that the target's convolution, or its map of flattened patches, reads."""
    width = layout.checkpoint[layout.stem[0]].shape[0]
    kernel = layout.checkpoint[layout.stem[0]].shape[2:]
    own = (layout.channels, layout.patch)
    convolved = [
        (shape[1], (shape[2], shape[3]))
        for shape in body.shapes.values()
        if len(shape) == 4 and shape[0] == width and (layout.any_channels or shape[1] == layout.channels)
    ]
    if not layout.patches:
        same = [channels for channels, k in convolved if k == tuple(kernel)]
        if layout.channels in same or not same:
            return [own]
        return [(channels, layout.patch) for channels in dict.fromkeys(same) if channels < width][:3]
    if own in convolved:
        return [own]
    square = [(c, p) for c, p in convolved if p[0] == p[1] and p[0] > 1]
    if square:
        return list(dict.fromkeys(square))[:3]
    inputs = body.inputs.get("pixel_values", ())
    count = inputs[1] if len(inputs) == 4 else 0
    flat = {shape[0] if shape[1] == width else shape[1] for shape in body.shapes.values() if _has(shape, width)}
    if layout.channels * math.prod(layout.patch) in flat:
        return [own]
    found = []
    for channels in [count] if count else [layout.channels, 1, 4]:
        for patch in [each for each in body.words(*_PATCH_WORDS) if isinstance(each, int)]:
            if channels * patch * patch in flat:
                found.append((channels, (patch, patch)))
    return list(dict.fromkeys(found)) or [own]


def _has(shape: tuple[int, ...], width: int) -> bool:
    return len(shape) == 2 and width in shape


def _images(layout: Pictures, patch: Pair, body: Body) -> list[Pair]:
    """The sides of the images; by an example, else by what the target's modules say, else by its table of positions."""
    said: list[Pair] = []
    shape = body.inputs.get("pixel_values", ())
    if len(shape) == 4:
        said.append((shape[2], shape[3]))
    said += [pair(value) for value in body.words(*_IMAGE_WORDS)]
    if not layout.positions:
        fits = [side for side in said if side[0] >= patch[0] and side[1] >= patch[1]]
        return list(dict.fromkeys(fits))[:2] or [layout.image]
    width = layout.checkpoint[layout.positions].shape[-1]
    tables = set(body.rows(width).values())
    spare = sorted({0, 1, layout.prefix})
    if not any(rows > max(spare) for rows in tables):
        return [layout.image]
    found = [side for side in said if any(_count(side, patch) + more in tables for more in spare)]
    for rows in sorted(tables):
        for more in reversed(spare):
            root = math.isqrt(max(rows - more, 0))
            if root > 1 and root * root == rows - more:
                found.append((root * patch[0], root * patch[1]))
    if layout.square:
        found = [side for side in found if side[0] == side[1]]
    own = layout.image[0] // layout.patch[0] * patch[0], layout.image[1] // layout.patch[1] * patch[1]
    if not said and patch == layout.patch and own in found:
        return [layout.image]
    return list(dict.fromkeys(found))[:3] or [layout.image]


def _count(image: Pair, patch: Pair) -> int:
    return (image[0] // patch[0]) * (image[1] // patch[1])


def _windows(layout: Pictures, body: Body) -> list[int]:
    if not layout.biases:
        return [0]
    heads = {layout.checkpoint[name].shape[1] for name in layout.biases}
    sides = set()
    for shape in body.tables.values():
        rows = [n for n in shape if n not in heads and n != 1]
        if len(shape) >= 2 and heads & set(shape):
            root = math.isqrt(math.prod(rows))
            if root * root == math.prod(rows) and root % 2 and root > 1:
                sides.add((root + 1) // 2)
    said = [pair(value)[0] for value in body.words(*_WINDOW_WORDS)]
    found = sorted(sides, reverse=True)  # a window is cut where the image is smaller: the largest one is it
    return [*[side for side in dict.fromkeys(said) if side in sides], *found[:1]] or [layout.window]


# ---------------------------------------------------------------------------------------------------- what is made


def _resized(layout: Pictures, wanted: Mapping[str, Value]) -> Resized:
    patch, image = pair(wanted.get(_PATCH, layout.patch)), pair(wanted.get(_IMAGE, layout.image))
    channels, window = int(wanted[_CHANNELS]), int(wanted.get(_WINDOW, layout.window))  # type: ignore[arg-type]
    rows: dict[str, str] = {}
    for name in layout.stem:
        made = name
        if layout.patches and patch != layout.patch:
            made = f"resize_patch_embed({made}, to={patch})"
        if channels != layout.channels:
            made = f"adapt_input_channels({made}, to={channels}{_base(layout)})"
        if made != name:
            rows[name] = made
    grid = image[0] // patch[0], image[1] // patch[1]
    if layout.positions and grid != layout.grid:
        rows[layout.positions] = (
            f"resize_pos_embed_2d({layout.positions}, grid={layout.grid}, to={grid}, prefix={layout.prefix})"
        )
    for depth, name in enumerate(layout.biases):
        side = 2 * _fitting(layout, depth, window, image, patch) - 1
        if layout.checkpoint[name].shape[0] != side * side:
            rows[name] = f"resize_rel_pos_bias({name}, to=({side}, {side}))"
    config = layout.configured(image, patch, channels, window)
    without = layout.counts if grid != layout.grid else ()
    return Resized(rows, config, _alike(layout, image, channels), without)


def _base(layout: Pictures) -> str:
    return "" if layout.channels == 3 else f", base={layout.channels}"


def _fitting(layout: Pictures, at: int, window: int, image: Pair, patch: Pair) -> int:
    """The window of one block: no larger than what is left of the image at its stage, which halves from stage to
    stage."""
    stage = int(layout.biases[at].split("layers.")[1].split(".")[0])
    return min(window, min(image[0] // patch[0], image[1] // patch[1]) // 2**stage)


def _alike(
    layout: Pictures, image: Pair, channels: int
) -> Callable[[int], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """One smooth picture at both sizes; grey where the channels are others."""

    def alike(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        import torch
        from torch.nn.functional import interpolate

        count = channels if channels == layout.channels else 1
        coarse = torch.randn(2, count, 6, 6, generator=torch.Generator().manual_seed(seed))

        def at(size: Pair, wanted: int) -> dict[str, Tensor]:
            picture = interpolate(coarse, size, mode="bicubic", antialias=True)
            return {"pixel_values": picture if count == wanted else picture.repeat(1, wanted, 1, 1)}

        return at(layout.image, layout.channels), at(image, channels)

    return alike
