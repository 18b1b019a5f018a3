"""The namespace open_clip:ARCH/TAG, answered from open_clip's own table of pretrained weights."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches

from zoo import Entry, Source, ZooError
from zoo_clip import clip, siglip

CONFIG = "open_clip_config.json"


def resolve(ref: str) -> Entry:
    """An entry with the parts of CLIP or SigLIP, whose source is the hub repository that the table names."""
    arch, _, tag = ref.removeprefix("open_clip:").rpartition("/")
    if not arch:
        raise ZooError(f"{ref} names no weights", kind="reference", hint="as in open_clip:ViT-B-32/laion2b_s34b_b79k")
    # The table is a module of open_clip, and importing any module of it imports torch.
    from open_clip import pretrained

    tags = pretrained.list_pretrained_tags_by_model(arch)
    if not tags:
        known = sorted({name for name, _ in pretrained.list_pretrained()})
        near = ", ".join(get_close_matches(arch, known, 3, 0.5))
        raise ZooError(f'open_clip has no weights for "{arch}"', kind="unknown", hint=f"close to it: {near}")
    found = pretrained.get_pretrained_cfg(arch, tag)
    if not found:
        raise ZooError(f'{arch} has no weights called "{tag}"', kind="unknown", hint=f"there are {', '.join(tags)}")
    where, _, file = str(found.get("hf_hub") or "").partition("/")
    name, _, file = file.partition("/")
    if not where or not name:
        raise ZooError(
            f"open_clip fetches {ref} from {found.get('url')}, and not from a hub",
            kind="unknown",
            hint="download the file, and name it as file:path",
        )
    repository = f"{where}/{name}"
    # A trailing slash in the table means the default names, safetensors first.
    files = (file,) if file else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    like = siglip.ENTRY if "siglip" in arch.lower() else clip.ENTRY
    return replace(
        like,
        name=ref,
        tags={"default": tuple(Source("hub", repository, files=(each, CONFIG)) for each in files)},
        default_tag="default",
        licence="",
    )
