"""The tape: what it writes down computes the same again, and writing it down leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from surgery import twin
from surgery.mapper.record import FingerprintIndex, NotRecordable, Ref, Tape, fingerprint, record, same

aten = torch.ops.aten


def call(module: nn.Module, x: Any) -> Any:
    return module(*x) if isinstance(x, tuple) else module(x)


def tape_of(module: nn.Module, x: Any, run: Callable[[nn.Module, Any], Any] = call, **options: Any) -> Tape:
    return record(run, twin.twin(module), x, **options)


def replayed(tape: Tape) -> dict[int, Tensor]:
    """Every value, computed again from the parameters, inputs and constants by the nodes as they were written."""
    values = {
        vid: v.tensor.to(torch.float64) if v.tensor.is_floating_point() else v.tensor
        for vid, v in enumerate(tape.values)
        if v.origin != "node" and v.tensor is not None
    }
    for node in tape.nodes:
        if node.op == "sync":
            continue
        args, kwargs = tree_map(lambda a: values[a.vid] if isinstance(a, Ref) else a, (node.args, node.kwargs))
        kwargs.pop("saw", None)
        op = aten.reshape.default if node.op in (aten.view.default, aten._unsafe_view.default) else node.op
        with torch.no_grad():
            out = op(*args, **kwargs)
        for vid, t in zip(node.outs, out if isinstance(out, (tuple, list)) else (out,), strict=False):
            if vid >= 0 and isinstance(t, Tensor):
                values.setdefault(vid, t)  # what chance made stays what it was
    return values


def outputs(tape: Tape) -> list[Tensor]:
    values = replayed(tape)
    return [values[vid] for vid in tape.outputs()]


class Does(nn.Module):
    """A module of one function and a few parameters."""

    def __init__(self, f: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.f = f
        for name, t in parameters.items():
            self.register_parameter(name, nn.Parameter(t))

    def forward(self, *x: Tensor) -> Any:
        return self.f(self, *x)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def agrees(module: nn.Module, *x: Any) -> Tape:
    """The tape of a run computes what the module computes, evaluated in float64."""
    tape = tape_of(module, x)
    with torch.no_grad():
        want = call(module.double().eval(), tuple(t.double() if t.is_floating_point() else t for t in x))
    wanted = [t for t in tree_leaves(want) if isinstance(t, Tensor)]
    got = outputs(tape)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    return tape


def ops(tape: Tape) -> set[str]:
    return {
        str(n.op._schema.name).split("::")[1]
        for n in tape.nodes
        if not isinstance(n.op, str) and hasattr(n.op, "_schema")
    }


# -- in place ---------------------------------------------------------------------------------------------------------
def _through_a_view(_: nn.Module, x: Tensor) -> Any:
    y = x * 2
    part = y[:, 1:3]
    part.add_(10.0)
    return y, part


def _seen_by_a_view(_: nn.Module, x: Tensor) -> Any:
    y = x * 2
    turned = y.t()
    y.mul_(3.0)
    return turned + 1


def _overlapping_views(_: nn.Module, x: Tensor) -> Any:
    y = x * 2
    left, right = y[:, :3], y[:, 2:]
    left += 1.0
    right *= 5.0
    return y, left, right


def _item_assigned(_: nn.Module, x: Tensor) -> Any:
    y = torch.zeros(4, 5, dtype=x.dtype)
    y[1] = x[0]
    y[:, 2] = 7.0
    y[x > 0] = -1.0
    return y


def _written_out(_: nn.Module, x: Tensor) -> Any:
    y = torch.empty_like(x)
    torch.add(x, x, out=y)
    return y + 1


def _turned_in_place(_: nn.Module, x: Tensor) -> Any:
    y = x * 2
    y.t_().unsqueeze_(0)
    return y


def _masked(_: nn.Module, x: Tensor) -> Any:
    scores = x @ x.t()
    scores.masked_fill_(scores < 0, float("-inf"))
    return scores.softmax(-1)


def _relu(_: nn.Module, x: Tensor) -> Any:
    y = x - 0.1
    return F.relu(y, inplace=True) + y


def _view_of_a_view(_: nn.Module, x: Tensor) -> Any:
    y = x * 1.5
    inner = y.view(2, 2, 5)[1].t()
    inner.zero_()
    return y.sum(0), inner


def _own_argument(_: nn.Module, x: Tensor) -> Any:
    return x.contiguous() + x.to(x.dtype)


IN_PLACE = [
    _through_a_view, _seen_by_a_view, _overlapping_views, _item_assigned, _written_out, _turned_in_place, _masked,
    _relu, _view_of_a_view, _own_argument,
]  # fmt: skip


@pytest.mark.parametrize("f", IN_PLACE, ids=lambda f: f.__name__[1:])
def test_in_place_writes_become_values(f: Callable[..., Any]) -> None:
    tape = agrees(Does(f), rand(4, 5))
    assert not any(n.op._schema.is_mutable for n in tape.nodes if hasattr(n.op, "_schema"))


# -- canonical --------------------------------------------------------------------------------------------------------
CANONICAL: dict[str, tuple[nn.Module, tuple[Tensor, ...], set[str]]] = {
    "addmm": (
        Does(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2), w=rand(5, 3), b=rand(3)),
        (rand(4, 5),),
        {"addmm"},
    ),
    "addmm without bias": (
        Does(lambda m, x: torch.addmm(m.b, x, m.w, beta=0), w=rand(5, 3), b=rand(3)),
        (rand(4, 5),),
        {"addmm"},
    ),
    "addmv": (Does(lambda m, x: torch.addmv(m.b, x, m.w), w=rand(5), b=rand(4)), (rand(4, 5),), {"addmv", "mv"}),
    "mv": (Does(lambda m, x: x @ m.w, w=rand(5)), (rand(4, 5),), {"mv"}),
    "dot": (Does(lambda m, x: x @ m.w, w=rand(5)), (rand(5),), {"dot"}),
    "baddbmm": (
        Does(lambda m, x: torch.baddbmm(m.b, x, m.w, beta=2), w=rand(2, 5, 3), b=rand(2, 1, 3)),
        (rand(2, 4, 5),),
        {"baddbmm"},
    ),
    "linear": (nn.Linear(5, 3), (rand(2, 4, 5),), {"addmm", "linear"}),
    "layer norm": (nn.LayerNorm((3, 5)), (rand(2, 3, 5),), set()),
    "layer norm without bias": (nn.LayerNorm(5, bias=False), (rand(2, 3, 5),), set()),
    "group norm": (nn.GroupNorm(2, 6), (rand(2, 6, 4, 3),), set()),
    "batch norm": (nn.BatchNorm2d(3), (rand(2, 3, 4, 5),), {"native_batch_norm"}),
    "batch norm of vectors": (nn.BatchNorm1d(3), (rand(6, 3),), {"native_batch_norm"}),
    "batch norm without statistics": (nn.BatchNorm1d(3, track_running_stats=False), (rand(2, 3, 5),), set()),
    "instance norm": (nn.InstanceNorm1d(3, affine=True), (rand(2, 3, 5),), set()),
    "conv": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (rand(2, 4, 5, 5),), set()),
    "transposed conv": (nn.ConvTranspose1d(4, 3, 3, stride=2), (rand(2, 4, 5),), set()),
    "addcmul": (
        Does(lambda m, x: torch.addcmul(m.a, x, m.b, value=3), a=rand(5), b=rand(4, 5)),
        (rand(4, 5),),
        {"addcmul"},
    ),
    "addcdiv": (
        Does(lambda m, x: torch.addcdiv(m.a, x, m.b.exp(), value=3), a=rand(5), b=rand(4, 5)),
        (rand(4, 5),),
        {"addcdiv"},
    ),
    "rsub": (Does(lambda m, x: 1 - m.a * x + torch.rsub(x, m.a, alpha=2), a=rand(5)), (rand(4, 5),), {"rsub"}),
    "scaled sum": (
        Does(lambda m, x: torch.add(x, m.a, alpha=2) - torch.sub(x, m.a, alpha=3), a=rand(5)),
        (rand(4, 5),),
        set(),
    ),
    "embedding": (nn.Embedding(7, 3, padding_idx=0), (torch.tensor([[1, 0], [6, 2]]),), {"embedding"}),
    "stack": (Does(lambda m, x: torch.stack([x, x + m.a], -1), a=rand(5)), (rand(4, 5),), {"stack"}),
    "mean": (Does(lambda m, x: (x * m.a).mean((0, -1), keepdim=True), a=rand(5)), (rand(2, 4, 5),), {"mean"}),
    "prelu": (nn.PReLU(3), (rand(2, 3, 4),), {"_prelu_kernel"}),
    "one slope": (nn.PReLU(), (rand(2, 3, 4),), {"_prelu_kernel"}),
    "powers": (Does(lambda m, x: x.abs() ** 0.5 + x.abs().rsqrt() + x**-1 + x**3), (rand(4, 5),), {"rsqrt"}),
    "divided by a weight": (Does(lambda m, x: x / m.a, a=rand(5)), (rand(4, 5),), {"div"}),
    "lstm": (nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True), (rand(2, 5, 4),), {"lstm", "addmm"}),
    "gru": (nn.GRU(4, 3), (rand(5, 2, 4),), {"gru", "addmm"}),
    "encoder layer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (rand(2, 5, 8),), {"addmm"}),
}


@pytest.mark.parametrize("name", CANONICAL)
def test_canonical_spellings_compute_the_same(name: str) -> None:
    module, x, gone = CANONICAL[name]
    with torch.no_grad():
        for key, t in module.state_dict().items():
            if t.is_floating_point() and not isinstance(module, Does):
                t.copy_(rand(*t.shape).abs() + 0.5 if "var" in key else rand(*t.shape))
    tape = agrees(module, *x)
    assert not ops(tape) & gone


# -- no trace ---------------------------------------------------------------------------------------------------------
class Busy(nn.Module):
    """Writes into its buffers, counts its calls, draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("seen", torch.zeros(4, dtype=torch.bool))
        self.register_buffer("cache", torch.zeros(4, 2))
        self.register_buffer("exact", torch.zeros(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen[0] = True
        self.cache[:, 1] = x[:, 0]
        self.exact.add_(1.0)
        y = self.drop(self.norm(self.linear(x)))
        self.mean.mul_(0.5).add_(y.detach().mean(0))
        return y + self.mean + 1e-3 * torch.rand_like(y) + self.calls + self.cache.sum(1, keepdim=True)


def test_the_module_is_untouched() -> None:
    module = Busy().train()
    ran: list[Any] = []
    handle = module.linear.register_forward_hook(lambda *_: ran.append(1))
    before = {n: (t, t.detach().clone()) for n, t in module.state_dict(keep_vars=True).items()}
    hooks = {n: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in module.named_modules()}
    state = torch.get_rng_state()
    x = rand(4, 5)
    kept = x.clone()
    tape_of(module, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert all(m.training for m in module.modules())
    assert {n: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in module.named_modules()} == hooks
    for name, t in module.state_dict(keep_vars=True).items():
        assert t is before[name][0]
        assert t.dtype == before[name][1].dtype
        assert torch.equal(t, before[name][1]), name
    assert ran, "the twin carries the person's own hooks"
    handle.remove()


def test_the_module_is_untouched_by_a_plain_run_on_its_twin() -> None:
    module = Busy()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    twin.run(call, twin.twin(module), rand(4, 5))
    for name, t in module.state_dict().items():
        assert torch.equal(t, before[name]), name


def _buffers_written(m: nn.Module, x: Tensor) -> Tensor:
    m.cache[:, 1] = x[:, 0]
    m.cache.mul_(2.0)
    m.count += 2
    return m.cache.sum() * x + m.count


def test_writes_into_buffers_count() -> None:
    def module() -> nn.Module:
        made = Does(_buffers_written)
        made.register_buffer("cache", rand(4, 3))
        made.register_buffer("count", torch.tensor(1))
        return made

    x = rand(4, 5)
    agrees(module(), x)
    with torch.no_grad():
        want = module().double()(x.double())
    torch.testing.assert_close(twin.run(call, twin.twin(module()), x), want, rtol=1e-12, atol=1e-12)


def _row_written(m: nn.Module, x: Tensor) -> Tensor:
    m.a[0] = 0.0
    return x * m.a


def _data_clamped(m: nn.Module, x: Tensor) -> Tensor:
    m.a.data.clamp_(max=-10.0)
    return x * m.a


def _view_of_a_view_written(m: nn.Module, x: Tensor) -> Tensor:
    m.a.view(1, 5).t()[1:2].add_(1.0)
    return x * m.a


@pytest.mark.parametrize("f", [_row_written, _data_clamped, _view_of_a_view_written], ids=lambda f: f.__name__[1:])
def test_a_write_into_a_view_of_a_parameter_is_refused(f: Callable[..., Any]) -> None:
    """A twin has stand-ins for parameters: a write past them would be lost, and the proof be of another program."""
    module = Does(f, a=rand(5))
    with pytest.raises(NotRecordable, match="view of a parameter"):
        tape_of(module, rand(4, 5))
    assert torch.equal(module.a, rand(5))


def test_a_write_that_changes_nothing_is_none() -> None:
    module = Does(_row_written, a=torch.zeros(5))
    assert tape_of(module, rand(4, 5)).outputs()


def test_a_parameter_written_as_a_whole_is_the_new_value() -> None:
    def clamped(m: nn.Module, x: Tensor) -> Tensor:
        m.a.clamp_(max=0.2)
        return x * m.a

    module = Does(clamped, a=rand(5))
    (got,) = outputs(tape_of(module, rand(4, 5)))
    torch.testing.assert_close(got, rand(4, 5).double() * rand(5).double().clamp(max=0.2))
    assert torch.equal(module.a, rand(5))


def test_globals_are_restored_after_a_failure() -> None:
    def fails(_: nn.Module, x: Tensor) -> Tensor:
        raise ValueError("no")

    module = Does(fails)
    with pytest.raises(ValueError, match="no"):
        tape_of(module, rand(2, 2))
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.randn(2).dtype == torch.float32


def test_chance_is_a_constant_of_the_tape() -> None:
    module = Does(lambda m, x: (x @ m.w) * torch.rand(4, 3) + torch.randn_like(x[:, :3]), w=rand(5, 3))
    tape = tape_of(module, rand(4, 5))
    random = [v for v in tape.values if v.origin == "const" and v.tensor is not None]
    assert random
    values = replayed(tape)
    for vid in tape.outputs():
        assert tape.values[vid].tensor is not None
        torch.testing.assert_close(values[vid], tape.values[vid].tensor)


def test_two_runs_draw_the_same() -> None:
    module = Does(lambda m, x: x + torch.rand_like(x))
    a, b = (outputs(tape_of(module, rand(4, 5)))[0] for _ in range(2))
    assert torch.equal(a, b)


# -- what is written --------------------------------------------------------------------------------------------------
def test_values_know_what_they_depend_on() -> None:
    module = Does(lambda m, x: (m.a * 2, x * 2, x * m.a, torch.arange(5) * 2.0), a=rand(5))
    tape = tape_of(module, rand(4, 5))
    depends = [(tape.values[v].data, tape.values[v].weights) for v in tape.outputs()]
    assert depends == [(False, True), (True, False), (True, True), (False, False)]
    assert set(tape.params) == {"a"}


def test_a_tied_tensor_is_one_value() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    tape = tape_of(module, rand(2, 4))
    assert tape.params["0.weight"] == tape.params["1.weight"]
    assert len(tape.consumers[tape.params["0.weight"]]) >= 2


def test_what_is_no_weight_is_a_constant() -> None:
    module = nn.Linear(4, 4)
    tape = tape_of(module, rand(2, 4), weights={"weight"})
    assert set(tape.params) == {"weight"}
    assert any(v.origin == "const" and v.name == "bias" for v in tape.values)


def test_nodes_know_their_module() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    tape = tape_of(module, rand(2, 4))
    assert {n.module for n in tape.nodes} >= {"0", "1.0", "1.1"}


def test_what_python_reads_is_noted() -> None:
    def looks(_: nn.Module, x: Tensor) -> Tensor:
        if x.sum().item() > 0:
            x = x + 1
        return x * len(x.argmax(1).tolist())

    tape = tape_of(Does(looks), rand(4, 5))
    saw = [n.kwargs["saw"] for n in tape.nodes if "saw" in n.kwargs]
    assert len(saw) == 2
    assert isinstance(saw[0], float)
    assert isinstance(saw[1], Tensor)
    assert saw[1].shape == (4,)


def test_activations_are_held_within_a_budget() -> None:
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    tape = tape_of(module, rand(4, 8), keep=3 * 4 * 8 * 8)
    held = sum(t.numel() * 8 for v in tape.values if v.origin == "node" and v.data and (t := v.tensor) is not None)
    assert 0 < held <= 3 * 4 * 8 * 8
    assert all(v.fingerprint for v in tape.values if v.origin == "node" and v.data)


# -- fingerprints -----------------------------------------------------------------------------------------------------
@st.composite
def moved(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A tensor, and the same elements in another layout, among zeros."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    t = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 1000))), dtype=torch.float64)
    out = t
    for step in draw(st.lists(st.sampled_from(["permute", "flatten", "pad", "unsqueeze"]), max_size=5)):
        if step == "permute":
            out = out.permute(draw(st.permutations(range(out.ndim))))
        elif step == "flatten":
            out = out.reshape(-1)
        elif step == "pad":
            out = F.pad(out, (draw(st.integers(0, 2)), draw(st.integers(0, 3))))
        else:
            out = out.unsqueeze(draw(st.integers(0, out.ndim)))
    return t, out


@given(moved())
@settings(max_examples=60, deadline=None)
def test_layout_does_not_change_a_fingerprint(pair: tuple[Tensor, Tensor]) -> None:
    t, out = pair
    if t.numel() < 2:
        return
    a, b = fingerprint(t), fingerprint(out)
    assert a is not None
    assert b is not None
    assert same(a, b)
    assert FingerprintIndex([(3, a)]).find(b) == [3]


@given(moved(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_changed_element_changes_a_fingerprint(pair: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    t, out = pair
    if t.numel() < 2:
        return
    out = out.clone()
    flat = out.view(-1) if out.is_contiguous() else out.reshape(-1)
    at = data.draw(st.integers(0, flat.numel() - 1))
    flat[at] += 1e-4
    a, b = fingerprint(t), fingerprint(flat)
    assert a is not None
    assert b is not None
    assert not same(a, b)
    assert FingerprintIndex([(3, a)]).find(b) == []


@pytest.mark.parametrize("t", [torch.zeros(3), torch.full((4,), 2.5), torch.empty(0), torch.tensor([1, 2])])
def test_what_tells_nothing_has_no_fingerprint(t: Tensor) -> None:
    assert fingerprint(t) is None


def test_masked_scores_are_alike_however_they_are_masked() -> None:
    scores = rand(3, 4).double()
    hidden = torch.tensor([False, False, True, False])
    prints = [fingerprint(scores.masked_fill(hidden, m)) for m in (float("-inf"), -1e9, torch.finfo(torch.float64).min)]
    assert prints[0] is not None
    assert all(p is not None and same(prints[0], p) for p in prints)


class Buffered(nn.Module):
    """Counts its calls in a buffer, writes into a view of another, and has products of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        y = self.attend(x, x, x, need_weights=False)[0]
        return self.mix(y) + self.seen


def test_operators_without_their_products() -> None:
    """Made-up products leave the same operators and shapes as real ones, and the module's buffers alone."""
    torch.manual_seed(0)
    module, x = Buffered().eval(), torch.randn(2, 5, 8)
    real = tape_of(module, x)
    rest = record(call, twin.twin(module, written=False), x, keep=0, made_up=True)
    assert [(n.op, n.outs, n.inputs) for n in rest.nodes] == [(n.op, n.outs, n.inputs) for n in real.nodes]
    assert [v.shape for v in rest.values] == [v.shape for v in real.values]
    assert [v.dtype for v in rest.values] == [v.dtype for v in real.values]
    assert float(module.seen) == 0
    out = rest.values[rest.outputs()[0]]
    assert out.shape == (2, 5, 8)
