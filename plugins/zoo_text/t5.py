"""T5: an encoder and a decoder with relative positions. Names of tensors as transformers saves them.

Raffel et al. 2020 (t5-small ... t5-11b), its second version (t5-v1_1: gated feed-forward, a head of its own), and
FLAN-T5 (Chung et al. 2022), which has the form of the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from zoo import Entry, Part, Source

if TYPE_CHECKING:
    from surgery import TensorInfo

LAYOUTS = {
    "model": ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.block.0.*"),
    "encoder": ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
}
# A tied table stands once or more often, as the release of transformers that saved it had it.
_TABLE = ("shared.weight", "encoder.embed_tokens.weight")
_DECODER = ("shared.weight", "decoder.*")

PARTS = (
    Part(
        "embeddings",
        {"model": ("shared.weight",), "encoder": ("shared.weight",)},
        probe="zoo_text.generative:t5_embeddings",
        outputs=("embeddings",),
    ),
    Part(
        "encoder",
        {"model": (*_TABLE, "encoder.*"), "encoder": (*_TABLE, "encoder.*")},
        probe="zoo_text.generative:t5_encoder",
        outputs=("last_hidden_state",),
    ),
    Part(
        "decoder",
        {"model": _DECODER, "encoder": ()},
        probe="zoo_text.generative:t5_decoder",
        outputs=("last_hidden_state",),
    ),
    Part(
        "head",
        {"model": ("lm_head.weight",), "encoder": ()},
        probe="zoo_text.generative:t5_head",
        outputs=("logits",),
    ),
)

ENTRIES = (
    Entry(
        name="t5",
        tags={
            "small": (Source("hub", "google-t5/t5-small"),),
            "base": (Source("hub", "google-t5/t5-base"),),
            "large": (Source("hub", "google-t5/t5-large"),),
            "3b": (Source("hub", "google-t5/t5-3b"),),
            "v1_1-small": (Source("hub", "google/t5-v1_1-small"),),
            "v1_1-base": (Source("hub", "google/t5-v1_1-base"),),
            "v1_1-large": (Source("hub", "google/t5-v1_1-large"),),
            "flan-small": (Source("hub", "google/flan-t5-small"),),
            "flan-base": (Source("hub", "google/flan-t5-base"),),
            "flan-large": (Source("hub", "google/flan-t5-large"),),
        },
        default_tag="small",
        modality="text",
        tasks=("translation", "summarization", "text2text-generation"),
        licence="apache-2.0",
        layouts=LAYOUTS,
        requires="text",
        load="zoo_text.loading:t5",
        probe="zoo_text.generative:t5_whole",
        outputs=("encoder_last_hidden_state", "last_hidden_state", "logits"),
        parts=PARTS,
        sizes="zoo_text.sizes:t5",
    ),
)


def shapes_say(tensors: Mapping[str, TensorInfo]) -> str | Literal[False]:
    """The feed-forward tells the versions apart."""
    gated = any(name.endswith("DenseReluDense.wi_0.weight") for name in tensors)
    return (
        "its feed-forward is gated, as in version 1.1 and FLAN" if gated else "its feed-forward is that of version 1.0"
    )
