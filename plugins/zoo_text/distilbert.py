"""DistilBERT: half of BERT's layers, no token types, no pooler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from zoo import Entry, Part, Source

if TYPE_CHECKING:
    from surgery import TensorInfo

LAYOUTS = {
    "model": ("embeddings.word_embeddings.weight", "transformer.layer.0.*"),
    "pretraining": ("distilbert.embeddings.word_embeddings.weight", "distilbert.transformer.layer.0.*"),
}
_HEADS = ("vocab_*", "pre_classifier.*", "classifier.*", "qa_outputs.*")

PARTS = (
    Part(
        "embeddings",
        {"model": ("embeddings.*",), "pretraining": ("distilbert.embeddings.*",)},
        outputs=("embeddings",),
    ),
    Part(
        "encoder",
        {
            "model": ("embeddings.*", "transformer.*"),
            "pretraining": ("distilbert.embeddings.*", "distilbert.transformer.*"),
        },
        outputs=("last_hidden_state",),
    ),
    Part(
        "head",
        {"model": _HEADS, "pretraining": _HEADS},
        outputs=("logits",),
    ),
)

ENTRIES = (
    Entry(
        name="distilbert",
        tags={
            "base": (Source("hub", "distilbert/distilbert-base-uncased"),),
            "base-cased": (Source("hub", "distilbert/distilbert-base-cased"),),
            "multilingual": (Source("hub", "distilbert/distilbert-base-multilingual-cased"),),
        },
        default_tag="base",
        modality="text",
        tasks=("fill-mask", "feature-extraction"),
        licence="apache-2.0",
        layouts=LAYOUTS,
        requires="text",
        outputs=("last_hidden_state",),
        parts=PARTS,
    ),
)


def shapes_say(tensors: Mapping[str, TensorInfo]) -> str | Literal[False]:
    """Its names alone give it away."""
    return ""
