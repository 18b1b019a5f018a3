"""Further pairs and styles than the graft matrix holds: solved but for those named here, and none claimed and wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODALITIES = ("text", "vision", "clip", "audio", "timeseries")
OPEN: set[str] = set()  # cases that no mechanism solves yet, by the beginning of their names


@pytest.mark.slow
@pytest.mark.parametrize("modality", MODALITIES)
def test_cases_are_solved_and_none_is_wrong(modality: str) -> None:
    """Modules whose libraries are not installed are passed over by `python -m tests.further_cases`, by name."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.further_cases", "zoo", modality],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    said = done.stdout
    assert re.search(r"solved (\d+)/(\d+)  wrong 0 ", said), said + done.stderr
    cases = [line for line in said.splitlines() if re.match(r"(solved|silent|unsolved|WRONG|refused)[: ] ", line)]
    if not cases or all("ModuleNotFoundError" in line for line in cases):
        pytest.skip(f"not installed: {'; '.join(re.findall(r'^# (.*)', said, re.M))}")
    cases = [line for line in cases if "ModuleNotFoundError" not in line]
    missed = [line for line in cases if not line.startswith("solved") and not any(name in line for name in OPEN)]
    assert not missed, "\n".join(missed)
