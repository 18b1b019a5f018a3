"""A third party's plugin for Llama, as transformers saves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import zoo

if TYPE_CHECKING:
    from torch import Tensor, nn

    import surgery

ZOO_API = 1
_TENSORS = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight")


@zoo.hookimpl
def zoo_entries() -> list[zoo.Entry]:
    return [
        zoo.Entry(
            "llama",
            tags={"only": (zoo.Source("hub", "org/llama"),)},
            default_tag="only",
            modality="text",
            tasks=("text-generation",),
            licence="llama3",
            layouts={"transformers": _TENSORS},
            probe="zoo_llama:whole",
            outputs=("logits",),
        )
    ]


@zoo.hookimpl
def zoo_recognise(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[zoo.Recognition]:
    if config.get("model_type") != "llama" or not all(name in tensors for name in _TENSORS):
        return []
    return [zoo.Recognition("llama", ("config.json says llama",), len(_TENSORS))]


def whole(checkpoint: surgery.Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From token ids to logits."""
    import torch
    import transformers

    known = transformers.LlamaConfig(**config)
    module = zoo.unfilled(lambda: transformers.LlamaForCausalLM(known))
    zoo.fill(module, checkpoint)

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        shape = {"plain": (2, 9), "shortest": (1, 1), "longest": (1, int(known.max_position_embeddings))}[variant]
        draw = torch.Generator().manual_seed(seed)
        return {"input_ids": torch.randint(0, int(known.vocab_size), shape, generator=draw)}

    def run(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (module(**x).logits,)

    return zoo.PartProbe(module, run, inputs, ("plain", "shortest", "longest"), ("logits",))
