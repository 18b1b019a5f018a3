"""The judge: right grafts are proven, near misses are refuted with the place where they part, and gaps are named."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.plan import Plan
from surgery.proof import GATE, PassResult, Proof
from tests import pairs

BOTH = pytest.mark.parametrize("surface", [False, True], ids=["returned", "surface"])


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return pairs.bert()


def prove(reference: nn.Module, target: nn.Module, *, surface: bool = False, **changes: Any) -> Proof:
    source = reference.state_dict()
    plan = changes.pop("plan", None) or pairs.plan(source, target)
    passes = changes.pop("passes", ())
    return surgery.verify(
        source,
        target,
        plan,
        probe=pairs.probe(reference, surface=surface, **changes),
        passes=passes or ("cpu/float64",),
    )


# -- right grafts -----------------------------------------------------------------------------------------------------
@BOTH
def test_a_right_graft_is_proven(bert: nn.Module, surface: bool) -> None:
    proof = prove(bert, pairs.Encoder(), surface=surface)
    assert proof.verdict == "proven"
    (only,) = proof.passes
    assert only.name == "cpu/float64"
    assert only.status == "passed"
    assert only.inputs == ("seed 1", "seed 2", "seed 3")  # seed 0 is what a search may look at
    assert only.residuals["last_hidden_state"] <= GATE
    assert proof.storage == 0.0
    assert proof.divergence is None
    assert dict(proof.surface) == ({"last_hidden_state": "blocks.1.norm2"} if surface else {})


@BOTH
def test_what_no_input_reached_is_listed(bert: nn.Module, surface: bool) -> None:
    proof = prove(bert, pairs.Encoder(), surface=surface)
    gaps = "\n".join(proof.not_exercised)
    assert "places.weight: filled, not exercised: 15 of 24 rows" in gaps
    assert "types.weight: filled, not exercised: 1 of 2 rows" in gaps
    assert "blocks" not in gaps
    assert "mask" not in gaps


@BOTH
def test_a_key_bias_is_a_symmetry(bert: nn.Module, surface: bool) -> None:
    """Inside a fused bias, softmax cancels the rows of the key, and only these."""
    proof = prove(bert, pairs.Encoder(), surface=surface)
    assert proof.symmetries == tuple(f"blocks.{i}.mix.qkv.bias[32:64]: the softmax cancels it" for i in range(2))


def test_any_key_bias_is_proven(bert: nn.Module) -> None:
    target = pairs.Encoder()
    rows = pairs.expressions(target)
    for i in range(2):
        rows[f"blocks.{i}.mix.qkv.bias"] = rows[f"blocks.{i}.mix.qkv.bias"].replace(
            "self.key.bias", "output.LayerNorm.bias"
        )
    proof = prove(bert, target, plan=pairs.plan_of(bert.state_dict(), target, rows))
    assert proof.verdict == "proven"
    assert len(proof.symmetries) == 2


def test_one_key_is_no_symmetry(bert: nn.Module) -> None:
    """With one token softmax is 1 whatever comes in: nothing was seen of query and key, and that is a gap."""

    def one(seed: int) -> tuple[Tensor, Tensor]:
        ids, mask = pairs.inputs(seed)
        return ids[:, :1], mask[:, :1]

    proof = prove(bert, pairs.Encoder(), inputs=one)
    assert proof.verdict == "proven"
    assert not proof.symmetries
    assert "blocks.0.mix.qkv.weight: filled, not exercised: 64 of 96 rows" in proof.not_exercised


def test_a_mask_that_hides_nothing(bert: nn.Module) -> None:
    def unpadded(seed: int) -> dict[str, Tensor]:
        ids, mask = pairs.inputs(seed)
        return {"ids": ids, "mask": torch.ones_like(mask)}

    def run(module: nn.Module, x: dict[str, Tensor]) -> Tensor:
        return pairs.run_bert(module, (x["ids"], x["mask"]))

    proof = prove(bert, pairs.Encoder(), surface=True, inputs=unpadded, run_reference=run)
    assert proof.verdict == "proven"
    assert "mask: mask not exercised: it hides nothing on any proof input" in proof.not_exercised


def test_only_one_input_says_so(bert: nn.Module) -> None:
    proof = prove(bert, pairs.Encoder(), inputs=[pairs.inputs(0)])
    assert proof.passes[0].inputs == ("input 0 (also searched)",)


def test_tensors_that_the_run_does_not_reach(bert: nn.Module) -> None:
    """A filled tensor off the path is listed, and does not lower the verdict."""
    target = pairs.Encoder(classes=pairs.WIDTH)
    rows = {**pairs.expressions(target), "head.weight": "pooler.dense.weight", "head.bias": "pooler.dense.bias"}
    plan = pairs.plan_of(bert.state_dict(), target, rows)
    proof = prove(bert, target, plan=plan, surface=True)
    assert proof.verdict == "proven"
    assert "head.weight: filled, not exercised: what was compared does not depend on it" in proof.not_exercised


# -- near misses ------------------------------------------------------------------------------------------------------
MISSES = {
    "eps": ({"eps": 1e-5}, "norm", "eps", "): eps is 1e-05, the source has 1e-12"),
    "tanh": ({"gelu": "tanh"}, "blocks.0.ffn.1", "gelu", "its activation is GELU (tanh), the source has GELU (erf)"),
    "residual": ({"order": "no residual"}, "blocks.0", "missing residual", "the residual is missing"),
    "pre-norm": ({"order": "pre"}, "blocks.0", "pre/post norm", "its norm stands at another place"),
    "heads": ({"heads": 2}, "blocks.0.mix", "number of heads", "heads is 2, the source has 4 heads"),
    "mask": ({"masked": False}, "blocks.0.mix", "mask", "the mask is missing"),
    "scale": ({"scaled": False}, "blocks.0.mix", "scale", "its attention scores are 2.82843 (sqrt(8)) times"),
}


@BOTH
@pytest.mark.parametrize("miss", MISSES)
def test_a_near_miss_is_refuted_where_it_is(bert: nn.Module, miss: str, surface: bool) -> None:
    changes, module, cause, why = MISSES[miss]
    proof = prove(bert, pairs.Encoder(**changes), surface=surface)  # type: ignore[arg-type]
    assert proof.verdict == "refuted"
    assert proof.divergence is not None
    assert proof.divergence.target_module == module
    assert proof.divergence.cause == cause
    assert why in proof.divergence.why
    assert proof.divergence.why in proof.message
    assert proof.divergence.file.endswith("pairs.py")
    assert proof.divergence.fix in proof.divergence.why


def test_the_second_of_two_layers(bert: nn.Module) -> None:
    target = pairs.Encoder()
    target.blocks[1].norm1.eps = 1e-5
    proof = prove(bert, target)
    assert proof.divergence is not None
    assert proof.divergence.target_module == "blocks.1.norm1"
    assert proof.divergence.reference_module == "encoder.layer.1.attention.output.LayerNorm"
    assert proof.divergence.cause == "eps"


@pytest.mark.parametrize("wrong", ["swapped", "layers", "shifted"])
def test_wrong_weights_are_refuted(bert: nn.Module, wrong: str) -> None:
    target = pairs.Encoder()
    rows = pairs.expressions(target)
    if wrong == "swapped":
        name = "blocks.1.mix.qkv.weight"
        rows[name] = rows[name].replace("query", "*").replace("key", "query").replace("*", "key")
    elif wrong == "layers":
        rows["blocks.0.ffn.0.weight"], rows["blocks.1.ffn.0.weight"] = (
            rows["blocks.1.ffn.0.weight"],
            rows["blocks.0.ffn.0.weight"],
        )
    else:
        name = rows["places.weight"]
        rows["places.weight"] = f"cat(slice({name}, axis=0, start=1, stop=24), slice({name}, axis=0, stop=1), axis=0)"
    proof = prove(bert, target, plan=pairs.plan_of(bert.state_dict(), target, rows))
    assert proof.verdict == "refuted"


def test_a_surface_never_rests_on_new_tensors(bert: nn.Module) -> None:
    """A bias that happens to be zero now is trained tomorrow: what depends on it is not the part's output."""

    class Shifted(pairs.Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(pairs.WIDTH))

        def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
            hide = mask.bool()
            x = self.norm(self.tokens(ids) + self.places.weight[: ids.shape[1]] + self.types.weight[0] + self.shift)
            for block in self.blocks:
                x = block(x, hide)
            return x

    proof = prove(bert, Shifted(), surface=True)
    assert proof.verdict == "refuted"
    returned = prove(bert, Shifted())
    assert returned.verdict == "proven"
    assert any("also depend on new tensors" in note and "shift" in note for note in returned.notes)


# -- what proves nothing ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda m, x: pairs.run_bert(m, x) * 0, "is the same number everywhere"),
        (lambda m, x: pairs.run_bert(m, x)[:0], "is empty"),
        (lambda m, x: pairs.run_bert(m, x) * float("nan"), "is not a number"),
    ],
)
def test_outputs_that_prove_nothing(bert: nn.Module, run: Any, said: str) -> None:
    other = {"run_target": lambda m, x: run_like(run, m, x)}
    proof = prove(bert, pairs.Encoder(), run_reference=run, **other)
    assert proof.verdict not in ("proven", "adapted")
    assert proof.passes[0].status == "failed"
    assert said in " ".join(p.why for p in proof.passes)


def run_like(run: Any, module: nn.Module, x: Any) -> Tensor:
    class Stand(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            class Out:
                last_hidden_state = module.encode(input_ids, attention_mask)

            return Out

    return run(Stand(), x)


def test_outputs_that_no_filled_tensor_reaches(bert: nn.Module) -> None:
    proof = prove(
        bert,
        pairs.Encoder(),
        run_reference=lambda m, x: x[0].float() * 1.5,
        run_target=lambda m, x: x[0].float() * 1.5,
    )
    assert proof.verdict == "ambiguous"
    assert "does not depend on any filled tensor" in proof.message


def test_a_reference_with_other_weights_is_an_error(bert: nn.Module) -> None:
    source, target, other = bert.state_dict(), pairs.Encoder(), pairs.probe(pairs.bert(seed=1))
    with pytest.raises(surgery.GraftError, match="weights that are not the source's"):
        surgery.verify(source, target, pairs.plan(source, target), probe=other)


def test_shapes_that_cannot_be_compared(bert: nn.Module) -> None:
    proof = prove(bert, pairs.Encoder(), run_target=lambda m, x: m.encode(*x)[:, 1:])
    assert proof.verdict == "refuted"
    assert "has shape (3, 8, 32)" in proof.passes[0].why
    turned = prove(bert, pairs.Encoder(), run_target=lambda m, x: m.encode(*x).transpose(0, 1))
    assert turned.verdict == "proven"


# -- a residual above the gate is attributed, or refuted --------------------------------------------------------------
class Scaled(nn.Module):
    """A scale that is stored, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.tensor(7**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) * self.scale)


class Own(nn.Module):
    """The same, with a scale that is computed."""

    def __init__(self, scale: float = 7**-0.5) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.by = scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) * self.by)


class Waves(nn.Module):
    """Sinusoids, from a table in float32 or as they are needed."""

    def __init__(self, stored: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.stored = stored
        if stored:
            self.register_buffer("table", self.waves(32), persistent=False)

    @staticmethod
    def waves(n: int) -> Tensor:
        rate = 10000 ** (-torch.arange(0, 8, 2) / 8)
        angle = torch.arange(n)[:, None] * rate
        return torch.cat([angle.sin(), angle.cos()], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (self.table[: x.shape[0]] if self.stored else self.waves(x.shape[0]))


def simple(reference: nn.Module, target: nn.Module, **changes: Any) -> Proof:
    source = reference.state_dict()
    rows = {name: name for name in target.state_dict() if name in source}
    given = {
        "run_reference": lambda m, x: m(x),
        "run_target": lambda m, x: m(x),
        "inputs": lambda seed: torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)),
        **changes,
    }
    passes = given.pop("passes", ("cpu/float64",))
    plan = given.pop("plan", None) or pairs.plan_of(source, target, rows)
    return surgery.verify(source, target, plan, probe=surgery.Probe(reference, **given), passes=passes)


def test_a_scalar_that_float32_rounded_is_named() -> None:
    proof = simple(Scaled(), Own())
    assert proof.verdict == "proven"
    assert proof.causes == ("the reference stores scale in float32",)
    assert any("before that cause was removed" in note for note in proof.notes)


def test_another_scale_is_not_waved_through() -> None:
    assert simple(Scaled(), Own(7**-0.5 * (1 + 1e-8))).verdict == "refuted"


@pytest.mark.parametrize("stored", [True, False])
def test_a_table_that_float32_rounded_is_named(stored: bool) -> None:
    proof = simple(Waves(not stored), Waves(stored))
    assert proof.verdict == "proven"
    (cause,) = proof.causes
    assert "table in float32" in cause
    assert ("the target" in cause) == stored


def test_storage_has_a_line_of_its_own() -> None:
    torch.manual_seed(0)
    reference, target = Own(), Own().to(torch.bfloat16)
    proof = simple(reference, target)
    assert proof.verdict == "proven"
    assert proof.passes[0].worst <= GATE
    assert 1e-4 < proof.storage < 1e-1


# -- passes -----------------------------------------------------------------------------------------------------------
@BOTH
def test_passes_on_the_cpu(bert: nn.Module, surface: bool) -> None:
    wanted = ("cpu/float64", "cpu/float32", "cpu/bfloat16")
    proof = prove(bert, pairs.Encoder(), surface=surface, passes=wanted)
    assert [p.name for p in proof.passes] == list(wanted)
    assert [p.status for p in proof.passes] == ["passed"] * 3
    assert proof.verdict == "proven"
    single = proof.passes[1]
    own = single.details["reference_error"]["last_hidden_state"]
    assert single.details["factor"] == 4.0
    assert single.gate == pytest.approx(max(4 * own, 8 * torch.finfo(torch.float32).eps))
    assert 0 < single.worst < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_pass_without_its_device_is_not_run(bert: nn.Module) -> None:
    proof = prove(bert, pairs.Encoder(), passes=("cpu/float64", "cuda/bfloat16", "cuda/float64"))
    assert [(p.status, p.why) for p in proof.passes[1:]] == [("not run", "no CUDA device")] * 2
    assert proof.verdict == "proven"
    assert "cuda/bfloat16: not run: no CUDA device" in str(proof)


def test_a_pass_that_differs_refutes() -> None:
    """The function is the same, the arithmetic is not: it loses in low precision what the reference keeps."""

    class Lossy(Own):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 100.0 - 100.0)

    proof = simple(Own(), Lossy(), passes=("cpu/float64", "cpu/float32"))
    assert proof.passes[0].status == "passed"
    assert proof.passes[1].status == "failed"
    assert proof.verdict == "refuted"


def test_a_pass_is_written_device_and_type(bert: nn.Module) -> None:
    for name in ("float32", "cpu/float31", "quantum/float32"):
        with pytest.raises(surgery.SurgeryError, match="pass|device"):
            prove(bert, pairs.Encoder(), passes=(name,))


# -- the probe --------------------------------------------------------------------------------------------------------
def test_a_target_that_fails_names_its_module(bert: nn.Module) -> None:
    class Broken(pairs.Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[1].ffn[0] = nn.Linear(7, pairs.FFN)

    target = Broken()
    rows = pairs.expressions(target)
    del rows["blocks.1.ffn.0.weight"]
    with pytest.raises(surgery.GraftError, match=r"the target could not be run on seed 1 in blocks.1.ffn.0"):
        prove(bert, target, plan=pairs.plan_of(bert.state_dict(), target, rows))


def test_a_reference_that_fails_is_an_error(bert: nn.Module) -> None:
    def run(module: nn.Module, x: Any) -> Tensor:
        raise KeyError("pixel_values")

    with pytest.raises(surgery.GraftError, match="the reference could not be run on seed 1: KeyError: 'pixel_values'"):
        prove(bert, pairs.Encoder(), run_reference=run)
    with pytest.raises(surgery.GraftError, match="returned str, which holds no tensor"):
        prove(bert, pairs.Encoder(), run_target=lambda m, x: "no")


# -- data -------------------------------------------------------------------------------------------------------------
def test_a_proof_is_json(bert: nn.Module) -> None:
    for proof in (prove(bert, pairs.Encoder(eps=1e-5), surface=True), prove(bert, pairs.Encoder())):
        text = json.dumps(proof.as_dict(), allow_nan=False)
        assert json.loads(text)["verdict"] == proof.verdict
    odd = Proof((PassResult("cpu/float64", "failed", "no", {"y": float("inf")}, differs=True),))
    assert json.loads(json.dumps(odd.as_dict(), allow_nan=False))["passes"][0]["residuals"] == {"y": None}
    assert odd.verdict == "refuted"
    assert "y cannot be compared (gate 1.0e-12); no" in str(odd)
    on = PassResult("cpu/float32", "passed", "gate: 4 times", {"y": 1e-7}, 1e-6, ("plain", "padded"))
    assert str(on) == "cpu/float32: passed: y 1.0e-07 (gate 1.0e-06) on plain, padded; gate: 4 times"
    assert Proof((PassResult("cuda/float32", "not run", "no CUDA device"),)).verdict == "ambiguous"


def test_verify_writes_nothing(bert: nn.Module) -> None:
    target = pairs.Encoder().train()
    before = {n: t.clone() for n, t in target.state_dict().items()}
    plan: Plan = pairs.plan(bert.state_dict(), target)
    state = torch.get_rng_state()
    prove(bert, target, plan=plan)
    assert target.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in target.state_dict().items())
