"""The one sink: what a command says, in the way it was asked to. Human, --json or -q.

Data goes to stdout; warnings, hints and notes go to stderr; in --json mode stdout is one JSON object, also when the
command fails. Colour only adds: everything is understood without it, and NO_COLOR or a pipe turns it off.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from zoo.errors import BUG, NO, USAGE, ZooError

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


class Out:
    """The output of one command.

    `stdout` and `stderr` are looked up when something is written, so that a test that replaces them sees everything.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json, self.quiet, self.verbose = as_json, quiet, verbose

    @property
    def progress(self) -> bool:
        """Whether progress may be shown: on a terminal, and to a person."""
        return sys.stderr.isatty() and not self.quiet and not self.as_json

    def style(self, text: str, name: str, stream: TextIO | None = None) -> str:
        stream = stream or sys.stdout
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb" or not stream.isatty()
        return text if plain else f"\x1b[{_CODES[name]}m{text}\x1b[0m"

    # ------------------------------------------------------------------------------------------------ data

    def data(self, thing: Mapping[str, Any], human: Callable[[], str], quiet: Callable[[], str] | None = None) -> None:
        """The answer: `thing` as JSON, or as `human()` puts it, or, with -q, as `quiet()` does where that differs."""
        if self.as_json:
            text = json.dumps(thing, indent=2, ensure_ascii=False, default=str)
        else:
            text = (quiet if self.quiet and quiet is not None else human)()
        if text:
            _write(sys.stdout, text)

    # ------------------------------------------------------------------------------------------------ beside the data

    def note(self, text: str) -> None:
        """Something worth knowing about how the answer came about."""
        if not self.quiet and not self.as_json:
            _write(sys.stderr, self.style(text, "dim", sys.stderr))

    def hint(self, text: str) -> None:
        if not self.quiet and not self.as_json:
            _write(sys.stderr, f"{self.style('hint:', 'cyan', sys.stderr)} {text}")

    def warn(self, text: str) -> None:
        """Something is wrong, and the command goes on. Said in every mode: stderr is not the data."""
        word, _, rest = text.partition(": ") if text.startswith("warning: ") else ("warning", "", text)
        _write(sys.stderr, f"{self.style(word + ':', 'yellow', sys.stderr)} {rest}")

    # ------------------------------------------------------------------------------------------------ the end

    def fail(self, error: BaseException) -> int:
        """Say what went wrong, in every mode, and give the exit status."""
        kind, status, message, hint, extra = explain(error)
        if self.as_json:
            thing = {"error": kind, "message": message, "hint": hint, "exit": status, **extra}
            _write(sys.stdout, json.dumps(thing, indent=2, ensure_ascii=False, default=str))
        else:
            _write(sys.stderr, f"{self.style('error:', 'red', sys.stderr)} {message}")
            if hint:
                _write(sys.stderr, f"{self.style('hint:', 'cyan', sys.stderr)} {hint}")
        if self.verbose or status == BUG:
            _write(sys.stderr, "".join(traceback.format_exception(error)).rstrip())
        return status


def explain(error: BaseException) -> tuple[str, int, str, str, dict[str, Any]]:
    """The table from exceptions to (kind, exit status, message, hint, further JSON). Each command ends through it."""
    if isinstance(error, ZooError):
        return error.kind, error.status, str(error), error.hint, {}
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130, "interrupted", "", {}
    surgery = sys.modules.get("surgery.errors")  # an error of the engine's can only come from an engine that is loaded
    if surgery is not None and isinstance(error, surgery.GraftError):
        report = error.report
        return "refused", NO, str(error), error.hint, dict(report.as_dict()) if report is not None else {}
    if surgery is not None and isinstance(error, surgery.SurgeryError):
        kind = {"CheckpointError": "checkpoint", "PlanError": "plan"}.get(type(error).__name__, "surgery")
        return kind, USAGE, str(error), error.hint, {}
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return "file", USAGE, f"{error.filename}: {error.strerror}" if error.filename else str(error), "", {}
    click = sys.modules.get("click")
    if click is not None and isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        return "usage", USAGE, error.format_message(), f"{context.command_path} --help" if context else "", {}
    message = f"this is a defect of weightzoo: {type(error).__name__}: {error}"
    return "bug", BUG, message, "please report it, with what is printed here", {}


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] | None = None) -> str:
    """Columns, aligned by spaces. No frames and no wrapping, so that `cut`, `grep` and people can all read it."""
    lines = [tuple(header), *rows] if header else list(rows)
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def amount(number: int) -> str:
    """22713216 -> 22.7M, as people say it."""
    for limit, unit in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "K")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return str(number)


def size(nbytes: int) -> str:
    """90868376 -> 90.9 MB."""
    for limit, unit in ((1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB")):
        if nbytes >= limit:
            return f"{nbytes / limit:.3g} {unit}"
    return f"{nbytes} B"


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    # A terminal that cannot show a branch of a tree gets a question mark, not a traceback.
    safe = text.encode(encoding, "replace").decode(encoding)
    stream.write(safe + "\n")
    stream.flush()
