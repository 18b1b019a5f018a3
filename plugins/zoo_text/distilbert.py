"""DistilBERT: half of BERT's layers, no token types, no pooler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from zoo import Entry, Part, PartProbe, Source

if TYPE_CHECKING:
    from surgery import Checkpoint, TensorInfo

LAYOUTS = {
    "model": ("embeddings.word_embeddings.weight", "transformer.layer.0.*"),
    "pretraining": ("distilbert.embeddings.word_embeddings.weight", "distilbert.transformer.layer.0.*"),
}
_HEADS = ("vocab_*", "pre_classifier.*", "classifier.*", "qa_outputs.*")

PARTS = (
    Part(
        "embeddings",
        {"model": ("embeddings.*",), "pretraining": ("distilbert.embeddings.*",)},
        probe="zoo_text.distilbert:embeddings_probe",
        outputs=("embeddings",),
    ),
    Part(
        "encoder",
        {
            "model": ("embeddings.*", "transformer.*"),
            "pretraining": ("distilbert.embeddings.*", "distilbert.transformer.*"),
        },
        probe="zoo_text.distilbert:encoder_probe",
        outputs=("last_hidden_state",),
    ),
    Part(
        "head",
        {"model": _HEADS, "pretraining": _HEADS},
        probe="zoo_text.distilbert:head_probe",
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
        load="zoo_text.loading:distilbert",
        probe="zoo_text.distilbert:whole_probe",
        outputs=("last_hidden_state",),
        parts=PARTS,
        sizes="zoo_text.sizes:bert",
    ),
)


def shapes_say(tensors: Mapping[str, TensorInfo]) -> str | Literal[False]:
    """Its names alone give it away."""
    return ""


def embeddings_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From token ids to the sum of embeddings, normalised."""
    from zoo_text.probes import DISTILBERT

    return DISTILBERT.embeddings(checkpoint, config)


def encoder_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From token ids to the last hidden state."""
    from zoo_text.probes import DISTILBERT

    return DISTILBERT.encoder(checkpoint, config)


def head_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From hidden states to logits."""
    from zoo_text.probes import DISTILBERT

    return DISTILBERT.head(checkpoint, config)


def whole_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """All there is: last hidden state, logits."""
    from zoo_text.probes import DISTILBERT

    return DISTILBERT.whole(checkpoint, config)
