"""Recurrent cells: what a first step of zeros hides, and what joins, cuts up and looks up a step at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.expr import evaluate
from surgery.mapper import find
from surgery.plan import Plan

IN, UNITS, STEPS, VOCAB = 5, 7, 6, 19


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def call(module: nn.Module, x: Any) -> Any:
    return module(x)


def series(seed: int) -> Tensor:
    return torch.randn(3, STEPS, IN, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (3, STEPS), generator=torch.Generator().manual_seed(seed))


def shaken(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    return module.eval()


def plan_of(reference: nn.Module, target: nn.Module, x: Callable[[int], Any]) -> Plan:
    return find(surgery.open(reference.state_dict()), target, surgery.Probe(reference, call, call, x))


def solves(reference: nn.Module, target: nn.Module, x: Callable[[int], Any]) -> Plan:
    """The filled target computes what the reference computes, on inputs that the search did not see."""
    shaken(reference), shaken(target)
    plan = plan_of(reference, target, x)
    assert plan.verdict is None, plan.diagnosis
    state = reference.state_dict()
    made = {r.target: evaluate(r.expr, state.__getitem__) for r in plan.rows if r.expr is not None}
    made |= {r.target: made[r.tied_to] for r in plan.rows if r.tied_to in made}
    target.load_state_dict({**target.state_dict(), **made})
    with torch.no_grad():
        for seed in (1, 2):
            torch.testing.assert_close(target(x(seed)), reference(x(seed)), rtol=1e-4, atol=1e-5)
    return plan


def refuses(reference: nn.Module, target: nn.Module, x: Callable[[int], Any]) -> None:
    plan = plan_of(shaken(reference), shaken(target), x)
    assert plan.verdict == "refuted"


# -- a GRU: two biases that add up for two gates and stay apart for the third ------------------------------------------
class LibraryGRU(nn.Module):
    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.rnn = nn.GRU(IN, UNITS, layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class GRU(nn.Module):
    """As the equations are written; `after`: the reset gate multiplies what the hidden state's product gives."""

    def __init__(self, after: bool = True, start: str = "new") -> None:
        super().__init__()
        self.after, self.start = after, start
        self.Wz, self.Uz = nn.Linear(IN, UNITS), nn.Linear(UNITS, UNITS, bias=False)
        self.Wr, self.Ur = nn.Linear(IN, UNITS), nn.Linear(UNITS, UNITS, bias=False)
        self.Wh, self.Uh = nn.Linear(IN, UNITS), nn.Linear(UNITS, UNITS)

    def forward(self, x: Tensor) -> Tensor:
        h, out = x.new_zeros(len(x), UNITS), []
        if self.start == "like":
            h = torch.zeros_like(self.Wz(x[:, 0]))
        elif self.start == "full":
            h = torch.full((len(x), UNITS), 0.0).to(x)
        for v in x.unbind(1):
            z, r = torch.sigmoid(self.Wz(v) + self.Uz(h)), torch.sigmoid(self.Wr(v) + self.Ur(h))
            n = self.Wh(v) + (r * self.Uh(h) if self.after else self.Uh(r * h))
            h = z * h + (1 - z) * torch.tanh(n)
            out.append(h)
        return torch.stack(out, 1)


@pytest.mark.parametrize("start", ["new", "like", "full"])
def test_a_bias_that_only_a_gate_scales_is_found_at_the_first_step(start: str) -> None:
    plan = solves(LibraryGRU(), GRU(start=start), series)
    by_name = {r.target: str(r.expr) for r in plan.rows}
    assert "rnn.bias_hh_l0" in by_name["Uh.bias"]
    assert "rnn.bias_ih_l0" not in by_name["Uh.bias"]
    assert by_name["Wz.bias"].startswith("add(")


def test_biases_that_one_gate_has_go_into_the_two_of_a_library() -> None:
    solves(GRU(), LibraryGRU(), series)


class JoinedGates(nn.Module):
    """Two gates from one Linear on [x, h] and in one sigmoid; the third from a Linear each."""

    def __init__(self) -> None:
        super().__init__()
        self.zr, self.nx, self.nh = nn.Linear(IN + UNITS, 2 * UNITS), nn.Linear(IN, UNITS), nn.Linear(UNITS, UNITS)

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(len(x), UNITS, dtype=x.dtype), []
        for v in x.unbind(1):
            z, r = self.zr(torch.cat([v, h], -1)).sigmoid().chunk(2, -1)
            n = torch.tanh(self.nx(v) + r * self.nh(h))
            h = n + z * (h - n)
            out.append(h)
        return torch.stack(out, 1)


@pytest.mark.parametrize("pair", [(LibraryGRU, JoinedGates), (JoinedGates, LibraryGRU), (GRU, JoinedGates)])
def test_gates_that_are_joined_on_one_side_only(pair: tuple[type[nn.Module], type[nn.Module]]) -> None:
    solves(pair[0](), pair[1](), series)


class Stacked(nn.Module):
    """Two layers, both moved on at each step, with one bias for each gate and one within the reset gate's reach."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.ModuleList(nn.Linear(n, 3 * UNITS) for n in (IN, UNITS))
        self.U = nn.ModuleList(nn.Linear(UNITS, 3 * UNITS, bias=False) for _ in range(2))
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(UNITS)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h, out = [x.new_zeros(len(x), UNITS)] * 2, []
        for v in x.unbind(1):
            for i in range(2):
                (r, z, n), (ur, uz, un) = self.W[i](v).chunk(3, -1), self.U[i](h[i]).chunk(3, -1)
                r, z = torch.sigmoid(r + ur), torch.sigmoid(z + uz)
                h[i] = v = (1 - z) * torch.tanh(n + r * (un + self.b[i])) + z * h[i]
            out.append(v)
        return torch.stack(out, 1)


def test_two_layers_that_move_on_together() -> None:
    solves(LibraryGRU(layers=2), Stacked(), series)


def test_a_reset_before_the_product_is_another_function() -> None:
    refuses(LibraryGRU(), GRU(after=False), series)


# -- an LSTM: joined inputs, several gates in one sigmoid, a step at a time --------------------------------------------
class WordLM(nn.Module):
    """The classic word language model, tied."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(VOCAB, UNITS), nn.Linear(UNITS, VOCAB)
        self.rnn = nn.LSTM(UNITS, UNITS, layers)
        self.decoder.weight = self.encoder.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.rnn(self.encoder(ids.T))[0]).transpose(0, 1)


class Cell(nn.Module):
    """All gates in one matrix on [h, x] or [x, h]; three of them in one sigmoid. `peep`: a gate sees the state."""

    def __init__(self, i: int, order: str = "hx", peep: bool = False) -> None:
        super().__init__()
        self.gates = nn.Linear(i + UNITS, 4 * UNITS)
        self.order, self.peep = order, peep

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        z = self.gates(torch.cat([h, x] if self.order == "hx" else [x, h], -1))
        i, f, o = torch.sigmoid(z[:, : 3 * UNITS]).chunk(3, -1)
        c = f * c + i * torch.tanh(z[:, 3 * UNITS :])
        return (o + c if self.peep else o) * torch.tanh(c), c


class StepLM(nn.Module):
    """The same, written as a loop over steps; the table is a parameter used both ways."""

    def __init__(self, layers: int = 2, **cell: Any) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(VOCAB))
        self.cells = nn.ModuleList(Cell(UNITS, **cell) for _ in range(layers))
        self.words = nn.Parameter(torch.zeros(VOCAB, UNITS))

    def forward(self, ids: Tensor) -> Tensor:
        start = torch.zeros(len(ids), UNITS).to(self.words)
        state, out = [(start, start)] * len(self.cells), []
        for t in range(ids.shape[1]):
            x = self.words[ids[:, t]]
            for j, cell in enumerate(self.cells):
                state[j] = cell(x, *state[j])
                x = state[j][0]
            out.append(x @ self.words.T + self.bias)
        return torch.stack(out, 1)


@pytest.mark.parametrize("order", ["hx", "xh"])
def test_a_library_lstm_into_cells_on_joined_inputs(order: str) -> None:
    solves(WordLM(), StepLM(order=order), tokens)


def test_cells_on_joined_inputs_into_a_library_lstm() -> None:
    solves(StepLM(), WordLM(), tokens)


def test_cells_joined_one_way_into_cells_joined_the_other() -> None:
    solves(StepLM(order="xh"), StepLM(order="hx"), tokens)


def test_a_cell_whose_gate_sees_its_state_is_refused() -> None:
    refuses(WordLM(1), StepLM(1, peep=True), tokens)


class SeparateGates(nn.Module):
    """A Linear a gate and an input."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.ModuleDict({g: nn.Linear(IN, UNITS) for g in "fgio"})
        self.h = nn.ModuleDict({g: nn.Linear(UNITS, UNITS, bias=g == "o") for g in "fgio"})

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros_like(x[:, 0, :1]).expand(-1, UNITS)
        out = []
        for v in x.unbind(1):
            f, g, i, o = (self.x[k](v) + self.h[k](h) for k in "fgio")
            c = c * f.sigmoid() + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            out.append(h)
        return torch.stack(out, 1)


class JoinedInput(nn.Module):
    """A library's LSTM whose input is itself joined from two."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(IN, UNITS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(torch.cat([x[..., :2], x[..., 2:]], -1))[0]


class LoopedCell(nn.Module):
    """One cell on [x, h], looped."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell(IN, "xh")

    def forward(self, x: Tensor) -> Tensor:
        h, c, out = x.new_zeros(len(x), UNITS), x.new_zeros(len(x), UNITS), []
        for v in x.unbind(1):
            h, c = self.cell(v, h, c)
            out.append(h)
        return torch.stack(out, 1)


@pytest.mark.parametrize(
    "pair",
    [(LoopedCell, JoinedInput), (JoinedInput, LoopedCell), (SeparateGates, JoinedInput), (LoopedCell, SeparateGates)],
    ids=lambda pair: f"{pair[0].__name__}-{pair[1].__name__}",
)
def test_joined_and_separate_inputs_of_one_cell(pair: tuple[type[nn.Module], type[nn.Module]]) -> None:
    solves(pair[0](), pair[1](), series)
