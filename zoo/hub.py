"""The model hub: the only file that knows huggingface_hub.

Its real client downloads into its ordinary cache, shared with every other tool on the machine. What is asked for is
listed first, so that only needed files travel; a branch or tag is resolved to a commit once, and everything is taken
from that commit. Every failure becomes a ZooError that says what to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError, close_matches, did_you_mean

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from surgery import TensorInfo

_COMMIT = re.compile(r"[0-9a-f]{40}")
_VARIANT = re.compile(r"\.(fp16|fp32|bf16|non_ema|int8|int4)\.")
_NOT_A_MODEL = ("training_args.bin", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "optimizer.pt")
# Preferred first. One of these names is enough; other names of the kind are taken where there is exactly one.
_PREFERRED = (
    ("model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin"),
)
_SUFFIXES = ((".safetensors",), (".bin", ".pt", ".pth", ".ckpt", ".npz"))
# What belongs to weights: the configuration, and what turns a plain input into tensors.
_BESIDE = frozenset(
    (
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "feature_extractor_config.json",
        "open_clip_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "normalizer.json",
        "spiece.model",
        "tokenizer.model",
        "sentencepiece.bpe.model",
        "bpe.codes",
    )
)


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit."""

    repository: str
    commit: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Snapshot:
    """Files in the cache, all of one commit. `weights` is what opens: a file, or the index of its shards."""

    repository: str
    commit: str
    weights: Path
    files: tuple[Path, ...]
    note: str = ""


def choose_weights(files: Sequence[str], where: str) -> str:
    """The weights among a repository's files: safetensors before pickles, and never both."""
    top = [name for name in files if "/" not in name]
    for names, suffixes in zip(_PREFERRED, _SUFFIXES, strict=True):
        for name in names:
            if name in top:
                return name
        indexes = [name for name in top if name.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes))]
        found = indexes or [name for name in top if name.endswith(suffixes) and name not in _NOT_A_MODEL]
        plain = [name for name in found if not _VARIANT.search(name)] or found
        if len(plain) == 1:
            return plain[0]
        if plain:
            raise ZooError(
                f"{where} holds several files of weights: {', '.join(sorted(plain))}",
                kind="ambiguous",
                hint="download the one you want, and name it as file:path",
            )
    held = ", ".join(sorted(top)[:8]) or "nothing at its top level"
    raise ZooError(f"{where} holds no weights that can be read; it holds {held}", kind="weights")


def choose_beside(files: Sequence[str], weights: str) -> list[str]:
    """The files that belong to the weights: those known by name, at the top level."""
    return [name for name in files if name in _BESIDE and name != weights]


def shards_of(index: Path) -> list[str]:
    """The files that a sharded checkpoint's index names."""
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZooError(f"{index} is not an index of shards: {error!r}", kind="weights") from error
    strange = [name for name in shards if not isinstance(name, str) or "/" in name or "\\" in name]
    if strange:
        raise ZooError(f"{index} names shards outside its folder: {strange[0]!r}", kind="weights")
    return sorted(shards)


class Hub:
    """One hub and one cache. Left out, both are what the client takes from the environment.

    `known` are repositories of the catalogue, to suggest where one is not found.
    """

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        cache: str | Path | None = None,
        token: str | None = None,
        known: Callable[[], list[str]] = list,
        quiet: bool = True,
    ) -> None:
        self._endpoint, self._cache, self._token = endpoint, cache, token
        self._known, self._quiet = known, quiet

    @property
    def endpoint(self) -> str:
        from huggingface_hub import constants

        return self._endpoint or constants.ENDPOINT

    @property
    def cache(self) -> Path:
        from huggingface_hub import constants

        return Path(self._cache or constants.HF_HUB_CACHE)

    @property
    def offline(self) -> bool:
        from huggingface_hub import constants

        return constants.HF_HUB_OFFLINE

    def _api(self) -> HfApi:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import logging
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if self._quiet:
            disable_progress_bars()
            logging.set_verbosity_error()
        return HfApi(endpoint=self._endpoint, token=self._token, library_name="weightzoo")

    # ------------------------------------------------------------------------------------------------ the cache

    def _folder(self, repository: str) -> Path:
        return self.cache / ("models--" + repository.replace("/", "--"))

    def _cached_commit(self, repository: str, revision: str | None) -> str | None:
        folder = self._folder(repository)
        wanted = revision or "main"
        if (folder / "snapshots" / wanted).is_dir() and _COMMIT.fullmatch(wanted):
            return wanted
        try:
            return (folder / "refs" / wanted).read_text(encoding="utf-8").strip()
        except OSError:
            return None

    def cached(self, repository: str, revision: str | None = None, files: Sequence[str] = ()) -> Snapshot | None:
        """The files in the cache, or None unless the weights are complete there. Reads folders, imports no client."""
        commit = self._cached_commit(repository, revision)
        if commit is None:
            return None
        folder = self._folder(repository) / "snapshots" / commit
        held = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        try:
            weights = files[0] if files else choose_weights(held, repository)
            shards = shards_of(folder / weights) if weights.endswith(".index.json") else []
        except ZooError:
            return None
        needed = [weights, *shards, *files[1:]]
        if not set(needed) <= set(held):
            return None
        names = dict.fromkeys([*needed, *choose_beside(held, weights)])
        return Snapshot(repository, commit, folder / weights, tuple(folder / name for name in names))

    def cached_commits(self, repository: str) -> list[str]:
        folder = self._folder(repository) / "snapshots"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    # ------------------------------------------------------------------------------------------------ the hub

    def listing(self, repository: str, revision: str | None = None) -> Listing:
        """What the repository holds, and the commit that `revision` (or the default branch) stands for."""
        where = f"{repository}@{revision}" if revision else repository
        info = self._asked(where, lambda: self._api().model_info(repository, revision=revision), repository, revision)
        files = tuple(sibling.rfilename for sibling in info.siblings or ())
        if info.sha is None:
            raise ZooError(f"{self.endpoint} did not say which commit {where} is", kind="hub")
        return Listing(repository, info.sha, files)

    def fetch(self, repository: str, revision: str | None = None, files: Sequence[str] = ()) -> Snapshot:
        """Download what is needed, and no more, into the cache. While the hub is out of reach, the cache will do."""
        if self.offline:
            return self._cached_or(repository, revision, files, None)
        try:
            listing = self.listing(repository, revision)
        except ZooError as error:
            if error.kind in ("network", "server", "rate-limit"):
                return self._cached_or(repository, revision, files, error)
            raise
        weights = files[0] if files else choose_weights(listing.files, repository)
        absent = [name for name in (weights, *files[1:]) if name not in listing.files]
        if absent:
            raise self._no_file(listing, absent[0])
        first = self._download(listing, weights, revision or "main")
        names = list(dict.fromkeys([*choose_beside(listing.files, weights), *files[1:]]))
        if weights.endswith(".index.json"):
            names += shards_of(first)
        paths = [first, *(self._download(listing, name, listing.commit) for name in names)]
        return Snapshot(repository, listing.commit, first, tuple(paths))

    def _download(self, listing: Listing, name: str, revision: str) -> Path:
        where = f"{name} of {listing.repository}"
        client = self._api()

        def work(at: str) -> Path:
            return Path(client.hf_hub_download(listing.repository, name, revision=at, cache_dir=str(self.cache)))

        # Asking by branch is what makes the client note in the cache which commit the branch stood for, which other
        # tools (and we, offline) read. Should the branch have moved since it was listed, the listed commit counts.
        path = self._asked(where, lambda: work(revision), listing.repository, revision, listing)
        if listing.commit not in path.parts:
            path = self._asked(where, lambda: work(listing.commit), listing.repository, listing.commit, listing)
        return path

    def _cached_or(
        self, repository: str, revision: str | None, files: Sequence[str], error: ZooError | None
    ) -> Snapshot:
        found = self.cached(repository, revision, files)
        if found is not None:
            note = f"{error}; taken from the cache" if error else ""
            return Snapshot(found.repository, found.commit, found.weights, found.files, note)
        if error is not None:
            raise error
        raise self.not_cached(repository, revision)

    def not_cached(self, repository: str, revision: str | None) -> ZooError:
        where = f"{repository}@{revision}" if revision else repository
        held = ", ".join(commit[:12] for commit in self.cached_commits(repository))
        hint = "go online once (unset HF_HUB_OFFLINE), and pull it"
        return ZooError(
            f"{where} is not in the cache, and the hub is not asked (offline)",
            kind="offline",
            hint=f"{hint}; the cache has other commits of it: {held}" if held else hint,
        )

    def headers(
        self, repository: str, revision: str | None = None, files: Sequence[str] = ()
    ) -> tuple[str, str, dict[str, TensorInfo]]:
        """Commit, weights and tensors of a repository, from byte ranges: only safetensors headers travel."""
        from surgery import TensorInfo

        if self.offline:
            raise self.not_cached(repository, revision)
        listing = self.listing(repository, revision)
        weights = files[0] if files else choose_weights(listing.files, repository)
        names = [weights]
        if weights.endswith(".safetensors.index.json"):
            names = shards_of(self._download(listing, weights, listing.commit))
        elif not weights.endswith(".safetensors"):
            raise ZooError(
                f"{weights} of {repository} shows its tensors only once it is here", kind="not-cached", hint="pull it"
            )
        tensors: dict[str, TensorInfo] = {}
        for name in names:
            header = self._asked(
                f"{name} of {repository}",
                lambda name=name: self._api().parse_safetensors_file_metadata(  # type: ignore[misc]
                    repository, name, revision=listing.commit
                ),
                repository,
                listing.commit,
                listing,
            )
            for tensor, info in header.tensors.items():
                start, stop = info.data_offsets
                tensors[tensor] = TensorInfo(tuple(info.shape), str(info.dtype), stop - start)
        return listing.commit, weights, tensors

    # ------------------------------------------------------------------------------------------------ what went wrong

    def _asked(
        self,
        where: str,
        call: Callable[[], Any],
        repository: str,
        revision: str | None,
        listing: Listing | None = None,
    ) -> Any:
        """The answer to a question to the hub; whatever the client raises instead becomes a ZooError."""
        from huggingface_hub import errors

        # The client's transport has had other names over time; its errors module has always held the base class.
        transport: type[Exception] = getattr(errors, "HTTPError", OSError)
        parsing = (errors.SafetensorsParsingError, errors.NotASafetensorsRepoError)
        try:
            return call()
        except parsing as error:
            raise ZooError(f"{where} is not a safetensors file: {error}", kind="weights") from error
        except errors.HFValidationError as error:
            raise ZooError(f"{repository}: {error}", kind="reference", hint="the form is hf:org/repo") from error
        except (OSError, transport) as error:
            raise self._explained(error, where, repository, revision, listing) from error

    def _explained(
        self, error: Exception, where: str, repository: str, revision: str | None, listing: Listing | None
    ) -> ZooError:
        from huggingface_hub import errors

        # The client wraps what it could not get around ("cannot find the file in the cache") over the true cause.
        while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        page = f"{self.endpoint}/{repository}"
        if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
            return self.not_cached(repository, revision)
        if isinstance(error, errors.GatedRepoError):
            return ZooError(
                f"{repository} is gated: its authors want you to accept their terms first",
                kind="gated",
                hint=f"accept them at {page}, then type: hf auth login",
            )
        if isinstance(error, errors.DisabledRepoError):
            return ZooError(f"{repository} has been disabled by its authors or the hub", kind="forbidden")
        if isinstance(error, errors.RevisionNotFoundError):
            return self._no_revision(repository, revision)
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return (
                self._no_file(listing, where.split(" of ")[0])
                if listing
                else ZooError(f"there is no {where}", kind="missing")
            )
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if isinstance(error, errors.RepositoryNotFoundError) or (status == 401 and not _bad_token(error)):
            near = [f"hf:{name}" for name in close_matches(repository, self._known())]
            hint = f"did you mean {' or '.join(near)}? " if near else "check the spelling; "
            return ZooError(
                f"there is no repository {repository} on {self.endpoint}, or it is private",
                kind="repository",
                hint=f"{hint}if it is private, type: hf auth login",
            )
        if isinstance(error, errors.HfHubHTTPError):
            return self._status(error, where)
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            return ZooError(f"{error.filename}: {error.strerror}", kind="file", hint="HF_HOME moves the cache")
        return ZooError(
            f"{self.endpoint} could not be reached for {where}: {_first_line(error)}",
            kind="network",
            hint="check the connection; HF_HUB_OFFLINE=1 works from the cache, HF_ENDPOINT names a mirror",
        )

    def _status(self, error: Any, where: str) -> ZooError:
        status = error.response.status_code
        if status == 401:
            return ZooError("the hub does not accept your token", kind="unauthorised", hint="type: hf auth login")
        if status == 403:
            return ZooError(
                f"your token may not read {where}",
                kind="forbidden",
                hint="type: hf auth login, with a token that may read it",
            )
        if status == 429:
            seconds = _wait(error.response.headers)
            hint = f"wait {seconds} s and try again" if seconds is not None else "wait a few minutes and try again"
            return ZooError(
                f"the hub has had too many requests from here (429), at {where}",
                kind="rate-limit",
                hint=f"{hint}; signing in (hf auth login) raises the limit",
            )
        if status >= 500:
            return ZooError(
                f"the hub failed at {where} ({status})", kind="server", hint="it is not your fault; try again later"
            )
        return ZooError(f"the hub refused {where} ({status}): {_first_line(error)}", kind="hub")

    def _no_revision(self, repository: str, revision: str | None) -> ZooError:
        from huggingface_hub import errors

        transport: type[Exception] = getattr(errors, "HTTPError", OSError)
        try:
            refs = self._api().list_repo_refs(repository)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
        except (OSError, transport):
            names = []  # this was only to be helpful
        near = did_you_mean(revision or "", names)
        there = f"it has {', '.join(names[:8])}" if names else ""
        return ZooError(
            f"{repository} has no branch, tag or commit {revision}",
            kind="revision",
            hint=near or there or "leave @revision out for the default branch",
        )

    def _no_file(self, listing: Listing, name: str) -> ZooError:
        near = did_you_mean(name, list(listing.files))
        held = ", ".join(listing.files[:8]) or "nothing"
        return ZooError(
            f"{listing.repository} has no file {name} at commit {listing.commit[:12]}",
            kind="missing",
            hint=near or f"it holds {held}",
        )


def _bad_token(error: Exception) -> bool:
    response = getattr(error, "response", None)
    return response is not None and "Invalid credentials" in (response.headers.get("X-Error-Message") or "")


def _wait(headers: Any) -> int | None:
    """Seconds to wait, from Retry-After or the draft RateLimit header ('"api";r=0;t=55')."""
    after = (headers.get("Retry-After") or "").strip()
    if after.isdigit():
        return int(after)
    reset = re.search(r"\bt=(\d+)", headers.get("RateLimit") or "")
    return int(reset.group(1)) if reset else None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
