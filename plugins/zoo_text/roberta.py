"""RoBERTa: BERT's form, with other positions and heads of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from zoo import Entry, Part, PartProbe, Source

if TYPE_CHECKING:
    from surgery import Checkpoint, TensorInfo

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
        probe="zoo_text.roberta:embeddings_probe",
        outputs=("embeddings",),
    ),
    Part(
        "encoder",
        {"model": ("embeddings.*", "encoder.*"), "pretraining": ("roberta.embeddings.*", "roberta.encoder.*")},
        probe="zoo_text.roberta:encoder_probe",
        outputs=("last_hidden_state",),
    ),
    Part(
        "pooler",
        {"model": ("pooler.*",), "pretraining": ("roberta.pooler.*",)},
        probe="zoo_text.roberta:pooler_probe",
        outputs=("pooler_output",),
    ),
    Part(
        "head",
        {"model": _HEADS, "pretraining": _HEADS},
        probe="zoo_text.roberta:head_probe",
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
        load="zoo_text.loading:roberta",
        probe="zoo_text.roberta:whole_probe",
        outputs=("last_hidden_state",),
        parts=PARTS,
        sizes="zoo_text.sizes:roberta",
    ),
)


def shapes_say(tensors: Mapping[str, TensorInfo]) -> str | Literal[False]:
    """RoBERTa keeps a table of one token type, and its first two positions are padding."""
    for name, info in tensors.items():
        if name.endswith("embeddings.token_type_embeddings.weight"):
            rows = info.shape[0]
            return "it has a single token type" if rows == 1 else False
    return ""


def embeddings_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From token ids to the sum of embeddings, normalised."""
    from zoo_text.probes import ROBERTA

    return ROBERTA.embeddings(checkpoint, config)


def encoder_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From token ids to the last hidden state."""
    from zoo_text.probes import ROBERTA

    return ROBERTA.encoder(checkpoint, config)


def pooler_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From hidden states to one vector per sequence."""
    from zoo_text.probes import ROBERTA

    return ROBERTA.pooling(checkpoint, config)


def head_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From hidden states to logits."""
    from zoo_text.probes import ROBERTA

    return ROBERTA.head(checkpoint, config)


def whole_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """All there is: last hidden state, pooled vector, logits."""
    from zoo_text.probes import ROBERTA

    return ROBERTA.whole(checkpoint, config)
