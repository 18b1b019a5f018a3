"""The reference's live tensors, found by value among the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.expr import evaluate, names
from surgery.link import link


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Holder(nn.Module):
    """A module that holds these tensors."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, t in tensors.items():
            self.register_parameter(name, nn.Parameter(t, requires_grad=t.is_floating_point()))


def linked(module: nn.Module, state: dict[str, Tensor]) -> dict[str, str]:
    """What is linked, after it was checked to give the live values bit for bit."""
    source = surgery.open(state)
    found = link(module, source)
    live = module.state_dict()
    for name, expr in found.items():
        made = evaluate(expr, source.read)
        assert made.shape == live[name].shape
        assert torch.equal(made.to(live[name].dtype), live[name])
        assert set(names(expr)) <= set(source)
    return {name: str(expr) for name, expr in found.items()}


a, b, c = rand(4, 6), rand(4, 6) + 1, rand(4, 6) - 1


@pytest.mark.parametrize(
    ("live", "state", "want"),
    [
        pytest.param({"w": a}, {"w": a}, "w", id="same"),
        pytest.param({"w": a}, {"x": b, "old": a}, "old", id="renamed"),
        pytest.param({"w": a}, {"w": b, "old": a}, "old", id="renamed, and another of its name"),
        pytest.param({"w": a.t()}, {"w": a}, "transpose(w)", id="transposed"),
        pytest.param({"w": a.reshape(2, 12)}, {"w": a}, "reshape(w, shape=(2, 12))", id="reshaped"),
        pytest.param(
            {"w": rand(2, 3, 4).permute(2, 0, 1)}, {"w": rand(2, 3, 4)}, "permute(w, dims=(2, 0, 1))", id="permuted"
        ),
        pytest.param(
            {"w": rand(2, 3, 4).permute(2, 0, 1).flatten(1)},
            {"w": rand(2, 3, 4)},
            "reshape(permute(w, dims=(2, 0, 1)), shape=(4, 6))",
            id="permuted and flattened",
        ),
        pytest.param({"w": b}, {"qkv": torch.cat([a, b, c])}, "slice(qkv, axis=0, start=4, stop=8)", id="split"),
        pytest.param({"w": torch.cat([c, a])}, {"x": a, "y": b, "z": c}, "cat(z, x, axis=0)", id="joined"),
        pytest.param(
            {"w": torch.cat([c.t(), a.t()])},
            {"x": a, "y": b, "z": c.reshape(4, 2, 3)},
            "cat(reshape(permute(z, dims=(1, 2, 0)), shape=(6, 4)), transpose(x), axis=0)",
            id="joined, each moved",
        ),
        pytest.param(
            {"w": torch.stack([b, a])},
            {"x": a, "y": b},
            "cat(reshape(y, shape=(1, 4, 6)), reshape(x, shape=(1, 4, 6)), axis=0)",
            id="stacked",
        ),
        pytest.param({"w": a.float()}, {"w": a.double()}, "w", id="cast down on load"),
        pytest.param({"w": a.bfloat16()}, {"old": a}, "old", id="cast down and renamed"),
        pytest.param({"w": a.bfloat16().float()}, {"w": a.bfloat16()}, "w", id="cast up on load"),
        pytest.param({"w": a.half().t()}, {"w": a}, "transpose(w)", id="cast and transposed"),
        pytest.param({"w": torch.tensor(2.5)}, {"s": torch.tensor([2.5])}, "reshape(s, shape=())", id="a scalar"),
        pytest.param({"w": torch.arange(5)}, {"position_ids": torch.arange(5)}, "position_ids", id="integers"),
    ],
)
def test_live_tensors_are_found(live: dict[str, Tensor], state: dict[str, Tensor], want: str) -> None:
    assert linked(Holder(**live), state)["w"] == want


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({"w": b}, id="another value"),
        pytest.param({"w": torch.cat([a[:3], b[3:]])}, id="one row of another"),
        pytest.param({"w": a + 1e-6}, id="nearly"),
        pytest.param({"x": rand(3)}, id="nothing of its shape"),
        pytest.param({"x": a[:2]}, id="half of it"),
        pytest.param({"w": a.flip(0)}, id="rows in reverse"),
    ],
)
def test_what_is_not_there_is_left_out(state: dict[str, Tensor]) -> None:
    assert linked(Holder(w=a), state) == {}


def test_one_element_changed_is_not_linked() -> None:
    live = a.clone()
    live[2, 3] = torch.nextafter(live[2, 3], torch.tensor(10.0))
    assert linked(Holder(w=live, v=b), {"w": a, "v": b}) == {"v": "v"}


def test_tied_tensors_have_one_expression() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    module[1].weight = module[0].weight
    table = module[0].weight.detach().clone()
    assert linked(module, {"table": table}) == {"0.weight": "table", "1.weight": "table"}
    assert linked(module, {"0.weight": table}) == {"0.weight": "0.weight", "1.weight": "0.weight"}


def test_of_equal_tensors_the_likelier_name() -> None:
    ones = torch.ones(4)
    state = {"enc.0.ln_1.weight": ones, "enc.0.ln_2.weight": ones, "enc.1.ln_1.weight": ones, "enc.1.ln_2.weight": ones}
    module = nn.ModuleDict(
        {f"enc_{i}": nn.ModuleDict({f"ln_{j}": nn.LayerNorm(4, bias=False) for j in (1, 2)}) for i in (0, 1)}
    )
    found = linked(module, state)
    assert found == {f"enc_{i}.ln_{j}.weight": f"enc.{i}.ln_{j}.weight" for i in (0, 1) for j in (1, 2)}


def test_nothing_of_the_module_changes() -> None:
    module = Holder(w=a.t().clone(), v=b.clone()).train()
    before = {n: (t, t.detach().clone(), t._version) for n, t in module.state_dict(keep_vars=True).items()}
    linked(module, {"w": a, "v": b})
    for name, t in module.state_dict(keep_vars=True).items():
        assert t is before[name][0]
        assert torch.equal(t, before[name][1])
        assert t._version == before[name][2]
    assert module.training


# -- as libraries save ------------------------------------------------------------------------------------------------
def shaken(module: nn.Module) -> nn.Module:
    """Other values everywhere, so that no two tensors are equal by their initialisation."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return module.eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=31,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=12,
        )
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
        )
    )


@pytest.mark.parametrize("build", [bert, vit])
def test_a_library_s_model_saved_in_its_file_s_names(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = shaken(build())
    model.save_pretrained(tmp_path)
    source = surgery.open(tmp_path)
    found = link(model, source)
    live = model.state_dict()
    weights = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert weights <= set(found)
    for name, expr in found.items():
        assert torch.equal(evaluate(expr, source.read), live[name]), name
    assert {s for e in found.values() for s in names(e)} == set(source)


def test_names_of_older_files() -> None:
    """`gamma` and `beta`, a prefix, and a table that an older version kept: the library renames them on load."""
    model = shaken(bert())
    state = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t.clone()
        for n, t in model.state_dict().items()
        if n != "cls.predictions.decoder.weight"
    }
    state["bert.embeddings.position_ids"] = torch.arange(12)[None]
    found = linked(model, state)
    assert {n for n, _ in model.named_parameters(remove_duplicate=False)} <= set(found)
    assert found["bert.encoder.layer.1.output.LayerNorm.weight"] == "bert.encoder.layer.1.output.LayerNorm.gamma"
    assert found["cls.predictions.decoder.weight"] == "bert.embeddings.word_embeddings.weight"
