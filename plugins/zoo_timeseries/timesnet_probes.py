"""References for TimesNet: neuralforecast's modules, sized by the shapes of the tensors and by its hyper-parameters.

How many periods a block looks at (top_k) is in no tensor, and changes what is computed. neuralforecast writes it into
the file; a file of Time-Series-Library does not say, and without a config.json that does, it is not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import zoo
from zoo_timeseries.forecasters import Settings, library, marks_of, univariate
from zoo_timeseries.forecasters import embedding as embed
from zoo_timeseries.running import drawn

if TYPE_CHECKING:
    from surgery import Checkpoint

# The length is fixed. A constant series has no period, and which ones are then taken is anybody's choice.
_BATCHES = {"plain": 2, "shortest": 1}


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
    """Without calendar features by number, which Time-Series-Library has as well."""
    module = zoo.unfilled(lambda: embed(checkpoint, "enc_embedding", positions=True))
    channels = checkpoint["enc_embedding.value_embedding.tokenConv.weight"].shape[1]
    marks = marks_of(module)
    zoo.fill(module, checkpoint, lambda name: f"enc_embedding.{name}")

    def shapes(batch: int, length: int) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"past_values": (batch, length, channels)}
        return found | ({"past_time_features": (batch, length, marks)} if marks else {})

    inputs = drawn({"plain": shapes(2, 12), "longest": shapes(1, 96)})
    return zoo.PartProbe(
        module,
        lambda m, x: (m(x["past_values"], x.get("past_time_features")),),
        inputs,
        ("plain", "longest"),
        ("embeddings",),
    )


def encoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    timesnet = library("models.timesnet")
    blocks, kernels, width, inner = _blocks(checkpoint)
    settings = Settings.of(checkpoint, config)
    top_k = int(settings.need("top_k")[0])  # it changes what is computed
    # The part holds no tensor of that length; any will do that has more frequencies than top_k.
    length = settings.length + int(settings.get("h", 8))

    def build() -> nn.Module:
        made = [timesnet.TimesBlock(length, 0, top_k, width, inner, kernels) for _ in range(blocks)]
        return Blocks(nn.ModuleList(made), nn.LayerNorm(width))

    module = zoo.unfilled(build)
    zoo.fill(module, checkpoint)
    inputs = drawn({name: {"hidden_states": (batch, length, width)} for name, batch in _BATCHES.items()})
    return zoo.PartProbe(module, lambda m, x: (m(x["hidden_states"]),), inputs, tuple(_BATCHES), ("last_hidden_state",))


def whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    module = model(checkpoint, config)

    def run(m: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (m({"insample_y": x["past_values"], "futr_exog": None}),)

    inputs = drawn({name: {"past_values": (batch, module.input_size, 1)} for name, batch in _BATCHES.items()})
    return zoo.PartProbe(module, run, inputs, tuple(_BATCHES), ("forecast",))


def model(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Any:
    """neuralforecast's own, for what it wrote: one series, one number a step."""
    settings = Settings.of(checkpoint, config)
    if settings.given.get("input_size") is None or settings.given.get("h") is None:
        raise zoo.ZooError(
            f"{checkpoint.source} is not from neuralforecast, or does not say so; only that is run as a whole",
            kind="weights",
            hint="graft its part encoder, as in file:checkpoint.pth#encoder; or with --static, which runs nothing; "
            'or put a config.json with its arguments beside it, as in {"h": N, "input_size": N, "top_k": N}',
        )
    univariate(settings)
    length, horizon, top_k = settings.need("input_size", "h", "top_k")
    blocks, kernels, width, inner = _blocks(checkpoint)
    out = checkpoint["projection.weight"].shape[0]
    if out != 1:
        raise zoo.ZooError(f"{checkpoint.source} forecasts {out} numbers a step, and not one", kind="weights")

    def build() -> nn.Module:
        made: nn.Module = library("models").TimesNet(
            h=int(horizon),
            input_size=int(length),
            hidden_size=width,
            conv_hidden_size=inner,
            num_kernels=kernels,
            encoder_layers=blocks,
            top_k=int(top_k),
            scaler_type=settings.get("scaler_type", "identity"),
        )
        return made

    module = zoo.unfilled(build)
    zoo.fill(module, checkpoint)
    return module
