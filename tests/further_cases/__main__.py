"""python -m tests.further_cases oracle|zoo|zoo-static [modality | part of a name] (from the root of the repository)"""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch

from tests.graft_matrix import core, zoo_method

MODALITIES = ("text", "vision", "clip", "audio", "timeseries")


def main() -> int:
    torch.set_grad_enabled(False)
    what = sys.argv[1] if len(sys.argv) > 1 else "oracle"
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    for name in MODALITIES:
        try:
            importlib.import_module(f"tests.further_cases.{name}")
        except ModuleNotFoundError as e:
            print(f"# {name}: {e}")
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
