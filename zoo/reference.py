"""The grammar of references: text in, `Reference` out. It knows no catalogue and touches no disk.

    name[.tag][@revision]        an entry of the catalogue; name[.tag]-part is sugar for REF#part
    hf:org/repo[@revision]       any repository of the hub
    timm:name                    any model of timm          (opened by the plugin that wraps it)
    open_clip:arch/tag           any model of open_clip     (likewise)
    file:path                    a file or folder on this machine
    package:dist/path            a file or folder inside an installed Python distribution

Each may end in `#part`. A path may hold any characters, so `@` means nothing in it, and `#` counts only when what
follows could be the name of a part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from zoo.errors import ZooError, did_you_mean

CATALOGUE = "zoo"
SCHEMES = ("hf", "timm", "open_clip", "file", "package")
_PATHS = ("file", "package")
_PART = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]*")


@dataclass(frozen=True)
class Reference:
    """A parsed reference. `body` is the name, repository or path; `str()` gives back the canonical spelling."""

    scheme: str
    body: str
    revision: str | None = None
    part: str | None = None

    def __str__(self) -> str:
        text = self.body if self.scheme == CATALOGUE else f"{self.scheme}:{self.body}"
        text += f"@{self.revision}" if self.revision is not None else ""
        return text + (f"#{self.part}" if self.part is not None else "")

    def of_part(self, part: str | None) -> Reference:
        """The same with `part` asked for. Naming two different parts is an error."""
        if part is None or part == self.part:
            return self
        if self.part is not None:
            raise ZooError(f'"{self}" names the part {self.part}, and {part} was asked for too', kind="reference")
        return replace(self, part=part)

    def at(self, revision: str | None) -> Reference:
        """The same at `revision`. Naming two different revisions, or one of a local path, is an error."""
        if revision is None or revision == self.revision:
            return self
        if self.scheme in _PATHS:
            raise ZooError(f'"{self}" is on this machine and has no revisions', kind="reference")
        if self.revision is not None:
            raise ZooError(f'"{self}" names a revision, and {revision} was asked for too', kind="reference")
        return replace(self, revision=revision)


def parse(text: str) -> Reference:
    """Parse a reference, or say what is wrong with it and how it should look."""
    text = text.strip()
    if not text:
        raise ZooError("the reference is empty", kind="reference", hint="zoo list shows the names there are")
    scheme, colon, rest = text.partition(":")
    if not colon:
        return _parse_catalogue(text)
    if scheme in _PATHS:
        return _parse_path(scheme, rest, text)
    if scheme in SCHEMES:
        return _parse_remote(scheme, rest, text)
    if scheme in ("http", "https"):
        repository = re.sub(r"^//[^/]+/", "", rest).split("/resolve/")[0].split("/tree/")[0].strip("/")
        hint = f"hf:{repository}" if _REPOSITORY.fullmatch(repository) else "hf:org/repo"
        raise ZooError(f'"{text}" is an address, not a reference', kind="reference", hint=f"for the hub, type {hint}")
    near = did_you_mean(scheme, list(SCHEMES))
    raise ZooError(
        f'"{text}": no kind of reference is called "{scheme}:"',
        kind="reference",
        hint=near or "there are " + ", ".join(f"{known}:" for known in SCHEMES) + " and the names of zoo list",
    )


def _parse_path(scheme: str, rest: str, text: str) -> Reference:
    path, hash_, part = rest.rpartition("#")
    if not hash_ or not _PART.fullmatch(part):
        path, part = rest, ""
    if not path:
        shape = "file:path" if scheme == "file" else "package:dist/path"
        raise ZooError(f'"{text}" names no path', kind="reference", hint=f"the form is {shape}")
    if scheme == "package" and ".." in path.split("/"):
        raise ZooError(f'"{text}": a path inside a package does not lead out of it', kind="reference")
    return Reference(scheme, path, part=part or None)


def _parse_remote(scheme: str, rest: str, text: str) -> Reference:
    body, revision, part = _split(rest, text)
    shape = {"hf": "hf:org/repo", "timm": "timm:name", "open_clip": "open_clip:arch/tag"}[scheme]
    fits = _REPOSITORY.fullmatch(body) and (scheme != "open_clip" or "/" in body)
    if not fits:
        raise ZooError(f'"{text}" is not of the form {shape}[@revision][#part]', kind="reference")
    return Reference(scheme, body, revision, part)


def _parse_catalogue(text: str) -> Reference:
    body, revision, part = _split(text, text)
    if _NAME.fullmatch(body):
        return Reference(CATALOGUE, body, revision, part)
    if "/" in body or "\\" in body:
        looks_local = body.startswith((".", "/", "~")) or "\\" in body or body.count("/") > 1
        hint = f"for a file, type file:{body}"
        if not looks_local and _REPOSITORY.fullmatch(body):
            hint = f"for a repository of the hub, type hf:{body}; {hint}"
        raise ZooError(f'"{text}" is not a name of the catalogue', kind="reference", hint=hint)
    raise ZooError(
        f'"{text}" is not a reference', kind="reference", hint="the form is name[.tag][@revision][#part], as in bert"
    )


def _split(body: str, text: str) -> tuple[str, str | None, str | None]:
    body, hash_, part = body.partition("#")
    if hash_ and not _PART.fullmatch(part):
        raise ZooError(f'"{text}": after # comes the name of one part, as in bert#encoder', kind="reference")
    body, at, revision = body.partition("@")
    if at and not _REVISION.fullmatch(revision):
        raise ZooError(f'"{text}": after @ comes a branch, a tag or a commit', kind="reference")
    return body, revision if at else None, part if hash_ else None
