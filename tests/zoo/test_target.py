"""A person's file to a module: which class, which arguments, which inputs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo import fit, inputs, target

HEAD = "import torch\nfrom torch import nn\n"
LEAF = "class {name}({base}):\n    def __init__(self{more}):\n        super().__init__()\n        {body}\n"


def write(tmp_path: Path, text: str, name: str = "mine.py") -> str:
    path = tmp_path / name
    path.write_text(HEAD + text)
    return str(path)


def leaf(name: str, body: str = "pass", *, base: str = "nn.Module", more: str = "") -> str:
    return LEAF.format(name=name, body=body, base=base, more=more)


# ---------------------------------------------------------------------------------------------------- the class


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (leaf("Only"), "Only"),
        (leaf("Part") + leaf("Whole", "self.part = Part()"), "Whole"),
        (leaf("Whole", "self.part = Part()") + leaf("Part"), "Whole"),
        (leaf("Base") + leaf("Mine", base="Base"), "Mine"),
        (leaf("Part") + leaf("Middle", "self.x = Part()") + leaf("Top", "self.x = [Middle() for _ in '12']"), "Top"),
        ("from torch.nn import Linear\n" + leaf("Mine", "self.x = Linear(2, 2)"), "Mine"),
        (leaf("Mine") + "class Settings:\n    pass\n", "Mine"),
    ],
)
def test_the_class_that_no_other_uses(tmp_path: Path, text: str, chosen: str) -> None:
    assert target.load(write(tmp_path, text)).name == chosen


def test_it_says_why(tmp_path: Path) -> None:
    found = target.load(write(tmp_path, leaf("Part") + leaf("Whole", "self.part = Part()")))
    assert found.notes == (f"Whole of {found.file}: the only one that no other module there uses (1)",)
    assert target.load(write(tmp_path, leaf("Only"))).notes == ()


@pytest.mark.parametrize("text", [leaf("A") + leaf("B"), leaf("A", "B") + leaf("B", "A")])
def test_more_than_one(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(zoo.ZooError, match="A, B") as caught:
        target.load(file)
    assert (caught.value.kind, caught.value.hint) == ("ambiguous", f"name one, as in {file}:B")
    assert target.load(f"{file}:A").name == "A"


def test_named_things(tmp_path: Path) -> None:
    """A class that is imported, or a function that makes a module, will do if it is asked for."""
    file = write(
        tmp_path, "from torch.nn import Identity\ndef make(size=3):\n    return nn.Linear(size, size)\nx = 1\n"
    )
    assert isinstance(target.load(f"{file}:Identity").model, nn.Identity)
    made = target.load(f"{file}:make", sets=["size=5"]).model
    assert isinstance(made, nn.Linear)
    assert made.in_features == 5
    with pytest.raises(zoo.ZooError, match="x is no nn.Module"):
        target.load(f"{file}:x")
    with pytest.raises(zoo.ZooError, match="gave a int"):
        target.load(write(tmp_path, "def make():\n    return 3\n", "three.py") + ":make")


def test_the_file_runs_at_home(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Imports from beside it work, nothing is left on sys.path or on the disk, and stdout stays clean."""
    (tmp_path / "beside_it.py").write_text("size = 7\n")
    before = list(sys.path)
    file = write(tmp_path, "print('hello')\nfrom beside_it import size\n" + leaf("Mine", "self.x = nn.Linear(size, 1)"))
    made = target.load(file).model
    assert made.x.in_features == 7
    assert sys.path == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside_it.py", "mine.py"]
    assert capsys.readouterr() == ("", "hello\n")


def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    """torch.py in a person's folder must not stand in the way of torch."""
    assert target.load(write(tmp_path, leaf("Mine"), "tokenize.py")).name == "Mine"
    assert "tmp" not in str(sys.modules["tokenize"].__file__ if "tokenize" in sys.modules else "")


def test_a_module_in_a_package(tmp_path: Path) -> None:
    package = tmp_path / "weightzoo_test_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text(HEAD + leaf("Part"))
    (package / "mine.py").write_text(HEAD + "from .parts import Part\n" + leaf("Mine", "self.part = Part()"))
    assert target.load(str(package / "mine.py")).name == "Mine"


def test_seeds(tmp_path: Path) -> None:
    file = write(tmp_path, leaf("Mine", "self.x = nn.Linear(3, 3)"))
    one, same, other = (target.load(file, seed=seed).model.state_dict()["x.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# ---------------------------------------------------------------------------------------------------- arguments

ARGUMENTS = leaf(
    "Mine", "self.got = (d_model, depth, act, wide)", more=", d_model, depth=2, act='relu', wide=False, **kw"
)


def test_set(tmp_path: Path) -> None:
    file = write(tmp_path, ARGUMENTS)
    made = target.load(file, sets=["d_model=(1, 2)", "act=gelu", "wide=true", "more=[1]"]).model
    assert made.got == ((1, 2), 2, "gelu", True)
    with pytest.raises(zoo.ZooError, match="needs the argument d_model") as caught:
        target.load(file)
    assert caught.value.hint.startswith("--set d_model=...; or --fit")


def test_fit(tmp_path: Path) -> None:
    config = {"hidden_size": 8, "num_hidden_layers": 5, "hidden_act": "silu", "architectures": ["X"], "use_cache": True}
    found = target.load(write(tmp_path, ARGUMENTS), config=config, sets=["depth=1"])
    assert found.model.got == (8, 1, "silu", False)
    assert found.notes == ("--fit took d_model=8 (hidden_size), act='silu' (hidden_act)",)
    nothing = target.load(write(tmp_path, leaf("Mine"), "none.py"), config=config)
    assert nothing.notes == ("--fit took nothing: config.json has none of its arguments",)


@pytest.mark.parametrize(
    ("name", "config", "value"),
    [
        ("hidden", {"hidden_size": 8}, 8),
        ("dim", {"d_model": 8}, 8),
        ("heads", {"n_head": 4}, 4),
        ("ffn", {"dim": 8, "hidden_dim": 32}, 32),
        ("width", {"dim": 8, "hidden_dim": 32}, 8),
        ("width", {"hidden_dim": 32}, 32),
        ("layers", {"n_layers": 3, "num_labels": 2}, 3),
        ("classes", {"num_labels": 2}, None),
        ("num_labels", {"num_labels": 2}, 2),
        ("hidden", {"hidden_size": [8, 16]}, None),
        ("speaker", {"hidden_size": 8}, None),
    ],
)
def test_words_for_the_same_thing(name: str, config: dict[str, Any], value: object) -> None:
    taken = fit.from_config(name, config)
    assert (taken.value if taken else None) == value


def test_a_word_means_one_thing() -> None:
    words = [word for line in fit.SYNONYMS for word in line]
    assert len(words) == len(set(words))


# ---------------------------------------------------------------------------------------------------- inputs


class Recorder(nn.Module):
    """Takes anything, and keeps what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(1, 1)
        self.got: list[Any] = []


def standard(seed: int, variant: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shape = {"plain": (2, 6), "padded": (2, 6), "shortest": (1, 1), "longest": (1, 9)}[variant]
    mask = torch.ones(shape, dtype=torch.long)
    if variant == "padded":
        mask[1, 4:] = 0
    ids = torch.randint(0, 40, shape, generator=draw)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}


PART = zoo.PartProbe(nn.Linear(1, 1), lambda module, x: (x["input_ids"],), standard, outputs=("out",))


def gathered(forward: Any, example: Any = None) -> tuple[inputs.Inputs, Recorder]:
    """What is gathered for a module with this forward."""
    kind = type("Mine", (Recorder,), {"forward": forward})
    model = kind()
    return inputs.gather(model, PART, example=example), model


def same(found: inputs.Inputs, at: int, seed: int, variant: str, *names: str) -> None:
    """The reference sees what the entry's sample inputs are."""
    read = found.call.read(found.xs[at])
    expected = standard(seed, variant)
    assert set(read) == set(names)
    assert all(torch.equal(read[name], expected[name]) for name in names)


def test_one_argument_is_the_main_input() -> None:
    found, _ = gathered(lambda self, whatever: whatever)
    assert found.labels == ("search", "plain", "shortest", "longest")
    assert set(found.xs[0]) == {"whatever"}
    same(found, 1, 1, "plain", "input_ids")
    assert any("no mask" in note for note in found.notes)


def test_further_arguments_go_by_name() -> None:
    found, _ = gathered(lambda self, ids, segments=None, mask=None, labels=None: ids)
    assert found.labels == ("search", "plain", "padded", "shortest", "longest")
    assert set(found.xs[0]) == {"ids", "segments", "mask"}
    same(found, 2, 2, "padded", "input_ids", "attention_mask", "token_type_ids")
    assert found.xs[2]["mask"].tolist() == standard(2, "padded")["attention_mask"].tolist()


def test_a_padding_mask_is_the_inverse() -> None:
    found, _ = gathered(lambda self, src, src_key_padding_mask: src)
    mask = found.xs[2]["src_key_padding_mask"]
    assert mask.dtype is torch.bool
    assert torch.equal(mask, standard(2, "padded")["attention_mask"] == 0)
    same(found, 2, 2, "padded", "input_ids", "attention_mask")


def test_the_spelling_of_a_mask_is_found_by_trying() -> None:
    found, _ = gathered(lambda self, ids, mask: torch.zeros(ids.shape).masked_fill(~mask, 1.0))
    assert found.xs[0]["mask"].dtype is torch.bool
    same(found, 2, 2, "padded", "input_ids", "attention_mask")


def test_a_forward_that_takes_one_length() -> None:
    """Without an example the variants it refuses are left out; with one, its shapes are taken instead."""

    def forward(self: Any, ids: Tensor, mask: Tensor) -> Tensor:
        if ids.shape[1] != 6:
            raise ValueError("six, please")
        return ids

    found, _ = gathered(forward)
    assert found.labels == ("search", "plain", "padded")
    assert "not run on longest (1 x 9): forward raised ValueError: six, please" in found.notes
    found, _ = gathered(forward, (torch.zeros(3, 6, dtype=torch.int32), torch.ones(3, 6, dtype=torch.bool)))
    assert found.labels == ("search", "plain", "padded", "shortest", "longest")
    assert [tuple(x[0].shape) for x in found.xs] == [(2, 6), (2, 6), (2, 6), (3, 6), (3, 6)]
    assert (found.xs[0][0].dtype, found.xs[0][1].dtype) == (torch.int32, torch.bool)
    same(found, 1, 1, "plain", "input_ids", "attention_mask")


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), "mask"),
        (torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]]), "att"),
        (torch.tensor([[False, False, False, False], [False, False, True, True]]), "mask"),
        (torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]]), "padding"),
        (torch.tensor([[0.0, 0, 0, 0], [0, 0, -1e9, -1e9]]), "mask"),
        (torch.tensor([[True, True, True, True], [True, True, False, False]])[:, None, None], "mask"),
    ],
)
def test_an_example_shows_how_the_mask_is_spelled(mask: Tensor, name: str) -> None:
    name = f"{name}_mask" if name == "att" else name
    scope: dict[str, Any] = {}
    exec(f"def forward(self, tokens, {name}): return tokens", scope)
    example = {"tokens": torch.zeros(2, 4, dtype=torch.long), name: mask}
    found, _ = gathered(scope["forward"], example)
    padded = found.xs[2][name]
    assert (padded.dtype, padded.dim()) == (mask.dtype, mask.dim())
    hidden = padded.reshape(2, 6)[1, 4:]
    shown = mask.reshape(2, 4)[1, 2:]
    assert bool((hidden != 0).all()) == bool((shown != 0).all())
    same(found, 2, 2, "padded", "input_ids", "attention_mask")


def test_what_the_reference_does_not_know_stays() -> None:
    scale = torch.tensor(2.5)
    found, _ = gathered(lambda self, ids, scale, flag: ids, (torch.zeros(2, 3, dtype=torch.long), scale, True))
    assert all(x[1] is scale and x[2] is True for x in found.xs)
    assert any("scale is nothing the reference knows of" in note for note in found.notes)
    same(found, 1, 1, "plain", "input_ids")


def test_positions_are_counted() -> None:
    found, _ = gathered(lambda self, ids, position_ids: ids)
    assert found.xs[0]["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    same(found, 0, 0, "plain", "input_ids")


def test_an_argument_that_is_a_dict() -> None:
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3)}
    found, _ = gathered(lambda self, batch: batch["input_ids"], batch)
    (x,) = found.xs[2]
    assert x["attention_mask"].dtype is torch.float32
    same(found, 2, 2, "padded", "input_ids", "attention_mask")


def test_a_single_tensor() -> None:
    found, _ = gathered(lambda self, x: x, torch.zeros(2, 3, dtype=torch.long))
    assert isinstance(found.xs[0], Tensor)
    same(found, 3, 4, "longest", "input_ids")


def test_trying_changes_nothing() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)
            self.drop = nn.Dropout()

        def forward(self, ids: Tensor) -> Tensor:
            return self.drop(self.norm(ids.float().reshape(-1, 1)))

    model = Counting().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    inputs.gather(model, PART)
    assert torch.equal(torch.rand(1), expected)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_stays_open_is_asked_for() -> None:
    with pytest.raises(zoo.ZooError) as caught:
        gathered(lambda self, ids, mask, speaker: ids)
    assert "speaker" in str(caught.value)
    text = caught.value.hint.partition("\n\n")[2]
    assert "    return ids, mask, speaker" in text
    scope: dict[str, Any] = {"torch": torch}
    exec(text, scope)
    ids, mask, rest = scope["example"]()
    assert (tuple(ids.shape), tuple(mask.shape), rest) == ((2, 6), (2, 6), ...)
    with pytest.raises(zoo.ZooError, match="none of the inputs of its example is input_ids"):
        gathered(lambda self, x: x, torch.zeros(2, 3))
