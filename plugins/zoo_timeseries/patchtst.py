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
            "neuralforecast": (f"{_NF}W_P.*", f"{_NF}W_pos", f"{_NF}encoder.*", "model.revin_layer.*"),
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


def _probe(part: str, checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    from zoo_timeseries import patchtst_forecasters as others

    if others.forecasters(checkpoint):
        made: PartProbe = getattr(others, part)(checkpoint, config)
    elif others.librarys(checkpoint, config):
        made = (
            others.head(checkpoint, config)
            if part == "head"
            else getattr(others, f"library_{part}")(checkpoint, config)
        )
    else:
        from zoo_timeseries import patchtst_probes

        made = getattr(patchtst_probes, part)(checkpoint, config)
    return made


def embedding_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From patches [B, channels, patches, patch_length] to their embeddings with positions."""
    return _probe("embedding", checkpoint, config)


def encoder_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From past values [B, context, channels] to hidden states [B, channels, patches, width]."""
    return _probe("encoder", checkpoint, config)


def head_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From hidden states to the forecast of the scaled series, [B, horizon, channels]; in the layouts of neuralforecast
    and Time-Series-Library [B, channels, horizon]."""
    return _probe("head", checkpoint, config)


def whole_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From past values to hidden states and the forecast."""
    return _probe("whole", checkpoint, config)
