"""Ops that resample and adapt agree with the libraries that published them, over random shapes: bit for bit in the
types in which those libraries compute, and to rounding in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from open_clip.model import resize_text_pos_embed
from timm.layers import (
    resample_abs_pos_embed,
    resample_patch_embed,
    resize_rel_pos_bias_table,
    resize_rel_pos_bias_table_simple,
)
from timm.models import adapt_input_conv
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as load_swin
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as load_vit
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import sinusoids

from surgery import ops
from surgery.errors import PlanError
from surgery.expr import call, infer
from tests.agreement import SEEDS, agree, run

NARROW = [torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*NARROW, torch.float64]
SIDES = st.tuples(st.integers(1, 7), st.integers(1, 7))
some = settings(max_examples=60, deadline=None)


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def agrees(op: str, reference: str, mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Bit for bit, or where the library computed float64 in float32, to that rounding."""
    assert mine.dtype == dtype
    agree(op, reference, mine, theirs.to(dtype), within=1e-4 if dtype == torch.float64 else 0.0)


@some
@given(SIDES, SIDES, st.sampled_from([0, 1, 2]), st.sampled_from(DTYPES), st.booleans(), SEEDS)
def test_positions_of_a_grid_are_timms(
    grid: tuple[int, int], to: tuple[int, int], prefix: int, dtype: torch.dtype, flat: bool, seed: int
) -> None:
    pos = random((1, prefix + math.prod(grid), 5), dtype, seed)
    for interpolation, antialias in (("bicubic", 1), ("bilinear", 0)):
        mine = run(
            "resize_pos_embed_2d",
            pos[0] if flat else pos,
            grid=grid,
            to=to,
            prefix=prefix,
            interpolation=interpolation,
            antialias=antialias,
        )
        theirs = resample_abs_pos_embed(pos, list(to), list(grid), prefix, interpolation, bool(antialias))
        agrees("resize_pos_embed_2d", "timm.layers.resample_abs_pos_embed", mine.reshape(theirs.shape), theirs, dtype)
        assert torch.equal((mine if not flat else mine[None])[:, :prefix], pos[:, :prefix])


def test_equal_counts_of_tokens_are_not_equal_grids() -> None:
    pos = random((1, 17, 3))
    mine = run("resize_pos_embed_2d", pos, grid=(4, 4), to=(2, 8), prefix=1)
    assert mine.shape == pos.shape
    assert not torch.equal(mine, pos)
    image = pos[:, 1:].reshape(1, 4, 4, 3).permute(0, 3, 1, 2)
    wanted = F.interpolate(image, (2, 8), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 16, 3)
    assert torch.equal(mine[:, 1:], wanted)
    assert run("resize_pos_embed_2d", pos, grid=(4, 4), to=(4, 4), prefix=1) is pos


@some
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(DTYPES), SEEDS)
def test_positions_of_a_text_are_open_clips(old: int, new: int, dtype: torch.dtype, seed: int) -> None:
    pos = random((old, 6), dtype, seed)
    state = {"positional_embedding": pos}
    resize_text_pos_embed(state, SimpleNamespace(positional_embedding=torch.empty(new, 6)))
    mine = run("resize_pos_embed_1d", pos, to=new)
    assert mine.dtype == dtype
    agree("resize_pos_embed_1d", "open_clip.model.resize_text_pos_embed", mine, state["positional_embedding"])
    assert torch.equal(run("resize_pos_embed_1d", pos[None], to=new)[0], mine)
    front = random((2, 6), dtype, seed + 1)
    kept = run("resize_pos_embed_1d", torch.cat((front, pos)), to=new + 2, prefix=2)
    assert torch.equal(kept, torch.cat((front, mine)))


@some
@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 3), st.sampled_from(DTYPES))
def test_tiled_positions_are_longformers(learned: int, more: int, offset: int, dtype: torch.dtype) -> None:
    pos = random((offset + learned, 4), dtype)
    mine = run("extend_pos_embed_tile", pos, to=len(pos) + more, offset=offset)
    for row in range(len(mine)):
        wanted = pos[row] if row < offset else pos[offset + (row - offset) % learned]
        assert torch.equal(mine[row], wanted)


@some
@given(st.tuples(st.integers(1, 4), st.integers(1, 3)), SIDES, SIDES, st.sampled_from(DTYPES), SEEDS)
def test_patch_kernels_are_timms(
    front: tuple[int, int], old: tuple[int, int], new: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    kernel = random((*front, *old), dtype, seed)
    mine = run("resize_patch_embed", kernel, to=new)
    theirs = resample_patch_embed(kernel, list(new))
    if dtype != torch.float64:
        agrees("resize_patch_embed", "timm.layers.resample_patch_embed", mine, theirs, dtype)
        return
    # a resize matrix may be all but singular, where a pseudo-inverse in float32 means little: compare what it is for
    resize = F.interpolate(torch.eye(math.prod(old)).double().reshape(-1, 1, *old), new, mode="bicubic", antialias=True)
    wanted = kernel.flatten(2) @ torch.linalg.pinv(resize.flatten(1).T)
    torch.testing.assert_close(mine.flatten(2), wanted, rtol=1e-9, atol=1e-9)
    if math.prod(old) <= math.prod(new) and old[0] <= new[0] and old[1] <= new[1]:
        patch = random((1, front[1], *old), dtype, seed + 1)
        larger = F.interpolate(patch, new, mode="bicubic", antialias=True)
        torch.testing.assert_close(
            (larger * mine).sum((1, 2, 3)), (patch * kernel).sum((1, 2, 3)), rtol=1e-9, atol=1e-9
        )


@some
@given(st.integers(1, 5), st.integers(1, 24), st.integers(1, 24), st.sampled_from(NARROW), SEEDS)
def test_patch_kernels_of_a_series_are_those_of_an_image_one_row_high(
    width: int, old: int, new: int, dtype: torch.dtype, seed: int
) -> None:
    kernel = random((width, 2, old), dtype, seed)
    theirs = resample_patch_embed(kernel[:, :, None], [1, new])[:, :, 0]
    mine = run("resize_patch_embed_1d", kernel, to=new)
    agree("resize_patch_embed_1d", "timm.layers.resample_patch_embed", mine, theirs)
    assert torch.equal(
        run("resize_patch_embed_1d", kernel[:, 0], to=new), resample_patch_embed(kernel[:, :1, None], [1, new])[:, 0, 0]
    )


@some
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 3), st.sampled_from(DTYPES), SEEDS)
def test_relative_position_tables_are_timms(old: int, new: int, extra: int, dtype: torch.dtype, seed: int) -> None:
    side, to = 2 * old - 1, 2 * new - 1
    table = random((side * side + extra, 3), dtype, seed)
    theirs = resize_rel_pos_bias_table_simple(table, (new, new), (to * to + extra, 3))
    mine = run("resize_rel_pos_bias", table, to=(to, to), extra=extra)
    agree("resize_rel_pos_bias", "timm.layers.resize_rel_pos_bias_table_simple", mine, theirs)
    heads_first = table[: side * side].T.reshape(3, side, side)
    theirs = resize_rel_pos_bias_table_simple(heads_first, (new, new), (3, to, to))
    mine = run("resize_rel_pos_bias", heads_first, to=(to, to))
    agree("resize_rel_pos_bias", "timm.layers.resize_rel_pos_bias_table_simple", mine, theirs)


@some
@given(
    st.tuples(st.integers(2, 6), st.integers(2, 6)),
    st.tuples(st.integers(2, 6), st.integers(2, 6)),
    st.integers(0, 3),
    st.sampled_from(DTYPES),
    SEEDS,
)
def test_geometric_tables_are_those_of_beit(
    old: tuple[int, int], new: tuple[int, int], extra: int, dtype: torch.dtype, seed: int
) -> None:
    grid, to = (2 * old[0] - 1, 2 * old[1] - 1), (2 * new[0] - 1, 2 * new[1] - 1)
    table = random((math.prod(grid) + extra, 2), dtype, seed)
    theirs = resize_rel_pos_bias_table(table, new, (math.prod(to) + extra, 2), old)
    mine = run("resize_rel_pos_bias", table, to=to, grid=grid, extra=extra, rule="geometric")
    agrees('resize_rel_pos_bias, rule="geometric"', "timm.layers.resize_rel_pos_bias_table", mine, theirs, dtype)


@some
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.sampled_from(DTYPES), SEEDS)
def test_input_channels_are_timms(to: int, base: int, groups: int, dtype: torch.dtype, seed: int) -> None:
    assume(to in (1, base) or groups == 1)  # timm, too, tiles no space-to-depth stem
    kernel = random((seed % 5 + 1, base * groups, 3, 2), dtype, seed)
    mine = run("adapt_input_channels", kernel, to=to, base=base)
    theirs, within = adapt_input_conv(to, kernel, base), 1e-5 if dtype == torch.float64 else 0.0
    agree("adapt_input_channels", "timm.models.adapt_input_conv", mine, theirs.to(dtype), within=within)
    # one-dimensional and three-dimensional kernels are no other matter
    assert torch.equal(run("adapt_input_channels", kernel[..., 0], to=to, base=base), mine[..., 0])
    if dtype == torch.float64 and (to == 1 or to % base == 0):  # channels that are all alike compute as they did
        torch.testing.assert_close(mine.sum(1), kernel.sum(1), rtol=1e-12, atol=1e-12)


@some
@given(SIDES, SIDES, st.sampled_from([0, 1, 2]), st.sampled_from([torch.float32, torch.float64]), SEEDS)
def test_spectrogram_positions_are_those_of_ast(
    grid: tuple[int, int], to: tuple[int, int], prefix: int, dtype: torch.dtype, seed: int
) -> None:
    pos = random((1, prefix + math.prod(grid), 4), dtype, seed)
    image = pos[:, prefix:].transpose(1, 2).reshape(1, 4, *grid)
    # the paper's rule, one axis after the other: time, then frequency
    if to[1] <= grid[1]:
        start = int(grid[1] / 2) - int(to[1] / 2)
        image = image[..., start : start + to[1]]
    else:
        image = F.interpolate(image, (grid[0], to[1]), mode="bilinear")
    if to[0] <= grid[0]:
        start = int(grid[0] / 2) - int(to[0] / 2)
        image = image[:, :, start : start + to[0]]
    else:
        image = F.interpolate(image, to, mode="bilinear")
    wanted = torch.cat((pos[:, :prefix], image.reshape(1, 4, -1).transpose(1, 2)), dim=1)
    assert torch.equal(run("spectrogram_pos_embed", pos, grid=grid, to=to, prefix=prefix), wanted)
    kernel = random((5, 3, *grid), dtype, seed)
    assert torch.equal(run("spectrogram_patch", kernel), torch.sum(kernel, dim=1).unsqueeze(1))


@some
@given(st.integers(1, 60), st.integers(1, 60), st.integers(2, 9), st.sampled_from(NARROW))
def test_frames_follow_whispers_formula(old: int, new: int, half: int, dtype: torch.dtype) -> None:
    table = sinusoids(old, 2 * half).to(dtype)
    mine = run("resize_sinusoids", table, to=new)
    theirs, within = sinusoids(new, 2 * half).to(dtype), 4e-6 if new > old else 0.0
    agree("resize_sinusoids", "transformers.models.whisper.modeling_whisper.sinusoids", mine, theirs, within=within)
    assert torch.equal(mine[:old], table[:new])


@some
@given(st.integers(1, 5), st.sampled_from(["mean", "centre"]), SEEDS)
def test_a_still_video_computes_as_its_image(frames: int, how: str, seed: int) -> None:
    kernel, image = random((3, 2, 3, 3), torch.float64, seed), random((1, 2, 6, 6), torch.float64, seed + 1)
    video = run("inflate_2d_to_3d", kernel, frames=frames, how=how)
    moving = F.conv3d(image.unsqueeze(2).repeat(1, 1, frames, 1, 1), video)
    torch.testing.assert_close(moving[:, :, 0], F.conv2d(image, kernel), rtol=1e-12, atol=1e-12)
    assert ops.get("inflate_2d_to_3d").check([kernel], frames=frames, how=how) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@settings(max_examples=20, deadline=None)
@given(cin=st.integers(1, 5), cout=st.integers(1, 16), seed=SEEDS)
def test_folded_norms_are_torchs(
    dtype: torch.dtype, transposed: bool, bias: bool, cin: int, cout: int, seed: int
) -> None:
    torch.manual_seed(seed)
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv, norm = make(cin, cout, 3, bias=bias).to(dtype).eval(), nn.BatchNorm2d(cout, eps=1e-3).to(dtype).eval()
    for value in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(value)
    nn.init.uniform_(norm.running_var, 0.1, 2)
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm, transpose=transposed)
    gain, beta, mean, var = (t.detach() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    weight = run("bn_fold", conv.weight.detach(), gain, var, eps=1e-3, transposed=int(transposed))
    old_bias = conv.bias.detach() if bias else torch.zeros(cout, dtype=dtype)
    folded = run("bn_fold_bias", old_bias, gain, beta, mean, var, eps=1e-3)
    agree("bn_fold", "torch.nn.utils.fusion.fuse_conv_bn_eval", weight, fused.weight)
    agree("bn_fold_bias", "torch.nn.utils.fusion.fuse_conv_bn_eval", folded, fused.bias)
    x = random((2, cin, 5, 5), dtype, seed)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(fused(x), norm(conv(x)), rtol=tolerance, atol=tolerance)


def test_a_vision_transformer_takes_what_timms_own_loading_makes() -> None:
    torch.manual_seed(0)
    small = {"embed_dim": 12, "depth": 1, "num_heads": 3, "num_classes": 2}
    source = VisionTransformer(img_size=64, patch_size=16, **small)
    target = VisionTransformer(img_size=(96, 80), patch_size=8, in_chans=1, **small)
    state = source.state_dict()
    nn.init.normal_(state["pos_embed"])
    theirs = dict(state)
    theirs["patch_embed.proj.weight"] = adapt_input_conv(1, theirs["patch_embed.proj.weight"])
    theirs = load_vit(theirs, target)
    positions = run("resize_pos_embed_2d", state["pos_embed"], grid=(4, 4), to=(12, 10), prefix=1)
    grey = run("adapt_input_channels", state["patch_embed.proj.weight"], to=1)
    assert torch.equal(positions, theirs["pos_embed"])
    assert torch.equal(run("resize_patch_embed", grey, to=(8, 8)), theirs["patch_embed.proj.weight"])


def test_a_swin_takes_what_timms_own_loading_makes() -> None:
    torch.manual_seed(0)
    small = {"embed_dim": 6, "depths": (1,), "num_heads": (3,), "patch_size": 4, "num_classes": 2}
    source = SwinTransformer(img_size=56, window_size=7, **small)
    target = SwinTransformer(img_size=64, window_size=8, **small)
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    mine = run("resize_rel_pos_bias", source.state_dict()[name], to=(15, 15), rule="geometric")
    assert torch.equal(mine, load_swin(dict(source.state_dict()), target)[name])


EMPTY: list[tuple[str, list[tuple[int, ...]], dict[str, ops.Value], tuple[int, ...]]] = [
    ("resize_pos_embed_2d", [(1, 10, 0)], {"grid": (3, 3), "to": (2, 5), "prefix": 1}, (1, 11, 0)),
    ("resize_pos_embed_1d", [(7, 0)], {"to": 3}, (3, 0)),
    ("extend_pos_embed_tile", [(4, 0)], {"to": 9, "offset": 2}, (9, 0)),
    ("resize_patch_embed", [(0, 3, 4, 4)], {"to": (2, 2)}, (0, 3, 2, 2)),
    ("resize_patch_embed_1d", [(4, 0, 4)], {"to": 2}, (4, 0, 2)),
    ("resize_rel_pos_bias", [(9, 0)], {"to": (5, 5)}, (25, 0)),
    ("adapt_input_channels", [(0, 3, 2, 2)], {"to": 1}, (0, 1, 2, 2)),
    ("spectrogram_patch", [(0, 3, 2, 2)], {}, (0, 1, 2, 2)),
    ("spectrogram_pos_embed", [(6, 0)], {"grid": (2, 2), "to": (3, 1)}, (5, 0)),
    ("inflate_2d_to_3d", [(0, 3, 2, 2)], {"frames": 2}, (0, 3, 2, 2, 2)),
    ("vocab_resize", [(3, 0)], {"to": 5}, (5, 0)),
    ("vocab_map", [(3, 0)], {"rows": "2 +2"}, (3, 0)),
    ("label_remap", [(3, 0)], {"index": (2, -1)}, (2, 0)),
    ("label_remap", [(0, 3)], {"index": (-1,)}, (1, 3)),
    ("shrink_width", [(4, 0)], {"to": 2}, (2, 0)),
    ("clone_width", [(0, 2)], {"times": (2, 2)}, (0, 4)),
    ("widen", [(2, 0)], {"to": 3}, (3, 0)),
    ("mha_to_gqa", [(4, 0)], {"heads": 4, "groups": 2}, (2, 0)),
    ("rope_permute", [(4, 0)], {"heads": 1}, (4, 0)),
    ("bn_fold", [(0, 3), (0,), (0,)], {}, (0, 3)),
    ("lora_merge", [(2, 0), (2, 1), (1, 0)], {}, (2, 0)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("op", "shapes", "params", "made"), EMPTY, ids=lambda value: value if isinstance(value, str) else ""
)
def test_empty_tensors_give_what_their_shape_foretells(
    op: str, shapes: list[tuple[int, ...]], params: dict[str, ops.Value], made: tuple[int, ...], dtype: torch.dtype
) -> None:
    result = run(op, *(torch.zeros(shape, dtype=dtype) for shape in shapes), **params)
    assert tuple(result.shape) == made
    assert result.dtype == dtype


REFUSED: list[tuple[str, list[tuple[int, ...]], dict[str, ops.Value], str]] = [
    (
        "resize_pos_embed_2d",
        [(1, 17, 3)],
        {"grid": (4, 4), "to": (2, 8)},
        "make 16 tokens, and a tensor of shape 1x17x3",
    ),
    ("resize_pos_embed_2d", [(2, 16, 3)], {"grid": (4, 4), "to": (2, 8)}, "1 x tokens x width, not 2x16x3"),
    ("resize_pos_embed_2d", [(16, 3)], {"grid": (4, 4), "to": (0, 8)}, "to=.*needs 2 lengths of 1 or more"),
    ("resize_pos_embed_2d", [(16, 3)], {"grid": (4, 4), "to": (2,)}, "to=.*needs 2 lengths"),
    ("resize_pos_embed_2d", [(16, 3)], {"grid": (4, 4), "to": (1, 1), "prefix": -1}, "prefix=-1 rows cannot"),
    ("resize_pos_embed_2d", [(4, 3)], {"grid": (2, 2), "to": (1, 1), "interpolation": "cubic"}, "none of bicubic"),
    ("resize_pos_embed_2d", [(4, 3)], {"grid": (2, 2), "to": (1, 1), "antialias": 2}, "antialias=2 is neither"),
    ("resize_pos_embed_2d", [(4, 3)], {"grid": (2, 2), "to": (1, 1), "interpolation": "nearest"}, "add antialias=0"),
    ("resize_pos_embed_1d", [(4, 3)], {"to": 2, "prefix": 2}, "leaves nothing to interpolate"),
    ("extend_pos_embed_tile", [(8, 3)], {"to": 4}, "to=4 is fewer than the 8 positions"),
    ("extend_pos_embed_tile", [(2, 3)], {"to": 4, "offset": 2}, "leaves none of the 2 positions"),
    ("resize_patch_embed", [(8, 48)], {"to": (2, 2)}, "width x channels x rows x columns, not 8x48"),
    ("resize_patch_embed_1d", [(8,)], {"to": 2}, "width x length"),
    ("resize_rel_pos_bias", [(169, 4)], {"to": (12, 12)}, "not a table of offsets"),
    ("resize_rel_pos_bias", [(172, 4)], {"to": (23, 23)}, "172 rows less extra=0 are 172 cells, not 13 x 13"),
    ("resize_rel_pos_bias", [(9, 4)], {"to": (5, 5), "rule": "cubic"}, "none of bicubic, geometric"),
    ("resize_rel_pos_bias", [(1, 4)], {"to": (5, 5), "rule": "geometric"}, "needs tables of 3 x 3 or more"),
    ("adapt_input_channels", [(8, 4, 3, 3)], {"to": 1}, "no multiple of base=3"),
    ("adapt_input_channels", [(8, 4, 3, 3)], {"to": 5}, "only one that takes base=3 can be tiled to 5"),
    ("adapt_input_channels", [(8, 4, 3, 3)], {"to": 3}, "takes 4 channels, not base=3"),
    ("adapt_input_channels", [(8, 3)], {"to": 1}, "a linear map is reshaped first"),
    ("spectrogram_patch", [(8, 3)], {}, "not 8x3"),
    ("resize_sinusoids", [(8, 3)], {"to": 4}, "rows of 4, 6, 8"),
    ("inflate_2d_to_3d", [(8, 3, 2, 2)], {"frames": 0}, "frames=0 has to be"),
    ("inflate_2d_to_3d", [(8, 3, 2, 2)], {"frames": 1, "how": "max"}, "none of mean, centre"),
    ("bn_fold", [(4, 3), (3,), (4,)], {}, "argument 2, the gain, has shape 3 where 4 channels"),
    ("bn_fold", [(4, 3), (4,), (4,)], {"eps": -1.0}, "eps=-1.0 has to be 0 or more"),
    ("bn_fold_bias", [(4,), (4,), (4,), (4,), (1,)], {}, "argument 5, the running variance, has shape 1"),
    ("vocab_resize", [(0, 3)], {"to": 5}, "has no rows to make new ones from"),
    ("vocab_resize", [(4, 3)], {"to": 0}, "no number of tokens"),
    ("vocab_resize", [(4, 3)], {"to": 5, "seed": -1}, "seed=-1 is no seed"),
    ("vocab_map", [(4, 3)], {"rows": "0:5"}, "names the old row 4"),
    ("vocab_map", [(4, 3)], {"rows": "3:1"}, '"3:1" is no item'),
    ("vocab_map", [(4, 3)], {"rows": " "}, "names no row"),
    ("vocab_transplant_omp", [(4, 3), (4, 3)], {"rows": "0:3 +1"}, "k=64 atoms out of 3 shared tokens"),
    ("vocab_transplant_omp", [(4, 3), (2, 3)], {"rows": "0:3"}, "rows has 3 tokens, and the donor's table"),
    ("vocab_transplant_omp", [(4, 3), (4, 3)], {"rows": "0:3", "donor_rows": "0:2"}, "3 tokens, and donor_rows 2"),
    ("vocab_transplant_omp", [(4, 3), (4, 3)], {"rows": "0:2", "donor_rows": "3:5"}, "donor_rows names row 4"),
    ("label_remap", [(4, 3)], {"index": (4,)}, "index 4 is none of the 4 labels"),
    ("low_rank", [(4, 3)], {"rank": 4}, "rank=4 of a matrix of shape 4x3: 1 to 3"),
    ("low_rank", [(4, 3)], {"rank": 1, "factor": "c"}, "none of product, a, b"),
    ("lora_merge", [(4, 3), (4, 2), (1, 3)], {}, "4x2 and 1x3 do not multiply"),
    ("lora_merge", [(3, 4), (4, 2), (2, 3)], {}, "B @ A has shape 4x3, which is not that of a weight of shape 3x4"),
    ("shrink_width", [(4, 3)], {"to": 5}, "to=5 is more than the 4 of axis 0"),
    ("shrink_width", [(6, 3)], {"to": 4, "unit": 4}, "does not divide into parts=1 of units of 4"),
    ("shrink_width", [(12, 3)], {"to": 6, "unit": 4}, "to=6 does not divide into parts=1 of units of 4"),
    ("prune_units", [(4, 3)], {"keep": (0, 0)}, "needs different numbers from 0 to 3"),
    ("prune_heads", [(10, 3)], {"heads": 4, "drop": (1,)}, "holds 10, which does not divide into heads=4"),
    ("prune_heads", [(8, 3)], {"heads": 2, "drop": (0, 1)}, "and not all of them"),
    ("mha_to_gqa", [(10, 3)], {"heads": 4, "groups": 2}, "holds 10, which does not divide into heads=4"),
    ("mha_to_gqa", [(12, 3)], {"heads": 4, "groups": 3}, "heads=4 do not divide into groups=3"),
    ("rope_permute", [(12, 3)], {"heads": 4}, "no heads=4 of an even width"),
    ("clone_width", [(4, 3)], {"times": (2,)}, "needs a count of 1 or more for each axis"),
    ("widen", [(4, 3)], {"to": 3}, "to=3 is less than the 4 of axis 0"),
    ("widen", [(4, 3)], {"to": 6, "spread": "odd"}, "none of random, even"),
    ("dirac", [], {"shape": (2, 2, 2)}, "has no middle"),
    ("normal", [], {"shape": (2,), "std": -1.0}, "std=-1.0 has to be 0 or more"),
]


@pytest.mark.parametrize(("op", "shapes", "params", "says"), REFUSED)
def test_what_does_not_fit_is_refused_in_words(
    op: str, shapes: list[tuple[int, ...]], params: dict[str, ops.Value], says: str
) -> None:
    expr = call(op, *(f"t{n}" for n in range(len(shapes))), **params)
    with pytest.raises(PlanError, match=says) as error:
        infer(expr, dict(zip((f"t{n}" for n in range(len(shapes))), shapes, strict=True)).__getitem__)
    assert f"{op}: " in str(error.value)


def test_learned_positions_are_no_sinusoids_and_whole_numbers_are_not_resampled() -> None:
    with pytest.raises(PlanError, match="does not follow the formula"):
        run("resize_sinusoids", random((8, 6)), to=4)
    with pytest.raises(PlanError, match="resize_pos_embed_1d takes floats, not int64"):
        run("resize_pos_embed_1d", torch.arange(8).reshape(4, 2), to=2)
