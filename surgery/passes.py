"""Passes on a device and in a type: as the target will be run, not as the proof runs it.

Nobody types a tolerance in. The reference, run on the same device in the same type, differs from its own float64 twin
by some amount; the grafted target may differ from that twin by FACTOR times as much, or by a few roundings of the
type where the reference's error is smaller than that. A side that cannot be run so is no failure of the other: the
pass is not run, says why, and is never one that passed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from surgery import machine, surface
from surgery.errors import GraftError, SurgeryError
from surgery.proof import PassResult
from surgery.running import Call, Side, build

if TYPE_CHECKING:
    from surgery.judge import Judge

FACTOR = 4.0  # times the reference's own error
FLOOR = 8.0  # times the type's eps
NORM = "max |output - float64 twin's| / max |float64 twin's|, the worst of all inputs"
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_ON = {
    "cpu": ("float64", "float32", "bfloat16"),  # float16 on a CPU is emulated
    "cuda": ("float32", "bfloat16", "float16"),
    "mps": ("float32", "bfloat16", "float16"),
}
COMPILE = "+compile"
INDUCTOR = "inductor"


class _NotRun(GraftError):
    """This pass says nothing; the message says why."""


@dataclass(frozen=True)
class Pass:
    """What "cuda/bfloat16" says; `compiled` is the backend of torch.compile, where the name ends in "+compile" or in
    "+compile:BACKEND"."""

    name: str
    device: torch.device
    dtype: torch.dtype
    compiled: str = ""


def parse(name: str) -> Pass:
    """The device and type of a pass; a SurgeryError that lists what there is."""
    plain, plus, backend = name.partition(COMPILE)
    device, _, dtype = plain.partition("/")
    if dtype not in _DTYPES or (backend and not backend.startswith(":")):
        why = f"there is no type {dtype!r}" if dtype and dtype not in _DTYPES else "it is written device/type"
        raise SurgeryError(
            f"{name!r} is no pass: {why}",
            hint=f"For instance cpu/float32 or cuda/bfloat16; the types are {', '.join(_DTYPES)}. "
            f"A name that ends in {COMPILE} goes through torch.compile.",
        )
    compiled = backend.removeprefix(":") or INDUCTOR if plus else ""
    if compiled and dtype == "float64":
        raise SurgeryError(
            f"{name!r}: the float64 proof runs operator by operator, and is never compiled",
            hint=f"For instance cpu/float32{COMPILE}.",
        )
    try:
        return Pass(name, torch.device(device), _DTYPES[dtype], compiled)
    except RuntimeError as error:
        raise SurgeryError(
            f"{name!r}: {str(error).splitlines()[0]}", hint="For instance cpu, cuda, cuda:1 or mps."
        ) from None


def of_device(kind: str) -> tuple[str, ...]:
    """The passes of a device ("cuda", "cuda:1"), whether it is there or not. SurgeryError where it is none."""
    device = parse(f"{kind}/float32").device
    return tuple(f"{kind}/{dtype}" for dtype in _ON.get(device.type, ("float32",)))


def of_machine() -> tuple[str, ...]:
    """The passes that this machine can run: those of the CPU, and of each accelerator that is there."""
    found = list(of_device("cpu"))
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        for kind in ("cuda",) if count == 1 else tuple(f"cuda:{i}" for i in range(count)):
            found += of_device(kind)
    if torch.backends.mps.is_available():
        found += of_device("mps")
    return tuple(found)


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
    return _no_compiler(wanted) if wanted.compiled else ""


def _no_compiler(wanted: Pass) -> str:
    if wanted.compiled != INDUCTOR:
        known = torch._dynamo.list_backends(exclude_tags=())
        return "" if wanted.compiled in known else f"torch.compile has no backend {wanted.compiled}"
    if wanted.device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "torch.compile needs a C++ compiler (g++ or clang++) on the CPU, and there is none"
    elif wanted.device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "torch.compile needs triton on a CUDA device, and there is none"
    return ""


# -- running ----------------------------------------------------------------------------------------------------------
@dataclass
class _Ran:
    """One side on all inputs."""

    outputs: list[list[Tensor]] = field(default_factory=list)  # by input; held on the CPU
    seconds: float = 0.0
    sdpa: list[str] = field(default_factory=list)
    graphs: int = 0
    breaks: int = 0


def run(judge: Judge, wanted: Pass, places: Mapping[str, surface.Place]) -> PassResult:
    """Both sides as they are, in this type on this device, against the reference's float64 twin. One after the other:
    both are never held at once. `places`: where the target computes the outputs, where it does not return them."""
    surfaced = judge.probe.run_target is None
    labels = tuple(label for label, _ in judge.inputs)
    details: dict[str, Any] = {"factor": FACTOR, "floor": FLOOR, "norm": NORM, **machine.settings(wanted.device)}
    details["compile"] = {"backend": wanted.compiled} if wanted.compiled else None
    if surfaced:
        inside = [name for name in judge.names if name not in places or places[name].out < 0]
        if inside:
            why = f"{', '.join(inside)}: no module of the target returns it, so that it cannot be read in this type"
            return PassResult(wanted.name, "not run", why, details=details)
    started = time.perf_counter()
    try:
        with machine.Peak(wanted.device) as peak:
            theirs = _side(judge, judge.reference_side, _reference(judge, wanted), wanted, None)
            at = [places[name] for name in judge.names] if surfaced else None
            ours = _side(judge, judge.target_side, _target(judge, wanted, surfaced), wanted, at)
    except GraftError as error:
        return PassResult(wanted.name, "not run", str(error), inputs=labels, details=details)
    details |= {
        "seconds": round(time.perf_counter() - started, 4),
        "seconds_forward": {"reference": round(theirs.seconds, 4), "target": round(ours.seconds, 4)},
        "peak_bytes": peak.bytes,
        "peak_of": peak.how,
        "sdpa": {"reference": theirs.sdpa, "target": ours.sdpa},
    }
    if wanted.compiled:
        details["compile"] |= {
            "graphs": {"reference": theirs.graphs, "target": ours.graphs},
            "graph_breaks": {"reference": theirs.breaks, "target": ours.breaks},
        }
    result = _judged(judge, wanted, theirs.outputs, ours.outputs, labels, details, anywhere=surfaced)
    return result if not result.differs or wanted.compiled else _blamed(judge, wanted, theirs.outputs, at, result)


def _blamed(
    judge: Judge, wanted: Pass, theirs: list[list[Tensor]], at: Sequence[surface.Place] | None, failed: PassResult
) -> PassResult:
    """A pass that failed, with the casts of the target that are why: without them it passes."""
    from surgery import casts

    found: dict[casts.Cast, None] = {}
    left: list[float] = []  # by trial, what still differs

    def again(lift: casts.Lift) -> bool:
        side = casts.watching(judge.target_side, lift, found)
        try:
            ours = _side(judge, side, _target(judge, wanted, at is not None), wanted, at)
        except GraftError:
            return False  # it does not run without them
        result = _judged(judge, wanted, theirs, ours.outputs, failed.inputs, {}, anywhere=at is not None)
        left.append(result.worst)
        return result.status == "passed"

    again(lambda _: False)
    blamed = casts.blamed(judge, found, again)
    if not blamed:
        return failed
    said = "; ".join(casts.told(judge, of) for of in blamed)
    why = f"{failed.why}: {said}, and without that it differs by {min(left):.1e}"
    sites = [{"module": of[0].module, "file": of[0].file, "line": of[0].line} for of in blamed]
    details = {**failed.details, "cause": "dtype cast", "casts": sites}
    return replace(failed, why=why, details=details)


def _judged(
    judge: Judge,
    wanted: Pass,
    theirs: Sequence[Sequence[Tensor]],
    ours: Sequence[Sequence[Tensor]],
    labels: tuple[str, ...],
    details: dict[str, Any],
    *,
    anywhere: bool,
) -> PassResult:
    own: dict[str, float] = dict.fromkeys(judge.names, 0.0)
    residuals: dict[str, float] = dict.fromkeys(judge.names, 0.0)
    for expected, a, b in zip(judge.expected, theirs, ours, strict=True):
        for name, exact, x, y in zip(judge.names, expected, a, b, strict=True):
            exact = exact.cpu()
            own[name] = max(own[name], surface.residual(exact, x))
            residuals[name] = max(residuals[name], surface.residual(exact, y, anywhere=anywhere))
    floor = FLOOR * torch.finfo(wanted.dtype).eps
    gates = {name: max(FACTOR * error, floor) for name, error in own.items() if error < surface.INF}
    details |= {"reference_error": {name: own[name] for name in gates}, "gates": gates}
    broken = [name for name in own if name not in gates]
    if broken:
        why = f"the reference itself gives no finite {', '.join(broken)} in this type: nothing to compare with"
        return PassResult(wanted.name, "not run", why, residuals, 0.0, labels, details)
    over = [name for name in judge.names if not residuals[name] <= gates[name]]
    why = "" if not over else f"{over[0]} differs by {residuals[over[0]]:.1e}, over {gates[over[0]]:.1e}"
    why = why or f"gate: {FACTOR:g} times the reference's own error, at least {FLOOR:g} eps"
    return PassResult(
        wanted.name, "failed" if over else "passed", why, residuals, max(gates.values()), labels, details, bool(over)
    )


def _reference(judge: Judge, wanted: Pass) -> nn.Module:
    return build(judge.probe.reference, {}, wanted.device, wanted.dtype)


def _target(judge: Judge, wanted: Pass, surfaced: bool) -> nn.Module:
    """With the plan's values; and others for what is new, where nothing may depend on it or where it has none."""
    from surgery.running import all_tensors

    own = all_tensors(judge.target)
    new = {name: t for name, t in judge.new.items() if surfaced or own[name].is_meta}
    return build(judge.target, {**new, **judge.values}, wanted.device, wanted.dtype)


def _side(judge: Judge, side: Side, module: nn.Module, wanted: Pass, places: Sequence[surface.Place] | None) -> _Ran:
    """One side on all inputs: what it returns, or what the modules at `places` do."""
    ran = _Ran()
    xs = [(label, _moved(x, wanted)) for label, x in judge.inputs]
    devices = [wanted.device] if wanted.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        _try(side, module, xs[0], ran)
        with _compiled(side, module, wanted, places, ran) if wanted.compiled else _plain(side, module, places) as call:
            for label, x in xs:
                started = time.perf_counter()
                found = call(label, x)
                if wanted.device.type == "cuda":
                    torch.cuda.synchronize(wanted.device)
                ran.seconds += time.perf_counter() - started
                ran.outputs.append([t.cpu() for t in found])
    return ran


def outputs(
    side: Side, module: nn.Module, x: Any, label: str, wanted: Pass, calls: list[Call] | None = None
) -> list[Tensor]:
    """What one side returns for x as a pass runs it; nothing is compiled. `calls`: see surgery.running.watched."""
    devices = [wanted.device] if wanted.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        return side.outputs(module, _moved(x, wanted), label, calls=calls, exact=False)


def _moved(x: Any, wanted: Pass) -> Any:
    def move(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.to(wanted.device, wanted.dtype if t.is_floating_point() else t.dtype)

    return tree_map(move, x)


def _try(side: Side, module: nn.Module, first: tuple[str, Any], ran: _Ran) -> None:
    """Run it once as it is: whether it can be, and by which form of attention."""
    label, x = first
    seen, called = _Fused(), _Attends()
    with called, seen:
        side.outputs(module, x, label, exact=False)
    ran.sdpa = sorted(seen.found) or (["math"] if called.count else [])


class _Fused(TorchDispatchMode):
    """The kernels of attention that run, as aten calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func._schema.name).removeprefix("aten::")
        if name.startswith("_scaled_dot_product_"):
            self.found.add(name.removeprefix("_scaled_dot_product_").replace("_attention", ""))
        elif name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


class _Attends(TorchFunctionMode):
    """How often scaled_dot_product_attention is called: its math form is no operator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


_Caller = Callable[[str, Any], list[Tensor]]


@contextmanager
def _plain(side: Side, module: nn.Module, places: Sequence[surface.Place] | None) -> Iterator[_Caller]:
    def call(label: str, x: Any) -> list[Tensor]:
        if places is None:
            return side.outputs(module, x, label, exact=False)
        calls: list[Call] = []
        side.outputs(module, x, label, calls=calls, exact=False)
        return [
            [c for c in calls if c.module == place.module][place.call].out[place.out].to(torch.float64)
            for place in places
        ]

    yield call


@contextmanager
def _compiled(
    side: Side, module: nn.Module, wanted: Pass, places: Sequence[surface.Place] | None, ran: _Ran
) -> Iterator[_Caller]:
    """Through torch.compile: the whole run, the person's runner included. A graph that is compiled too often would be
    run as it is, silently; here that is an error."""
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    kept: dict[str, list[Any]] = {place.module: [] for place in places or ()}
    handles = [
        module.get_submodule(name).register_forward_hook(lambda _m, _a, out, held=held: held.append(out))
        for name, held in kept.items()
    ]

    def program(x: Any) -> Any:
        return side.run(module, x)

    dynamo.reset()
    before = {name: dict(counters[name]) for name in ("stats", "graph_break")}
    compiled = torch.compile(program, backend=wanted.compiled)

    def call(label: str, x: Any) -> list[Tensor]:
        for held in kept.values():
            held.clear()
        try:
            with dynamo.config.patch(fail_on_recompile_limit_hit=True, suppress_errors=False):
                out = compiled(x)
        # Whatever the compiler raises: it ran without it a moment ago.
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise _NotRun(
                f"torch.compile ({wanted.compiled}) of the {side.name} failed on {label}: "
                f"{type(error).__name__}: {first}"
            ) from error
        if places is None:
            return side.tensors(out)
        return [_tensors(kept[place.module][place.call])[place.out].to(torch.float64) for place in places]

    try:
        yield call
        stats = counters["stats"]
        ran.graphs = stats["unique_graphs"] - before["stats"].get("unique_graphs", 0)
        ran.breaks = sum(counters["graph_break"].values()) - sum(before["graph_break"].values())
        if not ran.graphs:
            raise _NotRun(f"torch.compile found nothing to compile in the {side.name}")
    finally:
        for handle in handles:
            handle.remove()
        dynamo.reset()


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in tree_iter(out) if isinstance(t, Tensor)]
