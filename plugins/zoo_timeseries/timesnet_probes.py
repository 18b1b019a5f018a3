"""References for TimesNet: neuralforecast's modules, sized by the shapes of the tensors and by its hyper-parameters.

How many periods a block looks at (top_k) is in no tensor, and changes what is computed. neuralforecast writes it into
the file; a file of Time-Series-Library does not say, and without a config.json that does, it is not run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import zoo
from zoo_timeseries.running import drawn

if TYPE_CHECKING:
    from surgery import Checkpoint


def _neuralforecast() -> Any:
    try:
        from neuralforecast.models import timesnet
    except ModuleNotFoundError as error:
        raise zoo.ZooError(
            f"a TimesNet is run by neuralforecast, and {error.name} is not installed",
            kind="extra",
            hint="pip install neuralforecast; or graft with --static, which runs nothing",
        ) from error
    return timesnet


def _settings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """neuralforecast's hyper-parameters, where it wrote the file; else what config.json says."""
    text = checkpoint.metadata.get("hyper_parameters")
    return json.loads(text) if text else dict(config)


def _blocks(checkpoint: Checkpoint) -> tuple[int, int, int, int]:
    """(blocks, kernels, width, width within a block), from names and shapes."""
    names = [name.split(".") for name in checkpoint if name.startswith("model.")]
    blocks = 1 + max(int(words[1]) for words in names)
    kernels = 1 + max(int(words[5]) for words in names)
    inner, width = checkpoint["model.0.conv.0.kernels.0.weight"].shape[:2]
    return blocks, kernels, width, inner


class Blocks(nn.Module):
    """The blocks and the norm that they share, under their names in the model."""

    def __init__(self, model: nn.ModuleList, layer_norm: nn.LayerNorm) -> None:
        super().__init__()
        self.model, self.layer_norm = model, layer_norm

    def forward(self, x: Tensor) -> Tensor:
        for block in self.model:
            x = self.layer_norm(block(x))
        return x


def embedding(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """Without calendar features, which the two libraries encode each in their way."""
    _neuralforecast()
    from neuralforecast.common._modules import DataEmbedding

    if any(".temporal_embedding." in name for name in checkpoint):
        raise zoo.ZooError(
            f"{checkpoint.source} embeds calendar features, which have no reference here",
            kind="weights",
            hint="graft with --static, which runs nothing; or the part encoder",
        )
    width, channels, _ = checkpoint["enc_embedding.value_embedding.tokenConv.weight"].shape
    module = zoo.unfilled(lambda: DataEmbedding(channels, 0, width))
    zoo.fill(module, checkpoint, lambda name: f"enc_embedding.{name}")
    inputs = drawn({"plain": {"past_values": (2, 12, channels)}, "longest": {"past_values": (1, 96, channels)}})
    return zoo.PartProbe(module, lambda m, x: (m(x["past_values"]),), inputs, ("plain", "longest"), ("embeddings",))


def encoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    timesnet = _neuralforecast()
    blocks, kernels, width, inner = _blocks(checkpoint)
    settings = _settings(checkpoint, config)
    if "top_k" not in settings:  # it changes what is computed, and no tensor tells it
        raise zoo.ZooError(
            f"{checkpoint.source} does not say how many periods a block looks at (top_k), and no tensor tells it",
            kind="weights",
            hint='put a config.json with {"top_k": N} beside it, N as in training (the library\'s default is 5); '
            "or graft with --static, which runs nothing",
        )
    top_k = int(settings["top_k"])
    # The part holds no tensor of that length; any will do that has more frequencies than top_k.
    length = int(settings.get("input_size", 24)) + int(settings.get("h", 8))

    def build() -> nn.Module:
        made = [timesnet.TimesBlock(length, 0, top_k, width, inner, kernels) for _ in range(blocks)]
        return Blocks(nn.ModuleList(made), nn.LayerNorm(width))

    module = zoo.unfilled(build)
    zoo.fill(module, checkpoint)
    inputs = drawn({"plain": {"hidden_states": (2, length, width)}})
    return zoo.PartProbe(module, lambda m, x: (m(x["hidden_states"]),), inputs, ("plain",), ("last_hidden_state",))


def whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    timesnet = _neuralforecast()
    if "hyper_parameters" not in checkpoint.metadata:
        raise zoo.ZooError(
            f"{checkpoint.source} is not from neuralforecast, and only what that wrote is run as a whole",
            kind="weights",
            hint="graft its part encoder, as in file:checkpoint.pth#encoder; or with --static, which runs nothing",
        )
    settings = _settings(checkpoint, config)
    if settings.get("futr_exog_list") or settings.get("cat_exog_list"):
        raise zoo.ZooError(
            f"{checkpoint.source} takes exogenous series, which have no reference here",
            kind="weights",
            hint="graft its part encoder; or with --static, which runs nothing",
        )
    blocks, kernels, width, inner = _blocks(checkpoint)
    out = checkpoint["projection.weight"].shape[0]
    if out != 1:
        raise zoo.ZooError(f"{checkpoint.source} forecasts {out} numbers a step, and not one", kind="weights")
    length, horizon = int(settings["input_size"]), int(settings["h"])

    def build() -> nn.Module:
        return timesnet.TimesNet(
            h=horizon,
            input_size=length,
            hidden_size=width,
            conv_hidden_size=inner,
            num_kernels=kernels,
            encoder_layers=blocks,
            top_k=int(settings["top_k"]),
        )

    module = zoo.unfilled(build)
    zoo.fill(module, checkpoint)

    def run(m: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (m({"insample_y": x["past_values"], "futr_exog": None}),)

    return zoo.PartProbe(module, run, drawn({"plain": {"past_values": (2, length, 1)}}), ("plain",), ("forecast",))
