"""How a vision model is run as a reference: in the library that its names and its configuration belong to.

A model is built without values, cut down to the piece that was asked for, and filled tensor by tensor (zoo.fill).
Which model it is, config.json says: timm's has an architecture, that of transformers a model_type. Google's own files
say it by their shapes. Without either, each architecture that the family knows is built without storage and compared
by all names and shapes; only if exactly one function fits is it run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import zoo
from zoo_vision import of_google, of_timm, of_torchvision
from zoo_vision.family import TIMM, TORCHVISION, Family
from zoo_vision.running import Built, filled, first_tokens, hidden_inputs, pixel_inputs

if TYPE_CHECKING:
    from surgery import Checkpoint

_VARIANTS = ("plain", "shortest", "longest")


def probe_of(family: Family, part: str, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """The reference for a part of a family's model; "whole" for all of it."""
    if isinstance(config.get("architecture"), str) and not of_google.names(checkpoint):
        return _cut(of_timm.configured(config), family.pieces[TIMM], part, checkpoint)
    if isinstance(config.get("model_type"), str):
        from zoo_vision import of_transformers

        return of_transformers.probe(family, part, checkpoint, config)
    return _cut(*unlabelled(family, part, checkpoint), part, checkpoint)


def any_of_timm(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """A whole model of timm, of no family that is known here."""
    return _cut(of_timm.configured(config), {}, "whole", checkpoint)


def _cut(made: Built, pieces: Mapping[str, tuple[str, ...]], part: str, checkpoint: Checkpoint) -> zoo.PartProbe:
    model = filled(made, checkpoint, lambda: _piece(made, pieces, part))
    pixels = pixel_inputs(made.sizes, made.channels)
    if part == "whole":
        if not made.classes:
            return zoo.PartProbe(
                model, lambda m, x: (made.features(m, x["pixel_values"]),), pixels, _VARIANTS, ("last_hidden_state",)
            )

        def whole(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
            features = made.features(module, x["pixel_values"])
            return features, made.head(module, features)

        return zoo.PartProbe(model, whole, pixels, _VARIANTS, ("last_hidden_state", "logits"))
    if part == "head":
        inputs = hidden_inputs(_shape(made))
        return zoo.PartProbe(
            model, lambda m, x: (made.head(m, x["hidden_states"]),), inputs, ("plain", "shortest"), ("logits",)
        )
    name = "embeddings" if part in ("patch", "stem") else "last_hidden_state"
    probe = zoo.PartProbe(model, lambda m, x: (made.features(m, x["pixel_values"]),), pixels, _VARIANTS, (name,))
    return first_tokens(probe, made.tokens) if name == "last_hidden_state" else probe


def _shape(made: Built) -> tuple[int, ...]:
    """The shape of one image's features, found by running the model without storage."""
    with torch.device("meta"):
        model = made.build().eval()
        side = made.sizes[0] if len(made.sizes) == 1 else made.sizes[1]
        return tuple(made.features(model, torch.empty(1, made.channels, side, side)).shape[1:])


def _piece(made: Built, pieces: Mapping[str, tuple[str, ...]], part: str) -> nn.Module:
    """The model with what belongs to no such piece taken out: modules become the identity, tensors go."""
    model = made.build()
    if part != "whole":
        _keep(model, "", pieces[part])
    return model


def _keep(model: nn.Module, at: str, kept: Sequence[str]) -> None:
    for name, _ in [*model.named_parameters(recurse=False), *model.named_buffers(recurse=False)]:
        if at + name not in kept:
            setattr(model, name, None)
    for name, child in list(model.named_children()):
        path = at + name
        if path in kept or not any(True for _ in child.state_dict()):
            continue
        if any(each.startswith(f"{path}.") for each in kept):
            _keep(child, f"{path}.", kept)
        else:
            setattr(model, name, nn.Sequential())


# ---------------------------------------------------------------------------------------------------- unlabelled


def unlabelled(family: Family, part: str, checkpoint: Checkpoint) -> tuple[Built, Mapping[str, tuple[str, ...]]]:
    """By names and shapes alone. torchvision comes first: its checkpoints are the ones without a configuration."""
    if of_google.names(checkpoint):
        return of_google.made(checkpoint, part), family.pieces[TIMM]
    tried = {TORCHVISION: of_torchvision.candidates, TIMM: of_timm.candidates}
    if family.name == "efficientnet":
        from zoo_vision.efficientnet import EFFICIENTNET_PYTORCH

        tried[EFFICIENTNET_PYTORCH] = of_timm.efficientnet_pytorch
    for layout, candidates in tried.items():
        pieces = family.pieces[TORCHVISION if layout == TORCHVISION and layout in family.pieces else TIMM]
        # Two that are written alike are one function: the stems of two sizes, which have nothing in them to tell apart.
        fits: dict[str, Built] = {}
        called: dict[str, str] = {}
        for name, made in candidates(family.candidates.get(layout, ()), checkpoint):
            written = _fits(made, pieces, part, checkpoint)
            if written and written not in fits:
                fits[written], called[written] = made, name
        if len(fits) > 1:
            raise zoo.ZooError(
                f"{checkpoint.source}: by names and shapes it could be {' or '.join(called.values())}, which compute "
                "different things",
                kind="weights",
                hint="put its config.json beside the weights; or graft with --static, which runs nothing",
            )
        for made in fits.values():
            return made, pieces
    raise zoo.ZooError(
        f"{checkpoint.source}: there is no config.json, and no model of {family.name} has just these names and shapes",
        kind="weights",
        hint="put the model's config.json beside the weights; or graft with --static, which runs nothing",
    )


def _fits(made: Built, pieces: Mapping[str, tuple[str, ...]], part: str, checkpoint: Checkpoint) -> str:
    """The model as it is written, where its names and shapes are the checkpoint's; else nothing."""
    with torch.device("meta"):
        model = made.bare or made.build()
    if part != "whole":
        _keep(model, "", pieces[part])
    own = {made.at(name): tuple(value.shape) for name, value in model.state_dict().items()}
    counts = {name for name in own if name.endswith("num_batches_tracked")}
    same = own.keys() - counts <= set(checkpoint) and all(
        name in own and tuple(checkpoint[name].shape) == own[name] for name in checkpoint
    )
    return repr(model) if same else ""
