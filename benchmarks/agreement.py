"""How far do the surgery ops agree with the libraries and programs that published their rules?

    python benchmarks/agreement.py

runs the tests of agreement, which draw their shapes through hypothesis, and prints a row for each op and reference: the
shapes of results that were met, how many comparisons were bit for bit equal, and of the others the largest difference
in parts of the largest number. timm, open_clip, transformers and torch come with the project. peft and mergekit are
asked where they are installed, and three programs that are on no package index where PYTHONPATH holds their folders:

    git clone https://github.com/apple/ml-hypercloning       (module hypercloning)
    git clone https://github.com/OscarXZQ/weight-selection   (module weight_selection)
    git clone https://github.com/erogol/Net2Net              (module net2net)

What is not at hand is listed below the table as not asked.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = {"timm": "timm", "open_clip": "open_clip_torch", "torch": "torch", "transformers": "transformers"}
OTHERS = {"peft": "peft", "mergekit": "mergekit"}
PROGRAMS = {"hypercloning": "HyperCloning", "weight_selection": "Weight selection", "net2net": "Net2Net"}


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import pytest

    from tests.agreement import MET

    files = sorted(str(path) for path in (ROOT / "tests" / "surgery").glob("test_agreement*.py"))
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files])
    if status:
        sys.exit(int(status))
    print("\n| op | reference | shapes | types | compared | bit for bit | largest difference of the others |")
    print("|---|---|---|---|---|---|---|")
    for (op, reference), met in sorted(MET.items()):
        others = f"{met.worst:.0e}" if met.exact < met.tried else ""
        types = ", ".join(sorted(met.dtypes))
        print(f"| `{op}` | {reference} | {len(met.shapes)} | {types} | {met.tried} | {met.exact} | {others} |")
    asked = {n: d for n, d in {**LIBRARIES, **OTHERS}.items() if importlib.util.find_spec(n)}
    print("\nWith " + ", ".join(f"{name} {importlib.metadata.version(dist)}" for name, dist in asked.items()) + ".")
    absent = [name for name in OTHERS if name not in asked]
    absent += [title for name, title in PROGRAMS.items() if importlib.util.find_spec(name) is None]
    if absent:
        print("Not asked, for they are not at hand: " + ", ".join(absent) + ".")


if __name__ == "__main__":
    main()
