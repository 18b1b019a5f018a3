"""How the proof is tested: defects put into correct grafts, and correct grafts on which no pass may fail.

python benchmarks/mutations.py                      # everything; some 11 minutes on one core
python benchmarks/mutations.py --sample 60          # some of the defects of each set, of every kind
python benchmarks/mutations.py --no-correct         # the defects alone
python benchmarks/mutations.py --no-defects         # the correct grafts alone

Ctrl-C stops and prints what was measured until then. These are the tables of docs/proof.md. Needs what the extras `all`
and `dev` bring, and takes what `matrix` brings.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import surgery  # noqa: E402
from tests.mutations import suite  # noqa: E402
from tests.mutations.families import FAMILIES, right  # noqa: E402

PASSES = ("cpu/float32", "cpu/bfloat16")
MODULES = (
    *(f"tests.graft_matrix.{m}" for m in ("text", "vision", "clip", "audio", "timeseries")),
    *(f"tests.further_cases.{m}" for m in ("text", "vision", "clip", "audio", "timeseries", "ports")),
    *(f"tests.further_cases.styles_{m}" for m in ("text", "vision", "clip", "audio", "timeseries")),
)


def share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / max(1, whole):.1f}%)"


def defects(only: str, sample: int, seed: int, verbose: bool, second: bool) -> None:
    outcomes: list[suite.Outcome] = []
    print("\n## the second set" if second else "## the set that the search was mended on")
    for defect in suite.chosen(only, sample, seed, second=second):
        try:
            outcomes.append(suite.judged_of(defect))
        except (surgery.SurgeryError, RuntimeError, ImportError) as error:
            print(f"NOT JUDGED {defect.name}: {error}", flush=True)
            continue
        except KeyboardInterrupt:
            print("interrupted: what was judged until then")
            break
        if verbose or str(outcomes[-1]).startswith("BAD"):
            print(outcomes[-1], flush=True)
    print("\n| kind of defect | defects | change the function | refuted | located | cause | 1e-3 | 1e-4 | 1e-5 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in sorted({o.defect.kind for o in outcomes}):
        print(line(kind, [o for o in outcomes if o.defect.kind == kind]))
    print(line("**all**", outcomes))
    f = suite.described(outcomes)
    whole = f["change the function"]
    print(
        f"\n{f['defects']} defects of {f['kinds']} kinds in {f['families']} architectures; {whole} change the function."
    )
    print(f"refuted {share(f['refuted'], whole)}; located {share(f['located'], f['refuted'])};", end=" ")
    print(f"cause {share(f['cause'], f['refuted'])}; a line named {share(f['line'], f['refuted'])}")
    for gate in suite.GATES:
        print(f"allclose {gate:g}: {share(f[f'allclose {gate:g}'], whole)} seen")
    alarms = [o for o in outcomes if not o.changes and o.verdict != "proven"]
    print(f"harmless changes not proven: {share(len(alarms), sum(not o.changes for o in outcomes))}")


def line(name: str, outcomes: list[suite.Outcome]) -> str:
    f = suite.described(outcomes)
    seen = " | ".join(str(f[f"allclose {gate:g}"]) for gate in suite.GATES)
    whole = f["change the function"]
    return f"| {name} | {f['defects']} | {whole} | {f['refuted']} | {f['located']} | {f['cause']} | {seen} |"


def pairs(only: str) -> Iterator[tuple[str, surgery.Proof]]:
    """(name, proof in all passes) of correct grafts: of the suite's families, of the graft matrix, of further cases."""
    from tests.graft_matrix import core

    for name in FAMILIES:
        if only in name:
            graft = right(name)
            yield (
                name,
                surgery.verify(graft.source, graft.target(), graft.plan, probe=graft.probe, passes=PASSES),
            )
    for module in MODULES:
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"# {module}: {error}")
    for case in core.CASES:
        if only not in case.name:
            continue
        source, target = core.build(case)
        probe = surgery.Probe(source, case.run_source, case.run_target, [case.inputs(seed) for seed in (1, 2, 3)])
        state = case.source_state(source)
        try:
            report = surgery.graft(state, target, probe=probe, require="proven")
        except surgery.SurgeryError as error:
            print(f"NOT GRAFTED {case.name}: {str(error)[:100]}", flush=True)
            continue
        yield case.name, surgery.verify(state, target, report.plan, probe=probe, passes=PASSES)


def correct(only: str) -> None:
    run = failed = skipped = grafts = 0
    try:
        for name, proof in pairs(only):
            grafts += 1
            for p in proof.passes:
                if p.name in PASSES:
                    ran = p.status == "passed" or p.differs
                    run += ran
                    skipped += not ran
                    if p.differs:
                        failed += 1
                        print(f"REFUTED {name}: {p}", flush=True)
                    elif not ran:
                        print(f"COULD NOT RUN {name}: {p.name}: {p.why}", flush=True)
    except KeyboardInterrupt:
        print("interrupted: what was proven until then")
    print(f"\ncorrect grafts: {grafts}, passes run {run}, refuted {share(failed, run)}, not run {skipped}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a defect's or a graft's name")
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--no-correct", action="store_true")
    parser.add_argument("--no-defects", action="store_true")
    given = parser.parse_args()
    started = time.perf_counter()
    if not given.no_defects:
        for second in (False, True):
            defects(given.only, given.sample, given.seed, given.verbose, second)
    if not given.no_correct:
        correct(given.only)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
