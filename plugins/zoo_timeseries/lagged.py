"""Informer and Autoformer: entries and parts. The two take the same inputs, and name their tensors alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo import Entry, Part, PartProbe, Source

if TYPE_CHECKING:
    from surgery import Checkpoint

_EMBEDDING = ("value_embedding.*", "embed_positions.*", "layernorm_embedding.*")
_OTHER = "time-series-library"  # neuralforecast took its names over, so the two are one layout


def _layouts(own: str, other: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Where the body lies under `model.` and where it does not; `own` is what only this family has."""
    every = ("encoder.value_embedding.value_projection.weight", own)
    shared = ("enc_embedding.value_embedding.tokenConv.weight", *other)
    return {"prediction": tuple(f"model.{name}" for name in every), "model": every, _OTHER: shared}


def _parts(probes: str) -> tuple[Part, ...]:
    def held(names: tuple[str, ...], other: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        return {"prediction": tuple(f"model.{name}" for name in names), "model": names, _OTHER: other}

    embeds = tuple(f"encoder.{name}" for name in _EMBEDDING)
    last = ("decoder.norm.*", "decoder.projection.*", "decoder.layers.*", "dec_embedding.*")
    return (
        Part(
            "embedding",
            held(embeds, ("enc_embedding.*",)),
            probe=f"zoo_timeseries.lagged:{probes}_embedding",
            outputs=("embeddings",),
        ),
        # The embedding of static features, which is shared by both sides.
        Part(
            "static",
            held(("embedder.*",), ()),
            probe=f"zoo_timeseries.lagged:{probes}_static",
            outputs=("static_features",),
        ),
        Part(
            "encoder",
            held(("encoder.*",), ("enc_embedding.*", "encoder.*")),
            probe=f"zoo_timeseries.lagged:{probes}_encoder",
            outputs=("encoder_last_hidden_state",),
        ),
        Part(
            "decoder",
            held(("decoder.*",), last),
            probe=f"zoo_timeseries.lagged:{probes}_decoder",
            outputs=("last_hidden_state",),
        ),
        Part(
            "head",
            {"prediction": ("parameter_projection.*",), "model": (), _OTHER: ("decoder.projection.*",)},
            probe=f"zoo_timeseries.lagged:{probes}_head",
            outputs=("params",),
        ),
    )


def _entry(name: str, layouts: Mapping[str, tuple[str, ...]]) -> Entry:
    return Entry(
        name=name,
        tags={"tourism-monthly": (Source("hub", f"huggingface/{name}-tourism-monthly"),)},
        default_tag="tourism-monthly",
        modality="timeseries",
        tasks=("forecasting",),
        licence="apache-2.0",
        layouts=layouts,
        requires="timeseries",
        load=f"zoo_timeseries.loading:{name}",
        probe=f"zoo_timeseries.lagged:{name}_whole",
        outputs=("encoder_last_hidden_state", "params"),
        parts=_parts(name),
    )


# An Informer normalises its last layer as any other; an Autoformer's decoder has a trend beside it.
ENTRIES = (
    _entry(
        "informer",
        _layouts(
            "encoder.layers.0.final_layer_norm.weight",
            ("encoder.attn_layers.0.attention.query_projection.weight", "encoder.attn_layers.0.norm1.weight"),
        ),
    ),
    _entry(
        "autoformer",
        _layouts(
            "encoder.layers.0.final_layer_norm.layernorm.weight",
            (
                "encoder.attn_layers.0.attention.query_projection.weight",
                "encoder.norm.layernorm.weight",
                "decoder.layers.0.projection.weight",
            ),
        ),
    ),
)


def _probe(family: str, part: str, checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    from zoo_timeseries import lagged_forecasters

    if lagged_forecasters.named(checkpoint):
        made: PartProbe = getattr(lagged_forecasters.FAMILIES[family], part)(checkpoint, config)
        return made
    from zoo_timeseries import lagged_probes

    probe: PartProbe = getattr(lagged_probes.FAMILIES[family], part)(checkpoint, config)
    return probe


def informer_embedding(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From features [B, T, F] to embeddings [B, T, width]."""
    return _probe("informer", "embedding", checkpoint, config)


def informer_static(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From static categories [B, N] to their embeddings."""
    return _probe("informer", "static", checkpoint, config)


def informer_encoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From features [B, T, F] to hidden states. Every query attends: which are active is not exercised."""
    return _probe("informer", "encoder", checkpoint, config)


def informer_decoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From features [B, horizon, F] and the encoder's states to hidden states."""
    return _probe("informer", "decoder", checkpoint, config)


def informer_head(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From hidden states to the parameters of the distribution."""
    return _probe("informer", "head", checkpoint, config)


def informer_whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From the series with its future to the encoder's states and the parameters. Every query attends."""
    return _probe("informer", "whole", checkpoint, config)


def autoformer_embedding(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From features [B, T, F] to embeddings [B, T, width]."""
    return _probe("autoformer", "embedding", checkpoint, config)


def autoformer_static(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From static categories [B, N] to their embeddings."""
    return _probe("autoformer", "static", checkpoint, config)


def autoformer_encoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From features [1, T, F] to hidden states; one series at a time, see lagged_probes."""
    return _probe("autoformer", "encoder", checkpoint, config)


def autoformer_decoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From features, trend and the encoder's states to the season and the trend; one series at a time."""
    return _probe("autoformer", "decoder", checkpoint, config)


def autoformer_head(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From season plus trend to the parameters of the distribution."""
    return _probe("autoformer", "head", checkpoint, config)


def autoformer_whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From the series with its future to the encoder's states and the parameters; one series at a time."""
    return _probe("autoformer", "whole", checkpoint, config)
