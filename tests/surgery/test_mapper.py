"""From two programs to a plan: small models of one function, spelled differently, end to end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.errors import GraftError
from surgery.expr import evaluate, kind
from surgery.mapper import find
from surgery.memory import info_of
from surgery.plan import Plan, Status

VOCAB, WIDTH, HEADS, FFN, PLACES = 23, 12, 3, 20, 16


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def call(module: nn.Module, x: Any) -> Any:
    return module(x)


def inputs(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(seed))


def vectors(seed: int) -> Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def shaken(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.eval()


def mapped(
    reference: nn.Module,
    target: nn.Module,
    x: Callable[[int], Any],
    *,
    run_target: Callable[[nn.Module, Any], Any] | None = call,
    state: dict[str, Tensor] | None = None,
    **options: Any,
) -> Plan:
    """The plan; checked to account for everything, with the target as it was."""
    source = surgery.open(reference.state_dict() if state is None else state)
    before = {n: t.clone() for n, t in target.state_dict().items()}
    plan = find(source, target, surgery.Probe(reference, call, run_target, x), **options)
    plan.check(source, {n: info_of(t) for n, t in before.items()})
    for name, t in target.state_dict().items():
        assert torch.equal(t, before[name])
    return plan


def filled(plan: Plan, target: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The target with the rows of the plan in place."""
    made = {r.target: evaluate(r.expr, state.__getitem__) for r in plan.rows if r.expr is not None}
    made |= {r.target: made[r.tied_to] for r in plan.rows if r.tied_to in made}
    target.load_state_dict({**target.state_dict(), **made})
    return target.eval()


def solves(plan: Plan, reference: nn.Module, target: nn.Module, x: Callable[[int], Any]) -> None:
    """The filled target computes what the reference computes, on inputs that the search did not see."""
    assert plan.verdict is None, plan.diagnosis
    target = filled(plan, target, reference.state_dict())
    with torch.no_grad():
        for seed in (1, 2):
            torch.testing.assert_close(target(x(seed)), reference(x(seed)), rtol=1e-4, atol=1e-5)


def rows(plan: Plan) -> dict[str, str]:
    return {r.target: str(r.expr) if r.expr is not None else r.status.value for r in plan.rows}


# -- a language model, twice ------------------------------------------------------------------------------------------
class Layer(nn.Module):
    """A pre-norm block with three projections, as most libraries write it."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        q, k, v = (p(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out_proj(y.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.ln_2(x))))


class Library(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.h = nn.ModuleList(Layer() for _ in range(2))
        self.ln_f = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for layer in self.h:
            x = layer(x)
        return F.linear(self.ln_f(x), self.wte.weight)


class Mixed(nn.Module):
    """Own code: one product whose columns lie by head (query, key, value of each), and no names that tell."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH))
        self.a0 = nn.Parameter(torch.randn(3 * WIDTH))
        self.b = nn.Linear(WIDTH, WIDTH)
        self.c, self.d = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)
        self.n, self.m = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        y = (self.n(x) @ self.a + self.a0).view(len(x), t, HEADS, 3, WIDTH // HEADS)
        q, k, v = y.permute(3, 0, 2, 1, 4)
        scores = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -1e9)
        x = x + self.b((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
        return x + self.d(F.gelu(self.c(self.m(x))))


class Own(nn.Module):
    """The head is tied to the token table."""

    def __init__(self, places: int = PLACES) -> None:
        super().__init__()
        self.u = nn.Embedding(VOCAB, WIDTH)
        self.p = nn.Parameter(torch.randn(places, WIDTH))
        self.z = nn.ModuleList(Mixed() for _ in range(2))
        self.e = nn.LayerNorm(WIDTH)
        self.y = nn.Linear(WIDTH, VOCAB, bias=False)
        self.y.weight = self.u.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.u(ids) + self.p[: ids.shape[1]]
        for block in self.z:
            x = block(x)
        return self.y(self.e(x))


def test_a_language_model_in_its_own_spelling() -> None:
    reference, target = shaken(Library()), Own()
    plan = mapped(reference, target, inputs)
    solves(plan, reference, target, inputs)
    found = rows(plan)
    assert found["y.weight"] == "tied"
    assert {r.target: r.tied_to for r in plan.rows if r.status is Status.TIED} == {"y.weight": "u.weight"}
    assert found["u.weight"] == "wte.weight"
    assert found["p"] == "wpe.weight", "the places that no input reached come with the others"
    three = [f"transpose(h.1.{n}_proj.weight)" for n in "qkv"]
    assert found["z.1.a"] == f"interleave({', '.join(three)}, groups={HEADS}, axis=1)"
    assert found["z.0.a0"] == f"interleave(h.0.q_proj.bias, h.0.k_proj.bias, h.0.v_proj.bias, groups={HEADS}, axis=0)"
    assert found["z.1.n.weight"] == "h.1.ln_1.weight"
    assert not plan.dropped
    assert all(kind(r.expr) == "exact" for r in plan.rows if r.expr is not None)
    assert all(r.evidence for r in plan.rows if r.status is Status.FILLED)


def test_a_file_in_other_names_than_the_reference() -> None:
    """What the file holds is what a plan speaks of, whatever the library called it after loading."""
    reference, target = shaken(Library()), Own()
    state = {f"model.{n.replace('h.', 'blocks.')}": t for n, t in reference.state_dict().items()}
    plan = mapped(reference, target, inputs, state=state)
    assert plan.verdict is None, plan.diagnosis
    assert rows(plan)["z.1.m.bias"] == "model.blocks.1.ln_2.bias"


def test_a_target_that_computes_otherwise_is_refuted() -> None:
    target = Own()
    for block in target.z:
        block.m.eps = 1e-2
    plan = mapped(shaken(Library()), target, inputs)
    assert plan.verdict == "refuted"
    assert plan.diagnosis


def test_a_reference_with_other_weights_than_the_file_is_refused() -> None:
    reference = shaken(Library())
    state = {n: t.clone() for n, t in reference.state_dict().items()}
    state["h.0.fc1.weight"] += 1.0
    with pytest.raises(GraftError, match="does not hold: h.0.fc1.weight$"):
        mapped(reference, Own(), inputs, state=state)


def test_what_a_side_raises_names_the_side() -> None:
    def no(_: nn.Module, x: Any) -> Any:
        raise ValueError("bad input")

    reference = shaken(Library())
    source = surgery.open(reference.state_dict())
    with pytest.raises(GraftError, match="the reference failed.*bad input"):
        find(source, Own(), surgery.Probe(reference, no, call, inputs))
    with pytest.raises(GraftError, match="the target failed.*bad input"):
        find(source, Own(), surgery.Probe(reference, call, no, inputs))


# -- an image model, twice --------------------------------------------------------------------------------------------
class Images(nn.Module):
    """Convolutions and batch norms, a class token, a pooled end."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return F.relu(self.bn(self.conv(self.norm(x).transpose(1, 2)))).amax(2)


class OwnImages(nn.Module):
    """Patches by a product, the class token's place in a table of its own, the batch norm folded into a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(48, WIDTH)
        self.first = nn.Parameter(torch.randn(WIDTH))
        self.grid = nn.Parameter(torch.randn(4, WIDTH))
        self.first_place = nn.Parameter(torch.randn(WIDTH))
        self.ln = nn.LayerNorm(WIDTH)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.standard = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        cut = x.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 3, 5, 1)  # rows, columns, in them, channel
        y = self.stem(cut.reshape(len(x), 4, 48)) + self.grid
        first = (self.first + self.first_place).expand(len(x), 1, -1)
        y = self.ln(torch.cat([first, y], 1)).transpose(1, 2)
        return self.standard(self.mix(y)).relu().amax(2)


def images(seed: int) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_an_image_model_in_its_own_spelling() -> None:
    reference, target = shaken(Images()), OwnImages()
    with torch.no_grad():
        reference.bn.running_mean.normal_()
        reference.bn.running_var.uniform_(0.5, 2.0)
    plan = mapped(reference, target, images)
    solves(plan, reference, target, images)
    found = rows(plan)
    assert found["stem.weight"] == "reshape(permute(patch.weight, dims=(0, 2, 3, 1)), shape=(12, 48))"
    assert "slice(" in found["grid"]
    assert found["standard.running_var"] == "bn.running_var"
    assert found["standard.num_batches_tracked"] == "bn.num_batches_tracked", "not read, but beside what is"


# -- control flow that reads values -----------------------------------------------------------------------------------
class Branching(nn.Module):
    """Which branch is taken depends on what the first weights make of the input."""

    def __init__(self, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.names = names
        for n in names:
            setattr(self, n, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, n) for n in self.names)
        y = gate(x)
        if y.mean().item() > 0:
            return up(torch.relu(y))
        return down(torch.tanh(y))


@pytest.mark.parametrize("positive", [True, False])
def test_a_branch_on_a_value(positive: bool) -> None:
    reference, target = shaken(Branching(("gate", "up", "down"))), Branching(("x1", "x2", "x3"))
    with torch.no_grad():
        reference.gate.bias.fill_(2.0 if positive else -2.0).add_(0.1 * torch.randn(WIDTH))
        target.x1.bias.fill_(-2.0 if positive else 2.0)  # its own weights take the other branch
    plan = mapped(reference, target, vectors)
    assert plan.verdict is None, plan.diagnosis
    found = rows(plan)
    assert found["x1.weight"] == "gate.weight"
    assert found["x2.weight" if positive else "x3.weight"] == ("up.weight" if positive else "down.weight")
    assert found["x3.weight" if positive else "x2.weight"] == "new", "the run did not go there"


class Routed(nn.Module):
    """Each row goes to the expert that a router ranks first, by a loop over what tolist() says."""

    def __init__(self, router: str, experts: str) -> None:
        super().__init__()
        self.names = router, experts
        setattr(self, router, nn.Linear(WIDTH, 4, bias=False))
        setattr(self, experts, nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        router, experts = (getattr(self, n) for n in self.names)
        rows = x.flatten(0, 1)
        scores = router(rows).softmax(-1)
        weight, chosen = scores.topk(1)
        out = [weight[i] * experts[k](rows[i]) for i, (k,) in enumerate(chosen.tolist())]
        return torch.stack(out).view_as(x)


def test_experts_chosen_by_their_rank() -> None:
    reference, target = shaken(Routed("router", "experts")), Routed("g", "e")
    plan = mapped(reference, target, lambda seed: 3 * vectors(seed))
    solves(plan, reference, target, lambda seed: 3 * vectors(seed))
    assert rows(plan)["e.2.weight"] == "experts.2.weight"


# -- a fresh head, and no runner --------------------------------------------------------------------------------------
class WithHead(nn.Module):
    """A classifier on an encoder: the reference's output is one of its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Own()
        self.encoder.y = nn.Identity()
        self.classify = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.classify(self.encoder(ids).mean(1))


class Body(Library):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for layer in self.h:
            x = layer(x)
        return self.ln_f(x)


def test_a_new_head_and_no_runner() -> None:
    reference, target = shaken(Body()), WithHead()
    plan = mapped(reference, target, inputs, run_target=None)
    assert plan.verdict is None, plan.diagnosis
    new = {r.target for r in plan.rows if r.status is Status.NEW}
    assert new == {"classify.weight", "classify.bias"}
    target = filled(plan, target, reference.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(target.encoder(inputs(1)), reference(inputs(1)), rtol=1e-4, atol=1e-5)


def test_what_an_earlier_graft_filled_is_kept() -> None:
    reference, target = shaken(Library()), Own()
    with torch.no_grad():
        target.e.load_state_dict(reference.ln_f.state_dict())
    plan = mapped(reference, target, inputs, kept=frozenset({"e.weight", "e.bias"}))
    assert plan.verdict is None, plan.diagnosis
    assert {r.target for r in plan.rows if r.status is Status.KEPT} == {"e.weight", "e.bias"}
    assert {d.source for d in plan.dropped} == {"ln_f.weight", "ln_f.bias"}


# -- what was not reached ---------------------------------------------------------------------------------------------
class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.dense(x)))


def test_what_the_run_did_not_reach_comes_from_where_its_neighbours_come() -> None:
    reference, target = shaken(Pooled()), Pooled()
    plan = mapped(reference, target, vectors)
    solves(plan, reference, target, vectors)
    row = next(r for r in plan.rows if r.target == "pooler.weight")
    assert (str(row.expr), row.status) == ("pooler.weight", Status.FILLED)
    assert "not reached" in row.evidence


def test_what_has_no_namesake_stays_new() -> None:
    class Other(Pooled):
        def __init__(self) -> None:
            super().__init__()
            self.extra = self.pooler
            del self.pooler

    plan = mapped(shaken(Pooled()), Other(), vectors)
    row = next(r for r in plan.rows if r.target == "extra.weight")
    assert row.status is Status.NEW
    assert row.note == "not reached by the part that was run"
    assert {d.source: d.reason for d in plan.dropped}["pooler.weight"] == "not part of what was run"
