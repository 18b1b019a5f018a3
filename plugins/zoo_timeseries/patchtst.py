"""PatchTST: entry and parts. Names of tensors as transformers saves them, and as other libraries do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo import Entry, Part, PartProbe, Source

if TYPE_CHECKING:
    from surgery import Checkpoint

# "model" is the body alone; "prediction" has it under `model.`, beside a head.
LAYOUTS = {
    "prediction": ("model.encoder.embedder.input_embedding.*", "model.encoder.layers.0.self_attn.q_proj.weight"),
    "model": ("encoder.embedder.input_embedding.*", "encoder.layers.0.self_attn.q_proj.weight"),
    "neuralforecast": ("model.backbone.W_P.*", "model.backbone.encoder.layers.0.self_attn.W_Q.weight"),
    "time-series-library": (
        "patch_embedding.value_embedding.weight",
        "encoder.attn_layers.0.attention.query_projection.weight",
    ),
}
_NF = "model.backbone."

PARTS = (
    Part(
        "embedding",
        {
            "prediction": ("model.encoder.embedder.*", "model.encoder.positional_encoder.*"),
            "model": ("encoder.embedder.*", "encoder.positional_encoder.*"),
            "neuralforecast": (f"{_NF}W_P.*", f"{_NF}W_pos"),
            "time-series-library": ("patch_embedding.*",),
        },
        probe="zoo_timeseries.patchtst:embedding_probe",
        outputs=("embeddings",),
    ),
    # From the series to hidden states: scaling, patches and embedding belong to it.
    Part(
        "encoder",
        {
            "prediction": ("model.encoder.*",),
            "model": ("encoder.*",),
            "neuralforecast": (f"{_NF}W_P.*", f"{_NF}W_pos", f"{_NF}encoder.*"),
            "time-series-library": ("patch_embedding.*", "encoder.*"),
        },
        probe="zoo_timeseries.patchtst:encoder_probe",
        outputs=("last_hidden_state",),
    ),
    Part(
        "head",
        {
            "prediction": ("head.*",),
            "model": (),
            "neuralforecast": ("model.head.*",),
            "time-series-library": ("head.*",),
        },
        probe="zoo_timeseries.patchtst:head_probe",
        outputs=("projection",),
    ),
)

ENTRIES = (
    Entry(
        name="patchtst",
        tags={"granite": (Source("hub", "ibm-granite/granite-timeseries-patchtst"),)},
        default_tag="granite",
        modality="timeseries",
        tasks=("forecasting",),
        licence="apache-2.0",
        layouts=LAYOUTS,
        requires="timeseries",
        load="zoo_timeseries.loading:patchtst",
        probe="zoo_timeseries.patchtst:whole_probe",
        outputs=("last_hidden_state", "prediction_outputs"),
        parts=PARTS,
        sizes="zoo_timeseries.sizes:patchtst",
    ),
)


def embedding_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From patches [B, channels, patches, patch_length] to their embeddings with positions."""
    from zoo_timeseries import patchtst_probes

    return patchtst_probes.embedding(checkpoint, config)


def encoder_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From past values [B, context, channels] to hidden states [B, channels, patches, width]."""
    from zoo_timeseries import patchtst_probes

    return patchtst_probes.encoder(checkpoint, config)


def head_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From hidden states to the forecast of the scaled series [B, horizon, channels]."""
    from zoo_timeseries import patchtst_probes

    return patchtst_probes.head(checkpoint, config)


def whole_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From past values to hidden states and the forecast."""
    from zoo_timeseries import patchtst_probes

    return patchtst_probes.whole(checkpoint, config)
