"""What a graft leaves on the disk: the weights and their plan. Both or none, and nobody's files but its own."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import ZooError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    import surgery
    from zoo.resolving import Source

SUFFIX = ".safetensors"
_MARK = "weightzoo"  # in the metadata of weights that a graft wrote


@dataclass(frozen=True)
class Written:
    """What a graft wrote, read again."""

    weights: surgery.Checkpoint
    plan: surgery.Plan
    path: Path  # of the plan


def plan_beside(weights: Path) -> Path:
    """x.safetensors -> x.graft.toml"""
    return weights.with_name(weights.name.removesuffix(SUFFIX) + ".graft.toml")


def destination(output: str | None, file: str) -> Path:
    """Where the weights are, or will be: as asked, or beside the module's file under its name."""
    from zoo.target import split

    if output is None:
        return split(file)[0].with_suffix(SUFFIX)
    path = Path(output)
    if path.is_dir():
        raise ZooError(f"{path} is a folder", kind="file", hint=f"name the file: {path / split(file)[0].stem}{SUFFIX}")
    if path.suffix != SUFFIX:
        raise ZooError(
            f"{path}: weights are written as safetensors, and only so", hint=f"name it {path.with_suffix(SUFFIX)}"
        )
    if not path.parent.is_dir():
        raise ZooError(f"there is no folder {path.parent}", kind="file", hint=f"mkdir -p {path.parent}")
    return path


def check_free(weights: Path, plan: str | None) -> None:
    """Refuse to write over what is not an earlier graft's, before anything is done. `plan` is the one to be applied."""
    import surgery

    beside = plan_beside(weights)
    for path in (weights, beside):
        if path.exists() and not path.is_file():
            raise ZooError(f"{path} is in the way, and no file", kind="file", hint="choose another name with -o")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ZooError(f"{path} may not be written", kind="file", hint="choose another name with -o")
    hint = "choose another name with -o, or move it away"
    if weights.exists():
        try:
            ours = _MARK in surgery.open(weights).metadata
        except surgery.CheckpointError:
            ours = False
        if not ours:
            raise ZooError(f"{weights} is there, and no graft wrote it", kind="file", hint=hint)
    if beside.exists() and (plan is None or Path(plan).resolve() != beside.resolve()):
        try:
            edited = surgery.Plan.load(beside).verdict == "stale"
        except surgery.PlanError:
            raise ZooError(f"{beside} is there, and no graft wrote it", kind="file", hint=hint) from None
        if edited:
            raise ZooError(
                f"{beside} was edited by hand, and would be written over",
                kind="file",
                hint=f"--plan {beside} applies it; or {hint}",
            )


def write(model: nn.Module, plan: surgery.Plan, weights: Path, *, verdict: str) -> list[Path]:
    """Both files, or neither: each is written beside its place and renamed into it."""
    from surgery.write import save

    beside = plan_beside(weights)
    mark = secrets.token_hex(4)
    fresh = [path.with_name(f".{mark}-{path.name}") for path in (weights, beside)]
    old = plan_beside(weights).read_bytes() if beside.exists() else None
    try:
        if old is not None:
            fresh[1].write_bytes(old)  # so that a person's comments in it stay
        save(model.state_dict(), fresh[0], metadata={"format": "pt", _MARK: f"grafted; {verdict}"})
        plan.save(fresh[1])
        os.replace(fresh[1], beside)
        try:
            os.replace(fresh[0], weights)
        except OSError:
            if old is None:
                beside.unlink()
            else:
                beside.write_bytes(old)
            raise
    finally:
        for path in fresh:
            path.unlink(missing_ok=True)
    return [weights, beside]


def read(weights: Path) -> Written:
    """The weights and the plan beside them."""
    import surgery

    beside = plan_beside(weights)
    for path in (weights, beside):
        if not path.is_file():
            raise ZooError(
                f"there is no file {path}", kind="file", hint="zoo graft writes the weights and, beside them, the plan"
            )
    return Written(surgery.open(weights), surgery.Plan.load(beside), beside)


def start_from(model: nn.Module, path: str) -> None:
    """Load a person's own weights into their module: every tensor of it, and nothing else.

    What a graft does not fill is then kept, and not new; but what an earlier graft's plan says is new stays so.
    """
    import surgery
    from surgery.apply import remember
    from surgery.plan import Status

    own = surgery.open(path)
    state = model.state_dict()
    missing = [name for name in state if name not in own]
    strange = [name for name in own if name not in state]
    shapes = [
        f"{name} is {list(own[name].shape)}, not {list(state[name].shape)}"
        for name in state
        if name in own and tuple(own[name].shape) != tuple(state[name].shape)
    ]
    problems = [*_some("lacks", missing), *_some("holds, and the module has not,", strange), *shapes[:3]]
    if problems:
        near = did_you_mean(strange[0], missing) if strange and missing else ""
        raise ZooError(
            f"{path} is not of this module: it {'; '.join(problems)}",
            kind="weights",
            hint=near or "give the constructor the arguments that it was saved with, by --set",
        )
    model.load_state_dict({name: own.read(name).clone() for name in state})
    fresh: set[str] = set()
    beside = plan_beside(Path(path))
    if beside.is_file():
        fresh = {row.target for row in surgery.Plan.load(beside).rows if row.status == Status.NEW}
    remember(model, frozenset(state) - fresh)


def _some(what: str, names: list[str]) -> Iterator[str]:
    if names:
        yield f"{what} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def differences(made: Written, source: Source, model: nn.Module) -> list[str]:
    """What keeps written weights from being what their plan says of this source and this module."""
    from surgery import open
    from surgery.checkpoint import raw_bytes
    from surgery.write import row_value

    plan, checkpoint = made.plan, source.checkpoint
    found = []
    target = open(model.state_dict())
    plan.check(checkpoint, target)
    if plan.verdict_on(checkpoint, target) == "stale":
        found.append(f"{made.path} was changed after it was verified")
    now = source.hashing().result()
    changed = [name for name, digest in plan.source.files.items() if now.get(name) != digest]
    if changed:
        found.append(f"{', '.join(changed)} of {source.ref} is not the file that was grafted")
    other = []
    for row in plan.rows:
        origin = row if row.tied_to is None else plan[row.tied_to]
        if origin.expr is None:
            continue
        value = row_value(origin, checkpoint.read, lambda name: checkpoint[name].dtype)
        held = made.weights.read(row.target)
        # By bytes: zeros have two signs, and what is not a number equals nothing.
        if value.dtype != held.dtype or raw_bytes(value, row.target) != raw_bytes(held, row.target):
            other.append(row.target)
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        found.append(f"the weights are not what the plan gives: {', '.join(other[:3])}{more}")
    return found
