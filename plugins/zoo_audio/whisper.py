"""Whisper: entries and parts, in the names of transformers and in those of OpenAI's own files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from zoo import Entry, Part, Source

if TYPE_CHECKING:
    from surgery import TensorInfo

# "generation" is what is published on the hub, "model" the body alone, "openai" the files of the package openai-whisper
# ({"dims": ..., "model_state_dict": ...}, of which the tensors are read).
LAYOUTS = {
    "generation": ("model.encoder.conv1.weight", "model.decoder.embed_tokens.weight", "model.decoder.layers.0.*"),
    "model": ("encoder.conv1.weight", "decoder.embed_tokens.weight", "decoder.layers.0.*"),
    "openai": ("encoder.conv1.weight", "decoder.token_embedding.weight", "decoder.blocks.0.*"),
}

PARTS = (
    # From log-mel features to what enters the first block: convolutions and positions.
    Part(
        "frontend",
        {
            "generation": ("model.encoder.conv?.*", "model.encoder.embed_positions.*"),
            "model": ("encoder.conv?.*", "encoder.embed_positions.*"),
            "openai": ("encoder.conv?.*", "encoder.positional_embedding"),
        },
        probe="zoo_audio.whisper_probes:frontend",
        outputs=("embeddings",),
    ),
    Part(
        "encoder",
        {"generation": ("model.encoder.*",), "model": ("encoder.*",), "openai": ("encoder.*",)},
        probe="zoo_audio.whisper_probes:encoder",
        outputs=("last_hidden_state",),
    ),
    Part(
        "decoder",
        {"generation": ("model.decoder.*",), "model": ("decoder.*",), "openai": ("decoder.*",)},
        probe="zoo_audio.whisper_probes:decoder",
        outputs=("last_hidden_state",),
    ),
    # The published files have no matrix of the head: it is the embedding of the decoder's tokens.
    Part(
        "head",
        {
            "generation": ("proj_out.weight", "model.decoder.embed_tokens.weight"),
            "model": ("decoder.embed_tokens.weight",),
            "openai": ("decoder.token_embedding.weight",),
        },
        probe="zoo_audio.whisper_probes:head",
        outputs=("logits",),
    ),
)

_SIZES = ("tiny", "tiny.en", "base", "base.en", "small", "small.en", "medium", "medium.en")
_LARGE = {"large": "large", "large-v2": "large-v2", "large-v3": "large-v3", "turbo": "large-v3-turbo"}

ENTRIES = (
    Entry(
        name="whisper",
        tags={
            tag: (Source("hub", f"openai/whisper-{name}", licence="mit" if tag == "turbo" else ""),)
            for tag, name in {**dict(zip(_SIZES, _SIZES, strict=True)), **_LARGE}.items()
        },
        default_tag="base",
        modality="audio",
        tasks=("automatic-speech-recognition", "feature-extraction"),
        licence="apache-2.0",
        layouts=LAYOUTS,
        requires="audio",
        load="zoo_audio.loading:whisper",
        probe="zoo_audio.whisper_probes:whole",
        outputs=("logits",),
        parts=PARTS,
        sizes="zoo_audio.sizes:whisper",
    ),
)


def file_says(entry: str, beside: Mapping[str, Any]) -> str | Literal[False]:
    """What openai-whisper wrote beside the weights."""
    dims = beside.get("dims")
    if not isinstance(dims, Mapping) or not {"n_mels", "n_audio_state", "n_text_layer"} <= dims.keys():
        return ""
    return f"its dims are those of openai-whisper: {dims['n_audio_layer']} and {dims['n_text_layer']} layers"


def names_say(entry: str, tensors: Mapping[str, TensorInfo]) -> str | Literal[False]:
    """Its names alone give it away; the convolution says how many bands of a spectrogram it takes."""
    for name, info in tensors.items():
        if name.endswith("encoder.conv1.weight"):
            return f"its first convolution takes {info.shape[1]} mel bands" if len(info.shape) == 3 else False
    return False
