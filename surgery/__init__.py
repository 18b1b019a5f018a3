"""The engine: reads checkpoints, plans, reshapes, applies and proves.

    report = surgery.graft("theirs.safetensors", mine, probe=probe)
    report.verdict                        # proven, adapted, consistent; or a GraftError that says why not

Importing it imports no torch: names are resolved on first use.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery import rules as rules
    from surgery.body import Reshaped as Reshaped
    from surgery.checkpoint import Checkpoint as Checkpoint
    from surgery.checkpoint import TensorInfo as TensorInfo
    from surgery.checkpoint import open as open
    from surgery.coupling import coupled as coupled
    from surgery.depth import insert_identity_blocks as insert_identity_blocks
    from surgery.depth import insert_identity_convolutions as insert_identity_convolutions
    from surgery.depth import select_layers as select_layers
    from surgery.depth import stack_layers as stack_layers
    from surgery.errors import CheckpointError as CheckpointError
    from surgery.errors import GraftError as GraftError
    from surgery.errors import PlanError as PlanError
    from surgery.errors import SurgeryError as SurgeryError
    from surgery.experts import dense_to_moe as dense_to_moe
    from surgery.formats import Format as Format
    from surgery.formats import register as register
    from surgery.graft import graft as graft
    from surgery.graft import plan as plan
    from surgery.graft import verify as verify
    from surgery.grouped_heads import mha_to_gqa as mha_to_gqa
    from surgery.plan import Plan as Plan
    from surgery.probe import Probe as Probe
    from surgery.report import Report as Report
    from surgery.report import Verdict as Verdict
    from surgery.widths import clone_width as clone_width
    from surgery.widths import prune_heads as prune_heads
    from surgery.widths import shrink_width as shrink_width
    from surgery.widths import widen as widen
    from surgery.write import write as write

_HOME = {
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "Format": "formats",
    "GraftError": "errors",
    "Plan": "plan",
    "PlanError": "errors",
    "Probe": "probe",
    "Report": "report",
    "Reshaped": "body",
    "SurgeryError": "errors",
    "TensorInfo": "checkpoint",
    "Verdict": "report",
    "clone_width": "widths",
    "coupled": "coupling",
    "dense_to_moe": "experts",
    "graft": "graft",
    "insert_identity_blocks": "depth",
    "insert_identity_convolutions": "depth",
    "mha_to_gqa": "grouped_heads",
    "open": "checkpoint",
    "plan": "graft",
    "prune_heads": "widths",
    "register": "formats",
    "select_layers": "depth",
    "shrink_width": "widths",
    "stack_layers": "depth",
    "verify": "graft",
    "widen": "widths",
    "write": "write",
}

__all__ = [
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
]


def __getattr__(name: str) -> Any:
    if name == "rules":
        return importlib.import_module("surgery.rules")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """surgery.plan, surgery.graft and surgery.write are functions. The import system would put the files of these
    names in their place as soon as one is imported; the files stay reachable by `from surgery.plan import ...`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
