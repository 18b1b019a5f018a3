"""Other depths, and experts in place of MLPs: what preserves the function does, on real libraries' models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import Reshaped, SurgeryError
from surgery.experts import SparseExperts
from surgery.proof import GATE
from tests import tiny_bodies

STACKS = {
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "neox": "gpt_neox.layers",
    "t5": "encoder.block",
    "vit": "blocks",
    "swin": "features.1",
    "resnet": "layer1",
    "convnext": "stages.0.blocks",
}


def fits(result: Reshaped, model: nn.Module, tmp_path: Path) -> None:
    """The plan runs from file to file, and what it writes is what the edited module holds, name for name."""
    assert result.module is not None
    own = result.module.state_dict()
    surgery.write(model.state_dict(), result.plan, tmp_path / "out.safetensors", base=own)
    written = surgery.open(tmp_path / "out.safetensors")
    assert set(written) == set(own)
    for name, tensor in own.items():
        got = written.read(name)
        assert got.dtype == tensor.dtype, name
        assert torch.equal(got, tensor), name


@pytest.mark.parametrize("name", STACKS)
def test_identity_blocks_preserve(name: str, tmp_path: Path) -> None:
    model, example = tiny_bodies.body(name)
    result = surgery.insert_identity_blocks(model, example, STACKS[name], after=[1])
    assert result.kind == "preserving"
    assert result.drift is not None
    assert result.drift <= GATE
    assert result.module is not None
    assert len(result.module.get_submodule(STACKS[name])) == 3
    fits(result, model, tmp_path)


def test_what_is_zero_is_what_writes_into_the_stream() -> None:
    zero: dict[str, set[str]] = {}
    for name in ("gpt2", "resnet", "convnext"):
        model, example = tiny_bodies.body(name)
        plan = surgery.insert_identity_blocks(model, example, STACKS[name], after=[1]).plan
        zero[name] = {row.target for row in plan.rows if str(row.expr).startswith("zeros")}
    assert zero == {
        "gpt2": {f"transformer.h.2.{m}.c_proj.{t}" for m in ("attn", "mlp") for t in ("weight", "bias")},
        "resnet": {"layer1.2.bn2.weight", "layer1.2.bn2.bias"},
        "convnext": {"stages.0.blocks.2.gamma"},
    }


def test_post_norm_blocks_are_refused_or_said_to_be_approximate() -> None:
    model, example = tiny_bodies.body("bert")
    with pytest.raises(SurgeryError, match="post-norm") as raised:
        surgery.insert_identity_blocks(model, example, "encoder.layer", after=[0])
    assert "approximate=True" in raised.value.hint
    result = surgery.insert_identity_blocks(model, example, "encoder.layer", after=[0, 1], approximate=True)
    assert result.kind == "approximate"
    assert result.drift is not None
    assert result.drift > 0.01
    zero = {row.target for row in result.plan.rows if str(row.expr).startswith("zeros")}
    assert zero == {
        f"encoder.layer.{n}.{m}.dense.{t}"
        for n in (1, 3)
        for m in ("attention.output", "output")
        for t in ("weight", "bias")
    }


def test_a_block_that_projects_its_stream_is_refused() -> None:
    model, example = tiny_bodies.body("resnet")
    with pytest.raises(SurgeryError, match=r"layer2\.0 cannot be made to pass on"):
        surgery.insert_identity_blocks(model, example, "layer2", after=[0])


@pytest.mark.parametrize("name", [*STACKS, "bert"])
def test_blocks_left_out_and_repeated(name: str, tmp_path: Path) -> None:
    where = {**STACKS, "bert": "encoder.layer"}[name]
    model, example = tiny_bodies.body(name)
    fewer = surgery.select_layers(model, example, where, layers=[0])
    assert fewer.kind == "lossy"
    assert fewer.drift is not None
    fits(fewer, model, tmp_path)
    left = [drop for drop in fewer.plan.dropped if drop.source.startswith(f"{where}.")]
    assert left
    assert all(drop.reason == "its block is left out" for drop in left)
    order = [0, 1, 1]
    more = surgery.stack_layers(model, example, where, order)
    assert more.kind == "approximate"
    fits(more, model, tmp_path)
    own, wide = model.state_dict(), more.module.state_dict() if more.module is not None else {}
    for new, old in enumerate(order):
        at = f"{where}.{old}."
        assert all(torch.equal(wide[f"{where}.{new}.{n.removeprefix(at)}"], own[n]) for n in own if n.startswith(at))


def test_blocks_know_their_new_places() -> None:
    model, example = tiny_bodies.body("llama")
    result = surgery.stack_layers(model, example, "model.layers", [0, 1, 0, 1])
    assert result.module is not None
    assert [layer.self_attn.layer_idx for layer in result.module.model.layers] == [0, 1, 2, 3]
    assert result.module.config.num_hidden_layers == 4
    assert model.config.num_hidden_layers == 2
    with torch.no_grad():  # with a cache too, which goes by these places
        plain = result.module(example["input_ids"], use_cache=False).logits
        cached = result.module(example["input_ids"], use_cache=True).logits
    assert torch.allclose(plain, cached, atol=1e-6)


def test_the_selected_model_is_what_its_blocks_say() -> None:
    model, example = tiny_bodies.body("gpt2")
    result = surgery.select_layers(model, example, "transformer.h", layers=[1])
    from transformers import GPT2Config, GPT2LMHeadModel

    assert result.module is not None
    config = GPT2Config(**{**model.config.to_dict(), "n_layer": 1})
    fresh = GPT2LMHeadModel(config).eval()
    fresh.load_state_dict(result.module.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(**example)[0], result.module(**example)[0])


# --- convolutions that pass on their input ---------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_net2deeper(rank: int, tmp_path: Path) -> None:
    layer = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank]
    size = {} if rank == 0 else {"kernel_size": 3}
    model = nn.Sequential(layer(4, 6, **size), nn.ReLU(), layer(6, 3, **size))  # type: ignore[arg-type]
    x = torch.randn(2, 4, *(8 for _ in range(rank)))
    result = surgery.insert_identity_convolutions(tiny_bodies.unsettled(model), x, "1")
    assert result.kind == "preserving"
    assert result.drift == 0.0
    fits(result, model, tmp_path)
    assert result.module is not None
    assert isinstance(result.module[1][1], layer)


def test_an_activation_that_is_not_idempotent_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
    with pytest.raises(SurgeryError, match="applied again"):
        surgery.insert_identity_convolutions(model, torch.randn(2, 4), "1")


# --- experts ---------------------------------------------------------------------------------------------------------

MLPS = {"gpt2": "transformer.h.*.mlp", "llama": "model.layers.*.mlp", "vit": "blocks.*.mlp"}


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_begin_as_the_mlp_where_the_gates_sum_to_one(name: str, top_k: int, tmp_path: Path) -> None:
    model, example = tiny_bodies.body(name)
    result = surgery.dense_to_moe(model, example, MLPS[name], experts=4, top_k=top_k)
    assert result.kind == "preserving"
    assert result.drift is not None
    assert result.drift <= GATE
    fits(result, model, tmp_path)
    made = [row for row in result.plan.rows if row.status == "synthesised"]
    assert [str(row.expr) for row in made] == [f"normal(shape=(4, 24), std=0.02, seed={n})" for n in (0, 1)]
    assert all(row.target.endswith("router.weight") for row in made)
    shares = surgery.dense_to_moe(model, example, MLPS[name], experts=4, top_k=top_k, normalise=False)
    assert shares.kind == "approximate"
    assert shares.drift is not None
    assert shares.drift > 0.01


def test_experts_are_chosen_by_token() -> None:
    torch.manual_seed(0)
    experts = SparseExperts([nn.Linear(3, 3, dtype=torch.float64) for _ in range(4)], 3, top_k=2).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    got = experts(x)
    gates = experts.router(x).softmax(-1)
    best, which = gates.topk(2, dim=-1)
    best = best / best.sum(-1, keepdim=True)
    for b in range(2):
        for t in range(5):
            made: Tensor = sum(best[b, t, n] * experts.experts[int(which[b, t, n])](x[b, t]) for n in range(2))  # type: ignore[assignment]
            assert torch.allclose(got[b, t], made)


def test_a_router_may_leave_an_expert_without_tokens() -> None:
    experts = SparseExperts([nn.Linear(3, 3) for _ in range(6)], 3, top_k=1)
    experts(torch.randn(2, 3)).sum().backward()
    assert experts.router.weight.grad is not None


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("do", "says"),
    [
        (lambda m, x: surgery.insert_identity_blocks(m, x, "transformer.h", after=[2]), "no block 2"),
        (lambda m, x: surgery.select_layers(m, x, "transformer.h", layers=[]), "no block would be left"),
        (lambda m, x: surgery.select_layers(m, x, "transformer.j", layers=[0]), "did you mean transformer.h"),
        (lambda m, x: surgery.stack_layers(m, x, "transformer", [0]), "is no stack of blocks"),
        (lambda m, x: surgery.dense_to_moe(m, x, "transformer.h.*.mpl", experts=2), "no module"),
        (lambda m, x: surgery.dense_to_moe(m, x, "transformer.h.*.mlp", experts=2, top_k=3), "top_k=3 of 2"),
        (lambda m, x: surgery.dense_to_moe(m, x, "transformer.h.*.attn", experts=2), "arguments|other tokens"),
        (lambda m, x: surgery.insert_identity_convolutions(m, x, "lm_head"), "is no activation"),
    ],
)
def test_what_cannot_be_is_an_error_that_says_why(do: Callable[[nn.Module, Any], Reshaped], says: str) -> None:
    model, example = tiny_bodies.body("gpt2")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(SurgeryError, match=says) as raised:
        do(model, example)
    assert raised.value.hint
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
