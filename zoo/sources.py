"""Where an entry's files are: its sources tried in order, each with what came of it.

`locate` answers with files on this machine. A source that cannot serve (a package that is not installed, a file that
is not there) passes the turn to the next, and the answer says so; when none can, the last reason is the error.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.entry import Pick, Source
from zoo.errors import ZooError
from zoo.hub import Hub, choose_beside, choose_weights, shards_of

if TYPE_CHECKING:
    import surgery

# Reasons that leave the other sources a chance. Anything else (a typo, a gate, a wrong hash) is the answer.
_PASSES = ("package", "file", "offline", "network", "server", "rate-limit", "repository", "missing", "revision", "hub")


@dataclass(frozen=True)
class Located:
    """An entry's files on this machine. `weights` is what opens: a file, or the index of its shards."""

    pick: Pick
    source: Source
    weights: Path
    files: tuple[Path, ...]
    commit: str | None = None
    checked: Mapping[str, str] | None = None  # file -> sha256, for those the entry knows
    passed_over: tuple[str, ...] = ()
    note: str = ""
    key: str | None = None  # the entry of a file of several, as in file:thing.pt:state_dict_ema

    @property
    def config(self) -> dict[str, Any]:
        """The configuration beside the weights, or nothing. One that cannot be read is an error, not nothing."""
        return read_config(self.weights)

    @property
    def where(self) -> str:
        """One line: which source it was, at which commit."""
        return f"{self.source}{f' at commit {self.commit}' if self.commit else ''}"


def read_config(weights: Path) -> dict[str, Any]:
    """config.json; or open_clip's own, for weights in its layout and where there is no other."""
    # Repositories hold one model in two layouts, each with a configuration of its own, side by side.
    names = ["config.json", "open_clip_config.json"]
    if weights.name.startswith("open_clip"):
        names.reverse()
    path = next((path for name in names if (path := weights.parent / name).is_file()), None)
    if path is None:
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ZooError(f"{path} cannot be read: {error}", kind="file") from error
    if not isinstance(config, dict):
        raise ZooError(f"{path} is not a configuration: it holds no object", kind="file")
    return config


def described(tensors: object) -> dict[str, Any]:
    """What a file itself says of its model, each under its key in the file: `dims`, `args`, `cfg`, `hyper_parameters`.

    Nothing for tensors without metadata. Only dicts are kept, so that nothing in them is taken for an entry of a
    config.json.
    """
    found = {}
    metadata: Mapping[str, str] = getattr(tensors, "metadata", {})
    for name, text in metadata.items():
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):  # text of another kind, as safetensors' "format": "pt"
            continue
        if isinstance(value, dict):
            found[name] = value
    return found


# What people call the model inside of a training module, which then stands before every name.
_INSIDE = ("model", "net", "network", "backbone", "module", "_orig_mod")


def unprefixed(
    checkpoint: surgery.Checkpoint, recognise: Callable[[Mapping[str, surgery.TensorInfo]], int]
) -> surgery.Checkpoint:
    """The checkpoint without what a training module puts before every name, where it is recognised better so.

    `recognise` says how well something is recognised: the pieces of evidence, 0 for not at all. `model.` is a name of
    its own in many layouts, so that names alone do not tell; a Lightning module around a ViT is recognised without it.
    """
    for _ in range(3):
        first = next(iter(checkpoint), "").partition(".")[0]
        prefix = f"{first}."
        if first not in _INSIDE or not all(name.startswith(prefix) and name != prefix for name in checkpoint):
            break
        inner = checkpoint.view({name.removeprefix(prefix): name for name in checkpoint})
        if recognise(inner) <= recognise(checkpoint):
            break
        note = f"Every name began with {prefix!r}, which is left out: the rest is recognised, and with it it is not."
        checkpoint = inner.noted(note)
    return checkpoint


def locate(
    chosen: Pick,
    hub: Hub,
    *,
    expand: Callable[[str], Pick],
    download: bool = True,
    offline: bool = False,
    check: bool = True,
) -> Located | None:
    """The files of what was picked, from the first source that can serve.

    `download=False` looks only at what is on this machine and answers None where that is not enough; `offline` does the
    same and says why; `check` reads the files whose sha256 is known and refuses others. `expand` picks a reference
    that a source of the kinds timm and open_clip stands for.
    """
    passed: list[str] = []
    last: ZooError | None = None
    uncached = False
    for source in _expanded(chosen.sources, expand):
        try:
            found = _from(source, chosen, hub, download=download and not offline)
        except ZooError as error:
            if error.kind not in _PASSES:
                raise
            passed.append(f"{source}: {error}")
            last = error
            continue
        if found is None:
            uncached = True
            last = hub.not_cached(source.location, chosen.revision or source.revision)
            passed.append(f"{source}: {last}")
            continue
        checked = _check(source, found) if check else None
        return Located(
            chosen, source, found.weights, found.files, found.commit, checked, tuple(passed), found.note, found.key
        )
    if uncached and not download:
        return None
    if last is None:
        raise ZooError(f"{chosen.entry.name} names no source", kind="weights")
    if len(passed) > 1:
        raise ZooError("; ".join(passed), kind=last.kind, hint=last.hint)
    raise last


@dataclass(frozen=True)
class _Found:
    weights: Path
    files: tuple[Path, ...]
    commit: str | None = None
    note: str = ""
    key: str | None = None


def _expanded(sources: Sequence[Source], expand: Callable[[str], Pick]) -> list[Source]:
    flat: list[Source] = []
    for source in sources:
        if source.kind in ("timm", "open_clip"):
            flat += expand(str(source)).sources
        else:
            flat.append(source)
    return flat


def _from(source: Source, chosen: Pick, hub: Hub, *, download: bool) -> _Found | None:
    revision = chosen.revision
    if source.kind == "hub":
        wanted = revision or source.revision
        get = hub.fetch if download else hub.cached
        found = get(source.location, wanted, source.files)
        return _Found(found.weights, found.files, found.commit, found.note) if found is not None else None
    if revision is not None:
        raise ZooError(f"it has no revisions, and {revision} was asked for", kind=source.kind)
    if source.kind != "file":
        return _gather(_packaged(source.location), source, chosen)
    path, key = _local(source, chosen)
    return replace(_gather(path, source, chosen), key=key)


def _local(source: Source, chosen: Pick) -> tuple[Path, str | None]:
    """The file, and the key of an entry of it: "file:a:b" is the entry b of a, unless there is a file of that name."""
    path, key = Path(source.location).expanduser(), None
    head, colon, last = source.location.rpartition(":")
    if colon and not path.exists() and Path(head).expanduser().is_file():
        path, key = Path(head).expanduser(), last
    # "file:a#b" is the part b of a, unless there is a file of just that name.
    whole = Path(f"{source.location}#{chosen.reference.part}").expanduser()
    if not path.exists() and chosen.reference.part and whole.exists():
        raise ZooError(f"{whole} has a # in its name, which would be a part", kind="reference", hint="rename it")
    if not path.exists():
        raise ZooError(f"there is no file {path}", kind="file", hint=_nearby(path))
    return path, key


def _nearby(path: Path) -> str:
    from zoo.errors import did_you_mean

    try:
        names = sorted(each.name for each in path.parent.iterdir())
    except OSError:
        return f"there is no folder {path.parent} either" if not path.parent.exists() else ""
    return did_you_mean(path.name, names) or f"relative paths start at {Path.cwd()}"


def _packaged(location: str) -> Path:
    """The file or folder "dist/path": the path starts where the distribution is installed, or in a package of its."""
    name, _, inside = location.partition("/")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise ZooError(
            f"the package {name} is not installed", kind="package", hint=f"pip install --no-deps {name}"
        ) from None
    packages = [folder for top in _packages(distribution) for folder in _folders(top)]
    if not inside and len(packages) == 1:
        return packages[0]
    # Each package's parent as well: that is where the path starts for a distribution that is installed in place.
    roots = [Path(str(distribution.locate_file(""))), *(folder.parent for folder in packages), *packages]
    for root in roots:
        if inside and (root / inside).exists():
            return root / inside
    raise ZooError(
        f"the package {name} {distribution.version} is installed and holds no {inside or 'single folder'}",
        kind="package",
        hint="the path starts at its top-level folder, as in package:dist/folder/model.safetensors",
    )


def _packages(distribution: importlib.metadata.Distribution) -> list[str]:
    """The names of the packages that a distribution brings."""
    listed = {file.parts[0] for file in distribution.files or () if len(file.parts) > 1 and file.suffix == ".py"}
    listed |= set((distribution.read_text("top_level.txt") or "").split())
    return sorted(name for name in listed if name.isidentifier())


def _folders(package: str) -> list[Path]:
    # Finding the spec of a top-level package imports nothing.
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []


def _chosen(path: Path, names: Sequence[str], source: Source) -> str:
    """The weights among the files at a path; where there are none, the error names folders below that hold some."""
    try:
        return choose_weights(names, str(path))
    except ZooError as error:
        if error.kind != "weights":
            raise
        below = sorted(
            folder.relative_to(path).as_posix()
            for pattern in ("*", "*/*")
            for folder in path.glob(pattern)
            if folder.is_dir() and any(each.suffix in (".safetensors", ".bin") for each in folder.iterdir())
        )
        if not below:
            raise
        told = " or ".join(f"{source}/{folder}" for folder in below[:3])
        raise ZooError(str(error), kind="weights", hint=f"there are weights below it: {told}") from None


def _gather(path: Path, source: Source, chosen: Pick) -> _Found:
    """The weights at a path, and what lies beside them."""
    if path.is_file():
        names = sorted(each.name for each in path.parent.iterdir() if each.is_file())
        beside = [path.parent / name for name in choose_beside(names, path.name)]
        # Beside a file that someone named lies whatever they keep there; only its configuration is looked for.
        extra = beside if source.kind == "package" else [each for each in beside if each.name == "config.json"]
        weights = path
    else:
        names = sorted(each.name for each in path.iterdir() if each.is_file())
        weights = path / (source.files[0] if source.files else _chosen(path, names, source))
        extra = [path / name for name in dict.fromkeys([*source.files[1:], *choose_beside(names, weights.name)])]
    shards = [weights.parent / name for name in shards_of(weights)] if weights.name.endswith(".index.json") else []
    for each in (weights, *shards, *extra):
        if not each.is_file():
            raise ZooError(f"{each} is missing", kind="package" if source.kind == "package" else "file")
    return _Found(weights, (weights, *shards, *extra))


def _check(source: Source, found: _Found) -> dict[str, str]:
    """Compare the files whose hash the entry knows; bytes that differ are refused, whatever delivered them."""
    checked = {}
    for path in found.files:
        known = source.sha256.get(path.name)
        if known is None:
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != known:
            hint = f"remove {path.resolve()} and pull again" if source.kind == "hub" else "install the package again"
            raise ZooError(
                f"{path.name} from {source} is not the file this entry knows: sha256 {digest}, expected {known}",
                kind="integrity",
                hint=hint,
            )
        checked[path.name] = digest
    return checked
