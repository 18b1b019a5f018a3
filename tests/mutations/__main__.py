"""python -m tests.mutations [part of a name] [--sample N] [--seed S]: judges defects and prints what is not as it
should be, and the figures."""

from __future__ import annotations

import argparse
import warnings

from tests.mutations import suite


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations")
    parser.add_argument("only", nargs="?", default="")
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--second", action="store_true", help="the second set in place of the first")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    outcomes = []
    for defect in suite.chosen(given.only, given.sample, given.seed, second=given.second):
        outcome = suite.judged_of(defect)
        outcomes.append(outcome)
        print(outcome, flush=True)
    for name, figure in suite.described(outcomes).items():
        print(f"{name}: {figure}")


if __name__ == "__main__":
    main()
