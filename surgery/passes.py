"""Passes on a device and in a type: as the target will be run, not as the proof runs it.

Nobody types a tolerance in. The reference, run on the same device in the same type, differs from its own float64 twin
by some amount; the grafted target may differ from that twin by FACTOR times as much, or by a few roundings of the
type where the reference's error is smaller than that.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from surgery import surface
from surgery.errors import GraftError, SurgeryError
from surgery.proof import PassResult
from surgery.running import Call, Side, build

if TYPE_CHECKING:
    from surgery.judge import Judge

FACTOR = 4.0  # times the reference's own error
FLOOR = 8.0  # times the type's eps
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Pass:
    """What "cuda/bfloat16" says."""

    name: str
    device: torch.device
    dtype: torch.dtype


def parse(name: str) -> Pass:
    """The device and type of a pass; a SurgeryError that lists what there is."""
    device, _, dtype = name.partition("/")
    if dtype not in _DTYPES:
        raise SurgeryError(
            f"{name!r} is no pass: it is written device/type",
            hint=f"For instance cpu/float32 or cuda/bfloat16; the types are {', '.join(_DTYPES)}.",
        )
    try:
        return Pass(name, torch.device(device), _DTYPES[dtype])
    except RuntimeError as error:
        raise SurgeryError(
            f"{name!r}: {str(error).splitlines()[0]}", hint="For instance cpu, cuda, cuda:1 or mps."
        ) from None


def unavailable(wanted: Pass) -> str:
    """Why a pass cannot run on this machine, or an empty text."""
    kind = wanted.device.type
    if kind == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device"
        if wanted.device.index is not None and wanted.device.index >= torch.cuda.device_count():
            return f"no CUDA device {wanted.device.index}: there are {torch.cuda.device_count()}"
    elif kind == "mps":
        if not torch.backends.mps.is_available():
            return "no MPS device"
        if wanted.dtype is torch.float64:
            return "MPS has no float64"
    elif kind != "cpu":
        return f"no way is known to prove on {kind}"
    return ""


def run(judge: Judge, wanted: Pass, places: Mapping[str, surface.Place]) -> PassResult:
    """Both sides as they are, in this type on this device, against the reference's float64 twin."""
    surfaced = judge.probe.run_target is None
    labels = tuple(label for label, _ in judge.inputs)
    details: dict[str, Any] = {
        "factor": FACTOR,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "torch": torch.__version__,
    }
    if surfaced:
        inside = [name for name in judge.names if name not in places or places[name].out < 0]
        if inside:
            why = f"{', '.join(inside)}: no module of the target returns it, so that it cannot be read in this type"
            return PassResult(wanted.name, "not run", why, details=details)
    if wanted.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(wanted.device)
    started = time.perf_counter()
    try:
        reference = build(judge.probe.reference, {}, wanted.device, wanted.dtype)
        target = build(
            judge.target, {**judge.new, **judge.values} if surfaced else _with_meta(judge), wanted.device, wanted.dtype
        )
        own: dict[str, float] = dict.fromkeys(judge.names, 0.0)
        residuals: dict[str, float] = dict.fromkeys(judge.names, 0.0)
        for at, (label, x) in enumerate(judge.inputs):
            expected = [t.to(wanted.device) for t in judge.expected[at]]
            theirs = _outputs(judge.reference_side, reference, x, label, wanted)
            if surfaced:
                ours = _at_places(judge.target_side, target, x, label, wanted, [places[n] for n in judge.names])
            else:
                ours = _outputs(judge.target_side, target, x, label, wanted)
            for name, exact, a, b in zip(judge.names, expected, theirs, ours, strict=True):
                own[name] = max(own[name], surface.residual(exact, a))
                residuals[name] = max(residuals[name], surface.residual(exact, b, anywhere=surfaced))
    except GraftError as error:
        return PassResult(wanted.name, "failed", str(error), inputs=labels, details=details)
    details["seconds"] = round(time.perf_counter() - started, 3)
    if wanted.device.type == "cuda":
        details["device"] = torch.cuda.get_device_name(wanted.device)
        details["peak_bytes"] = torch.cuda.max_memory_allocated(wanted.device)
    floor = FLOOR * torch.finfo(wanted.dtype).eps
    gates = {name: max(FACTOR * error, floor) for name, error in own.items()}
    details |= {"reference_error": {n: e for n, e in own.items() if e < surface.INF}, "gates": gates}
    broken = [n for n, e in own.items() if not e < surface.INF]
    if broken:
        why = f"the reference itself gives no finite {', '.join(broken)} in this type: nothing to compare with"
        return PassResult(wanted.name, "not run", why, residuals, 0.0, labels, details)
    over = [n for n in judge.names if not residuals[n] <= gates[n]]
    why = "" if not over else f"{over[0]} differs by {residuals[over[0]]:.1e}, over {gates[over[0]]:.1e}"
    why = why or f"gate: {FACTOR:g} times the reference's own error, at least {FLOOR:g} eps"
    status = "failed" if over else "passed"
    return PassResult(
        wanted.name,
        "failed" if over else "passed",
        why,
        residuals,
        max(gates.values()),
        labels,
        details,
        status == "failed",
    )


def _with_meta(judge: Judge) -> dict[str, Tensor]:
    """The plan's values; and others for new tensors that have none."""
    from surgery.running import all_tensors

    own = all_tensors(judge.target)
    return {n: t for n, t in judge.new.items() if own[n].is_meta} | judge.values


def _outputs(
    side: Side, module: nn.Module, x: Any, label: str, wanted: Pass, calls: list[Call] | None = None
) -> list[Tensor]:
    x = tree_map(lambda t: t.to(wanted.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, x)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return side.outputs(module, x, label, calls=calls, exact=False)


def _at_places(
    side: Side, module: nn.Module, x: Any, label: str, wanted: Pass, places: list[surface.Place]
) -> list[Tensor]:
    calls: list[Call] = []
    _outputs(side, module, x, label, wanted, calls)
    found = []
    for place in places:
        at_module = [c for c in calls if c.module == place.module]
        found.append(at_module[place.call].out[place.out].to(torch.float64))
    return found
