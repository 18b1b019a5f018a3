"""Where two large runs part, roughly: what of them has to be held to say it exactly.

Both are run once with nothing held, and paired by what fingerprints tell. Around the first place where they part, as
many values are held in the next run as a bounded memory takes; of a small model or a short input, all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from surgery.mapper.record import Tape, record
from surgery.pairing import Pair, Run
from surgery.proof import GATE
from surgery.running import Side

if TYPE_CHECKING:
    from surgery.judge import Comparison, Judge

ROOM = 1 << 28  # bytes of values that each side may hold


def telling(judge: Judge, found: Comparison) -> int:
    """The input on which it is told where the two part: the worst one; in little memory the worst of the short ones,
    but for the shortest, on which much has no effect."""
    sizes = {at: sum(t.numel() for t in judge.expected[at]) for at in found.apart}
    short = [at for at, size in sizes.items() if found.apart[at] > GATE and 4 * size <= max(sizes.values())]
    short = [at for at in short if sizes[at] > min(sizes.values())] or short
    return max(short, key=found.apart.__getitem__) if judge.blockwise and short else found.worst_input


def held(judge: Judge, at: int, side: Side) -> range | None:
    """In little memory, the numbers of the values to hold of a side's run on an input; None where all are."""
    if not judge.blockwise:
        return None
    if at not in judge.near:
        judge.near[at] = _windows(judge, at)
    return judge.near[at][side.name]


def _windows(judge: Judge, at: int) -> Mapping[str, range]:
    surfaced = judge.probe.run_target is None
    theirs = _printed(judge, judge.reference_side, judge.reference_twin(), at, set(judge.links))
    ours = _printed(judge, judge.target_side, judge.target_twin(new=surfaced), at, set(judge.values))
    run = Run(ours, ours.outputs())
    if surfaced:
        run.barred = ours.depending(set(judge.new))
    pair = Pair(run, Run(theirs, theirs.outputs()))
    if surfaced:
        run.outputs = pair.sinks(run)
    sides = ((judge.target_side, run), (judge.reference_side, pair.theirs))
    return {side.name: _around(each.tape, _first(pair, each)) for side, each in sides}


def _printed(judge: Judge, side: Side, twin: nn.Module, at: int, weights: set[str]) -> Tape:
    """A run of which only fingerprints are left."""
    label, x = judge.inputs[at]
    x = tree_map(lambda t: t.to(judge.device) if isinstance(t, Tensor) else t, x)
    with side.failures(twin, label):
        return record(side.run, twin, x, weights=weights, within=range(0))


def _first(pair: Pair, run: Run) -> int:
    """The number of the first value that the other side has not, and should; the last one where there is none."""
    frontier = pair.frontier(run)
    outs = [o for o in run.tape.nodes[frontier[0]].outs if o >= 0] if frontier else []
    return min(outs, default=len(run.tape.values) - 1)


def _around(tape: Tape, middle: int) -> range:
    """As many values before and after this one as there is room for: twice as many after it."""
    first, end, room = middle, middle + 1, ROOM - _bytes(tape, middle)
    turn = 0
    while first > 0 or end < len(tape.values):
        before = first > 0 and (turn % 3 == 0 or end == len(tape.values))
        room -= _bytes(tape, first - 1 if before else end)
        if room < 0:
            break
        first, end = (first - 1, end) if before else (first, end + 1)
        turn += 1
    return range(first, end)


def _bytes(tape: Tape, vid: int) -> int:
    value = tape.values[vid]
    return 8 * math.prod(value.shape) if value.origin == "node" and value.data else 0
