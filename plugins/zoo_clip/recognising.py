"""What an unlabelled checkpoint could be, by its configuration, its names and its shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo import Entry, Recognition
from zoo_clip import align, clip, siglip

if TYPE_CHECKING:
    from surgery import TensorInfo

# What OpenAI's archives hold beside the weights: three integers.
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")


def recognise(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> list[Recognition]:
    """At most one of the three: their layouts exclude each other."""
    return [found for entry in (clip.ENTRY, siglip.ENTRY, align.ENTRY) if (found := _as(entry, config, tensors))]


def _as(entry: Entry, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Recognition | None:
    layout = entry.layout_of(tensors)
    if layout is None:
        return None
    evidence = [f"the tensors are named as in {entry.name}, layout {layout}"]
    model_type = config.get("model_type")
    if layout == "transformers":
        if model_type is not None and model_type != entry.name:
            return None
        if model_type == entry.name:
            evidence.append(f'config.json says that its model_type is "{model_type}"')
    elif isinstance(config.get("model_cfg"), Mapping):
        evidence.append("its configuration is open_clip's: it has a model_cfg")
    if entry.name == "clip" and all(name in tensors for name in OPENAI_SIZES):
        evidence.append(f"it holds {', '.join(OPENAI_SIZES)}, as OpenAI's own archives do")
    elif openai_precision(tensors):
        evidence.append("its matrices are in half precision and its norms are not, as in OpenAI's own files")
    return Recognition(entry.name, tuple(evidence), len(evidence))


def openai_precision(tensors: Mapping[str, TensorInfo]) -> bool:
    """OpenAI's files mix precisions in a way of their own: half for matrices, single for norms, in each tower."""

    def precisions(end: str) -> set[str]:
        return {str(info.dtype) for name, info in tensors.items() if name.endswith(end)}

    pairs = ((".attn.in_proj_weight", ".ln_1.weight"), ("visual.attnpool.q_proj.weight", ".bn1.weight"))
    return any(precisions(matrix) == {"F16"} and precisions(norm) == {"F32"} for matrix, norm in pairs)
