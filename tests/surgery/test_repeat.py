"""Repeated blocks: the first is searched for, the others follow from it, and only where what they compute agrees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import twin
from surgery.errors import GraftError
from surgery.mapper import hypothesis
from surgery.mapper.grid import Grid
from surgery.mapper.hypothesis import Hypothesis
from surgery.mapper.record import Tape, record
from surgery.mapper.reference import Reference
from surgery.mapper.repeat import Recipe, moved_on, numbers, pattern, recipe, renumbered
from surgery.mapper.search import Search
from surgery.mapper.unify import Assignment

WIDTH, WIDE = 8, 12


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def call(module: nn.Module, x: Any) -> Any:
    return module(x)


def inputs(seed: int) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed))


def shaken(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module.eval()


# -- one network, written twice ---------------------------------------------------------------------------------------
class Layer(nn.Module):
    """The reference's block."""

    def __init__(self, first: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, WIDE)
        self.down = nn.Linear(WIDE, WIDTH)
        self.act = first

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Theirs(nn.Module):
    """Blocks in the order in which they run, or registered the other way round."""

    def __init__(self, n: int, order: list[int] | None = None, acts: list[Any] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer((acts or [nn.GELU()] * n)[i]) for i in range(n))
        self.order = order or list(range(n))
        self.norm_f = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for i in self.order:
            x = self.layers[i](x)
        return self.norm_f(x)


class Block(nn.Module):
    """The target's: weights lie (in, out), and all have names of their own."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(WIDTH, WIDE))
        self.b1 = nn.Parameter(torch.randn(WIDE))
        self.w2 = nn.Parameter(torch.randn(WIDE, WIDTH))
        self.b2 = nn.Parameter(torch.randn(WIDTH))
        self.gain = nn.Parameter(torch.randn(WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.layer_norm(x, (WIDTH,), self.gain, self.bias)
        return x + self.act(y @ self.w1 + self.b1) @ self.w2 + self.b2


class Own(nn.Module):
    def __init__(self, n: int, acts: list[Any] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block((acts or [nn.GELU()] * n)[i]) for i in range(n))
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def graft(theirs: nn.Module, own: nn.Module) -> surgery.Report:
    return surgery.graft(theirs.state_dict(), own, probe=surgery.Probe(theirs, call, call, inputs))


def agree(theirs: nn.Module, own: nn.Module) -> bool:
    with torch.no_grad():
        return all(
            torch.allclose(own.eval()(inputs(seed)), theirs(inputs(seed)), rtol=1e-4, atol=1e-5) for seed in (11, 12)
        )


def check(theirs: Theirs, own: Own) -> None:
    """Proven, computes the same, and every block has the weights of the block that runs in its place."""
    assert graft(theirs, own).verdict == "proven"
    assert agree(theirs, own)
    for block, i in zip(own.blocks, theirs.order, strict=True):
        layer = theirs.layers[i]
        for mine, its in (
            (block.w1, layer.up.weight.t()),
            (block.b1, layer.up.bias),
            (block.w2, layer.down.weight.t()),
            (block.b2, layer.down.bias),
            (block.gain, layer.norm.weight),
            (block.bias, layer.norm.bias),
        ):
            assert torch.equal(mine, its)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The values that were searched for."""
    calls: list[int] = []
    plain = Search._candidates

    def counted(self: Search, h: Hypothesis, vid: int) -> Any:
        calls.append(vid)
        return plain(self, h, vid)

    monkeypatch.setattr(Search, "_candidates", counted)
    return calls


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_stack_of_blocks(n: int) -> None:
    check(shaken(Theirs(n)), Own(n))


def test_only_the_first_blocks_are_searched_for(searched: list[int]) -> None:
    counts = []
    for n in (1, 4, 8):
        searched.clear()
        check(shaken(Theirs(n)), Own(n))
        counts.append(len(searched))
    one, four, eight = counts
    assert 0 < one <= four
    assert eight == four
    assert eight < 8 * one


def test_the_same_without_recipes(searched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of every block finds what the recipes find; it only takes more."""
    theirs = shaken(Theirs(4))
    check(theirs, Own(4))
    quick = len(searched)
    searched.clear()
    monkeypatch.setattr("surgery.mapper.search.recipe", lambda *_, **__: None)
    check(theirs, Own(4))
    assert len(searched) > quick


# -- blocks that do not follow the first ------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [0, 1, 3, 2, 4], [2, 0, 4, 1, 3]])
def test_blocks_that_run_in_another_order(order: list[int]) -> None:
    check(shaken(Theirs(5, order)), Own(5))


def test_a_block_with_another_activation() -> None:
    acts = [nn.GELU(), nn.GELU(), nn.Tanh(), nn.GELU(), nn.GELU()]
    check(shaken(Theirs(5, acts=acts)), Own(5, acts))


def test_a_block_with_another_activation_than_the_reference() -> None:
    """No weights make it compute the same: it must not be called proven."""
    theirs, own = shaken(Theirs(5)), Own(5, [nn.GELU(), nn.GELU(), nn.Tanh(), nn.GELU(), nn.GELU()])
    before = {n: t.clone() for n, t in own.state_dict().items()}
    with pytest.raises(GraftError):
        graft(theirs, own)
    assert all(torch.equal(t, before[n]) for n, t in own.state_dict().items())


def test_equal_blocks() -> None:
    """Blocks of the same values: whichever is taken, it computes the same."""
    theirs, own = shaken(Theirs(4)), Own(4)
    for layer in list(theirs.layers)[1:]:
        layer.load_state_dict(theirs.layers[0].state_dict())
    try:
        report = graft(theirs, own)
    except GraftError:
        return
    assert report.verdict in ("proven", "consistent")
    assert agree(theirs, own)


# -- names and recipes ------------------------------------------------------------------------------------------------
def test_numbers_in_names() -> None:
    name = "h.3.conv1.part.10.w"
    assert pattern(name) == "h.#.conv#.part.#.w"
    assert numbers(name) == [3, 1, 10]
    assert renumbered(name, [4, 1, 9]) == "h.4.conv1.part.9.w"
    assert (pattern("weight"), numbers("weight"), renumbered("weight", [])) == ("weight", [], "weight")


def tape_of(module: nn.Module, x: Any) -> Tape:
    with torch.no_grad():
        return record(call, twin.twin(module), x)


def sides(own: nn.Module, theirs: nn.Module) -> Hypothesis:
    return Hypothesis(tape_of(own, inputs(0)), Reference(tape_of(theirs, inputs(0))), {}, set())


def param(p: Any, name: str) -> Grid:
    """All numbers of a tensor."""
    vid = p.tape.params[name]
    return Grid.whole(p.offset[vid], p.tape.values[vid].shape)


def first_block(h: Hypothesis) -> Recipe:
    """How w1 of the first block was settled."""
    source = param(h.reference, "layers.0.up.weight").transpose(0, 1)
    made = recipe(h, ["blocks.0.w1"], [Assignment(param(h, "blocks.0.w1"), [source])], occurs=True)
    assert made is not None
    return made


def test_a_recipe_moves_on() -> None:
    h = sides(Own(4), shaken(Theirs(4)))
    made = first_block(h)
    assert made.names == ("blocks.0.w1",)
    assert (made.occurs, made.folds) == (True, False)
    for i in (1, 2, 3):
        ((assignments, constants),) = list(moved_on(made, [f"blocks.{i}.w1"], h))
        (a,) = assignments
        assert constants == []
        assert a.target.same(param(h, f"blocks.{i}.w1"))
        assert a.sources[0].same(param(h.reference, f"layers.{i}.up.weight").transpose(0, 1))
        assert h.settle([a])
        value = h.value_of(f"blocks.{i}.w1")
        assert value is not None
        assert torch.equal(value, h.reference.tape.values[h.reference.tape.params[f"layers.{i}.up.weight"]].tensor.t())


def test_a_recipe_that_leads_nowhere() -> None:
    h = sides(Own(4), shaken(Theirs(3)))
    made = first_block(h)
    assert list(moved_on(made, ["blocks.0.w1"], h)) == []  # not on
    assert list(moved_on(made, ["blocks.3.w1"], h)) == []  # no such block there
    assert list(moved_on(made, ["blocks.1.w2"], h)) == []  # of another shape


class Windowed(nn.Module):
    """Two norms a block whose names differ by a number, and a mask of each block's own that no source holds."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(depth))
        for block in self.blocks:
            block.norm_1, block.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            block.lin = nn.Linear(WIDTH, WIDTH)
            block.register_buffer("window", torch.tril(torch.ones(6, 6)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block.norm_1(x)
            scores = (y @ y.transpose(-1, -2)) * block.window - 1e4 * (1 - block.window)
            x = x + block.lin(scores.softmax(-1) @ y)
            x = x + block.norm_2(x).tanh()
        return x


class Masked(nn.Module):
    """The same with other names, and a mask that is made as it runs."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)]) for _ in range(depth))
        self.mix = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.tril(torch.ones(x.shape[1], x.shape[1])).bool()
        for (first, second), mix in zip(self.layers, self.mix, strict=True):
            y = first(x)
            scores = (y @ y.transpose(-1, -2)).masked_fill(~seen, -1e4)
            x = x + mix(scores.softmax(-1) @ y)
            x = x + second(x).tanh()
        return x


def test_recipes_of_one_kind_are_kept_side_by_side(searched: list[int]) -> None:
    """Neither the second norm's recipe nor a constant's makes the next block a search."""
    inputs = [torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    counts = []
    for depth in (3, 6):
        searched.clear()
        theirs, own = shaken(Masked(depth)), Windowed(depth)
        probe = surgery.Probe(theirs, call, call, inputs)
        plan = surgery.plan(surgery.open(theirs.state_dict()), own, probe=probe)
        proof = surgery.verify(surgery.open(theirs.state_dict()), own, plan, probe=probe)
        assert str(proof.verdict) == "proven", proof.message
        counts.append(len(searched))
    assert counts[0] == counts[1]


def test_tensors_that_move_on_by_different_steps() -> None:
    h = sides(Own(4), shaken(Theirs(4)))
    pairs = [("w1", "up.weight"), ("w2", "down.weight")]
    made = recipe(
        h,
        [f"blocks.0.{mine}" for mine, _ in pairs],
        [
            Assignment(param(h, f"blocks.0.{mine}"), [param(h.reference, f"layers.0.{its}").transpose(0, 1)])
            for mine, its in pairs
        ],
        occurs=False,
    )
    assert made is not None
    assert len(list(moved_on(made, ["blocks.2.w1", "blocks.2.w2"], h))) == 1
    assert list(moved_on(made, ["blocks.1.w1", "blocks.2.w2"], h)) == []


def test_what_has_no_name_is_no_recipe() -> None:
    """Elements of two tensors at once."""
    h = sides(Own(2), shaken(Theirs(2)))
    both = Grid.cat([param(h, "blocks.0.b1"), param(h, "blocks.1.b1")], 0)
    theirs = [param(h.reference, f"layers.{i}.up.bias") for i in (0, 1)]
    assert recipe(h, ["blocks.0.b1"], [Assignment(both, [Grid.cat(theirs, 0)])], occurs=True) is None
    assert recipe(h, ["blocks.0.b1"], [Assignment(both.narrow(0, 0, WIDE), [theirs[0]])], occurs=True) is not None


# -- put aside and taken up again -------------------------------------------------------------------------------------
def walked(own: nn.Module, theirs: nn.Module) -> Hypothesis:
    """A hypothesis with all weights settled, and all values computed so far as they are needed."""
    h = sides(own, theirs)
    for i in range(len(own.blocks)):
        for mine, its in (
            ("w1", "up.weight"),
            ("b1", "up.bias"),
            ("w2", "down.weight"),
            ("b2", "down.bias"),
            ("gain", "norm.weight"),
            ("bias", "norm.bias"),
        ):
            source = param(h.reference, f"layers.{i}.{its}")
            source = source.transpose(0, 1) if source.ndim == 2 else source
            assert h.settle([Assignment(param(h, f"blocks.{i}.{mine}"), [source])])
    for name in ("weight", "bias"):
        assert h.settle([Assignment(param(h, f"last.{name}"), [param(h.reference, f"norm_f.{name}")])])
    return h


@pytest.mark.parametrize("part", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("releasing", [False, True])
def test_shelved_and_restored(part: float, releasing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    h = walked(Own(3), shaken(Theirs(3)))
    for node in h.tape.nodes[: int(part * len(h.tape.nodes))]:
        h.compute(node)
        if releasing:
            h.release(node)
        h.at += 1
    held = {v: t.clone() for v, t in h.env.items()}
    computed = [v for v in held if h.tape.values[v].data and h.tape.values[v].origin == "node"]
    assert computed
    h.shelve()
    assert not h.on_shelf  # so little may be held
    assert h.env.keys() == held.keys()
    monkeypatch.setattr(hypothesis, "SHELVED", 0)
    h.shelve()
    assert h.on_shelf
    assert not any(v in h.env for v in computed)
    h.restore()
    assert not h.on_shelf
    if releasing:
        assert h.env.keys() == held.keys()
    for v in held:
        value = h.known(v)
        assert value is not None
        assert torch.equal(value, held[v])


def test_a_fork_is_restored_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    h = walked(Own(2), shaken(Theirs(2)))
    for node in h.tape.nodes[: len(h.tape.nodes) // 2]:
        h.compute(node)
        h.at += 1
    held = set(h.env)
    other = h.fork()
    monkeypatch.setattr(hypothesis, "SHELVED", 0)
    other.shelve()
    assert set(h.env) == held
    assert set(other.env) < held
    for node in other.tape.nodes[other.at :]:  # the one that was not put aside goes on
        h.compute(node)
    other.restore()
    (out,) = h.tape.outputs()
    value = other.known(out)
    assert value is not None
    assert torch.equal(value, h.env[out])
    assert h.reference.index.find(hypothesis.fingerprint(value))


def test_what_is_not_shelved_is_not_restored() -> None:
    h = walked(Own(1), shaken(Theirs(1)))
    before = dict(h.env)
    h.restore()
    assert h.env == before


def test_a_search_that_puts_all_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken up again after a dead end goes on as if it had not been put aside."""
    restored: list[int] = []
    plain = Hypothesis.restore

    def counted(self: Hypothesis) -> None:
        restored.extend([self.at] * self.on_shelf)
        plain(self)

    monkeypatch.setattr(Hypothesis, "restore", counted)
    acts = [nn.GELU(), nn.GELU(), nn.Tanh(), nn.GELU()]
    theirs = shaken(Theirs(4))
    messages = []
    for limit in (hypothesis.SHELVED, 0):
        monkeypatch.setattr(hypothesis, "SHELVED", limit)
        assert not restored
        check(theirs, Own(4))
        with pytest.raises(GraftError) as caught:
            graft(theirs, Own(4, acts))
        messages.append(str(caught.value))
    assert restored
    assert messages[0] == messages[1]
