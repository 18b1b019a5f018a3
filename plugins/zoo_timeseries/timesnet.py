"""TimesNet: nobody publishes official weights, so the entry has no sources; a file of one's own is recognised.

Time-Series-Library's `checkpoint.pth` and neuralforecast's checkpoints name these tensors alike: one layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo import Entry, Part, PartProbe

if TYPE_CHECKING:
    from surgery import Checkpoint

_EMBEDDING = "enc_embedding.value_embedding.tokenConv.weight"
LAYOUTS = {"time-series-library": (_EMBEDDING, "model.0.conv.0.kernels.0.weight", "layer_norm.weight")}
_ONE = "time-series-library"

PARTS = (
    Part(
        "embedding",
        {_ONE: ("enc_embedding.*",)},
        probe="zoo_timeseries.timesnet:embedding_probe",
        outputs=("embeddings",),
    ),
    # The blocks alone, from hidden states [B, T, width]: in front of them, the two libraries scale each in their way.
    Part(
        "encoder",
        {_ONE: ("model.*", "layer_norm.*")},
        probe="zoo_timeseries.timesnet:encoder_probe",
        outputs=("last_hidden_state",),
    ),
    Part(
        "head",
        {_ONE: ("projection.*", "predict_linear.*")},
        probe=None,
        outputs=(),
    ),
)

ENTRIES = (
    Entry(
        name="timesnet",
        open=False,
        note="its authors publish no weights. Train one, and name the file: Time-Series-Library's checkpoint.pth and "
        "neuralforecast's checkpoints are read, as in zoo graft file:checkpoint.pth#encoder my_timesnet.py; "
        "neuralforecast's are loaded and run as well",
        modality="timeseries",
        tasks=("forecasting",),
        licence="mit",
        layouts=LAYOUTS,
        load="zoo_timeseries.loading:timesnet",
        probe="zoo_timeseries.timesnet:whole_probe",
        outputs=("forecast",),
        parts=PARTS,
    ),
)


def embedding_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From a series [B, T, channels] to embeddings [B, T, width], by neuralforecast's module."""
    from zoo_timeseries import timesnet_probes

    return timesnet_probes.embedding(checkpoint, config)


def encoder_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From hidden states [B, T, width] through the blocks of neuralforecast."""
    from zoo_timeseries import timesnet_probes

    return timesnet_probes.encoder(checkpoint, config)


def whole_probe(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    """From a window [B, T, 1] to the forecast; only for what neuralforecast wrote."""
    from zoo_timeseries import timesnet_probes

    return timesnet_probes.whole(checkpoint, config)
