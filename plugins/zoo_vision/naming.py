"""What names tell: the family of a model of timm, the repository of timm:NAME, and what an unlabelled checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from zoo import Entry, Recognition, Source
from zoo_vision.catalogue import FAMILIES, entries
from zoo_vision.family import TIMM, Family

if TYPE_CHECKING:
    from surgery import TensorInfo


def family_of(architecture: str) -> Family | None:
    """The family that a name of timm's begins with: the longest beginning counts."""
    fits = [
        (len(prefix), family)
        for family in FAMILIES
        for prefix in family.prefixes
        if architecture.startswith(prefix) and not architecture.startswith(family.not_from or ("\0",))
    ]
    return max(fits, key=lambda fit: fit[0])[1] if fits else None


def resolve(name: str) -> Entry | None:
    """The entry for timm:NAME, where NAME is as in timm: an architecture, or architecture.tag for certain weights.

    A name with a tag is a repository's name already. Which weights are an architecture's first is in the catalogue
    here, for those that it has; for others timm is asked. None where it has none.
    """
    architecture, _, tag = name.partition(".")
    location = f"timm/{name}" if tag else _listed(architecture) or _asked(architecture)
    if location is None:  # timm has no model of that name with published weights
        return None
    source = {"default": (Source("hub", location),)}
    family = family_of(architecture)
    if family is not None:
        made = family.entry(source, "default", "")
        return Entry(**{**vars(made), "name": f"timm:{name}"})
    return Entry(
        f"timm:{name}",
        source,
        "default",
        note="it is of no family of this plugin: it has no parts, and is loaded, run and grafted as a whole",
        modality="vision",
        requires="vision",
        load="zoo_vision.loading:load",
        probe="zoo_vision.probes:any_of_timm",
        outputs=("last_hidden_state", "logits"),
    )


def _listed(architecture: str) -> str | None:
    for entry in entries():
        for sources in entry.tags.values():
            for source in sources:
                if source.kind == "hub" and source.location.partition("/")[2].partition(".")[0] == architecture:
                    return source.location
    return None


def _asked(architecture: str) -> str | None:
    """What timm takes by default: its repository on the hub."""
    import timm

    known = timm.models.get_pretrained_cfg(architecture, allow_unregistered=False) if _is_model(architecture) else None
    return None if known is None or not known.hf_hub_id else str(known.hf_hub_id)


def _is_model(architecture: str) -> bool:
    import timm

    return bool(timm.is_model(architecture))


def recognise(family: Family, config: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> Recognition | None:
    """Whether a checkpoint is of this family, and by what."""
    evidence = []
    architecture, model_type = config.get("architecture"), config.get("model_type")
    if isinstance(architecture, str):
        if family_of(architecture) is not family:
            return None
        evidence.append(f'config.json says that its architecture is "{architecture}"')
    elif isinstance(model_type, str):
        if model_type not in family.bodies:
            return None
        evidence.append(f'config.json says that its model_type is "{model_type}"')
    layout = family.layout_of(tensors)
    if layout is None:
        return None
    evidence.append(f"the tensors are named as in {family.name}, layout {layout}")
    if not isinstance(architecture, str) and not isinstance(model_type, str):
        told = _told(family, layout, tensors)
        if told is None:
            return None
        evidence += told
    return Recognition(family.name, tuple(evidence), len(evidence))


def _told(family: Family, layout: str, tensors: Mapping[str, TensorInfo]) -> list[str] | None:
    """What names and shapes add where there is no configuration; None where they speak against the family."""
    if any(fnmatchcase(name, pattern) for pattern in family.never for name in tensors):
        return None
    if layout != TIMM:
        return []
    if family.name == "deit":  # without a teacher's token it has ViT's names and shapes, and is ViT's function
        return ["it has a token for a teacher"] if "dist_token" in tensors else None
    scaled = "blocks.0.ls1.gamma" in tensors
    patch = tensors["patch_embed.proj.weight"].shape[-1] if "patch_embed.proj.weight" in tensors else 0
    if family.name == "dinov2":
        return ["its branches are scaled, and its patches are of 14 pixels"] if patch == 14 else None
    if family.name == "vit" and scaled and patch == 14:
        return None
    return []
