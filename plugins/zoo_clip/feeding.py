"""Inputs for image-text models, by seed and variant; drawn apart from everyone else's random numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# As many images as texts, and enough of them that the logits are no single number, which could be anything.
ROWS = 3

Inputs = Callable[[int, str], dict[str, Tensor]]


def texts(*, vocabulary: int, length: int, end: int | None = None, mask: bool = False) -> Inputs:
    """Token ids [N, length], always as long as the table of positions: these models are fed padded texts.

    `end` is the id whose place the model pools, when it does: early in "shortest", last in "longest", and in the
    middle of the others, with the id 0 after it. With `mask` there is an attention mask, and in "padded" it hides what
    comes after the end.
    """

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, vocabulary, (ROWS, length), generator=draw)
        stops = [
            {"shortest": 1, "longest": length - 1}.get(variant, (length // 2 + row) % length) for row in range(ROWS)
        ]
        seen = torch.ones_like(ids)
        if end is not None:
            ordinary = torch.tensor([i for i in range(vocabulary) if i != end])
            ids = ordinary[ids % len(ordinary)]
            if variant in ("plain", "longest"):
                ids[0, 0], ids[-1, 0] = ordinary[0], ordinary[-1]
            for row, stop in enumerate(stops):
                ids[row, stop] = end
                ids[row, stop + 1 :] = 0 if end else 1
        elif variant in ("plain", "longest"):
            ids[0, 0], ids[-1, -1] = 0, vocabulary - 1
        if variant == "padded":
            for row, stop in enumerate(stops[1:], 1):
                seen[row, stop + 1 :] = 0
        return {"input_ids": ids, **({"attention_mask": seen} if mask else {})}

    return inputs


def images(*, size: tuple[int, int], longest: tuple[int, int] | None = None, channels: int = 3) -> Inputs:
    """Images [N, C, H, W], and in "shortest" one alone. `longest` is a larger size, for models that take several."""

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        height, width = longest if longest is not None and variant == "longest" else size
        rows = 1 if variant == "shortest" else ROWS
        return {"pixel_values": torch.randn(rows, channels, height, width, generator=draw)}

    return inputs


def both(first: Inputs, second: Inputs) -> Inputs:
    """Of the second as many as of the first, whatever the variant of the first is."""
    return lambda seed, variant: {**first(seed, variant), **second(seed, "plain" if variant == "shortest" else variant)}
