"""References for PatchTST in neuralforecast's names, by its own model; and in those of Time-Series-Library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import zoo
from zoo_timeseries.forecasters import Settings, count, library, univariate, until
from zoo_timeseries.running import drawn

if TYPE_CHECKING:
    from surgery import Checkpoint

_BATCH = 2
_EPS = 1e-5  # of the variance of a series, in Time-Series-Library
_NEEDS = ("n_heads", "stride", "activation", "res_attention", "batch_normalization", "revin", "input_size")


def forecasters(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are named as in neuralforecast."""
    return any(name.startswith(("model.backbone.", "model.head.", "model.revin_layer.")) for name in checkpoint)


def librarys(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether they are named as in Time-Series-Library."""
    own = ("patch_embedding.", "encoder.attn_layers.", "head.linear.")
    return "model_type" not in config and any(name.startswith(own) for name in checkpoint)


# ---------------------------------------------------------------------------------------------------- neuralforecast


def _arguments(checkpoint: Checkpoint, settings: Settings) -> dict[str, Any]:
    """Of neuralforecast's PatchTST."""
    univariate(settings)
    known = dict(zip(_NEEDS, settings.need(*_NEEDS), strict=True))
    if known["revin"]:
        (known["revin_subtract_last"],) = settings.need("revin_subtract_last")
    at = "model.backbone"
    width, length = checkpoint[f"{at}.W_P.weight"].shape
    known |= {
        "hidden_size": width,
        "patch_len": length,
        "encoder_layers": count(checkpoint, f"{at}.encoder.layers"),
        "linear_hidden_size": checkpoint[f"{at}.encoder.layers.0.ff.0.weight"].shape[0],
        "revin_affine": "model.revin_layer.affine_weight" in checkpoint,
        "scaler_type": settings.get("scaler_type", "identity"),
    }
    return known


def model(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Any:
    """neuralforecast's own, which forecasts one number a step."""
    settings = Settings.of(checkpoint, config)
    known = _arguments(checkpoint, settings)
    (horizon,) = settings.need("h")
    rows = checkpoint["model.head.linear.weight"].shape[0]
    if rows != horizon:
        raise zoo.ZooError(
            f"{checkpoint.source} forecasts {rows} numbers for {horizon} steps, and not one a step", kind="weights"
        )
    made = zoo.unfilled(lambda: library("models").PatchTST(h=horizon, **known))
    zoo.fill(made, checkpoint)
    return made


def whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    made = model(checkpoint, config)

    def run(m: Any, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        hook = m.model.backbone.register_forward_hook(lambda _m, _a, y: found.append(y.transpose(2, 3)))
        try:
            forecast = m({"insample_y": x["past_values"]})
        finally:
            hook.remove()
        return found[0], forecast

    inputs = drawn({"plain": {"past_values": (_BATCH, made.input_size, 1)}})
    return zoo.PartProbe(made, run, inputs, ("plain",), ("last_hidden_state", "prediction_outputs"))


def encoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """Hidden states [B, 1, patches, width] of a series [B, T, 1]."""
    settings = Settings.of(checkpoint, config)
    known = _arguments(checkpoint, settings)

    def build() -> nn.Module:
        made = library("models").PatchTST(h=1, **known).model
        made.head = nn.Identity()  # another part's, and not reached
        outer = nn.Module()
        outer.model = made
        return outer

    module = zoo.unfilled(build)
    zoo.fill(module, checkpoint)

    def run(m: Any, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        hidden = until(m, "model.backbone", lambda: m.model(x["past_values"].transpose(1, 2)))
        return (hidden.transpose(2, 3),)

    inputs = drawn({"plain": {"past_values": (_BATCH, int(known["input_size"]), 1)}})
    return zoo.PartProbe(module, run, inputs, ("plain",), ("last_hidden_state",))


class Patches(nn.Module):
    """neuralforecast's map of patches, and its positions: [..., patches, length] -> [..., patches, width]."""

    def __init__(self, patches: int, length: int, width: int) -> None:
        super().__init__()
        patchtst = library("models.patchtst")
        self.W_P = nn.Linear(length, width)
        self.W_pos = patchtst.positional_encoding("zeros", True, patches, width)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.W_P(x) + self.W_pos
        return embedded


def embedding(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    at = "model.backbone."
    (patches, width), length = checkpoint[f"{at}W_pos"].shape, checkpoint[f"{at}W_P.weight"].shape[1]
    module = zoo.unfilled(lambda: Patches(patches, length, width))
    zoo.fill(module, checkpoint, lambda name: at + name)
    return _of_patches(module, (_BATCH, 1, patches, length))


def _of_patches(module: nn.Module, shape: tuple[int, ...]) -> zoo.PartProbe:
    inputs = drawn({"plain": {"patch_input": shape}})
    return zoo.PartProbe(module, lambda m, x: (m(x["patch_input"]),), inputs, ("plain",), ("embeddings",))


def head(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From hidden states [B, channels, patches, width] to the forecast, [B, channels, horizon]: in both libraries
    one map of all a channel has, its width outside and its patches inside."""
    at = "model.head." if "model.head.linear.weight" in checkpoint else "head."
    rows, numbers = checkpoint[f"{at}linear.weight"].shape
    make = library("models.patchtst").Flatten_Head
    module = zoo.unfilled(lambda: make(False, 1, numbers, rows, 1))
    zoo.fill(module, checkpoint, lambda name: at + name)
    width = _width(numbers, Settings.of(checkpoint, config))
    inputs = drawn({"plain": {"hidden_states": (_BATCH, 1, numbers // width, width)}})
    return zoo.PartProbe(
        module, lambda m, x: (m(x["hidden_states"].transpose(2, 3)),), inputs, ("plain",), ("projection",)
    )


def _width(numbers: int, settings: Settings) -> int:
    """Of a hidden state: the head's map alone does not tell it from the number of patches."""
    width = settings.get("hidden_size") or settings.get("d_model")
    if width is None:
        (width,) = settings.need("hidden_size")
    if numbers % int(width):
        raise zoo.ZooError(
            f"{settings.source}: its head takes {numbers} numbers, which is no multiple of the width {width}",
            kind="weights",
        )
    return int(width)


# ---------------------------------------------------------------------------------------------------- the library


class Embedded(nn.Module):
    """Time-Series-Library's patches: [N, patches, length] -> [N, patches, width]; positions are a fixed table."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.value_embedding = nn.Linear(length, width, bias=False)
        self.position_embedding = library("common._modules").PositionalEmbedding(width)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.value_embedding(x) + self.position_embedding(x)
        return embedded


def _embedded(checkpoint: Checkpoint) -> Embedded:
    width, length = checkpoint["patch_embedding.value_embedding.weight"].shape
    return Embedded(length, width)


def library_embedding(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    module = zoo.unfilled(lambda: _embedded(checkpoint))
    zoo.fill(module, checkpoint, lambda name: f"patch_embedding.{name}")
    length = checkpoint["patch_embedding.value_embedding.weight"].shape[1]
    return _of_patches(module, (_BATCH, 7, length))


class Encoded(nn.Module):
    """From a series [B, T, channels] to hidden states [B, channels, patches, width], as Time-Series-Library does."""

    def __init__(self, embeds: Embedded, encoder: nn.Module, stride: int) -> None:
        super().__init__()
        self.patch_embedding, self.encoder, self.stride = embeds, encoder, stride

    def forward(self, x: Tensor) -> Tensor:
        # Each series is centred and scaled by itself; its last value is repeated for one stride more.
        centred = x - x.mean(1, keepdim=True)
        x = centred / (centred.var(1, keepdim=True, unbiased=False) + _EPS).sqrt()
        x = nn.functional.pad(x.transpose(1, 2), (0, self.stride), mode="replicate")
        patches = x.unfold(-1, self.patch_embedding.value_embedding.in_features, self.stride)
        hidden: Tensor = self.encoder(self.patch_embedding(patches.flatten(0, 1)), attn_mask=None)[0]
        return hidden.unflatten(0, patches.shape[:2])


def library_encoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    settings = Settings.of(checkpoint, config)
    heads, stride, activation, length = settings.need("n_heads", "stride", "activation", "input_size")

    def build() -> nn.Module:
        modules, turn = library("common._modules"), library("models.patchtst").Transpose
        inner, width, _ = checkpoint["encoder.attn_layers.0.conv1.weight"].shape
        layers = [
            modules.TransEncoderLayer(
                modules.AttentionLayer(modules.FullAttention(False), width, heads), width, inner, activation=activation
            )
            for _ in range(count(checkpoint, "encoder.attn_layers"))
        ]
        norm = nn.Sequential(turn(1, 2), nn.BatchNorm1d(width), turn(1, 2))
        return Encoded(_embedded(checkpoint), modules.TransEncoder(layers, norm_layer=norm), int(stride))

    module = zoo.unfilled(build)
    zoo.fill(module, checkpoint)
    inputs = drawn({"plain": {"past_values": (_BATCH, int(length), 3)}})
    return zoo.PartProbe(module, lambda m, x: (m(x["past_values"]),), inputs, ("plain",), ("last_hidden_state",))


def library_whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    raise zoo.ZooError(
        f"{checkpoint.source} is from Time-Series-Library, whose models do different things for different tasks; as a "
        "whole it has no reference",
        kind="weights",
        hint="graft its part encoder, as in file:checkpoint.pth#encoder; or with --static, which runs nothing",
    )
