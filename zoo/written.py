"""What a graft leaves on the disk: the weights and their plan. Both or none, and nobody's files but its own."""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import ZooError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    import surgery
    from surgery.plan import Row
    from zoo.resolving import Source

SUFFIX = ".safetensors"
OTHER_WEIGHTS = "the weights are not what the plan gives"
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
        stem = split(file)[0].stem if file else "model"
        raise ZooError(f"{path} is a folder", kind="file", hint=f"name the file: {path / stem}{SUFFIX}")
    if path.suffix != SUFFIX:
        raise ZooError(
            f"{path}: weights are written as safetensors, and only so", hint=f"name it {path.with_suffix(SUFFIX)}"
        )
    if not path.parent.is_dir():
        raise ZooError(f"there is no folder {path.parent}", kind="file", hint=f"mkdir -p {path.parent}")
    return path


def check_free(weights: Path, plan: str | None, *, shards: bool = False) -> None:
    """Refuse to write over what is not an earlier graft's, before anything is done. `plan` is the one to be applied.
    Shards are written where no file of a checkpoint is: which would be left over is not known before."""
    import surgery

    beside = plan_beside(weights)
    there = of_checkpoint(weights) if shards else []
    if there:
        raise ZooError(
            f"{there[0]} is there, and shards are not written over or beside another checkpoint",
            kind="file",
            hint="choose another name with -o, or move it away",
        )
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

    return _both(lambda path: save(model.state_dict(), path, metadata=_metadata(verdict)), plan, weights)


def write_to_file(
    source: surgery.Checkpoint,
    plan: surgery.Plan,
    weights: Path,
    *,
    verdict: str,
    base: Mapping[str, Tensor] | surgery.Checkpoint | None,
    like: surgery.Checkpoint | None,
    shard_size: str | None,
) -> list[Path]:
    """The same by running the plan from file to file, in the same order and with the same metadata; or as another file
    has them. In shards, the first path is that of the index."""
    import surgery

    metadata = None if like is not None else _metadata(verdict)
    if shard_size is None:
        return _both(
            lambda path: surgery.write(source, plan, path, base=base, metadata=metadata, order="rows", like=like),
            plan,
            weights,
        )
    before = set(of_checkpoint(weights))
    beside = plan_beside(weights)
    fresh = beside.with_name(f".{secrets.token_hex(4)}-{beside.name}")
    try:
        plan.save(fresh)
        first = surgery.write(
            source, plan, weights, base=base, metadata=metadata, order="rows", like=like, shard_size=shard_size
        )
        try:
            os.replace(fresh, beside)
        except OSError:
            for path in set(of_checkpoint(weights)) - before:
                path.unlink()
            raise
    finally:
        fresh.unlink(missing_ok=True)
    return [first, *(path for path in of_checkpoint(weights) if path != first), beside]


def of_checkpoint(weights: Path) -> list[Path]:
    """The files that there are of a checkpoint: x.safetensors, its shards x-00001-of-00002.safetensors, its index."""
    stem = re.escape(weights.name.removesuffix(SUFFIX))
    known = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
    return sorted(path for path in weights.parent.iterdir() if known.fullmatch(path.name))


def info(row: Row) -> surgery.TensorInfo:
    """What a file will hold of a row."""
    import surgery
    from surgery import dtypes

    return surgery.TensorInfo(row.shape, row.dtype, dtypes.nbytes(row.dtype, row.shape) or 0)


def _metadata(verdict: str) -> dict[str, str]:
    return {"format": "pt", _MARK: f"grafted; {verdict}"}


def _both(make: Callable[[Path], Path], plan: surgery.Plan, weights: Path) -> list[Path]:
    beside = plan_beside(weights)
    mark = secrets.token_hex(4)
    fresh = [path.with_name(f".{mark}-{path.name}") for path in (weights, beside)]
    old = plan_beside(weights).read_bytes() if beside.exists() else None
    try:
        if old is not None:
            fresh[1].write_bytes(old)  # so that a person's comments in it stay
        make(fresh[0])
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


def check_into(made: Written, into: str) -> None:
    """ZooError where the plan fills nothing in the submodule that is asked about: the plan beside weights that were
    grafted in several steps is that of the last step."""
    from surgery.plan import Status

    filled = [row.target for row in made.plan.rows if row.status is Status.FILLED]
    if not into or not filled or any(name.startswith(f"{into}.") for name in filled):
        return
    first = filled[0].partition(".")[0]
    raise ZooError(
        f"{made.path} fills nothing in {into}: it is the plan of what was grafted last, of "
        f"{made.plan.source.description}, whose tensors are in {first}",
        kind="file",
        hint="graft each step with an -o of its own, so that each keeps its plan",
    )


def start_from(model: nn.Module, path: str, *, mapped: bool = False) -> surgery.Checkpoint | None:
    """Load a person's own weights into their module: every tensor of it, and nothing else. `mapped`: as views of the
    file, where the module loads them in no way of its own; then it gives the file.

    What a graft does not fill is then kept, and not new; but what an earlier graft's plan says is new stays so.
    """
    import surgery
    from surgery import parked
    from surgery.apply import remember
    from surgery.plan import Status

    own = surgery.open(path)
    state = model.state_dict()
    missing = [name for name in state if name not in own]
    strange = [name for name in own if name not in state]
    shapes = [
        f"{name} is {list(own[name].shape)} there, and {list(state[name].shape)} in the module"
        for name in state
        if name in own and tuple(own[name].shape) != tuple(state[name].shape)
    ]
    problems = [*_some("it lacks", missing), *_some("it holds, and the module has not,", strange), *shapes[:3]]
    problems += [f"and {len(shapes) - 3} more are of another shape"] if len(shapes) > 3 else []
    if problems:
        near = did_you_mean(strange[0], missing) if strange and missing else ""
        raise ZooError(
            f"{path} is not of this module: {'; '.join(problems)}",
            kind="weights",
            hint=near or "give the constructor the arguments that it was saved with, by --set",
        )
    mapped = mapped and _loads_plainly(model)
    if mapped:
        from torch import no_grad

        with no_grad():
            for name in state.keys() - parked.hold(model, own):
                state[name].copy_(own.read(name))
    else:
        model.load_state_dict({name: own.read(name) for name in state})
    fresh: set[str] = set()
    beside = plan_beside(Path(path))
    if beside.is_file():
        fresh = {row.target for row in surgery.Plan.load(beside).rows if row.status == Status.NEW}
    remember(model, frozenset(state) - fresh)
    return own if mapped else None


def _loads_plainly(model: nn.Module) -> bool:
    from torch import nn

    return all(
        type(module)._load_from_state_dict is nn.Module._load_from_state_dict and not module._load_state_dict_pre_hooks
        for module in model.modules()
    )


def _some(what: str, names: list[str]) -> Iterator[str]:
    if names:
        yield f"{what} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def differences(made: Written, source: Source, model: nn.Module) -> list[str]:
    """What keeps written weights from being what their plan says of this source and this module."""
    from surgery import open
    from surgery.checkpoint import raw_bytes
    from surgery.write import loaded, row_value
    from zoo.to_file import beside

    plan = made.plan
    checkpoint = beside(source.checkpoint, plan)
    found = []
    target = open(model.state_dict())
    plan.check(checkpoint, target)
    if plan.verdict_on(checkpoint, target) == "stale":
        found.append(f"{made.path} was changed after it was verified")
    now = source.hashing().result()
    changed = [name for name, digest in plan.source.files.items() if now.get(name) != digest]
    if changed:
        found.append(f"{', '.join(changed)} of {source.ref} is not the file that was grafted")
    other: list[tuple[str, float, str]] = []
    for row in plan.rows:
        origin = row if row.tied_to is None else plan[row.tied_to]
        if origin.expr is None:
            continue
        value = row_value(origin, partial(loaded, checkpoint), lambda name: checkpoint[name].dtype)
        held = loaded(made.weights, row.target)
        # By bytes: zeros have two signs, and what is not a number equals nothing.
        if value.dtype != held.dtype or raw_bytes(value, row.target) != raw_bytes(held, row.target):
            other.append((row.target, *_apart(value, held)))
    if other:
        other.sort(key=lambda each: -each[1])  # the farthest first; those of one distance as they stand in the plan
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        said = ", ".join(f"{name} ({how})" for name, _, how in other[:3])
        found.append(f"{OTHER_WEIGHTS}: {said}{more}")
    return found


def _apart(value: Tensor, held: Tensor) -> tuple[float, str]:
    """How far apart two tensors of one shape are, in float64: a number to sort by, and what a person is told."""
    import torch

    from surgery.dtypes import name_of

    wide = torch.complex128 if value.is_complex() or held.is_complex() else torch.float64
    made, found = value.to(wide), held.to(wide)
    apart, norm = float((found - made).norm()), float(made.norm())
    relative = apart / norm if norm else math.inf if apart else 0.0
    if math.isfinite(relative):
        said = f"relative {relative:.1e}"
    else:
        said = "zeros in the plan" if math.isfinite(apart) else "not finite on one side"
        relative = math.inf
    types = "" if value.dtype == held.dtype else f"{name_of(held.dtype)}, not {name_of(value.dtype)}; "
    return relative, types + said
