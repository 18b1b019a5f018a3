"""Departures that are meant: modules of the target that compute something else on purpose, and the proof around them.

    ... -> equal inputs -> [module that departs] -> | the reference's activation | -> ... -> equal outputs

What a named module takes must occur in the reference; what it gives is replaced by the reference's activation in that
place (surgery.standing finds it), on every proof input, and from there on everything must be equal again. The verdict
is at best "adapted": the function is another one, by the named modules and by nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_map

from surgery import passes, surface, twin
from surgery.errors import GraftError, SurgeryError
from surgery.exercise import Exercise
from surgery.judge import Comparison, Judge
from surgery.mapper.record import FingerprintIndex, Recorder, Tape, fingerprint
from surgery.pairing import Run
from surgery.proof import GATE, Departure, PassResult, Proof
from surgery.running import Call, Side
from surgery.standing import Resolved, Resolving, Theirs, final
from surgery.surface import Place

if TYPE_CHECKING:
    from surgery.plan import Plan

_GOOD = ("proven", "adapted")  # the second where rows are approximate
INSIDE = "inside a departure, not proven"
Give = Callable[[int, str, Tensor], "Tensor | None"]  # (number of the place, module, what it computed) -> what goes on


# -- which modules ----------------------------------------------------------------------------------------------------
def matched(target: nn.Module, allowed: Sequence[str], into: str = "") -> dict[str, str]:
    """The modules that these patterns (globs over module paths) name, each with its pattern; of modules inside one
    another, the outer one. Paths are those of `target`, or, with `into`, of what is grafted into: both are understood,
    and what is given back is relative to it. SurgeryError where a pattern names none."""
    known = [name for name, _ in target.named_modules()]
    outer = f"{into}." if into else ""
    found: dict[str, str] = {}
    for pattern in allowed:
        hits = [n for n in known if fnmatchcase(n, pattern) or (outer and fnmatchcase(outer + n, pattern))]
        hits = [n for n in hits if n or pattern in ("", into)]  # a star is not the whole
        if not hits:
            import difflib

            close = difflib.get_close_matches(pattern, [n for n in known if n], n=3)
            raise SurgeryError(
                f"allow_different names {pattern or 'the whole'}, which the target does not have"
                f"{'; did you mean ' + ' or '.join(close) + '?' if close else ''}",
                hint="Name modules by their path in the target, as in blocks.3.act; a star stands for any part of it.",
            )
        for name in hits:
            found.setdefault(name, pattern)
    return {n: p for n, p in found.items() if not any(_within(n, other) and n != other for other in found)}


def _within(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


# -- cutting them out of a run ----------------------------------------------------------------------------------------
@contextmanager
def cut_out(module: nn.Module, names: Sequence[str], give: Give | None = None) -> Iterator[None]:
    """While a copy of the target runs: what the named modules give is replaced by what `give` says (None: by itself).
    A recorder takes down each place; what goes on there is a leaf of the run, like an input."""
    handles = []
    calls: dict[str, int] = {}
    places = 0
    depth = 0
    begun: list[int] = []

    def enter(_module: nn.Module, _args: Any) -> None:
        nonlocal depth
        recorder = _recorder()
        begun.append(len(recorder.tape.nodes) if recorder is not None else 0)
        depth += 1

    def leave(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> Any:
            nonlocal depth
            depth -= 1
            since = begun.pop()
            if depth:  # called by another one of them: inside of it
                return None
            number = calls[name] = calls.get(name, -1) + 1
            count = -1

            def put(t: Any) -> Any:
                nonlocal places, count
                if not isinstance(t, Tensor) or not t.is_floating_point():
                    return t
                count += 1
                places += 1
                recorder = _recorder()
                with _disable_current_modes(), torch._C.DisableTorchFunction():  # nothing of this is the target's
                    own = twin.lift(t) if recorder is not None else t
                    given = give(places - 1, name, own) if give is not None else None
                    value = (own if given is None else given.to(own.device, own.dtype)).detach().clone()
                    if recorder is not None:
                        recorder.replace(t, value, (name, number, count), since)
                return t if recorder is None and given is None else value

            return tree_map(put, out)

        return hook

    for name in names:
        held = module.get_submodule(name)
        handles.append(held.register_forward_pre_hook(enter))
        handles.append(held.register_forward_hook(leave(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorder() -> Recorder | None:
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, Recorder) else None


@dataclass(frozen=True)
class CutSide(Side):
    """The target's side, with its departures cut out whenever it is run on a proof input."""

    names: tuple[str, ...] = ()
    give: Callable[[str], Give | None] = field(default=lambda label: None)  # by the input's label

    @contextmanager
    def failures(
        self,
        module: nn.Module,
        label: str,
        calls: list[Call] | None = None,
        wanted: Callable[[Tensor], bool] | None = None,
    ) -> Iterator[None]:
        with cut_out(module, self.names, self.give(label)), super().failures(module, label, calls, wanted):
            yield


# -- the proof --------------------------------------------------------------------------------------------------------
class DepartingJudge(Judge):
    """A judge that proves the rest around modules that depart. `departing`: their paths, and what allows each."""

    def __init__(self, *args: Any, departing: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.departing = dict(departing)
        seen: dict[str, int] = {}
        for label, _ in self.inputs:
            seen[label] = seen.get(label, 0) + 1
        if any(count > 1 for count in seen.values()):  # an input is told by its label
            self.inputs = [(f"{label} ({i})", x) for i, (label, x) in enumerate(self.inputs)]
        self.resolved = Resolved()
        self.labels = {label: i for i, (label, _) in enumerate(self.inputs)}
        self.drift: dict[str, float] = {}
        self.places: list[tuple[str, int]] = []
        self._with: nn.Module | None = None  # the reference's twin that gives the activations
        self._last: tuple[int, Theirs] | None = None
        self._into: dict[str, tuple[float, int]] = {}  # by module: how far what it takes is from the reference's
        self._nothing = Exercise(self.source, {}, {})
        self._hits: dict[int, list[int]] = {}
        self._whole: dict[str, float] = {}  # by output: how far it is from the reference's as the target is

    def prove(self, wanted: Sequence[str] = (), *, anyway: bool = True) -> Proof:
        plain = self._again(Judge, self.device)
        if self._same(plain):
            return self._noted(plain.prove(wanted, anyway=anyway), self.departing)
        if all(self._within(n) for n in self.values):
            return self._nothing_left()
        still = dict(self.departing)
        while True:
            self.drift, self._into, self._last = {}, {}, None
            self.notes = []
            self._resolve()
            self.target_side = self._side(self._given)
            proof = super().prove(wanted, anyway=anyway)
            idle = [n for n in self.departing if self.drift.get(n, surface.INF) <= GATE]
            if proof.verdict not in _GOOD or not idle or len(idle) == len(self.departing):
                break
            for name in idle:  # it computes what the reference does, and is to be proven with the rest
                del self.departing[name]
        if proof.verdict not in _GOOD:
            return self._refused(proof)
        found = replace(proof, departures=self._departures(), departed=self._departed())
        inside = [n for n in self.values if self._within(n)]
        if inside:
            count = f"{len(inside)} of {len(self.values)} filled tensors are inside departures: they are not proven"
            found = replace(found, notes=(*found.notes, count))
        return self._noted(found, {n: p for n, p in still.items() if n not in self.departing})

    def _again(self, kind: type[Judge], device: torch.device, **more: Any) -> Judge:
        """A judge of the same plan."""
        more |= {"device": device, "links": self.links, "blockwise": self.blockwise}
        return kind(self.source, self.target, self.plan, self.probe, **more)

    def _same(self, plain: Judge) -> bool:
        """Is the target right as it is?"""
        plain._check_reference()
        plain.expected = plain._expect(plain.reference_twin())
        plain.names = self._names(plain.expected)
        found = plain.compare(plain.expected, plain.target_twin(new=self.surfaced))
        self._whole = dict(found.residuals)
        if found.differs and max(found.residuals.values()) < 1e-3:
            found, _ = plain._attributed(found)
        return found.passed

    def _within(self, name: str) -> bool:
        return any(_within(name, module) for module in self.departing)

    def _nothing_left(self) -> Proof:
        why = f"all that was filled is inside {_listed(self.departing)}: nothing is left to prove around it"
        labels = tuple(label for label, _ in self.inputs)
        gaps = tuple(f"{name}: {INSIDE}" for name in self.values)
        return Proof((PassResult(f"{self.device.type}/float64", "failed", why, inputs=labels),), not_exercised=gaps)

    def _names(self, expected: list[list[Tensor]]) -> tuple[str, ...]:
        from surgery.judge import output_names

        return output_names(self.probe, len(expected[0]))

    def _noted(self, proof: Proof, idle: Mapping[str, str]) -> Proof:
        notes = tuple(f"{name} is allowed to depart, and does not" for name in _spoken(idle, self.departing))
        return replace(proof, notes=(*proof.notes, *notes))

    @property
    def surfaced(self) -> bool:
        return self.probe.run_target is None

    # -- what stands in each place ------------------------------------------------------------------------------------
    def _side(self, give: Callable[[str], Give | None]) -> CutSide:
        return CutSide("target", self.probe.call_target, tuple(self.departing), give)

    def _own_run(self, at: int) -> Tape:
        """The target's run with its departures cut out and going on with what they compute."""
        self.target_side = self._side(lambda label: None)
        return self.record_target(self.target_twin(new=self.surfaced), at)

    def _resolve(self) -> None:
        sizes = sorted(range(len(self.inputs)), key=lambda i: (_size(self.inputs[i][1]), i))
        at = sizes[len(sizes) // 2]
        self._with = self.reference_twin()
        self.expected = self._expect(self._with)
        ours = self._own_run(at)
        self.places = [(r.module, r.call) for r in ours.replaced]
        called = {module for module, _ in self.places}
        for pattern in dict.fromkeys(self.departing.values()):
            if not any(p == pattern and n in called for n, p in self.departing.items()):
                raise SurgeryError(
                    f"allow_different names {pattern or 'the whole target'}, which is never called, or gives no tensor "
                    "of numbers: what it computes cannot be told from the rest",
                    hint="Name the module whose forward calls it.",
                )
        barred = ours.depending(set(self.new)) if self.surfaced else set()
        expected = self.expected[at]
        allowed = final(ours, set(self.values), barred)

        def ends(known: Mapping[int, Tensor], run: Run, tolerance: float) -> bool:
            if not self.surfaced:
                got = [known[v] if v in known else run.held(v) for v in run.outputs]
                return len(got) == len(expected) and all(
                    surface.residual(a, b) <= tolerance for a, b in zip(expected, got, strict=True)
                )
            index = FingerprintIndex(
                (v, fingerprint(known[v]) if v in known else value.fingerprint)
                for v, value in enumerate(ours.values)
                if v not in barred and (v in allowed or (value.origin == "node" and value.data and value.weights))
            )
            return all(index.find(fingerprint(e), tolerance) for e in expected if fingerprint(e) is not None)

        last = allowed if self.surfaced else set()
        own = {n: self.target.get_submodule(n).state_dict(keep_vars=True).values() for n in self.departing}
        weights = {n: sum(t.numel() for t in held if t.is_floating_point()) for n, held in own.items()}
        self.resolved = Resolving(ours, self._theirs(at), ends, barred, last, weights).resolve()

    def _theirs(self, at: int) -> Theirs:
        if self._last is None or self._last[0] != at:
            self._last = None  # one run is held at a time
            assert self._with is not None
            tape = self._record(self.reference_side, self._with, at, set(self.links), None, None)
            self._last = at, Theirs(tape)
        return self._last[1]

    def _given(self, label: str) -> Give | None:
        at = self.labels.get(label)
        if at is None:
            return None

        self._theirs(at)  # before anything of the target is recorded

        def give(number: int, module: str, own: Tensor) -> Tensor | None:
            stand = self.resolved.stands.get(number)
            if number >= len(self.places) or self.places[number][0] != module:
                raise GraftError(
                    f"{module} is called otherwise on {label} than on another input, so that nothing is known to stand "
                    "in its place",
                    hint="Name the module around it, or leave such inputs out.",
                )
            if stand is None:
                return None
            value = self._theirs(at).value(stand, tuple(own.shape))
            if value is None:
                where = stand.module or "its forward"
                raise GraftError(
                    f"what stands for {module} in the reference, in {where}, has no counterpart on {label}",
                    hint="Leave such inputs out, or name the module around it.",
                )
            if own.dtype == torch.float64:
                apart = surface.relative(value, own)
                self.drift[module] = max(self.drift.get(module, 0.0), apart)
            return value

        return give

    # -- comparing ------------------------------------------------------------------------------------------------
    def _expect(self, reference: nn.Module) -> list[list[Tensor]]:
        self._with, self._last = reference, None  # the activations are those of the same twin
        return super()._expect(reference)

    def _attributed(self, found: Comparison) -> tuple[Comparison, list[str]]:
        own = self._with
        try:
            return super()._attributed(found)
        finally:
            self._with, self._last = own, None

    def _storage(self) -> float:
        with self._measured():
            return super()._storage()

    def _recorded(self, exercise: Exercise) -> None:
        with self._measured():
            super()._recorded(exercise)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """What was measured so far stays: what runs inside is with other values."""
        before = dict(self.drift), dict(self._into), dict(self._hits)
        try:
            yield
        finally:
            self.drift, self._into, self._hits = before

    def compare(self, expected: list[list[Tensor]], target: nn.Module, exercise: Exercise | None = None) -> Comparison:
        self._into, self.drift = {}, {}
        found = super().compare(expected, target, exercise or self._nothing)
        for module, (apart, at) in self._into.items():
            if apart > GATE:
                if not found.differs:
                    found.worst_input = at
                found.differs = True
                said = f"differs by {apart:.1e}" if apart < surface.INF else "does not occur in the reference"
                found.why.setdefault(f"into {module}", f"what goes into {module} {said} on {self.inputs[at][0]}")
        return found

    def _exercising(self, target: nn.Module, at: int, expected: list[Tensor], exercise: Exercise) -> list[Tensor]:
        tape = self.record_target(target, at)
        self._check_into(tape, at)
        got = [twin.lift(Run(tape, []).held(v)).detach() for v in tape.outputs()]
        right = len(got) == len(expected) and all(
            surface.residual(a, b) <= GATE for a, b in zip(expected, got, strict=True)
        )
        if right and exercise is not self._nothing:
            self._told(exercise, tape, tape.outputs())
        return got

    def _surfaced(
        self, expected: list[Tensor], target: nn.Module, at: int, found: Comparison
    ) -> list[tuple[float, str, frozenset[Place]]]:
        calls: list[Call] = []
        tape = self.record_target(target, at, calls)
        self._check_into(tape, at)
        barred = tape.depending(set(self.new))
        allowed = final(tape, set(self.values), barred)
        index = FingerprintIndex(
            (v, value.fingerprint)
            for v, value in enumerate(tape.values)
            if v in allowed or (value.origin == "node" and value.data and value.weights)
        )
        results = self._occurring(expected, tape, index, calls, at, found)
        self._hits[at] = list(found.tapes[-1][1])
        return results

    def _check_into(self, tape: Tape, at: int) -> None:
        theirs, run = self._theirs(at), Run(tape, [])
        for place in tape.replaced:
            apart = max((theirs.residual(run.held(v)) for v in place.taken), default=0.0)
            if apart >= self._into.get(place.module, (0.0, at))[0]:
                self._into[place.module] = apart, at

    def _told(self, exercise: Exercise, tape: Tape, outputs: list[int], *more: Any) -> None:
        super()._told(exercise, tape, list(dict.fromkeys([*outputs, *tape.fed()])), *more)

    def _exercised(self, exercise: Exercise) -> tuple[list[str], list[str], str]:
        gaps, symmetries, why = super()._exercised(exercise)
        within = [n for n in self.values if self._within(n) and n not in exercise.read]
        hidden = set(within)
        gaps = [gap for gap in gaps if gap.partition(":")[0].partition("[")[0] not in hidden]
        return [*gaps, *(f"{n}: {INSIDE}" for n in within)], symmetries, why

    def _other_passes(self, wanted: Sequence[str], main: str, places: Mapping[str, Place]) -> Iterator[PassResult]:
        for name in wanted:
            asked = passes.parse(name)
            if asked.compiled:
                yield PassResult(name, "not run", "around a departure nothing goes through torch.compile")
            elif asked.dtype is torch.float64 and name != main and not passes.unavailable(asked):
                other = self._again(DepartingJudge, asked.device, departing=self.departing)
                yield replace(other.prove().passes[0], name=name)
            else:
                yield from map(self._around, super()._other_passes([name], main, places))

    @staticmethod
    def _around(result: PassResult) -> PassResult:
        if result.status == "not run":
            return result
        said = "the reference's float64 activations took the departures' place"
        return replace(result, why=f"{result.why}; {said}" if result.why else said)

    # -- what is said -------------------------------------------------------------------------------------------------
    def _departures(self) -> tuple[Departure, ...]:
        stood: dict[str, str] = {}
        for number, stand in self.resolved.stands.items():
            stood.setdefault(self.places[number][0], stand.module)
        return tuple(
            Departure(name, pattern, stood.get(name, ""), self.drift.get(name, 0.0))
            for name, pattern in self.departing.items()
            if name in stood
        )

    def _departed(self) -> dict[str, float]:
        """How far the outputs are moved by all departures together."""
        if not self.surfaced:
            return self._whole
        found = dict.fromkeys(self.names, 0.0)
        for at, hits in self._hits.items():
            tape = self._own_run(at)
            run = Run(tape, [])
            for name, vid, expected in zip(self.names, hits, self.expected[at], strict=True):
                fits = vid < len(tape.values) and math.prod(tape.values[vid].shape) == expected.numel()
                apart = surface.residual(expected, run.held(vid), anywhere=True) if fits else surface.INF
                found[name] = max(found[name], apart)
        self.target_side = self._side(self._given)
        return found

    def _refused(self, proof: Proof) -> Proof:
        if self.resolved.whole or proof.divergence is None:
            return proof
        where = self.places[self.resolved.failed][0] if self.resolved.failed < len(self.places) else ""
        said = f"around {_listed(self.departing)}: {proof.divergence.why}"
        if where and self.resolved.why:
            said += f"; of {where}: {self.resolved.why}"
        return replace(proof, divergence=replace(proof.divergence, why=said))


def _listed(names: Mapping[str, str]) -> str:
    patterns = list(dict.fromkeys(p or "the whole target" for p in names.values()))
    return ", ".join(patterns[:3]) + (" ..." if len(patterns) > 3 else "")


def _spoken(idle: Mapping[str, str], departing: Mapping[str, str]) -> list[str]:
    """The modules that do not depart: by their pattern, where none of it does."""
    found: dict[str, None] = {}
    for name, pattern in idle.items():
        several = [n for n, p in idle.items() if p == pattern]
        whole = len(several) > 1 and pattern not in {p for n, p in departing.items() if n not in idle}
        found[pattern if whole else name or "the whole target"] = None
    return list(found)


def _size(x: Any) -> int:
    from torch.utils._pytree import tree_iter

    return sum(t.numel() for t in tree_iter(x) if isinstance(t, Tensor))


def judge_of(
    source: Any, target: nn.Module, plan: Plan, probe: Any, *, departing: Mapping[str, str], **more: Any
) -> Judge:
    """A judge of this plan: around what may depart, where something may."""
    if not departing:
        return Judge(source, target, plan, probe, **more)
    return DepartingJudge(source, target, plan, probe, departing=departing, **more)
