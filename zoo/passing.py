"""Passes that are asked for on the command line, and whether those that are required were run and passed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from zoo.errors import ZooError

if TYPE_CHECKING:
    from surgery.proof import PassResult, Proof


def wanted(on: tuple[str, ...], required: tuple[str, ...], compiled: bool, *, machine: bool) -> tuple[str, ...]:
    """The passes to run: those that were asked for, or (`machine`) else all of this machine; those that are required;
    and those through torch.compile. SurgeryError for one that is none, ZooError where there is nothing to compile."""
    if not (on or required or compiled or machine):
        return ()
    from surgery import passes

    found = dict.fromkeys(on or (passes.of_machine() if machine else ()))
    for name in found:
        passes.parse(name)
    for name in required:
        if not any(answers(each, name) for each in found):
            found.update(dict.fromkeys([name] if "/" in name else passes.of_device(name)))
        if "/" in name:
            passes.parse(name)
    if compiled:
        plain = [n for n in found if passes.COMPILE not in n and not n.endswith("/float64")]
        if not plain:
            raise ZooError(
                "--compile: the float64 proof runs operator by operator, and no other pass was asked for",
                hint="add one, as in --on cpu/float32",
            )
        found.update(dict.fromkeys(name + passes.COMPILE for name in plain))
    return tuple(found)


def answers(name: str, required: str) -> bool:
    """Is this pass one of those required? "cuda" asks for every pass on it, "cuda/bfloat16" for that one."""
    device = name.partition("/")[0]
    return required in (name, device, device.partition(":")[0])


def unmet(proof: Proof, required: tuple[str, ...]) -> Iterator[str]:
    for name in required:
        for each in proof.passes:
            if answers(each.name, name) and each.status != "passed":
                yield f"{name} is required, and {each.name} {_outcome(each)}"


def _outcome(each: PassResult) -> str:
    return f"was not run: {each.why}" if each.status == "not run" else f"{each.status}: {each.why}"
