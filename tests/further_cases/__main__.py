"""python -m tests.further_cases oracle|zoo|zoo-static [modality | part of a name] (from the root of the repository)"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402

from tests.graft_matrix import core, zoo_method  # noqa: E402

MODALITIES = ("text", "vision", "clip", "audio", "timeseries")


def main() -> int:
    torch.set_grad_enabled(False)
    what = sys.argv[1] if len(sys.argv) > 1 else "oracle"
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    for found in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if found.name != "__main__":
            try:
                importlib.import_module(f"tests.further_cases.{found.name}")
            except ModuleNotFoundError as e:
                print(f"# {found.name}: {e}")
    cases = [c for c in core.CASES if (c.modality == only if only in MODALITIES else only in c.name)]
    if what == "oracle":
        bad = 0
        for c in cases:
            try:
                ok, worst, before = core.check_oracle(c)
            except Exception as e:
                ok, worst, before = False, float("nan"), float("nan")
                print(f"    {type(e).__name__}: {e}")
            bad += not ok
            print(f"{'ok ' if ok else 'BAD'} {worst:8.1e} (untouched {before:8.1e})  {c.name}", flush=True)
        print(f"{len(cases) - bad}/{len(cases)} oracles hold")
        return int(bool(bad))
    method = {"zoo": zoo_method.solve, "zoo-static": zoo_method.solve_static}.get(what) or core.METHODS[what]
    start = time.perf_counter()
    core.run(method, cases, verbose="trace" if os.environ.get("TRACE") else True)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
