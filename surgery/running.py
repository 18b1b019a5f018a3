"""Both sides, run on one input: the reference as it is, the target with a plan's values in place of its own.

Nothing here writes to a person's module: what runs is a twin or a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

from surgery import twin
from surgery.checkpoint import Checkpoint
from surgery.errors import GraftError, SurgeryError
from surgery.expr import evaluate_unrounded, names
from surgery.plan import Plan, Status
from surgery.probe import Probe

MADE = (Status.FILLED, Status.SYNTHESISED)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a module's state dict holds, by name, tied tensors under every name; the tensors themselves."""
    return {name: t for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that no state dict holds."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def unrounded(
    plan: Plan, source: Checkpoint, held: Mapping[str, Tensor] | None = None, *, on_use: bool = False
) -> dict[str, Tensor]:
    """The values of a plan's rows. Relayouts stay in the source's type, where they are exact; arithmetic is in
    float64. `held`: tensors of the source that are in memory already. `on_use`: a value that is no view of the source
    is not held, but made anew whenever an operation consumes it."""

    def read(name: str) -> Tensor:
        return held[name] if held is not None and name in held else source.read(name)

    values: dict[str, Tensor] = {}
    for row in plan.rows:
        if row.expr is not None:
            value = evaluate_unrounded(row.expr, read, twin.lift)
            if on_use and not _shares(value, [read(name) for name in names(row.expr)]):
                make = partial(evaluate_unrounded, row.expr, read, twin.lift)
                value = twin.Made(make, value, value.device)
            values[row.target] = value
    for row in plan.rows:
        if row.tied_to is not None and row.tied_to in values:
            values[row.target] = values[row.tied_to]
    return values


def _shares(value: Tensor, others: Iterable[Tensor]) -> bool:
    """Does it lie in the memory of one of these?"""
    at = value.untyped_storage().data_ptr()
    return any(t.untyped_storage().data_ptr() == at for t in others)


def perturbed(t: Tensor, seed: int) -> Tensor:
    """Other values of the same kind: of the same sign and size, so that a variance stays one. Reproducible."""
    g = torch.Generator().manual_seed(seed)
    x = torch.zeros(t.shape, dtype=torch.float64) if t.is_meta else t.detach().to("cpu", torch.float64)
    noise = torch.rand(t.shape, generator=g, dtype=torch.float64)
    return x * (1 + 0.3 * noise) + 0.1 * torch.where(x < 0, -noise, noise)


def build(
    module: nn.Module,
    values: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None = None,
    also: Mapping[int, Tensor] | None = None,
) -> nn.Module:
    """A copy in eval mode on `device`: a float64 twin where dtype is None, else a plain copy in that type. `values` by
    name and `also` by id stand in place of the module's own tensors."""
    own = all_tensors(module)
    put = {id(own[name]): value for name, value in values.items() if name in own} | dict(also or {})
    called = {id(t): name for name, t in own.items()}

    def replace(t: Tensor) -> Tensor:
        value = put.get(id(t), t).detach()
        if value.is_meta:
            raise GraftError(
                f"{called.get(id(t), 'a tensor')} is on the meta device and no row fills it: nothing can be run",
                hint="Build the target on the CPU, or give this tensor values first.",
            )
        value = value.to(device)
        written = not isinstance(t, nn.Parameter)  # by a forward pass: then the copy has one of its own
        if dtype is None:
            return twin.lifted_tensor(value, written=written)
        return twin.formed(value).to(dtype if value.is_floating_point() else value.dtype, copy=written)

    try:
        return twin.clone(module, replace)
    except SurgeryError:
        raise
    except Exception as error:
        raise GraftError(
            f"{type(module).__name__} cannot be copied, to run a twin of it: {type(error).__name__}: {error}",
            hint="A module must be copyable by copy.deepcopy; keep locks, files and generators out of it.",
        ) from error


@dataclass
class Call:
    """One call of one module of a copy: what went in, what came out."""

    module: str
    given: list[Tensor]
    out: list[Tensor] = field(default_factory=list)


@contextmanager
def watched(
    module: nn.Module,
    calls: list[Call] | None,
    stack: list[str],
    wanted: Callable[[Tensor], bool] | None = None,
) -> Iterator[None]:
    """While a copy runs: the path of the module that is running is on top of `stack` (and stays there after an
    exception); finished calls are appended to `calls`, in order of completion. Tensors that are not `wanted` are not
    held, and stand there empty."""
    open_calls: list[Call] = []
    handles = []

    def held(x: Any) -> list[Tensor]:
        with _disable_current_modes():  # a recorder must not see the copies
            found = (t for t in tree_iter(x) if isinstance(t, Tensor) and not isinstance(t, twin.Lifted))
            return [t.detach().clone() if wanted is None or wanted(t) else t.new_empty(0) for t in found]

    def enter(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            stack.append(name)
            if calls is not None:
                open_calls.append(Call(name, held((args, kwargs))))

        return hook

    def leave(_module: nn.Module, _args: Any, out: Any) -> None:
        stack.pop()
        if calls is not None:
            done = open_calls.pop()
            done.out = held(out)
            calls.append(done)

    for name, m in module.named_modules():
        handles.append(m.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(m.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Side:
    """One side of a probe."""

    name: str  # "reference" or "target", for messages
    run: Callable[[nn.Module, Any], Any]

    @classmethod
    def reference(cls, probe: Probe) -> Side:
        return cls("reference", probe.run_reference)

    @classmethod
    def target(cls, probe: Probe) -> Side:
        return cls("target", probe.call_target)

    def outputs(
        self, module: nn.Module, x: Any, label: str, *, calls: list[Call] | None = None, exact: bool = True
    ) -> list[Tensor]:
        """The tensors that the side returns for x. `exact`: the module is a float64 twin; else a plain copy."""
        device = next((t.device for t in all_tensors(module).values()), torch.device("cpu"))
        x = tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, x)
        with self.failures(module, label, calls):
            out = twin.run(self.run, module, x) if exact else self.run(module, x)
        return self.tensors(out)

    @contextmanager
    def failures(
        self,
        module: nn.Module,
        label: str,
        calls: list[Call] | None = None,
        wanted: Callable[[Tensor], bool] | None = None,
    ) -> Iterator[None]:
        """What the side raises becomes an error for the person, with the module where it happened."""
        stack: list[str] = []
        try:
            with watched(module, calls, stack, wanted):
                yield
        except Exception as error:
            where = f" in {stack[-1]}" if stack and stack[-1] else ""
            raise GraftError(
                f"the {self.name} could not be run on {label}{where}: {type(error).__name__}: {error}",
                hint=f"Run the {self.name} on this input by itself, in eval mode, and correct the probe or the module.",
            ) from error

    def tensors(self, out: Any) -> list[Tensor]:
        """The tensors in what a runner returned, in order."""
        found = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        if not found:
            raise GraftError(
                f"running the {self.name} returned {type(out).__name__}, which holds no tensor",
                hint=f"Let run_{self.name} return a Tensor or a tuple of Tensors.",
            )
        return [twin.lift(t).detach() for t in found]
