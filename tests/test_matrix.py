"""The graft matrix: real implementations into others, unaided. Every case solved, none claimed and wrong.

The cases are data of their own (tests/graft_matrix, see its README); a modality whose libraries are not installed is
skipped by name.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NEEDS = {
    "text": ("transformers", "curated_transformers", "pytorch_pretrained_bert"),
    "vision": ("transformers", "timm", "torchvision"),
    "clip": ("transformers", "timm", "torchvision", "open_clip", "clip"),
    "audio": ("transformers", "whisper", "torchaudio"),
    "timeseries": ("neuralforecast",),
}


def _run(what: str, modality: str) -> tuple[int, int, int, str]:
    """(solved, cases, wrong, all that was printed)."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "graft_matrix", what, modality],
        cwd=HERE, env=env, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    told = re.search(r"solved (\d+)/(\d+)  wrong (\d+)", done.stdout)
    assert told, done.stdout + done.stderr
    return int(told[1]), int(told[2]), int(told[3]), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("modality", NEEDS)
def test_every_case_is_solved_and_none_is_wrong(modality: str) -> None:
    missing = [m for m in NEEDS[modality] if importlib.util.find_spec(m) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    solved, cases, wrong, said = _run("zoo", modality)
    assert wrong == 0, said
    assert solved == cases > 0, said


@pytest.mark.slow
@pytest.mark.parametrize("modality", NEEDS)
def test_names_alone_are_never_wrong(modality: str) -> None:
    missing = [m for m in NEEDS[modality] if importlib.util.find_spec(m) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    _, _, wrong, said = _run("zoo-static", modality)
    assert wrong == 0, said
