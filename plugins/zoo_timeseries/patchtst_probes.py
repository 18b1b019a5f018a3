"""References for PatchTST, part by part. Missing values are not exercised: every value is observed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PatchTSTConfig, PatchTSTForPrediction, PatchTSTModel

import zoo
from zoo_timeseries.running import configured, drawn, prefix

if TYPE_CHECKING:
    from surgery import Checkpoint

# The length of the series is fixed by the configuration, so there is no shortest or longest.
_VARIANTS = ("plain",)


def _configured(config: Mapping[str, Any]) -> Any:
    known = configured(PatchTSTConfig, config)
    known.do_mask_input = False  # masks at random, and only to pretrain
    return known


def _past(known: Any) -> Any:
    return drawn({"plain": {"past_values": (2, known.context_length, known.num_input_channels)}})


def embedding(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    known = _configured(config)

    def build() -> nn.Module:
        encoder = PatchTSTModel(known).encoder
        del encoder.layers
        return encoder

    module = zoo.unfilled(build)
    at = prefix(checkpoint)
    zoo.fill(module, checkpoint, lambda name: f"{at}encoder.{name}")
    patches = _patches(known)
    shape = (2, known.num_input_channels, patches, known.patch_length)
    return zoo.PartProbe(
        module,
        _embed,
        drawn({"plain": {"patch_input": shape}}),
        _VARIANTS,
        ("embeddings",),
    )


def _embed(module: Any, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (module.positional_encoder(module.embedder(x["patch_input"])),)


def encoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    known = _configured(config)
    module = zoo.unfilled(lambda: PatchTSTModel(known))
    at = prefix(checkpoint)
    zoo.fill(module, checkpoint, lambda name: at + name)
    return zoo.PartProbe(
        module, lambda m, x: (m(**x).last_hidden_state,), _past(known), _VARIANTS, ("last_hidden_state",)
    )


def head(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    known = _configured(config)
    module = zoo.unfilled(lambda: PatchTSTForPrediction(known).head)
    zoo.fill(module, checkpoint, lambda name: f"head.{name}")
    patches = _patches(known) + int(known.use_cls_token)
    shape = (2, known.num_input_channels, patches, known.d_model)
    return zoo.PartProbe(
        module,
        lambda m, x: _tensors(m(x["hidden_states"])),
        drawn({"plain": {"hidden_states": shape}}),
        _VARIANTS,
        _names(known, "projection"),
    )


def whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    if not any(name.startswith("head.") for name in checkpoint):
        return encoder(checkpoint, config)
    known = _configured(config)
    model = zoo.unfilled(lambda: PatchTSTForPrediction(known))
    zoo.fill(model, checkpoint)

    def run(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        hook = module.get_submodule("model").register_forward_hook(lambda _m, _a, y: found.append(y.last_hidden_state))
        try:
            answer = module(**x).prediction_outputs
        finally:
            hook.remove()
        return (found[0], *_tensors(answer))

    outputs = ("last_hidden_state", *_names(known, "prediction_outputs"))
    return zoo.PartProbe(model, run, _past(known), _VARIANTS, outputs)


def _patches(known: Any) -> int:
    return int((known.context_length - known.patch_length) // known.patch_stride + 1)


def _tensors(answer: Any) -> tuple[Tensor, ...]:
    return tuple(answer) if isinstance(answer, (tuple, list)) else (answer,)


def _names(known: Any, name: str) -> tuple[str, ...]:
    """One name for a forecast, or one for each parameter of its distribution."""
    if known.loss == "mse":
        return (name,)
    count = {"student_t": 3, "normal": 2, "negative_binomial": 2}[known.distribution_output]
    return tuple(f"{name}_{i}" for i in range(count))
