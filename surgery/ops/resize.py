"""Positions, patches and bias tables for another number of tokens. Published rules that change the function a little.

timm's resamplers compute in float32 and cast back: for float32 and narrower these ops are timm's, bit for bit. float64
is computed in float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.errors import PlanError
from surgery.ops.registry import Example, Op, Param, Shape, Step, register, show

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MODES = ("bicubic", "bilinear", "nearest", "nearest-exact", "area")
INTERPOLATION = Param("interpolation", str, "bicubic", quiet=True)
ANTIALIAS = Param("antialias", int, 1, quiet=True)
PREFIX = Param("prefix", int, 0)


def floating(tensor: Tensor, op: str) -> Tensor:
    """The tensor, or a PlanError: what is resampled has to hold floats."""
    if not tensor.is_floating_point():
        raise PlanError(f"{op} takes floats, not {str(tensor.dtype).removeprefix('torch.')}")
    return tensor


def is_double(tensor: Tensor) -> bool:
    import torch

    return tensor.dtype == torch.float64


def check_mode(interpolation: str, antialias: int, modes: Sequence[str] = _MODES) -> None:
    if interpolation not in modes:
        raise PlanError(f'interpolation="{interpolation}" is none of {", ".join(modes)}')
    if antialias not in (0, 1):
        raise PlanError(f"antialias={antialias} is neither 1, yes, nor 0, no")
    if antialias and interpolation not in ("bicubic", "bilinear"):
        raise PlanError(f'interpolation="{interpolation}" has no antialias; add antialias=0')


def sides(size: tuple[int, ...], name: str, count: int = 2) -> None:
    if len(size) != count or min(size, default=0) < 1:
        raise PlanError(f"{name}={size} needs {count} lengths of 1 or more")


def _tokens(shape: Shape) -> int:
    """The number of positions of [tokens, width] or [1, tokens, width]."""
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
        raise PlanError(f"positions have the shape tokens x width or 1 x tokens x width, not {show(shape)}")
    return shape[-2]


def _at_least(prefix: int, tokens: int, name: str = "prefix") -> None:
    if not 0 <= prefix <= tokens:
        raise PlanError(f"{name}={prefix} rows cannot be set apart in {tokens}")


def _pos_2d_shape(
    shapes: Sequence[Shape],
    *,
    grid: tuple[int, ...],
    to: tuple[int, ...],
    prefix: int,
    interpolation: str,
    antialias: int,
) -> Shape:
    (shape,) = shapes
    sides(grid, "grid")
    sides(to, "to")
    check_mode(interpolation, antialias)
    tokens = _tokens(shape)
    _at_least(prefix, tokens)
    if grid[0] * grid[1] + prefix != tokens:
        raise PlanError(
            f"grid={grid} and prefix={prefix} make {grid[0] * grid[1] + prefix} tokens, and a tensor of shape "
            f"{show(shape)} has {tokens}"
        )
    return (*shape[:-2], prefix + to[0] * to[1], shape[-1])


def _pos_2d(
    tensors: Sequence[Tensor],
    *,
    grid: tuple[int, ...],
    to: tuple[int, ...],
    prefix: int,
    interpolation: str,
    antialias: int,
) -> Tensor:
    """Learned positions of a grid of patches, [tokens, width] or [1, tokens, width], for another grid. The `prefix`
    rows in front (class token, registers) stay; the others are read as an image of grid=(rows, columns) and resampled
    to `to`. Grids are compared, never counts of tokens: 4x4 becomes 2x8 by resampling.

    Rule: timm.layers.resample_abs_pos_embed: bicubic with antialias, in float32, cast back.
    """
    pos = floating(tensors[0], "resize_pos_embed_2d")
    if tuple(grid) == tuple(to):
        return pos
    if not pos.shape[-1]:
        return pos.new_empty((*pos.shape[:-2], prefix + to[0] * to[1], 0))
    if not is_double(pos):
        from timm.layers import resample_abs_pos_embed

        resampled = resample_abs_pos_embed(
            pos.reshape(1, *pos.shape[-2:]), list(to), list(grid), prefix, interpolation, bool(antialias)
        )
        return resampled.reshape(*pos.shape[:-2], *resampled.shape[-2:])
    import torch
    import torch.nn.functional as F

    image = pos[..., prefix:, :].reshape(1, *grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=to, mode=interpolation, antialias=bool(antialias))
    rows = image.permute(0, 2, 3, 1).reshape(*pos.shape[:-2], to[0] * to[1], pos.shape[-1])
    return torch.cat((pos[..., :prefix, :], rows), dim=-2)


register(
    Op(
        "resize_pos_embed_2d",
        "approximate",
        (1, 1),
        (Param("grid", tuple), Param("to", tuple), PREFIX, INTERPOLATION, ANTIALIAS),
        _pos_2d_shape,
        _pos_2d,
        partners="Buffers that count tokens (position ids, masks) take the new number; the patch kernel stays.",
        example=Example(
            "resize_pos_embed_2d(pos_embed, grid=(14, 14), to=(7, 7), prefix=1)", {"pos_embed": (1, 197, 768)}
        ),
    )
)


def _pos_1d_shape(shapes: Sequence[Shape], *, to: int, prefix: int, interpolation: str) -> Shape:
    (shape,) = shapes
    check_mode(interpolation, 0, ("linear", "nearest", "nearest-exact", "area"))
    tokens = _tokens(shape)
    _at_least(prefix, tokens)
    if to <= prefix or tokens == prefix:
        raise PlanError(f"to={to} of {tokens} positions, {prefix} of them set apart, leaves nothing to interpolate")
    return (*shape[:-2], to, shape[-1])


def _pos_1d(tensors: Sequence[Tensor], *, to: int, prefix: int, interpolation: str) -> Tensor:
    """Learned positions of a sequence, [tokens, width] or [1, tokens, width], stretched or squeezed to `to` rows in
    all. The `prefix` rows in front (a class token, RoBERTa's 2) stay.

    Rule: open_clip.model.resize_text_pos_embed: linear, corners not aligned, no antialias, in the tensor's own type.
    """
    pos = floating(tensors[0], "resize_pos_embed_1d")
    if to == pos.shape[-2]:
        return pos
    if not pos.shape[-1]:
        return pos.new_empty((*pos.shape[:-2], to, 0))
    import torch
    import torch.nn.functional as F

    rows = pos[..., prefix:, :].reshape(1, -1, pos.shape[-1]).permute(0, 2, 1)
    rows = F.interpolate(rows, size=to - prefix, mode=interpolation)
    rows = rows.permute(0, 2, 1).reshape(*pos.shape[:-2], to - prefix, pos.shape[-1])
    return torch.cat((pos[..., :prefix, :], rows), dim=-2)


register(
    Op(
        "resize_pos_embed_1d",
        "approximate",
        (1, 1),
        (Param("to", int), PREFIX, Param("interpolation", str, "linear", quiet=True)),
        _pos_1d_shape,
        _pos_1d,
        partners="The causal mask and the position ids, where they are buffers, take the new length.",
        example=Example("resize_pos_embed_1d(pos, to=4)", {"pos": [[0.0], [1.0]]}),
    )
)


def _tile_shape(shapes: Sequence[Shape], *, to: int, offset: int) -> Shape:
    (shape,) = shapes
    tokens = _tokens(shape)
    _at_least(offset, tokens, "offset")
    if to < tokens:
        raise PlanError(
            f"to={to} is fewer than the {tokens} positions there are, and tiling only adds",
            hint=f"to cut, write slice(..., axis={len(shape) - 2}, stop={to})",
        )
    if to > tokens == offset:
        raise PlanError(f"offset={offset} leaves none of the {tokens} positions to tile")
    return (*shape[:-2], to, shape[-1])


def _tile(tensors: Sequence[Tensor], *, to: int, offset: int) -> Tensor:
    """Learned positions of a sequence, [tokens, width] or [1, tokens, width], for longer inputs: the rows that there
    are stay, so that short inputs compute the same, and after them the rows from `offset` on are repeated until there
    are `to`. `offset` rows in front are no positions of tokens: 2 in RoBERTa.

    Rule: the conversion of RoBERTa to Longformer (Beltagy et al., arXiv 2004.05150). To stretch instead:
    resize_pos_embed_1d.
    """
    import torch

    (pos,) = tensors
    learned = pos[..., offset:, :]
    missing = to - pos.shape[-2]
    if not missing:
        return pos
    whole, part = divmod(missing, learned.shape[-2])
    return torch.cat((pos, *[learned] * whole, learned[..., :part, :]), dim=-2)


register(
    Op(
        "extend_pos_embed_tile",
        "approximate",
        (1, 1),
        (Param("to", int), Param("offset", int, 0)),
        _tile_shape,
        _tile,
        inverse=lambda shapes, params: [
            (Step("slice", {"axis": len(shapes[0]) - 2, "start": 0, "stop": shapes[0][-2]}),) if shapes[0][-2] else None
        ],
        partners="Position ids and token type ids, where they are buffers, take the new length.",
        example=Example("extend_pos_embed_tile(pos, to=8, offset=2)", {"pos": [[-1], [0], [1], [2], [3]]}),
    )
)


def _patch_shape(shapes: Sequence[Shape], *, to: tuple[int, ...], interpolation: str, antialias: int) -> Shape:
    (shape,) = shapes
    if len(shape) != 4 or 0 in shape[2:]:
        raise PlanError(f"a patch kernel has the shape width x channels x rows x columns, not {show(shape)}")
    sides(to, "to")
    check_mode(interpolation, antialias)
    return (*shape[:2], *to)


def _pi_resize(kernel: Tensor, to: tuple[int, ...], interpolation: str, antialias: int) -> Tensor:
    """PI-resize of [out, in, rows, columns]."""
    size = tuple(kernel.shape[-2:])
    if size == tuple(to):
        return kernel
    if not kernel.shape[0] * kernel.shape[1]:
        return kernel.new_empty((*kernel.shape[:2], *to))
    if not is_double(kernel):
        from timm.layers import resample_patch_embed

        resampled: Tensor = resample_patch_embed(kernel, list(to), interpolation, bool(antialias))
        return resampled
    import torch
    import torch.nn.functional as F

    basis = torch.eye(math.prod(size), dtype=kernel.dtype, device=kernel.device).reshape(-1, 1, *size)
    images = F.interpolate(basis, size=to, mode=interpolation, antialias=bool(antialias))
    inverse = torch.linalg.pinv(images.reshape(math.prod(size), math.prod(to)).t())  # of the resize matrix [new, old]
    return (kernel.reshape(*kernel.shape[:2], -1) @ inverse).reshape(*kernel.shape[:2], *to)


def _patch(tensors: Sequence[Tensor], *, to: tuple[int, ...], interpolation: str, antialias: int) -> Tensor:
    """A kernel that embeds patches, [width, channels, rows, columns], for patches of another size: the kernel that
    answers to a resized patch as nearly as can be as the old one to the patch. Growing patches keep the function on
    resized images; shrinking ones cannot quite.

    Rule: PI-resize of FlexiViT (Beyer et al., arXiv 2212.08013): the kernel times the pseudo-inverse of the matrix that
    resizes a patch; timm.layers.resample_patch_embed, bicubic with antialias, in float32, cast back.
    """
    return _pi_resize(floating(tensors[0], "resize_patch_embed"), to, interpolation, antialias)


register(
    Op(
        "resize_patch_embed",
        "approximate",
        (1, 1),
        (Param("to", tuple), INTERPOLATION, ANTIALIAS),
        _patch_shape,
        _patch,
        partners="An image of the same size has another number of patches: resize_pos_embed_2d for its positions.",
        example=Example("resize_patch_embed(proj.weight, to=(8, 8))", {"proj.weight": (768, 3, 16, 16)}),
    )
)


def _patch_1d_shape(shapes: Sequence[Shape], *, to: int, interpolation: str, antialias: int) -> Shape:
    (shape,) = shapes
    if len(shape) not in (2, 3) or not shape[-1]:
        raise PlanError(
            f"a kernel over patches of a series has the shape width x length or width x channels x length, not "
            f"{show(shape)}"
        )
    sides((to,), "to", 1)
    check_mode(interpolation, antialias)
    return (*shape[:-1], to)


def _patch_1d(tensors: Sequence[Tensor], *, to: int, interpolation: str, antialias: int) -> Tensor:
    """A linear map or convolution that embeds patches of a series, [width, length] or [width, channels, length], for
    patches of another length.

    Rule: PI-resize of FlexiViT (Beyer et al., arXiv 2212.08013) along one axis; timm.layers.resample_patch_embed of a
    kernel one row high. No paper measured it on series.
    """
    kernel = floating(tensors[0], "resize_patch_embed_1d")
    as_image = kernel.reshape(kernel.shape[0], math.prod(kernel.shape[1:-1]), 1, kernel.shape[-1])
    return _pi_resize(as_image, (1, to), interpolation, antialias).reshape(*kernel.shape[:-1], to)


register(
    Op(
        "resize_patch_embed_1d",
        "approximate",
        (1, 1),
        (Param("to", int), INTERPOLATION, ANTIALIAS),
        _patch_1d_shape,
        _patch_1d,
        partners="A series of the same length has another number of patches: resize_pos_embed_1d for its positions, "
        "and a head over all patches takes another input length.",
        example=Example("resize_patch_embed_1d(w, to=8)", {"w": (128, 16)}),
    )
)


def _table(shape: Shape, grid: tuple[int, ...], extra: int) -> tuple[int, int]:
    """The sides of a table [rows * columns + extra, heads] or [heads, rows, columns]."""
    if len(shape) == 3 and extra == 0:
        if grid and grid != shape[1:]:
            raise PlanError(f"grid={grid} is not that of a table of shape {show(shape)}")
        return shape[1], shape[2]
    if len(shape) != 2 or extra < 0:
        raise PlanError(
            f"a bias table has the shape (rows * columns + extra) x heads, or heads x rows x columns with extra=0, and "
            f"the argument has {show(shape)} with extra={extra}"
        )
    cells = shape[0] - extra
    if not grid:
        side = math.isqrt(max(cells, 0))
        grid = (side, side)
    sides(grid, "grid")
    if grid[0] * grid[1] != cells:
        raise PlanError(
            f"{shape[0]} rows less extra={extra} are {cells} cells, not {grid[0]} x {grid[1]}",
            hint="give grid=(rows, columns), and extra= the rows at the end that are no offsets (3 in BEiT)",
        )
    return grid[0], grid[1]


def _rel_shape(shapes: Sequence[Shape], *, to: tuple[int, ...], grid: tuple[int, ...], extra: int, rule: str) -> Shape:
    (shape,) = shapes
    sides(to, "to")
    rows, columns = _table(shape, grid, extra)
    if to[0] % 2 == 0 or to[1] % 2 == 0:
        raise PlanError(
            f"to={to} is not a table of offsets: a window of h x w has a table of (2h-1) x (2w-1)",
            hint=f"for a window of {to[0]} x {to[1]} write to=({2 * to[0] - 1}, {2 * to[1] - 1})",
        )
    if rule not in ("bicubic", "geometric"):
        raise PlanError(f'rule="{rule}" is none of bicubic, geometric')
    if rule == "geometric" and min(rows, columns, *to) < 3:
        raise PlanError('rule="geometric" needs tables of 3 x 3 or more on both sides')
    return (shape[0], *to) if len(shape) == 3 else (to[0] * to[1] + extra, shape[1])


def _geometric(source: int, target: int) -> list[float]:
    """Where the rows of the old table lie among those of the new one: distances that grow by a constant factor, found
    by bisection so that half a side spans half the new side."""
    low, high = 1.01, 1.5
    factor = (low + high) / 2
    while high - low > 1e-6:
        factor = (low + high) / 2
        reach = (1 - factor ** (source // 2)) / (1 - factor)
        low, high = (low, factor) if reach > target // 2 else (factor, high)
    right = [math.fsum(factor**power for power in range(count)) for count in range(1, source // 2 + 1)]
    return [-place for place in reversed(right)] + [0.0] + right


def _rel(tensors: Sequence[Tensor], *, to: tuple[int, ...], grid: tuple[int, ...], extra: int, rule: str) -> Tensor:
    """A table of relative position biases for another window: [(2h-1) * (2w-1) + extra, heads] (Swin, BEiT) or
    [heads, 2h-1, 2w-1] (MaxViT). `to` is the new table, (2h-1, 2w-1); `grid` the old one where it is not square;
    `extra` rows at the end (class token, 3 in BEiT) stay. rule="geometric" places the old offsets at distances that
    grow geometrically, dense about the centre, and interpolates linearly between them.

    Rule: timm.layers.resize_rel_pos_bias_table_simple, bicubic without antialias in the tensor's own type; geometric:
    timm.layers.resize_rel_pos_bias_table, in float32, after the fine-tuning of BEiT (Bao et al., arXiv 2106.08254);
    timm itself takes it for Swin and BEiT when it loads a checkpoint of another window.
    """
    table = floating(tensors[0], "resize_rel_pos_bias")
    rows, columns = _table(tuple(table.shape), grid, extra)
    if (rows, columns) == tuple(to):
        return table
    flat = table.dim() == 2
    heads = table.shape[1] if flat else table.shape[0]
    if not heads:
        return table.new_empty((to[0] * to[1] + extra, 0) if flat else (0, *to))
    import torch
    import torch.nn.functional as F

    cells = table[: rows * columns].t().reshape(1, heads, rows, columns) if flat else table.unsqueeze(0)
    if rule == "bicubic":
        made = F.interpolate(cells, size=to, mode="bicubic", align_corners=False)[0]
    elif is_double(table):
        from timm.layers.interpolate import RegularGridInterpolator

        places = [
            torch.tensor(_geometric(old, new), dtype=table.dtype, device=table.device)
            for old, new in zip((rows, columns), to, strict=True)
        ]
        ends = [torch.arange(-(n // 2), n // 2 + 1, dtype=table.dtype, device=table.device) for n in to]
        wanted = torch.meshgrid(*ends, indexing="ij")
        made = torch.stack([RegularGridInterpolator(places, head)(wanted) for head in cells[0]])
    else:
        from timm.layers import resize_rel_pos_bias_table

        window = ((to[0] + 1) // 2, (to[1] + 1) // 2)
        made = resize_rel_pos_bias_table(cells[0], window, (heads, *to))
    if not flat:
        return made
    return torch.cat((made.reshape(heads, -1).t(), table[rows * columns :]))


register(
    Op(
        "resize_rel_pos_bias",
        "approximate",
        (1, 1),
        (
            Param("to", tuple),
            Param("grid", tuple, (), quiet=True),
            Param("extra", int, 0, quiet=True),
            Param("rule", str, "bicubic", quiet=True),
        ),
        _rel_shape,
        _rel,
        partners="The index of relative positions and the mask of shifted windows are buffers of the window's size, "
        "which the new model makes itself.",
        example=Example("resize_rel_pos_bias(table, to=(23, 23))", {"table": (169, 4)}),
    )
)


def _spectrogram_pos_shape(
    shapes: Sequence[Shape], *, grid: tuple[int, ...], to: tuple[int, ...], prefix: int
) -> Shape:
    return _pos_2d_shape(shapes, grid=grid, to=to, prefix=prefix, interpolation="bilinear", antialias=0)


def _spectrogram_pos(tensors: Sequence[Tensor], *, grid: tuple[int, ...], to: tuple[int, ...], prefix: int) -> Tensor:
    """Positions of an image's patches, [tokens, width] or [1, tokens, width], for those of a spectrogram: to=(rows of
    frequency, columns of time). Time first, then frequency: a side that is no longer than the old one is cut out of
    the middle, a longer one stretched. The `prefix` rows in front stay (class and distillation token).

    Rule: AST (Gong et al., arXiv 2104.01778), section 2.2 and its code: bilinear without antialias.
    """
    import torch
    import torch.nn.functional as F

    pos = floating(tensors[0], "spectrogram_pos_embed")
    if not pos.shape[-1]:
        return pos.new_empty((*pos.shape[:-2], prefix + to[0] * to[1], 0))
    image = pos[..., prefix:, :].reshape(1, *grid, -1).permute(0, 3, 1, 2)
    for axis, wanted in ((1, to[1]), (0, to[0])):
        length = image.shape[2 + axis]
        if wanted <= length:
            image = image.narrow(2 + axis, length // 2 - wanted // 2, wanted)
        else:
            size = (image.shape[2], wanted) if axis else (wanted, image.shape[3])
            image = F.interpolate(image, size=size, mode="bilinear")
    rows = image.permute(0, 2, 3, 1).reshape(*pos.shape[:-2], to[0] * to[1], pos.shape[-1])
    return torch.cat((pos[..., :prefix, :], rows), dim=-2)


register(
    Op(
        "spectrogram_pos_embed",
        "approximate",
        (1, 1),
        (Param("grid", tuple), Param("to", tuple), Param("prefix", int, 2)),
        _spectrogram_pos_shape,
        _spectrogram_pos,
        partners="The patch kernel takes spectrogram_patch.",
        example=Example("spectrogram_pos_embed(pos, grid=(24, 24), to=(12, 101))", {"pos": (1, 578, 768)}),
    )
)


def _sinusoid_shape(shapes: Sequence[Shape], *, to: int, period: float) -> Shape:
    (shape,) = shapes
    tokens = _tokens(shape)
    if shape[-1] % 2 or shape[-1] < 4 or not tokens:
        raise PlanError(
            f"a table of sinusoids has rows of 4, 6, 8 ... numbers, sines and then cosines; not {show(shape)}"
        )
    if to < 1 or not period > 1:
        raise PlanError(f"to={to} has to be 1 or more, and period={period} more than 1")
    return (*shape[:-2], to, shape[-1])


def sinusoids(rows: int, width: int, period: float, dtype: torch.dtype) -> Tensor:
    """[rows, width]: sines, then cosines, of positions over wavelengths from 2 pi to 2 pi * period."""
    import torch

    half = width // 2
    rates = torch.exp(-math.log(period) / (half - 1) * torch.arange(half, dtype=dtype))
    angles = torch.arange(rows, dtype=dtype).unsqueeze(1) * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _sinusoid(tensors: Sequence[Tensor], *, to: int, period: float) -> Tensor:
    """Positions that a formula gives, [tokens, width] or [1, tokens, width], for another number of frames: the rows
    that there are stay, fewer are cut, more follow the formula. A table that does not follow it is refused.

    Rule: whisper.model.sinusoids, in float32 (float64 for float64): sines, then cosines, of wavelengths up to
    2 pi * period.
    """
    import torch

    pos = floating(tensors[0], "resize_sinusoids")
    made = sinusoids(max(to, pos.shape[-2]), pos.shape[-1], period, torch.float64 if is_double(pos) else torch.float32)
    made = made.to(pos.device)
    # 2^-8 is what bfloat16 leaves of a number below 1; a float32 angle of 1500 is off by a thirtieth of that
    if not torch.allclose(pos.to(made.dtype), made[: pos.shape[-2]].expand_as(pos), rtol=0, atol=2**-8):
        raise PlanError(
            "the table does not follow the formula of sinusoids with this period",
            hint="learned positions are stretched by resize_pos_embed_1d",
        )
    more = made[pos.shape[-2] : to].to(pos.dtype).expand(*pos.shape[:-2], -1, -1)
    return torch.cat((pos[..., :to, :], more), dim=-2)


register(
    Op(
        "resize_sinusoids",
        "approximate",
        (1, 1),
        (Param("to", int), Param("period", float, 10000.0, quiet=True)),
        _sinusoid_shape,
        _sinusoid,
        inverse=lambda shapes, params: [
            (Step("slice", {"axis": len(shapes[0]) - 2, "start": 0, "stop": shapes[0][-2]}),)
            if shapes[0][-2] <= params["to"]
            else None
        ],
        partners="The frontend gives as many frames: twice `to` in Whisper, whose second convolution halves them.",
        example=Example("resize_sinusoids(pos, to=2)", {"pos": [[0.0, 0.0, 1.0, 1.0]]}),
    )
)
