"""References for PatchTST, part by part. Of the whole body, series with edges and with missing values are among the
inputs; a target that takes no mask of observed values is not given any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PatchTSTConfig, PatchTSTForPrediction, PatchTSTModel

import zoo
from zoo_timeseries.running import Inputs, configured, drawn, edges, prefix

if TYPE_CHECKING:
    from surgery import Checkpoint

# The length of the series is fixed by the configuration, so there is no longest; shortest is a batch of one series.
_VARIANTS = ("plain", "shortest", "edges", "missing")
_FEW = {"plain": 2, "shortest": 1}
_BATCHES = {**_FEW, "missing": 2}


def _configured(config: Mapping[str, Any]) -> Any:
    known = configured(PatchTSTConfig, config)
    known.do_mask_input = False  # masks at random, and only to pretrain
    return known


def _past(known: Any) -> Inputs:
    """`missing`: values that a mask says were not observed, in the middle of one series and at the end of another."""
    steps, channels = known.context_length, known.num_input_channels
    plain = drawn({name: {"past_values": (batch, steps, channels)} for name, batch in _BATCHES.items()})

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        x = edges((4, steps, channels), seed) if variant == "edges" else plain(seed, variant)["past_values"]
        mask = torch.ones_like(x, dtype=torch.bool)
        if variant == "missing":
            mask[0, steps // 3 : steps // 2] = False
            mask[1, -max(1, steps // 8) :, -1] = False
        return {"past_values": x, "past_observed_mask": mask}

    return inputs


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
        drawn({name: {"patch_input": (batch, *shape[1:])} for name, batch in _FEW.items()}),
        tuple(_FEW),
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
        drawn({name: {"hidden_states": (batch, *shape[1:])} for name, batch in _FEW.items()}),
        tuple(_FEW),
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
