"""From one library's file to another's, by a plan that was found, and back by its inverse: the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery import shards
from surgery.expr import call, parse
from surgery.plan import Dropped, Plan, Row, Status
from tests import pairs

transformers = pytest.importorskip("transformers")


def file_of(state: Mapping[str, Tensor], path: Path) -> Path:
    """As the libraries save it."""
    save_file({name: t.contiguous().clone() for name, t in state.items()}, path, metadata={"format": "pt"})
    return path


def there_and_back(state: Mapping[str, Tensor], target: nn.Module, probe: surgery.Probe, folder: Path) -> Plan:
    """Plan, write, invert, write: every file of it is checked. Gives the plan."""
    a = surgery.open(file_of(state, folder / "a.safetensors"))
    plan = surgery.plan(a, target, probe=probe)
    assert surgery.verify(a, target, plan, probe=probe).verdict == "proven"
    b = surgery.write(a, plan, folder / "b.safetensors", base=target.state_dict())
    assert set(load_file(b)) == set(target.state_dict())
    plan.save(folder / "plan.toml")
    back = Plan.load(folder / "plan.toml").inverted(a)
    back.save(folder / "back.toml")
    again = surgery.write(b, Plan.load(folder / "back.toml"), folder / "again.safetensors", like=a)
    assert (folder / "a.safetensors").read_bytes() == again.read_bytes()
    return plan


# -- real libraries, each in the layout it publishes ------------------------------------------------------------------
def matrix_case(name: str) -> Any:
    """A pair of real implementations (tests/graft_matrix), built."""
    import importlib

    from tests.graft_matrix import core

    modality, _, name = name.partition("/")
    importlib.import_module(f"tests.graft_matrix.{modality}")
    return next(case for case in core.CASES if case.name == name)


@pytest.mark.parametrize(
    ("case", "needs"),
    [
        ("vision/vit: transformers (checkpoint file names) -> timm", "timm"),
        ("vision/vit: timm -> torchvision", "torchvision"),
        ("vision/deit: transformers -> timm (distilled)", "timm"),
        ("vision/swin: transformers -> timm", "timm"),
        ("vision/convnext: transformers -> torchvision", "torchvision"),
        ("vision/resnet: timm -> transformers", "timm"),
        ("clip/clip: transformers -> open_clip (towers of equal width)", "open_clip"),
        ("clip/siglip: transformers -> open_clip (timm image tower)", "open_clip"),
        ("audio/whisper: transformers -> openai-whisper", "whisper"),
        ("text/bert: transformers BertForMaskedLM -> own list-of-dicts module, tied head", "transformers"),
        ("text/gpt2: transformers -> own module, a list of unnamed layers and a fresh head", "transformers"),
    ],
)
def test_between_libraries(case: str, needs: str, tmp_path: Path) -> None:
    pytest.importorskip(needs)
    from tests.graft_matrix.core import build

    found = matrix_case(case)
    source, target = build(found)
    probe = surgery.Probe(source, found.run_source, found.run_target, inputs=[found.inputs(seed) for seed in (1, 2, 3)])
    there_and_back(found.source_state(source), target, probe, tmp_path)


@pytest.mark.parametrize(
    ("case", "needs", "lost"),
    [
        ("text/roberta: transformers -> own module, positions counted from 0", "transformers", "is made by add, which"),
        ("vision/dinov2-registers: transformers -> timm", "timm", "embeddings.mask_token: dropped: not part of what"),
        ("audio/wavlm: transformers -> torchaudio", "torchaudio", "masked_spec_embed: dropped"),
        ("clip/clip-vision: open_clip (whole model) -> transformers vision tower", "open_clip", "... and 22 more"),
    ],
)
def test_what_is_lost_on_the_way_is_named(case: str, needs: str, lost: str) -> None:
    pytest.importorskip(needs)
    from tests.graft_matrix.core import build

    found = matrix_case(case)
    source, target = build(found)
    probe = surgery.Probe(source, found.run_source, found.run_target, inputs=[found.inputs(1)])
    opened = surgery.open(found.source_state(source))
    with pytest.raises(surgery.PlanError, match="source tensors cannot be had back") as caught:
        surgery.plan(opened, target, probe=probe).inverted(opened)
    assert lost in str(caught.value)
    assert "Keep the source itself" in caught.value.hint


def test_openai_whisper_to_transformers(tmp_path: Path) -> None:
    pytest.importorskip("whisper")
    from tests.graft_matrix.core import build

    found = matrix_case("audio/whisper: transformers -> openai-whisper")
    target, source = build(found)
    probe = surgery.Probe(source, found.run_target, found.run_source, inputs=[found.inputs(seed) for seed in (1, 2, 3)])
    there_and_back(source.state_dict(), target, probe, tmp_path)


def bare_bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=pairs.VOCAB,
        hidden_size=pairs.WIDTH,
        num_hidden_layers=pairs.LAYERS,
        num_attention_heads=pairs.HEADS,
        intermediate_size=pairs.FFN,
        max_position_embeddings=pairs.PLACES,
    )
    torch.manual_seed(0)
    return pairs.shaken(transformers.BertModel(config, add_pooling_layer=False)).eval()


def test_bert_to_an_own_fused_encoder(tmp_path: Path) -> None:
    bert, mine = bare_bert(), pairs.Encoder().eval()
    plan = there_and_back(bert.state_dict(), mine, pairs.probe(bert, surface=True), tmp_path)
    back = plan.inverted(surgery.open(tmp_path / "a.safetensors"))
    query = back["encoder.layer.0.attention.self.query.weight"]
    assert str(query.expr) == f"slice(blocks.0.mix.qkv.weight, axis=0, start=0, stop={pairs.WIDTH})"
    dropped = {drop.source: drop.reason for drop in back.dropped}
    assert dropped["head.weight"] == "new: not from the source"


class Llama(nn.Module):
    """Llama as it was published: pairs of neighbouring units turn as complex numbers."""

    def __init__(self, vocab: int, dim: int, heads: int, kv: int, ffn: int, layers: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(LlamaBlock(dim, heads, kv, ffn) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.output = nn.Linear(dim, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


class LlamaBlock(nn.Module):
    def __init__(self, dim: int, heads: int, kv: int, ffn: int) -> None:
        super().__init__()
        self.heads, self.kv, self.width = heads, kv, dim // heads
        self.attention = nn.ModuleDict(
            {
                "wq": nn.Linear(dim, heads * self.width, bias=False),
                "wk": nn.Linear(dim, kv * self.width, bias=False),
                "wv": nn.Linear(dim, kv * self.width, bias=False),
                "wo": nn.Linear(heads * self.width, dim, bias=False),
            }
        )
        self.feed_forward = nn.ModuleDict(
            {
                "w1": nn.Linear(dim, ffn, bias=False),
                "w2": nn.Linear(ffn, dim, bias=False),
                "w3": nn.Linear(dim, ffn, bias=False),
            }
        )
        self.attention_norm = nn.RMSNorm(dim, eps=1e-6)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-6)

    def turned(self, x: Tensor) -> Tensor:
        length, half = x.shape[1], self.width // 2
        speeds = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = (torch.arange(length, dtype=torch.float64)[:, None] * speeds).to(x.dtype)[None, :, None]
        a, b = x.unflatten(-1, (half, 2)).unbind(-1)
        return torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (self.attention[name](h).unflatten(-1, (-1, self.width)) for name in ("wq", "wk", "wv"))
        q, k = self.turned(q), self.turned(k)
        k, v = (t[:, :, :, None].expand(-1, -1, -1, self.heads // self.kv, -1).flatten(2, 3) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention["wo"](y.transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        f = self.feed_forward
        return x + f["w2"](nn.functional.silu(f["w1"](h)) * f["w3"](h))


def test_llama_of_transformers_to_the_published_layout(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        num_hidden_layers=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    theirs = pairs.shaken(transformers.LlamaForCausalLM(config)).eval()
    mine = Llama(50, 32, 4, 4, 48, 2).eval()
    probe = surgery.Probe(
        theirs,
        lambda module, ids: module(input_ids=ids).logits,
        lambda module, ids: module(ids),
        inputs=lambda seed: torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(seed)),
    )
    plan = there_and_back(theirs.state_dict(), mine, probe, tmp_path)
    # transformers' own conversion, on the file that was written
    from transformers.core_model_loading import PermuteForRope

    class Heads:
        num_attention_heads, hidden_size = 4, 32

    written = load_file(tmp_path / "b.safetensors")
    op = PermuteForRope()
    op.config = Heads()
    permuted = op._permute_for_rope(written["layers.0.attention.wq.weight"], Heads())
    assert torch.equal(permuted, theirs.state_dict()["model.layers.0.self_attn.q_proj.weight"])
    assert plan["layers.1.attention.wq.weight"].sources == ("model.layers.1.self_attn.q_proj.weight",)


def test_conv1d_of_gpt2_to_linear(tmp_path: Path) -> None:
    """And one file that holds its tied head under both names."""
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=12)
    torch.manual_seed(0)
    theirs = pairs.shaken(transformers.GPT2LMHeadModel(config)).eval()
    mine = transformers.GPT2LMHeadModel(config).eval()
    for block in mine.transformer.h:
        for owner, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            old = getattr(owner, name)
            setattr(owner, name, nn.Linear(*old.weight.shape))
    probe = surgery.Probe(
        theirs,
        lambda module, ids: module(ids).logits,
        inputs=lambda seed: torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(seed)),
        run_target=lambda module, ids: module(ids).logits,
    )
    state = theirs.state_dict()
    assert "lm_head.weight" in state
    (tmp_path / "both").mkdir()
    plan = there_and_back(state, mine, probe, tmp_path / "both")
    assert str(plan["transformer.h.0.mlp.c_fc.weight"].expr) == "transpose(transformer.h.0.mlp.c_fc.weight)"
    (tmp_path / "once").mkdir()
    once = {name: t for name, t in state.items() if name != "lm_head.weight"}  # as transformers saves it
    there_and_back(once, mine, probe, tmp_path / "once")


def test_a_copy_is_told_by_its_bytes() -> None:
    """Without them, a second name for one tensor cannot be told from a tensor that was lost."""
    state = {"a": torch.arange(6.0), "b": torch.arange(6.0)}
    plan = Plan((Row("x", Status.FILLED, parse("a"), (6,), "F32"),), (Dropped("b", "the same as a"),))
    opened = surgery.open(state)
    assert plan.inverted(opened)["b"].tied_to == "a"
    with pytest.raises(surgery.PlanError, match="b: dropped: the same as a"):
        plan.inverted({name: opened[name] for name in opened})


class Turned(nn.Module):
    """A convolution under weight norm, in either spelling of torch, or folded."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv1d(4, 6, 3)
        if how == "old":
            self.conv = torch.nn.utils.weight_norm(self.conv)
        elif how == "new":
            self.conv = torch.nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_the_spellings_of_weight_norm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = pairs.shaken(Turned("old")).eval()
    probe = surgery.Probe(
        theirs,
        lambda module, x: module(x),
        lambda module, x: module(x),
        inputs=lambda seed: torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(seed)),
    )
    there_and_back(theirs.state_dict(), Turned("new").eval(), probe, tmp_path)
    opened = surgery.open(tmp_path / "a.safetensors")
    with pytest.raises(surgery.PlanError, match=r"conv.weight is made by weight_norm, which is preserving"):
        surgery.plan(opened, Turned("folded").eval(), probe=probe).inverted(opened)


# -- the algebra of it ------------------------------------------------------------------------------------------------
def inverse_of(
    shapes: Mapping[str, tuple[int, ...]], rows: Mapping[str, str], dtypes: Mapping[str, str] | None = None
) -> tuple[dict[str, Tensor], Plan, Plan]:
    from surgery.expr import infer
    from surgery.memory import info_of

    g = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    infos = {name: info_of(t) for name, t in state.items()}
    made = tuple(
        Row(t, Status.FILLED, parse(e), infer(parse(e), lambda n: infos[n].shape), (dtypes or {}).get(t, "F32"))
        for t, e in rows.items()
    )
    used = {n for row in made for n in row.sources}
    plan = Plan(made, tuple(Dropped(n, "x") for n in state if n not in used))
    return state, plan, plan.inverted(surgery.open(state))


@pytest.mark.parametrize(
    "rows",
    [
        {f"x{n}": f"slice(w, axis=0, start={4 * n}, stop={4 * n + 4})" for n in range(3)},
        {f"x{n}": f"transpose(slice(w, axis=1, start={2 * n}, stop={2 * n + 2}))" for n in range(3)},
        {f"x{n}": f"slice(transpose(w), axis=1, start={6 * n}, stop={6 * n + 6})" for n in range(2)},
        {f"x{n}": f"deinterleave(w, index={n}, of=3, groups=2)" for n in range(3)},
        {f"x{n}": f"deinterleave(w, index={n}, of=3, groups=2, widths=(4, 1, 1))" for n in range(3)},
        {"x0": "take(w, index=(0, 2, 4, 6, 8, 10))", "x1": "take(w, index=(11, 9, 7, 5, 3, 1, 0))"},
        {"x0": "slice(w, start=0, stop=8)", "x1": "slice(w, start=3, stop=12)"},
        {"x0": "slice(w, start=0, stop=8)", "x1": "take(w, index=(11, 10, 9, 8))"},
        {"x0": "take(w, index=(2, 1, 0, 3, 4, 5, 11, 10, 9, 8, 7, 6))"},
        {
            "x0": "slice(slice(w, axis=0, start=0, stop=6), axis=1, start=0, stop=3)",
            "x1": "slice(slice(w, axis=0, start=0, stop=6), axis=1, start=3, stop=6)",
            "x2": "slice(w, axis=0, start=6, stop=12)",
        },
        {"x0": "cat(slice(w, start=0, stop=5), b)", "x1": "cat(b, slice(w, start=5, stop=12))"},
    ],
)
def test_parts_make_the_whole_again(rows: dict[str, str], tmp_path: Path) -> None:
    shapes = {"w": (12, 6)} | ({"b": (2, 6)} if "b)" in rows["x0"] else {})
    state, plan, back = inverse_of(shapes, rows)
    b = surgery.write(state, plan, tmp_path / "b.safetensors")
    again = load_file(surgery.write(b, back, tmp_path / "a.safetensors"))
    assert all(torch.equal(again[name], t) for name, t in state.items())


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(8)), st.integers(1, 7), st.integers(0, 1), st.booleans())
def test_any_cut_and_order_comes_back(order: list[int], cut: int, axis: int, turned: bool) -> None:
    chosen = call("take", "w", index=tuple(order), axis=axis)
    inner = call("transpose", chosen) if turned else chosen
    rows = {
        "x": str(call("slice", inner, axis=0, start=0, stop=cut)),
        "y": str(call("slice", inner, axis=0, start=cut, stop=8)),
    }
    state, plan, back = inverse_of({"w": (8, 8)}, rows)
    from surgery.expr import evaluate

    made = {row.target: evaluate(row.expr, state.__getitem__) for row in plan.rows if row.expr is not None}
    expr = back["w"].expr
    assert expr is not None
    assert torch.equal(evaluate(expr, made.__getitem__), state["w"])


@pytest.mark.parametrize(
    ("rows", "types", "why"),
    [
        ({"x": "slice(w, start=0, stop=11)"}, {}, "x holds a part of it, as slice"),
        ({"x": "w"}, {"x": "BF16"}, "stored as BF16, which does not hold every F32"),
        ({"x": 'cast(cast(w, dtype="F16"), dtype="F32")'}, {}, "stored as F16"),
        ({"x": "exp(w)"}, {}, "x is made by exp, which is preserving"),
        ({"x": "slice(w, start=0, stop=6)", "y": "slice(w, start=7, stop=12)"}, {}, "a part of it"),
        ({"x": "zeros(shape=(3,))"}, {}, "w: dropped: x"),
    ],
)
def test_what_does_not_come_back(rows: dict[str, str], types: dict[str, str], why: str) -> None:
    with pytest.raises(surgery.PlanError, match="1 of 1 source tensors cannot be had back") as caught:
        inverse_of({"w": (12, 6)}, rows, types)
    assert why in str(caught.value)


@pytest.mark.parametrize("wide", ["F64", "F32"])
def test_a_type_that_holds_all_gives_all_back(wide: str, tmp_path: Path) -> None:
    half = {"w": torch.randn(3, 4).bfloat16(), "n": torch.arange(4, dtype=torch.int8), "e": torch.zeros(0, 2)}
    rows = tuple(
        Row(f"x{name}", Status.FILLED, parse(name), tuple(half[name].shape), dtype)
        for name, dtype in (("w", wide), ("n", wide), ("e", "F32"))
    )
    a = file_of(half, tmp_path / "a.safetensors")
    b = surgery.write(a, Plan(rows), tmp_path / "b.safetensors")
    back = Plan(rows).inverted(surgery.open(a))
    assert str(back["n"].expr) == 'cast(xn, dtype="I8")'
    again = surgery.write(b, back, tmp_path / "again.safetensors", like=a)
    assert again.read_bytes() == a.read_bytes()


# -- order, metadata, types and shards --------------------------------------------------------------------------------
def test_the_order_and_the_metadata_of_another_file(tmp_path: Path) -> None:
    state = {"z": torch.ones(2), "a": torch.arange(3), "m": torch.ones(3).half()}
    plan = identity(state)
    for metadata in (None, {"format": "np"}, {"by": "é"}):
        save_file(state, tmp_path / "a.safetensors", metadata=metadata)
        out = surgery.write(dict(state), plan, tmp_path / "b.safetensors", like=tmp_path / "a.safetensors")
        assert out.read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    save_file({"a": state["a"], "m": state["m"], "extra": torch.ones(1)}, tmp_path / "c.safetensors")
    with pytest.raises(surgery.PlanError, match=r"it has extra; it lacks z") as caught:
        surgery.write(state, plan, tmp_path / "b.safetensors", like=tmp_path / "c.safetensors")
    assert "the very names" in caught.value.hint
    rows = surgery.write(state, plan, tmp_path / "rows.safetensors", order="rows")
    assert list(surgery.open(rows)) == ["a", "z", "m"]


def test_a_cast_stands_in_the_rows(tmp_path: Path) -> None:
    state = {"w": torch.randn(4, 4), "h": torch.randn(3).bfloat16(), "n": torch.arange(2)}
    opened = surgery.open(state)
    plan = Plan(
        tuple(Row(n, Status.FILLED, parse(n), tuple(opened[n].shape), "I64" if n == "n" else "F32") for n in state)
    ).with_verdict("proven")
    small = plan.stored_as("BF16", opened)
    assert {row.target: str(row.expr) for row in small.rows} == {"w": 'cast(w, dtype="BF16")', "h": "h", "n": "n"}
    assert small.verdict is None
    assert "before that it was proven" in small.notes[-1]
    written = load_file(surgery.write(opened, small, tmp_path / "b.safetensors"))
    assert torch.equal(written["w"], state["w"].bfloat16())
    assert torch.equal(written["h"], state["h"])
    with pytest.raises(surgery.PlanError, match=r"w: stored as BF16"):
        small.inverted(opened)
    with pytest.raises(surgery.PlanError, match="no type to store weights in"):
        plan.stored_as("I8", opened)


def identity(state: Mapping[str, Tensor]) -> Plan:
    infos = surgery.open(state)
    return Plan(tuple(Row(n, Status.FILLED, parse(f'"{n}"'), infos[n].shape, infos[n].dtype) for n in infos))


def test_shards_are_those_of_huggingface_hub(tmp_path: Path) -> None:
    """Written by it and by us from the same weights: files, index and bytes; and read again into one file."""
    from huggingface_hub import save_torch_state_dict

    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=12)
    torch.manual_seed(0)
    model = transformers.GPT2Model(config)
    state = {name: t.detach() for name, t in model.state_dict().items()}
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    theirs.mkdir()
    mine.mkdir()
    save_torch_state_dict(state, theirs, max_shard_size="9KB")
    index = surgery.write(state, identity(state), mine / "model.safetensors", order="rows", shard_size="9KB")
    assert index == mine / "model.safetensors.index.json"
    assert sorted(p.name for p in theirs.iterdir()) == sorted(p.name for p in mine.iterdir())
    assert json.loads(index.read_text()) == json.loads((theirs / index.name).read_text())
    for path in mine.glob("*.safetensors"):
        assert load_file(path).keys() == load_file(theirs / path.name).keys()
    config.save_pretrained(mine)
    loaded = transformers.GPT2Model.from_pretrained(mine).state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in state.items())
    whole = surgery.write(mine, identity(state), tmp_path / "one.safetensors", order="rows")
    single = surgery.write(state, identity(state), tmp_path / "two.safetensors", order="rows")
    assert whole.read_bytes() == single.read_bytes()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(1, 50))
def test_the_split_is_that_of_huggingface_hub(sizes: list[int], limit: int) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    named = {f"t{n}": size for n, size in enumerate(sizes)}
    theirs = split_state_dict_into_shards_factory(
        named, get_storage_size=lambda size: size, filename_pattern="m{suffix}.safetensors", max_shard_size=limit
    )
    groups = shards.split(named, limit)
    files = shards.paths(Path("m.safetensors"), len(groups))
    # An empty first file, of which it is capable, is none of ours.
    assert [g for g in theirs.filename_to_tensors.values() if g] == groups
    if all(theirs.filename_to_tensors.values()):
        assert list(theirs.filename_to_tensors) == [path.name for path in files][: len(groups)]


@pytest.mark.parametrize("size", ["2", "2 apples", "0GB", 0, -1, "GB"])
def test_a_size_that_is_none(size: Any) -> None:
    with pytest.raises(surgery.CheckpointError, match="number of bytes"):
        shards.parse_size(size)


def test_sizes_are_those_of_huggingface_hub() -> None:
    from huggingface_hub.serialization._base import parse_size_to_int

    for text in ("2GB", "1.5MB", "3 KB", "7tb"):
        assert shards.parse_size(text) == parse_size_to_int(text)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_shards_are_all_there_or_none(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that fails on the way puts back what was there."""
    import os

    state = {f"t{n}": torch.full((4,), float(n)) for n in range(3)}
    out = tmp_path / "m.safetensors"
    surgery.write({k: v + 1 for k, v in state.items()}, identity(state), out, shard_size=16)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 4
    real: Callable[..., None] = os.replace
    calls: list[Any] = []

    def failing(old: Any, new: Any) -> None:
        if str(old).endswith(".part"):
            calls.append(new)
            if len(calls) == at + 1:
                raise OSError(5, "Input/output error")
        real(old, new)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(surgery.CheckpointError, match="cannot be written"):
        surgery.write(state, identity(state), out, shard_size=16)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.setattr(os, "replace", real)
    surgery.write(state, identity(state), out, shard_size=16)
    assert torch.equal(surgery.open(tmp_path / "m.safetensors.index.json").read("t2"), state["t2"])
    assert len(list(tmp_path.iterdir())) == 4
