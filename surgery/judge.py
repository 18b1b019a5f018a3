"""The judge: runs the reference and the grafted target on inputs that the search did not see, and says what that shows.

Both run as float64 twins, the target with the plan's values unrounded, so that one fixed gate (1e-12 relative)
separates the same function from another one. What is compared: the outputs that run_target returns; or, without
run_target, the reference's outputs wherever they occur among the target's activations (the proof surface). Tensors
that the plan leaves new are given other values than they have, so that nothing found on the surface can depend on
them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from surgery import attribution, casts, machine, nearby, passes, surface
from surgery import twin as twin_of
from surgery.checkpoint import Checkpoint
from surgery.divergence import diverge
from surgery.errors import GraftError
from surgery.exercise import Exercise, NotFaithful, unused_masks
from surgery.expr import kind, names
from surgery.link import held, link
from surgery.mapper.record import NEAR, Fingerprint, FingerprintIndex, NotRecordable, Tape, fingerprint, record, same
from surgery.plan import Plan, Status
from surgery.probe import Probe
from surgery.proof import GATE, PassResult, Proof
from surgery.running import MADE, Call, Side, all_tensors, build, own_tensors, perturbed, unrounded
from surgery.surface import INF, Place
from surgery.symmetry import left_out, reordered

CLOSE = 1e-5  # relative; what storing constants in float32 does to a fingerprint is less
BLOCKWISE = "block by block: weights are raised to float64, and gradients taken, a piece of the run at a time"


@dataclass
class Comparison:
    """Both sides on all inputs, in float64."""

    residuals: dict[str, float] = field(default_factory=dict)  # by output, the worst
    why: dict[str, str] = field(default_factory=dict)  # by output: what is wrong, where something is
    places: dict[str, Place] = field(default_factory=dict)
    worst_input: int = 0
    differs: bool = False
    apart: dict[int, float] = field(default_factory=dict)  # by input, the worst
    tapes: list[tuple[Tape, list[int]]] = field(default_factory=list)  # of a surface: each run, and the outputs on it

    @property
    def passed(self) -> bool:
        return bool(self.residuals) and not self.why and all(r <= GATE for r in self.residuals.values())


class Judge:
    """One plan, one probe, one target. `links`: surgery.link's result for the probe's reference, where it is at hand.

    `blockwise`: in little memory. Both sides are run as ever, as wholes and in float64, of which only what one operator
    consumes is held; beyond that, values that the plan computes are made on use, and gradients are taken a piece of the
    run at a time. None: where both models in float64 would not fit into the memory that is free.
    """

    def __init__(
        self,
        source: Checkpoint,
        target: nn.Module,
        plan: Plan,
        probe: Probe,
        *,
        device: torch.device | None = None,
        links: Mapping[str, Any] | None = None,
        blockwise: bool | None = None,
    ) -> None:
        self.source, self.target, self.plan, self.probe = source, target, plan, probe
        self.blockwise = not machine.fits(probe.reference, target) if blockwise is None else blockwise
        self.device = device or home(target)
        self.reference_side, self.target_side = Side.reference(probe), Side.target(probe)
        with machine.giving_back(self.blockwise):
            self.links = links if links is not None else link(probe.reference, source)
            self.held = held(probe.reference, source, self.links)
            self.values = unrounded(plan, source, self.held, on_use=self.blockwise)
        self.inputs = probe.proof_inputs()
        if not self.inputs:
            raise GraftError("the probe has no inputs", hint="Give at least one to search with and one to prove with.")
        self.new = self._new()
        self.expected: list[list[Tensor]] = []
        self.names: tuple[str, ...] = ()
        self.notes: list[str] = []
        self.near: dict[int, Mapping[str, range]] = {}  # of surgery.nearby

    # -- the two sides --------------------------------------------------------------------------------------------
    def _new(self) -> dict[str, Tensor]:
        """Other values for what the plan leaves as it is initialised."""
        own = own_tensors(self.target)
        new = [r.target for r in self.plan.rows if r.status is Status.NEW]
        new += [r.target for r in self.plan.rows if r.tied_to in new]
        some = {n: i for i, n in enumerate(new) if n in own and own[n].is_floating_point()}
        if not self.blockwise:
            return {n: perturbed(own[n], i) for n, i in some.items()}
        home = torch.device("cpu")
        return {
            n: twin_of.Made(
                partial(perturbed, own[n], i), torch.empty(own[n].shape, dtype=torch.float64, device="meta"), home
            )
            for n, i in some.items()
        }

    def reference_twin(self, also: Mapping[int, Tensor] | None = None) -> nn.Module:
        return build(self.probe.reference, {}, self.device, also=also)

    def target_twin(
        self, values: Mapping[str, Tensor] | None = None, also: Mapping[int, Tensor] | None = None, *, new: bool = False
    ) -> nn.Module:
        """The target's twin with the plan's values (or these). `new`: with other values for what is new; on the meta
        device there are none but these."""
        own = all_tensors(self.target)
        other = {n: t for n, t in self.new.items() if new or own[n].is_meta}
        return build(self.target, {**other, **(self.values if values is None else values)}, self.device, also=also)

    def _expect(self, reference: nn.Module) -> list[list[Tensor]]:
        return [self.reference_side.outputs(reference, x, label) for label, x in self.inputs]

    def _check_reference(self) -> None:
        """Every weight that the reference's run consumes must be one of the source's."""
        parameters = {n for n, _ in self.probe.reference.named_parameters(remove_duplicate=False)}
        own = own_tensors(self.probe.reference)
        open_names = {
            n
            for n, t in own.items()
            if t.is_floating_point() and n not in self.links and (n in parameters or n in self.source)
        }
        if not open_names:
            return
        tape = self.record_reference(0, sizes=frozenset())
        missing = [
            v.name
            for vid, v in enumerate(tape.values)
            if v.origin == "const" and v.name in open_names and tape.consumers[vid]
        ]
        if missing:
            few = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise GraftError(
                f"the reference runs with weights that are not the source's: {few}",
                hint="Load the source into the reference first: a proof about other weights proves nothing.",
            )

    def record_reference(self, at: int, calls: list[Call] | None = None, sizes: frozenset[int] | None = None) -> Tape:
        """`sizes`: as of record_target."""
        return self._record(self.reference_side, self.reference_twin(), at, set(self.links), calls, sizes)

    def record_target(
        self,
        twin: nn.Module,
        at: int,
        calls: list[Call] | None = None,
        sizes: frozenset[int] | None = None,
        returned: list[Tensor] | None = None,
        like: Sequence[Tensor] | None = None,
    ) -> Tape:
        """`sizes`: how many elements the activations of interest have (any number). `like`: of these, only what may be
        one of these tensors in another layout is held. `returned`: see `record`."""
        return self._record(self.target_side, twin, at, set(self.values), calls, sizes, returned, like)

    def _record(
        self,
        side: Side,
        twin: nn.Module,
        at: int,
        weights: set[str],
        calls: list[Call] | None,
        sizes: frozenset[int] | None,
        returned: list[Tensor] | None = None,
        like: Sequence[Tensor] | None = None,
    ) -> Tape:
        label, x = self.inputs[at]
        x = tree_map(lambda t: t.to(self.device) if isinstance(t, Tensor) else t, x)
        near = None if like is None else [f for t in like if (f := fingerprint(t)) is not None]
        # Outputs of one norm are of one size, whatever the layer: of a large model, a look-alike is not held.
        within = CLOSE if self.blockwise else NEAR

        def wanted(f: Fingerprint) -> bool:
            return any(same(each, f, within) for each in near or ())

        def held(t: Tensor) -> bool:
            if near is None or not t.is_floating_point():
                return sizes is None or t.numel() in sizes
            return (sizes is None or t.numel() in sizes) and (f := fingerprint(t)) is not None and wanted(f)

        with side.failures(twin, label, calls, held):
            return record(
                side.run,
                twin,
                x,
                weights=weights,
                sizes=sizes,
                returned=returned,
                wanted=None if near is None else wanted,
            )

    # -- comparing ------------------------------------------------------------------------------------------------
    def compare(self, expected: list[list[Tensor]], target: nn.Module, exercise: Exercise | None = None) -> Comparison:
        """The target's twin against what the reference gave, on every proof input. `exercise`: gathers what the inputs
        reach, for as long as they agree."""
        found = Comparison()
        nothing = self._shows_nothing(expected)
        places: dict[str, frozenset[Place]] = {}
        # Small inputs first: what they explain need not be explained on large ones.
        for at in sorted(range(len(self.inputs)), key=lambda i: sum(e.numel() for e in expected[i])):
            label, x = self.inputs[at]
            if self.probe.run_target is not None and exercise is not None and not found.differs:
                got = self._exercising(target, at, expected[at], exercise)
                results = self._returned(expected[at], got, label)
            elif self.probe.run_target is not None:
                results = self._returned(expected[at], self.target_side.outputs(target, x, label), label)
            else:
                results = self._surfaced(expected[at], target, at, found)
            for name, (value, why, where) in zip(self.names, results, strict=True):
                found.residuals[name] = max(found.residuals.get(name, 0.0), value)
                if value > GATE and "not a number" not in nothing.get(name, ""):
                    found.differs = True
                    found.why.setdefault(name, why or f"{name} differs by {value:.1e} on {label}")
                found.apart[at] = max(found.apart.get(at, 0.0), value)
                places[name] = places.get(name, where) & where
        found.worst_input = max(found.apart, key=found.apart.__getitem__, default=0)
        for name, where in places.items() if self.probe.run_target is None else ():
            if where:
                found.places[name] = surface.innermost(where)
            elif name not in found.why:
                found.why[name] = f"{name} occurs in the target at other places on other inputs"
        for name, why in nothing.items():
            found.why.setdefault(name, why)
        return found

    def _exercising(self, target: nn.Module, at: int, expected: list[Tensor], exercise: Exercise) -> list[Tensor]:
        """What the target's twin returns on an input; and what of it the input exercised, where it is right."""
        label, x = self.inputs[at]
        own = all_tensors(target)
        followed = {id(own[n]): own[n] for n in exercise.open() if n in own and own[n].is_floating_point()}
        returned: list[Tensor] = []
        live: tuple[Mapping[str, Tensor], list[Tensor]] | None = (own, returned)
        if self.blockwise:  # the graph of the whole run holds what it should not
            live, followed = None, {}
        try:
            for t in followed.values():
                t.requires_grad_(True)
            tape = self.record_target(target, at, sizes=frozenset(), returned=returned if live else None)
        except GraftError as error:
            if isinstance(error.__cause__, NotRecordable):
                exercise.untold = f"what the inputs exercised cannot be told: {error.__cause__}"
                return self.target_side.outputs(target, x, label)
            live = None  # a program that minds gradients
        finally:
            for t in followed.values():
                t.requires_grad_(False)
        if live is None and not self.blockwise:
            tape = self.record_target(target, at, sizes=frozenset())
        elif any(t.is_floating_point() and not t.requires_grad for t in returned):
            live = None  # or one that switches them off
        kept = [tape.values[v].tensor for v in tape.outputs()]
        got = [twin_of.lift(t).detach() for t in kept if t is not None]
        if len(got) != len(kept) or not got:
            return self.target_side.outputs(target, x, label)
        if len(got) == len(expected) and all(
            surface.residual(a, b) <= GATE for a, b in zip(expected, got, strict=True)
        ):
            self._told(exercise, tape, tape.outputs(), live, followed)
        return got

    def _told(
        self,
        exercise: Exercise,
        tape: Tape,
        outputs: list[int],
        live: tuple[Mapping[str, Tensor], list[Tensor]] | None = None,
        followed: Mapping[int, Tensor] | None = None,
    ) -> None:
        try:
            for t in (followed or {}).values():
                t.requires_grad_(live is not None)
            exercise.add(tape, outputs, live)
        except NotFaithful:
            exercise.untold = "the target's run cannot be replayed, so that what the inputs exercised is unknown"
        finally:
            for t in (followed or {}).values():
                t.requires_grad_(False)

    def _returned(
        self, expected: list[Tensor], got: list[Tensor], label: str
    ) -> list[tuple[float, str, frozenset[Place]]]:
        if len(expected) != len(got):
            raise GraftError(
                f"run_reference returned {len(expected)} tensors and run_target {len(got)} on {label}",
                hint="Both must return the same outputs, in one order.",
            )
        results = []
        for name, a, b in zip(self.names, expected, got, strict=True):
            value, why = surface.residual(a, b), ""
            if value == INF:
                if a.numel() != b.numel():
                    why = f"{name} has shape {tuple(b.shape)} on {label}, the reference's {tuple(a.shape)}"
                elif not bool(torch.isfinite(_floats(b)).all()):
                    why = f"{name} is not finite on {label}, where the reference's is"
            results.append((value, why, frozenset[Place]()))
        return results

    def _surfaced(
        self, expected: list[Tensor], target: nn.Module, at: int, found: Comparison
    ) -> list[tuple[float, str, frozenset[Place]]]:
        calls: list[Call] = []
        tape = self.record_target(target, at, calls, frozenset(a.numel() for a in expected), like=expected)
        return self._occurring(expected, tape, surface.indexed(tape), calls, at, found)

    def _occurring(
        self,
        expected: list[Tensor],
        tape: Tape,
        index: FingerprintIndex,
        calls: list[Call],
        at: int,
        found: Comparison,
    ) -> list[tuple[float, str, frozenset[Place]]]:
        """Each of the reference's outputs where it occurs among the activations in the index."""
        results = []
        found.tapes.append((tape, []))
        for name, a in zip(self.names, expected, strict=True):
            hit = surface.search(a, tape, index, calls)
            found.tapes[-1][1].extend(hit.vids[:1])
            why = ""
            if hit.residual > GATE:
                why = f"{name} of the reference does not occur among the target's activations on {self.inputs[at][0]}"
                if hit.residual < INF and hit.places:
                    why += f"; the nearest, in {surface.innermost(hit.places)}, differs by {hit.residual:.1e}"
            results.append((hit.residual, why, hit.places))
        return results

    def _shows_nothing(self, expected: list[list[Tensor]]) -> dict[str, str]:
        """Outputs that are fit to prove nothing on every input, or not a number on one."""
        out = {}
        for i, name in enumerate(self.names):
            whys = [surface.shows_nothing(outputs[i]) for outputs in expected]
            bad = [(w, label) for w, (label, _) in zip(whys, self.inputs, strict=True) if w]
            nan = [b for b in bad if "not a number" in b[0]]
            if nan or len(bad) == len(whys):
                why, label = (nan or bad)[0]
                out[name] = f"the reference's {name} {why} on {label}, which proves nothing"
        return out

    # -- the proof ------------------------------------------------------------------------------------------------
    def prove(self, wanted: Sequence[str] = (), *, anyway: bool = True) -> Proof:
        """The float64 proof, and the passes that are wanted beside it; not `anyway`: where that passed."""
        started = time.perf_counter()
        peak = machine.Peak(self.device)
        with peak, machine.giving_back(self.blockwise):
            main, places = self._main()
        took = {
            "seconds": round(time.perf_counter() - started, 4),
            "peak_bytes": peak.bytes,
            "peak_of": peak.how,
        }
        first = main.passes[0]
        first = replace(first, details={**first.details, **took})
        wanted = wanted if anyway or first.status == "passed" else ()
        return replace(main, passes=(first, *self._other_passes(wanted, first.name, places)))

    def _main(self) -> tuple[Proof, Mapping[str, Place]]:
        self._check_reference()
        reference = self.reference_twin()
        self.expected = self._expect(reference)
        counts = {len(outputs) for outputs in self.expected}
        if len(counts) != 1:
            raise GraftError(
                "run_reference returns more outputs on some inputs than on others",
                hint="Return the same ones on every input.",
            )
        self.names = output_names(self.probe, counts.pop())
        surfaced = self.probe.run_target is None
        target = self.target_twin(new=surfaced)
        rows = {r.target: r for r in self.plan.rows if r.status in MADE}
        exercise = Exercise(self.source, rows, self.values, in_pieces=self.blockwise)
        found = self.compare(self.expected, target, exercise)
        causes: list[str] = []
        if found.differs and max(found.residuals.values()) < 1e-3:
            found, causes = self._attributed(found)
            exercise = Exercise(self.source, rows, self.values, in_pieces=self.blockwise)
            if found.passed and not surfaced:
                self._recorded(exercise)
        main = f"{self.device.type}/float64"
        gaps: list[str] = []
        symmetries: list[str] = []
        why = "; ".join(dict.fromkeys(found.why.values()))
        if found.passed:
            for tape, outputs in found.tapes:  # of a surface, known only now
                self._told(exercise, tape, outputs)
            gaps, symmetries, nothing = self._exercised(exercise)
            gaps += unused_masks(self.inputs, self.target, surfaced)
            symmetries += [*reordered(self.plan.rows, self.values, self.held), *left_out(self)]
            why = nothing
            self.notes += casts.notes(self)
        labels = tuple(label for label, _ in self.inputs)
        passed = found.passed and not why
        details = {"lifted": True, "blockwise": self.blockwise, "norm": passes.NORM, "torch": torch.__version__}
        result = PassResult(
            main, "passed" if passed else "failed", why, found.residuals, GATE, labels, details, found.differs
        )
        if self.blockwise:
            self.notes.append(BLOCKWISE)
        proof = Proof(
            passes=(result,),
            not_exercised=tuple(gaps),
            symmetries=tuple(symmetries),
            storage=self._storage() if passed else 0.0,
            divergence=diverge(self, nearby.telling(self, found)) if found.differs else None,
            surface={name: str(place) for name, place in found.places.items()} if found.passed else {},
            causes=tuple(causes),
            notes=tuple(self.notes),
            adapted=self._adapted(),
        )
        return proof, found.places

    def _adapted(self) -> tuple[str, ...]:
        def dtype_of(name: str) -> str:
            return self.source[name].dtype

        rows = [r for r in self.plan.rows if r.expr is not None]
        return tuple(
            r.target for r in rows if r.expr is not None and kind(r.expr, dtype_of) in ("approximate", "lossy")
        )

    def _attributed(self, found: Comparison) -> tuple[Comparison, list[str]]:
        """The comparison without what float32 left in one side's constants; as it was, where that does not explain
        it."""
        reference, target = self.probe.reference, self.target
        used = set(self.plan.used)
        moved = {
            id(t)
            for n, t in own_tensors(reference).items()
            if n in self.links and (not attribution.one_number(t) or used.intersection(names(self.links[n])))
        }
        filled = {id(t) for n, t in all_tensors(target).items() if n in self.values or n in self.new}
        theirs = self._tape_or_none(lambda: self.record_reference(found.worst_input))
        ours = self._tape_or_none(lambda: self.record_target(self.target_twin(new=True), found.worst_input))
        tries: list[tuple[str, dict[int, Tensor], dict[int, Tensor]]] = []
        if scalars := attribution.scalars(reference, moved):
            named = ", ".join(attribution.names_of(reference, scalars))
            tries.append((f"the reference stores {named} in float32", scalars, {}))
        if scalars := attribution.scalars(target, filled):
            named = ", ".join(attribution.names_of(target, scalars))
            tries.append((f"the target stores its constant {named} in float32", {}, scalars))
        if theirs is not None and (tables := attribution.tables(target, filled, theirs)):
            named = ", ".join(attribution.names_of(target, tables))
            tries.append((f"the target keeps its table {named} in float32", {}, tables))
        if ours is not None and (tables := attribution.tables(reference, moved, ours)):
            named = ", ".join(attribution.names_of(reference, tables))
            tries.append((f"the reference keeps its table {named} in float32", tables, {}))
        if len(tries) > 1:
            theirs_all = {k: v for _, on_reference, _ in tries for k, v in on_reference.items()}
            ours_all = {k: v for _, _, on_target in tries for k, v in on_target.items()}
            tries.append(("; ".join(said for said, _, _ in tries), theirs_all, ours_all))
        for said, on_reference, on_target in tries:
            expected = self._expect(self.reference_twin(on_reference)) if on_reference else self.expected
            again = self.compare(expected, self.target_twin(None, on_target, new=self.probe.run_target is None))
            if again.passed:
                before = max(found.residuals.values())
                self.notes.append(f"before that cause was removed they differed by {before:.1e}")
                return again, [said]
        return found, []

    def _tape_or_none(self, run: Any) -> Tape | None:
        try:
            return run()
        except GraftError as error:
            if isinstance(error.__cause__, NotRecordable):
                return None
            raise

    def _exercised(self, exercise: Exercise) -> tuple[list[str], list[str], str]:
        """(not exercised, symmetries, why nothing is shown)."""
        if exercise.untold:
            return [], [], exercise.untold
        gaps, symmetries = exercise.findings()
        if not exercise.any:
            return gaps, symmetries, "what was compared does not depend on any filled tensor, which proves nothing"
        self._note_new()
        return gaps, symmetries, ""

    def _recorded(self, exercise: Exercise) -> None:
        """What the inputs exercise, of a run that is right but for a cause that was found."""
        target = self.target_twin()
        for at in range(len(self.inputs)):
            try:
                tape = self.record_target(target, at, sizes=frozenset())
            except GraftError as error:
                if not isinstance(error.__cause__, NotRecordable):
                    raise
                exercise.untold = f"what the inputs exercised cannot be told: {error.__cause__}"
                return
            self._told(exercise, tape, tape.outputs())

    def _note_new(self) -> None:
        """Returned outputs may depend on tensors that stay as they are initialised: then they are right as they are."""
        if self.probe.run_target is None or not self.new:
            return
        other = self.target_twin(new=True)
        label, x = self.inputs[0]
        before = self.target_side.outputs(self.target_twin(), x, label)
        after = self.target_side.outputs(other, x, label)
        if any(surface.residual(a, b) > GATE for a, b in zip(before, after, strict=True)):
            some = ", ".join(list(self.new)[:3]) + (" ..." if len(self.new) > 3 else "")
            self.notes.append(
                f"the outputs also depend on new tensors, proven with the values that they have now: {some}"
            )

    def _storage(self) -> float:
        """The residual with the values as the target stores them."""
        own = own_tensors(self.target)
        stored: dict[str, Tensor] = {}
        for n, v in self.values.items():
            dtype = own[n].dtype
            rounded = v if v.dtype == dtype else twin_of.formed(v).to(dtype)
            if rounded is v or torch.equal(rounded.to(v.dtype), twin_of.formed(v)):
                stored[n] = v  # nothing is lost, and nothing need be held twice
            elif self.blockwise:
                stored[n] = twin_of.Made(partial(_rounded, v, dtype), rounded, rounded.device)
            else:
                stored[n] = rounded
        if all(stored[n] is v for n, v in self.values.items()):
            return 0.0
        keep, self.notes = self.notes, []
        again = self.compare(self.expected, self.target_twin(stored, new=self.probe.run_target is None))
        self.notes = keep
        return max(again.residuals.values())

    def _other_passes(self, wanted: Sequence[str], main: str, places: Mapping[str, Place]) -> Iterator[PassResult]:
        for name in wanted:
            if name == main:
                continue
            parsed = passes.parse(name)
            missing = passes.unavailable(parsed)
            if missing:
                yield PassResult(name, "not run", missing)
            elif parsed.dtype is torch.float64:
                other = Judge(
                    self.source, self.target, self.plan, self.probe,
                    device=parsed.device, links=self.links, blockwise=self.blockwise,
                )  # fmt: skip
                yield replace(other.prove().passes[0], name=name)
            else:
                yield passes.run(self, parsed, places)


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return twin_of.formed(value).to(dtype)


def home(module: nn.Module) -> torch.device:
    """Where a module lives; the CPU where it lives nowhere, or where there is no float64."""
    device = next((t.device for t in all_tensors(module).values()), torch.device("cpu"))
    return torch.device("cpu") if device.type in ("meta", "mps") else device


def output_names(probe: Probe, count: int) -> tuple[str, ...]:
    """A name for each of the reference's outputs."""
    given = probe.outputs[:count]
    rest = ["output"] if count == 1 else [f"output {i}" for i in range(count)]
    return (*given, *rest[len(given) :])


def _floats(t: Tensor) -> Tensor:
    return t if t.is_floating_point() or t.is_complex() else t.to(torch.float64)


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Whatever draws random numbers inside leaves the generators as they were."""
    import random

    state = random.getstate()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(state)
