"""GPT-2 (Radford et al. 2019): a decoder whose head is its table of words. Names as transformers saves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from zoo import Entry, Part, Source

if TYPE_CHECKING:
    from surgery import TensorInfo

# The repositories of OpenAI's own weights hold the body alone; a model that was trained further has it under a prefix.
LAYOUTS = {
    "model": ("wte.weight", "wpe.weight", "h.0.attn.c_attn.weight"),
    "lm": ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight"),
}

PARTS = (
    Part(
        "embeddings",
        {"model": ("wte.weight", "wpe.weight"), "lm": ("transformer.wte.weight", "transformer.wpe.weight")},
        probe="zoo_text.generative:gpt2_embeddings",
        outputs=("embeddings",),
    ),
    Part(
        "decoder",
        {"model": ("wte.*", "wpe.*", "h.*", "ln_f.*"), "lm": ("transformer.*",)},
        probe="zoo_text.generative:gpt2_decoder",
        outputs=("last_hidden_state",),
        aliases=("body",),
    ),
    Part(
        "head",
        {"model": ("wte.weight",), "lm": ("transformer.wte.weight", "lm_head.weight")},
        probe="zoo_text.generative:gpt2_head",
        outputs=("logits",),
    ),
)

ENTRIES = (
    Entry(
        name="gpt2",
        tags={
            "small": (Source("hub", "openai-community/gpt2"),),
            "medium": (Source("hub", "openai-community/gpt2-medium"),),
            "large": (Source("hub", "openai-community/gpt2-large"),),
            "xl": (Source("hub", "openai-community/gpt2-xl"),),
            "distil": (Source("hub", "distilbert/distilgpt2", licence="apache-2.0"),),
        },
        default_tag="small",
        modality="text",
        tasks=("text-generation",),
        licence="mit",
        layouts=LAYOUTS,
        requires="text",
        load="zoo_text.loading:gpt2",
        probe="zoo_text.generative:gpt2_whole",
        outputs=("last_hidden_state", "logits"),
        parts=PARTS,
        sizes="zoo_text.sizes:gpt2",
    ),
)

_CLOSED = (
    "no weights are public: it is run by OpenAI alone, behind an API. Open models of its kind in this zoo: gpt2; "
    "T5 for translation and summaries (t5, t5.flan-base)"
)
CLOSED = tuple(
    Entry(name=name, modality=modality, tasks=tasks, licence="proprietary", open=False, note=note)
    for name, modality, tasks, note in (
        ("gpt-4", "text", ("text-generation",), _CLOSED),
        ("gpt-4o", "text", ("text-generation",), _CLOSED),
        (
            "gpt-4v",
            "multimodal",
            ("image-text-to-text",),
            "no weights are public: it is run by OpenAI alone, behind an API. Open models that relate images and texts "
            "in this zoo: clip, siglip, align",
        ),
    )
)


def shapes_say(tensors: Mapping[str, TensorInfo]) -> str | Literal[False]:
    """Its attention is one matrix for queries, keys and values, input first."""
    for name, info in tensors.items():
        if name.endswith("h.0.attn.c_attn.weight"):
            n, m = info.shape if len(info.shape) == 2 else (0, 0)
            return f"queries, keys and values are one matrix of {n} x {m}" if m == 3 * n and n else False
    return ""
