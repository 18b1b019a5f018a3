"""Passes on a device and in a type: what they record, when they are not run, and one code for every device."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import passes
from surgery.proof import PassResult, Proof
from tests import pairs

BOTH = pytest.mark.parametrize("surface", [False, True], ids=["returned", "surface"])
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return pairs.bert()


def prove(reference: nn.Module, target: nn.Module, *names: str, surface: bool = False, **changes: Any) -> Proof:
    source = reference.state_dict()
    blockwise = changes.pop("blockwise", None)
    return surgery.verify(
        source,
        target,
        pairs.plan(source, target),
        probe=pairs.probe(reference, surface=surface, **changes),
        passes=names,
        blockwise=blockwise,
    )


def only(proof: Proof, name: str) -> PassResult:
    (found,) = (each for each in proof.passes if each.name == name)
    return found


# -- names ------------------------------------------------------------------------------------------------------------
def test_the_passes_of_this_machine() -> None:
    found = passes.of_machine()
    assert found[:3] == ("cpu/float64", "cpu/float32", "cpu/bfloat16")
    assert any(name.startswith("cuda") for name in found) == torch.cuda.is_available()
    assert all(passes.unavailable(passes.parse(name)) == "" for name in found)
    assert passes.of_device("cuda:1") == ("cuda:1/float32", "cuda:1/bfloat16", "cuda:1/float16")


@pytest.mark.parametrize("name", ["float32", "cpu/float31", "quantum/float32", "cpu/float64+compile", "cpu/float32+x"])
def test_what_is_no_pass(name: str) -> None:
    with pytest.raises(surgery.SurgeryError):
        passes.parse(name)


# -- what is recorded -------------------------------------------------------------------------------------------------
@BOTH
def test_a_pass_says_how_it_ran(bert: nn.Module, surface: bool) -> None:
    proof = prove(bert, pairs.Encoder(), "cpu/float32", surface=surface)
    ran = only(proof, "cpu/float32").details
    assert (ran["tf32"], ran["deterministic"], ran["compile"]) == (False, False, None)
    assert ran["sdpa"] == {"reference": ["flash_for_cpu"], "target": ["flash_for_cpu"]}
    assert {"flash", "math"} <= set(ran["sdpa_enabled"])
    assert ran["torch"] == torch.__version__
    assert ran["seconds"] >= ran["seconds_forward"]["reference"] + ran["seconds_forward"]["target"] > 0
    assert ran["norm"].startswith("max |")
    assert ran["factor"], ran["floor"] == (passes.FACTOR, passes.FLOOR)
    first = proof.passes[0].details
    assert first["seconds"] > 0
    assert first["blockwise"] is False
    json.dumps(proof.as_dict(), allow_nan=False)


def test_settings_are_read_and_left_as_they_are(bert: nn.Module) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            ran = only(prove(bert, pairs.Encoder(), "cpu/float32"), "cpu/float32").details
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert ran["deterministic"] is True
    assert (ran["sdpa_enabled"], ran["sdpa"]["target"]) == (["math"], ["math"])


MARK = """
import torch
from surgery import machine
before = torch.ones(8 << 20)
with machine.Peak(torch.device("cpu")) as peak:
    inside = torch.ones(16 << 20)
    del inside
print(peak.bytes, peak.how.split(",")[0], sep="|")
"""


def test_the_highest_mark_of_memory() -> None:
    """More than what was held at once inside, and nothing of what was held before. In a process of its own: one that
    has let memory go takes it again without growing."""
    done = subprocess.run([sys.executable, "-c", MARK], capture_output=True, text=True, check=True)
    held, _, how = done.stdout.strip().partition("|")
    if held == "None":
        pytest.skip("this system does not say what a process holds")
    assert how.startswith("resident set")
    assert (60 << 20) < int(held) < (120 << 20)


# -- not run ----------------------------------------------------------------------------------------------------------
class Low(nn.Module):
    """Runs in float32 and above only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x if x.dtype == torch.float64 else x.float())


def linear(target: nn.Module, *names: str, **changes: Any) -> Proof:
    torch.manual_seed(0)
    reference = nn.Sequential()
    reference.add_module("linear", nn.Linear(8, 8))
    source = reference.state_dict()
    probe = surgery.Probe(
        reference,
        changes.get("run_reference", lambda m, x: m(x)),
        lambda m, x: m(x),
        lambda seed: torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)),
    )
    plan = pairs.plan_of(source, target, {name: name for name in source})
    return surgery.verify(source, target, plan, probe=probe, passes=names)


def test_a_side_that_cannot_be_run_so_is_not_run() -> None:
    proof = linear(Low(), "cpu/float32", "cpu/bfloat16")
    assert only(proof, "cpu/float32").status == "passed"
    missing = only(proof, "cpu/bfloat16")
    assert missing.status == "not run"
    assert "the target could not be run on seed 1 in linear: RuntimeError" in missing.why
    assert proof.verdict == "proven"


def test_a_reference_that_overflows_is_nothing_to_compare_with() -> None:
    def large(module: nn.Module, x: Tensor) -> Tensor:
        return module(x) * 1e6

    class Large(Low):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * 1e6

    proof = linear(Large(), "cpu/float16", run_reference=large)
    missing = only(proof, "cpu/float16")
    assert missing.status == "not run"
    assert "the reference itself gives no finite output" in missing.why
    json.dumps(proof.as_dict(), allow_nan=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device(bert: nn.Module) -> None:
    proof = prove(bert, pairs.Encoder(), "cuda/bfloat16", "cuda/float32+compile", "cuda/float64")
    assert [(p.status, p.why) for p in proof.passes[1:]] == [("not run", "no CUDA device")] * 3


def test_a_backend_that_is_not_there(bert: nn.Module) -> None:
    missing = prove(bert, pairs.Encoder(), "cpu/float32+compile:nobodys").passes[1]
    assert (missing.status, missing.why) == ("not run", "torch.compile has no backend nobodys")


def test_without_a_compiler(bert: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.cpp_builder as builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(builder, "get_cpp_compiler", none)
    missing = prove(bert, pairs.Encoder(), "cpu/float32+compile").passes[1]
    assert missing.status == "not run"
    assert "needs a C++ compiler" in missing.why


# -- torch.compile ----------------------------------------------------------------------------------------------------
@BOTH
def test_both_sides_compiled(bert: nn.Module, surface: bool) -> None:
    name = "cpu/float32+compile:aot_eager"
    found = only(prove(bert, pairs.Encoder(), name, surface=surface), name)
    assert found.status == "passed", found.why
    assert found.details["compile"]["backend"] == "aot_eager"
    assert min(found.details["compile"]["graphs"].values()) > 0
    assert found.details["compile"]["graph_breaks"] == {"reference": 0, "target": 0}


def test_what_does_not_compile_says_why() -> None:
    class Unruly(Low):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling():
                raise ZeroDivisionError("not when compiled")
            return self.linear(x)

    missing = only(linear(Unruly(), "cpu/float32+compile:eager"), "cpu/float32+compile:eager")
    assert missing.status == "not run"
    assert missing.why.startswith("torch.compile")
    assert "the target" in missing.why


def test_a_compiler_that_fails_says_why(bert: nn.Module) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise ZeroDivisionError("no code today")

    torch._dynamo.register_backend(broken, name="broken")
    missing = only(prove(bert, pairs.Encoder(), "cpu/float32+compile:broken"), "cpu/float32+compile:broken")
    assert missing.status == "not run"
    assert missing.why.startswith("torch.compile (broken) of the reference failed on seed 1: ")


# -- the same functions, on another device ----------------------------------------------------------------------------
def test_a_numbered_device(bert: nn.Module) -> None:
    """What "cuda:0" goes through, on a CPU: the device of a pass is not the one that the proof runs on."""
    found = only(prove(bert, pairs.Encoder(), "cpu:0/bfloat16", surface=True), "cpu:0/bfloat16")
    assert found.status == "passed"


@GPU
@BOTH
@pytest.mark.parametrize("name", ["cuda/float64", "cuda/float32", "cuda/bfloat16", "cuda/float16"])
def test_on_a_gpu(bert: nn.Module, name: str, surface: bool) -> None:
    found = only(prove(bert, pairs.Encoder(), name, surface=surface), name)
    assert found.status == "passed", found.why
    assert found.details["peak_bytes"] > 0


@GPU
def test_tf32_on_a_gpu_is_recorded(bert: nn.Module) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        found = only(prove(bert, pairs.Encoder(), "cuda/float32"), "cuda/float32")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert (found.status, found.details["tf32"]) == ("passed", True)
