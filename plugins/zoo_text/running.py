"""How a text model of transformers is run as a reference: built from its configuration, filled tensor by tensor, fed.

Nothing is loaded by transformers itself (see zoo.fill). Names are the checkpoint's, under the two conversions that
transformers makes on load as well: gamma and beta; the prefix of the body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import zoo

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from surgery import Checkpoint

BATCH, LENGTH, PADDED_TO = 2, 12, 7

# LayerNorm's weight and bias as checkpoints of the first TensorFlow releases have them.
_OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def configured(kind: type[PretrainedConfig], config: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a checkpoint, as transformers reads it; attention in plain operations."""
    if not config:
        raise zoo.ZooError(
            "there is no config.json beside the weights, and without it no reference can be built",
            kind="weights",
            hint="put the model's config.json beside the weights; or graft with --static, which runs nothing",
        )
    made = kind.from_dict(dict(config))
    made._attn_implementation = "eager"
    return made


def fill(module: nn.Module, checkpoint: Checkpoint, at: Callable[[str], str] = str) -> None:
    zoo.fill(module, checkpoint, at, spellings=_OLD)


# ---------------------------------------------------------------------------------------------------- inputs

Inputs = Callable[[int, str], dict[str, Tensor]]


def token_inputs(config: PretrainedConfig, *, longest: int, types: int = 0, keep_out: int | None = None) -> Inputs:
    """Inputs for a model of token ids, by seed and variant.

    plain holds the first and the last row of the vocabulary; shortest is one token, longest fills the positions. padded
    hides the end of a sequence by its mask alone: the tokens there are ordinary ones, because some models count
    positions by them. `keep_out` is the id that does so, and it is never drawn.
    """
    vocabulary = int(config.vocab_size)
    allowed = torch.tensor([i for i in range(vocabulary) if i != keep_out])

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        shapes = {"plain": (BATCH, LENGTH), "padded": (BATCH, LENGTH), "shortest": (1, 1), "longest": (1, longest)}
        if variant not in shapes:
            raise ValueError(f'no variant "{variant}"; there are {", ".join(shapes)}')
        batch, length = shapes[variant]
        length = min(length, longest)
        draw = torch.Generator().manual_seed(seed)
        ids = allowed[torch.randint(0, len(allowed), (batch, length), generator=draw)]
        if variant in ("plain", "longest") and length > 1:
            ids[0, 0], ids[-1, -1] = allowed[0], allowed[-1]
        mask = torch.ones(batch, length, dtype=torch.long)
        if variant == "padded":
            mask[1:, PADDED_TO:] = 0
        found = {"input_ids": ids, "attention_mask": mask}
        if types > 1:
            found["token_type_ids"] = torch.randint(0, types, (batch, length), generator=draw)
        return found

    return inputs


def hidden_inputs(width: int) -> Inputs:
    """Inputs for what stands on top of an encoder: hidden states. They have no padding of their own."""

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        length = {"plain": LENGTH, "shortest": 1, "longest": 64}[variant]
        draw = torch.Generator().manual_seed(seed)
        return {"hidden_states": torch.randn(BATCH, length, width, generator=draw)}

    return inputs
