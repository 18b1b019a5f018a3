"""From a dense MLP to a mixture of experts that begins as the same function.

    dense_to_moe(model, example, "transformer.h.*.mlp", experts=8, top_k=2)

Each expert is a copy of the MLP. The router is random, and as the gate's weights sum to 1 over equal experts, what it
chooses changes nothing: training is what tells the experts apart.

Source: Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055).
"""

from __future__ import annotations

import copy
import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from surgery.body import Reshaped, drift, infos, outputs, plan_of, values_of
from surgery.coupling import coupled
from surgery.errors import SurgeryError
from surgery.expr import Expr, Name, call, evaluate
from surgery.proof import GATE
from surgery.running import own_tensors

STD = 0.02  # of a router's weights, as GPT-2 and BERT draw theirs


class SparseExperts(nn.Module):
    """Experts of which each token, the last axis of the input, is given to `top_k`.

    normalise: the chosen gates are divided by their sum, so that they sum to 1 (as Mixtral does); without, each is its
    share among all experts (as Switch does), and equal experts give less than one of them would.
    """

    def __init__(self, experts: list[nn.Module], width: int, *, top_k: int, normalise: bool = True) -> None:
        super().__init__()
        self.router = nn.Linear(width, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)
        self.top_k, self.normalise = top_k, normalise

    def forward(self, x: Tensor) -> Tensor:
        """Any shape whose last axis is the width; of the experts' output, the same shape."""
        tokens = x.reshape(-1, x.shape[-1])
        gates, chosen = self.router(tokens).softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.normalise:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        out: Tensor | None = None
        for number, expert in enumerate(self.experts):
            share = (gates * (chosen == number)).sum(dim=-1)
            token, *_ = torch.nonzero(share, as_tuple=True)
            made = expert(tokens[token])
            out = made.new_zeros(tokens.shape[0], made.shape[-1]) if out is None else out
            out = out.index_add(0, token, made * share[token].unsqueeze(-1))
        assert out is not None
        return out.reshape(*x.shape[:-1], out.shape[-1])


def dense_to_moe(
    model: nn.Module,
    example: Any,
    where: str,
    *,
    experts: int,
    top_k: int = 2,
    normalise: bool = True,
    seed: int = 0,
) -> Reshaped:
    """Every module that `where` names (with * for any text) as SparseExperts whose experts are copies of it. Preserving
    where the gates sum to 1 (`normalise`), confirmed by running; approximate else.

    The routers' rows are synthesised: drawn from a normal distribution with a deviation of 0.02, each by a seed of its
    own, from `seed` on. What equal experts are given changes nothing, so any router is right until they are trained.
    SurgeryError where no module is meant, or one works on more than single tokens of its last axis.
    """
    if seed < 0:
        raise SurgeryError(f"seed={seed} is no seed", hint="Choose 0 or more.")
    if not 1 <= top_k <= experts:
        raise SurgeryError(f"top_k={top_k} of {experts} experts cannot be", hint="Choose 1 to all of them.")
    coupling = coupled(model, example)
    paths = [p for p, _ in model.named_modules() if p and fnmatch.fnmatchcase(p, where)]
    paths = [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]
    if not paths:
        raise SurgeryError(f"the model has no module {where}", hint="Print the model to see its modules.")
    widths = _widths(coupling.run, model, coupling.x, paths)
    module = copy.deepcopy(model)
    rows: dict[str, Expr] = {name: Name(name) for name in own_tensors(model)}
    routers: dict[str, Expr] = {}
    for number, path in enumerate(paths):
        dense = module.get_submodule(path)
        like = next((p for p in dense.parameters()), torch.zeros(()))
        sparse = SparseExperts(
            [copy.deepcopy(dense) for _ in range(experts)], widths[path], top_k=top_k, normalise=normalise
        ).to(device=like.device, dtype=like.dtype)
        drawn = call("normal", shape=tuple(sparse.router.weight.shape), std=STD, seed=seed + number)
        with torch.no_grad():
            sparse.router.weight.copy_(evaluate(drawn, model.get_parameter))
        routers[f"{path}.router.weight"] = drawn
        owner, _, local = path.rpartition(".")
        module.get_submodule(owner)._modules[local] = sparse.train(dense.training)
        for name in [name for name in rows if name.startswith(f"{path}.")]:
            row, rest = rows.pop(name), name.removeprefix(f"{path}.")
            rows |= {f"{path}.experts.{expert}.{rest}": row for expert in range(experts)}
    source = infos({name: t.detach() for name, t in own_tensors(model).items()})
    plan = plan_of(source, {**rows, **routers}, ties=coupling.ties(), description=type(model).__name__)
    try:
        got = outputs(coupling, module, values_of(plan, model))
    except Exception as error:  # the person's own modules, given tokens one by one: any error means they cannot be
        raise SurgeryError(
            f"{where} does not work on single tokens: {error}",
            hint="Name MLPs that work on each token of the last axis alone.",
        ) from error
    moved = drift(outputs(coupling, model), got)
    if normalise and (moved is None or moved > GATE):
        raise SurgeryError(
            f"{where}: the outputs move by {moved}, so what it computes for a token depends on other tokens",
            hint="Name MLPs that work on each token of the last axis alone.",
        )
    count = f"{len(routers)} router{'s' * (len(routers) > 1)} of {experts} experts"
    notes = (f"{count} drawn with a deviation of {STD} by seed {seed} and on; each expert is a copy of the MLP",)
    return Reshaped(plan, module, "preserving" if normalise else "approximate", moved, notes=notes)


def _widths(run: Any, model: nn.Module, x: Any, paths: list[str]) -> dict[str, int]:
    """The last axis of what each module is given."""
    found: dict[str, int] = {}

    def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        count = len(args) + len(kwargs)
        if count != 1 or not args or not isinstance(args[0], Tensor):
            what = f"{count} arguments" if count != 1 else "what is no tensor"
            raise SurgeryError(f"{path} takes {what}", hint="Name modules that take one tensor.")
        found[path] = int(args[0].shape[-1])

    probe = copy.deepcopy(model).eval()
    for path in paths:
        probe.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, kwargs, path=path: note(path, args, kwargs), with_kwargs=True
        )
    with torch.no_grad():
        run(probe, x)
    missing = [path for path in paths if path not in found]
    if missing:
        raise SurgeryError(f"{missing[0]} does not run on the example", hint="Name modules that do.")
    return found
