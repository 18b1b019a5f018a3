"""What is public, what an import costs, and who imports whom."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import surgery

HEAVY = ("torch", "transformers", "tokenizers", "huggingface_hub", "numpy", "safetensors", "timm", "open_clip", "scipy")

SURGERY = {
    "Checkpoint",
    "CheckpointError",
    "Format",
    "GraftError",
    "Plan",
    "PlanError",
    "Probe",
    "Report",
    "Reshaped",
    "SurgeryError",
    "TensorInfo",
    "Verdict",
    "clone_width",
    "coupled",
    "dense_to_moe",
    "graft",
    "insert_identity_blocks",
    "insert_identity_convolutions",
    "mha_to_gqa",
    "open",
    "plan",
    "prune_heads",
    "register",
    "rules",
    "select_layers",
    "shrink_width",
    "stack_layers",
    "verify",
    "widen",
    "write",
}


def sources(root: Path) -> Iterator[Path]:
    for package in ("surgery", "zoo", "plugins"):
        yield from sorted((root / package).rglob("*.py"))


def test_public_names_of_surgery() -> None:
    """Others build on these. Adding one is a decision that this test records; taking one away breaks somebody."""
    assert set(surgery.__all__) == SURGERY
    assert set(dir(surgery)) >= SURGERY
    for name in SURGERY:
        assert getattr(surgery, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        surgery.nothing_of_this_name  # noqa: B018


def test_functions_outlive_modules_of_their_name() -> None:
    """surgery.plan is the function; importing the file surgery/plan.py must not put the module in its place."""
    importlib.import_module("surgery.plan")
    importlib.import_module("surgery.graft")
    importlib.import_module("surgery.write")
    for name in ("plan", "graft", "verify", "write", "open", "register"):
        assert callable(getattr(surgery, name)), name


def test_the_exception_tree() -> None:
    for error in (surgery.CheckpointError, surgery.PlanError, surgery.GraftError):
        assert issubclass(error, surgery.SurgeryError)


@pytest.mark.parametrize(
    "code",
    [
        "import surgery",
        "import surgery.errors",
        "import surgery.expr, surgery.ops",
        "import surgery.plan",
        "import zoo",
        "import zoo_text",
    ],
)
def test_imports_stay_cold(code: str) -> None:
    """Commands that load no weights import no library that can; a fresh interpreter is the only honest witness."""
    report = f"{code}; import sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_entry_points() -> None:
    """The first-party plugin is found the way anybody's is."""
    installed = metadata.distribution("weightzoo").entry_points
    assert [point.value for point in installed.select(group="zoo", name="text")] == ["zoo_text"]
    (script,) = installed.select(group="console_scripts", name="zoo")
    assert callable(script.load())


def test_import_directions(root: Path) -> None:
    """The contracts stand in pyproject.toml: surgery alone, zoo without plugins, plugins on public names only."""
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_test_folder_hides_a_package(root: Path) -> None:
    """With an __init__.py, tests/zoo could be imported in place of zoo."""
    found = {path.parent.name for path in (root / "tests").glob("*/__init__.py")}
    assert found <= {"further_cases", "mutations", "graft_matrix"}  # packages of their own names


def test_the_law_of_accounting_has_no_way_around(root: Path) -> None:
    """Partial loading is said tensor by tensor, never by a switch that ignores what does not fit."""
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                lax = [k for k in node.keywords if k.arg == "strict" and not getattr(k.value, "value", True)]
                assert node.func.attr != "load_state_dict" or not lax, f"{path}:{node.lineno}"


def test_files_stay_readable(root: Path) -> None:
    """A file that outgrows this holds more than one subject."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(root)}
    assert {path.relative_to(root).as_posix(): n for path, n in lengths.items() if n > 600} == {}
