"""References for Informer and Autoformer in the names that neuralforecast and Time-Series-Library share.

An Informer's ProbSparse attention picks queries by keys that it samples at random: here every query attends, as it does
on short series in either library. Which ones it picks on long ones is not exercised.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import zoo
from zoo_timeseries.forecasters import Settings, count, embedding, library, marks_of, univariate
from zoo_timeseries.running import Inputs, drawn

if TYPE_CHECKING:
    from surgery import Checkpoint

_BATCH = 2
_ALL = 10**6  # times the logarithm of the length: more queries than there are
_WHOLE = ("input_size", "h", "decoder_input_size_multiplier")


def named(checkpoint: Checkpoint) -> bool:
    """Whether the tensors, of the whole or of a part, are named so."""
    return any(name.startswith(("enc_embedding.", "dec_embedding.", "decoder.projection.")) for name in checkpoint)


def _series(embeds: nn.Module, lengths: Mapping[str, int], **also: tuple[int, ...]) -> Inputs:
    channels = embeds.get_submodule("value_embedding.tokenConv").in_channels
    marks = marks_of(embeds)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for variant, length in lengths.items():
        shapes[variant] = {"past_values": (_BATCH, length, int(str(channels)))}
        if marks:
            shapes[variant]["past_time_features"] = (_BATCH, length, marks)
        shapes[variant] |= also
    return drawn(shapes)


def _embedded(module: Any, x: Mapping[str, Tensor]) -> Tensor:
    embeds: Tensor = module(x["past_values"], x.get("past_time_features"))
    return embeds


class Informer:
    """Each method: (checkpoint, config) -> zoo.PartProbe; the series is past_values [B, T, channels]."""

    name = "Informer"
    positions = True

    # -- what differs ---------------------------------------------------------------------------------------------
    def _attention(self, masked: bool, settings: Settings) -> nn.Module:
        made: nn.Module = library("models.informer").ProbAttention(masked, _ALL)
        return made

    def _attend(self, masked: bool, width: int, settings: Settings) -> nn.Module:
        (heads,) = settings.need("n_head")
        made: nn.Module = library("common._modules").AttentionLayer(self._attention(masked, settings), width, heads)
        return made

    def _encoder(self, checkpoint: Checkpoint, settings: Settings) -> nn.Module:
        modules = library("common._modules")
        inner, width, _ = checkpoint["encoder.attn_layers.0.conv1.weight"].shape
        (activation,) = settings.need("activation")
        layers = [
            modules.TransEncoderLayer(self._attend(False, width, settings), width, inner, activation=activation)
            for _ in range(count(checkpoint, "encoder.attn_layers"))
        ]
        halves = count(checkpoint, "encoder.conv_layers")
        convolve = library("models.informer").ConvLayer
        made: nn.Module = modules.TransEncoder(
            layers, [convolve(width) for _ in range(halves)] if halves else None, nn.LayerNorm(width)
        )
        return made

    def _decoder(self, checkpoint: Checkpoint, settings: Settings) -> nn.Module:
        modules = library("common._modules")
        inner, width, _ = checkpoint["decoder.layers.0.conv1.weight"].shape
        (activation,) = settings.need("activation")
        layers = [
            modules.TransDecoderLayer(
                self._attend(True, width, settings),
                self._attend(False, width, settings),
                width,
                inner,
                activation=activation,
            )
            for _ in range(count(checkpoint, "decoder.layers"))
        ]
        made: nn.Module = modules.TransDecoder(layers, nn.LayerNorm(width), _projection(checkpoint))
        return made

    def _decoded(self, module: Any, x: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        embeds = _embedded(module["dec_embedding"], x)
        return (module["decoder"](embeds, x["encoder_hidden_states"], x_mask=None, cross_mask=None),)

    def _trend(self, checkpoint: Checkpoint, length: int) -> dict[str, tuple[int, ...]]:
        return {}

    outputs: tuple[str, ...] = ("forecast",)
    needs: tuple[str, ...] = ("n_head", "activation")

    # -- parts ----------------------------------------------------------------------------------------------------
    def _spare(self, checkpoint: Checkpoint) -> list[str]:
        return [] if self.positions else [name for name in checkpoint if name.endswith(".position_embedding.pe")]

    def embedding(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        module = zoo.unfilled(partial(embedding, checkpoint, "enc_embedding", positions=self.positions))
        inputs = _series(module, {"plain": 12, "longest": 96})
        spare = self._spare(checkpoint)
        zoo.fill(module, checkpoint, lambda name: f"enc_embedding.{name}", spare=spare)
        return zoo.PartProbe(module, lambda m, x: (_embedded(m, x),), inputs, ("plain", "longest"), ("embeddings",))

    def encoder(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        settings = Settings.of(checkpoint, config)

        def build() -> nn.Module:
            embeds = embedding(checkpoint, "enc_embedding", positions=self.positions)
            return nn.ModuleDict({"enc_embedding": embeds, "encoder": self._encoder(checkpoint, settings)})

        module = zoo.unfilled(build)
        longest = settings.length
        # Even where the model's own is even: of an odd length, an Autoformer's correlation leaves out a delay.
        plain = longest - 4 if longest > 8 else longest
        inputs = _series(module.get_submodule("enc_embedding"), {"plain": plain, "longest": longest})
        zoo.fill(module, checkpoint, spare=self._spare(checkpoint))

        def run(m: Any, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return (m["encoder"](_embedded(m["enc_embedding"], x), attn_mask=None)[0],)

        return zoo.PartProbe(module, run, inputs, ("plain", "longest"), ("encoder_last_hidden_state",))

    def decoder(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        settings = Settings.of(checkpoint, config)

        def build() -> nn.Module:
            embeds = embedding(checkpoint, "dec_embedding", positions=self.positions)
            return nn.ModuleDict({"dec_embedding": embeds, "decoder": self._decoder(checkpoint, settings)})

        module = zoo.unfilled(build)
        length = settings.length // 2 + int(settings.get("h", 8))
        width = checkpoint["decoder.projection.weight"].shape[1]
        inputs = _series(
            module.get_submodule("dec_embedding"),
            {"plain": length},
            encoder_hidden_states=(_BATCH, settings.length, width),
            **self._trend(checkpoint, length),
        )
        zoo.fill(module, checkpoint, spare=self._spare(checkpoint))
        return zoo.PartProbe(module, self._decoded, inputs, ("plain",), self.outputs)

    def head(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        module = zoo.unfilled(lambda: _projection(checkpoint))
        zoo.fill(module, checkpoint, lambda name: f"decoder.projection.{name}")
        inputs = drawn({"plain": {"hidden_states": (_BATCH, 8, checkpoint["decoder.projection.weight"].shape[1])}})
        return zoo.PartProbe(module, lambda m, x: (m(x["hidden_states"]),), inputs, ("plain",), ("projection",))

    def whole(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        model = self.model(checkpoint, config)
        for child in model.modules():
            if type(child).__name__ == "ProbAttention":
                child.factor = _ALL
        inputs = drawn({"plain": {"past_values": (_BATCH, model.input_size, 1)}})

        def run(m: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return (m({"insample_y": x["past_values"], "futr_exog": None}),)

        return zoo.PartProbe(model, run, inputs, ("plain",), ("forecast",))

    def model(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> Any:
        """neuralforecast's own, for what it wrote: one series, one number a step."""
        settings = Settings.of(checkpoint, config)
        if settings.given.get("input_size") is None or settings.given.get("h") is None:
            raise zoo.ZooError(
                f"{checkpoint.source} is not said to be from neuralforecast; only what that wrote is run as a whole",
                kind="weights",
                hint="graft its part encoder, as in file:checkpoint.pth#encoder; or with --static, which runs nothing; "
                "if it is, put a config.json with the arguments of its class beside it",
            )
        univariate(settings)
        names = tuple(dict.fromkeys((*_WHOLE, "factor", *self.needs)))
        known = {"n_head": settings.get("n_head", 1), **dict(zip(names, settings.need(*names), strict=True))}
        rows, width = checkpoint["decoder.projection.weight"].shape
        if rows != 1:
            raise zoo.ZooError(f"{checkpoint.source} forecasts {rows} numbers a step, and not one", kind="weights")
        sizes: dict[str, Any] = {
            "hidden_size": width,
            "conv_hidden_size": checkpoint["encoder.attn_layers.0.conv1.weight"].shape[0],
            "encoder_layers": count(checkpoint, "encoder.attn_layers"),
            "decoder_layers": count(checkpoint, "decoder.layers"),
            "scaler_type": settings.get("scaler_type", "identity"),
        }
        if self.name == "Informer":
            sizes["distil"] = bool(count(checkpoint, "encoder.conv_layers"))
        model = zoo.unfilled(lambda: getattr(library("models"), self.name)(**known, **sizes))
        zoo.fill(model, checkpoint)
        return model


class Autoformer(Informer):
    """Its heads are all shifted alike, so that how many there are changes nothing."""

    name = "Autoformer"
    positions = False
    outputs = ("season", "trend")
    needs = ("factor", "MovingAvg_window", "activation")

    def _attend(self, masked: bool, width: int, settings: Settings) -> nn.Module:
        autoformer = library("models.autoformer")
        (factor,) = settings.need("factor")
        correlate = autoformer.AutoCorrelation(masked, factor)
        made: nn.Module = autoformer.AutoCorrelationLayer(correlate, width, settings.get("n_head", 1))
        return made

    def _encoder(self, checkpoint: Checkpoint, settings: Settings) -> nn.Module:
        autoformer = library("models.autoformer")
        inner, width, _ = checkpoint["encoder.attn_layers.0.conv1.weight"].shape
        _, window, activation = settings.need(*self.needs)
        layers = [
            autoformer.EncoderLayer(
                self._attend(False, width, settings), width, inner, MovingAvg=window, activation=activation
            )
            for _ in range(count(checkpoint, "encoder.attn_layers"))
        ]
        made: nn.Module = autoformer.Encoder(layers, norm_layer=autoformer.LayerNorm(width))
        return made

    def _decoder(self, checkpoint: Checkpoint, settings: Settings) -> nn.Module:
        autoformer = library("models.autoformer")
        inner, width, _ = checkpoint["decoder.layers.0.conv1.weight"].shape
        _, window, activation = settings.need(*self.needs)
        layers = [
            autoformer.DecoderLayer(
                self._attend(True, width, settings),
                self._attend(False, width, settings),
                hidden_size=width,
                c_out=checkpoint["decoder.projection.weight"].shape[0],
                conv_hidden_size=inner,
                MovingAvg=window,
                activation=activation,
            )
            for _ in range(count(checkpoint, "decoder.layers"))
        ]
        made: nn.Module = autoformer.Decoder(layers, autoformer.LayerNorm(width), _projection(checkpoint))
        return made

    def _decoded(self, module: Any, x: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        embeds = _embedded(module["dec_embedding"], x)
        season, trend = module["decoder"](
            embeds, x["encoder_hidden_states"], x_mask=None, cross_mask=None, trend=x["trend"]
        )
        return season, trend

    def _trend(self, checkpoint: Checkpoint, length: int) -> dict[str, tuple[int, ...]]:
        return {"trend": (_BATCH, length, checkpoint["decoder.projection.weight"].shape[0])}


def _projection(checkpoint: Checkpoint) -> nn.Module:
    rows, width = checkpoint["decoder.projection.weight"].shape
    return nn.Linear(width, rows)


FAMILIES = {"informer": Informer(), "autoformer": Autoformer()}
