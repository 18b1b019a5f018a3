"""RoBERTa: BERT's form, with other positions and heads of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from zoo import Entry, Part, Source

if TYPE_CHECKING:
    from surgery import TensorInfo

LAYOUTS = {
    "model": ("embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight", "encoder.layer.0.*"),
    "pretraining": (
        "roberta.embeddings.word_embeddings.weight",
        "roberta.embeddings.token_type_embeddings.weight",
        "roberta.encoder.layer.0.*",
    ),
}
_HEADS = ("lm_head.*", "classifier.*", "qa_outputs.*")

PARTS = (
    Part(
        "embeddings",
        {"model": ("embeddings.*",), "pretraining": ("roberta.embeddings.*",)},
        outputs=("embeddings",),
    ),
    Part(
        "encoder",
        {"model": ("embeddings.*", "encoder.*"), "pretraining": ("roberta.embeddings.*", "roberta.encoder.*")},
        outputs=("last_hidden_state",),
    ),
    Part(
        "pooler",
        {"model": ("pooler.*",), "pretraining": ("roberta.pooler.*",)},
        outputs=("pooler_output",),
    ),
    Part(
        "head",
        {"model": _HEADS, "pretraining": _HEADS},
        outputs=("logits",),
    ),
)

ENTRIES = (
    Entry(
        name="roberta",
        tags={
            "base": (Source("hub", "FacebookAI/roberta-base"),),
            "large": (Source("hub", "FacebookAI/roberta-large"),),
        },
        default_tag="base",
        modality="text",
        tasks=("fill-mask", "feature-extraction"),
        licence="mit",
        layouts=LAYOUTS,
        requires="text",
        outputs=("last_hidden_state",),
        parts=PARTS,
    ),
)


def shapes_say(tensors: Mapping[str, TensorInfo]) -> str | Literal[False]:
    """RoBERTa keeps a table of one token type, and its first two positions are padding."""
    for name, info in tensors.items():
        if name.endswith("embeddings.token_type_embeddings.weight"):
            rows = info.shape[0]
            return "it has a single token type" if rows == 1 else False
    return ""
