"""Time-series files in the names of neuralforecast and Time-Series-Library: run, grafted, loaded.

neuralforecast's own models are what the references are compared with. Time-Series-Library is on no package index: its
models (Informer, Autoformer, PatchTST, TimesNet; three channels, calendar features as
numbers) were run beside the references of embedding, encoder, decoder and head, once, from a copy of its repository
outside of this one. In float64 they differed by 5e-16 at most, and most not at all. What is tested here of that library
is the names and shapes, which neuralforecast's modules have as well.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import surgery
import zoo
from tests.plugins.test_zoo_timeseries import shaken
from zoo import cli

pytest.importorskip("neuralforecast")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from neuralforecast import models


_SHARED: dict[str, Any] = {"h": 4, "input_size": 24, "hidden_size": 8, "encoder_layers": 2, "scaler_type": "standard"}
_LAGGED = {**_SHARED, "n_head": 2, "conv_hidden_size": 12, "decoder_layers": 1, "factor": 3, "activation": "gelu"}
_LAGGED["decoder_input_size_multiplier"] = 0.5
ARGUMENTS: dict[str, dict[str, Any]] = {
    "PatchTST": {
        **_SHARED,
        "n_heads": 2,
        "linear_hidden_size": 12,
        "patch_len": 6,
        "stride": 3,
        "activation": "gelu",
        "res_attention": True,
        "batch_normalization": False,
        "revin": True,
        "revin_subtract_last": True,
        "revin_affine": True,
    },
    "Informer": {**_LAGGED, "distil": True},
    "Autoformer": {**_LAGGED, "MovingAvg_window": 5},
    "TimesNet": {**_SHARED, "conv_hidden_size": 6, "top_k": 2, "num_kernels": 2},
}
KINDS = list(ARGUMENTS)
ENCODED = {"PatchTST": "last_hidden_state"}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    torch.manual_seed(0)
    found = {kind: getattr(models, kind)(**arguments) for kind, arguments in ARGUMENTS.items()}
    for model in found.values():
        scales = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("sdp_attn.scale")}
        model.load_state_dict({**shaken(model).state_dict(), **scales})
    return found


@pytest.fixture(scope="module")
def saved(made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By kind: model.ckpt as neuralforecast writes it; lightning.ckpt, as it did before its version 3.3; told/ and
    bare/checkpoint.pth, with and without config.json."""
    folder = tmp_path_factory.mktemp("saved")
    for kind, model in made.items():
        for place in ("told", "bare"):
            (folder / kind / place).mkdir(parents=True)
            torch.save(model.state_dict(), folder / kind / place / "checkpoint.pth")
        model.save(str(folder / kind / "model.ckpt"))
        lightning = {"epoch": 1, "state_dict": model.state_dict(), "hyper_parameters": ARGUMENTS[kind]}
        torch.save(lightning, folder / kind / "lightning.ckpt")
        (folder / kind / "told" / "config.json").write_text(json.dumps(ARGUMENTS[kind]))
    return folder


def probe_of(name: str, part: str | None, path: Path, config: dict[str, Any] | None = None) -> zoo.PartProbe:
    entry, checkpoint = zoo.find(name), surgery.open(path)
    found = None if part is None else entry.part(part)
    text = entry.probe if found is None else found.probe
    assert text is not None
    if found is not None:
        checkpoint = checkpoint.view(entry.tensors_of(found, checkpoint))
    module, _, function = text.partition(":")
    probe = getattr(import_module(module), function)(checkpoint, config or {})
    assert isinstance(probe, zoo.PartProbe)
    return probe


def seen(model: Any, module: str, run: Callable[[], object]) -> tuple[Any, Any]:
    """(what a module of the library's model was given, what it gave) while it ran."""
    kept: list[tuple[Any, Any]] = []
    hook = model.get_submodule(module).register_forward_hook(lambda _m, x, y: kept.append((x[0], y)))
    try:
        run()
    finally:
        hook.remove()
    return kept[0]


# ---------------------------------------------------------------------------------------------------- references


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["model.ckpt", "lightning.ckpt", "told/checkpoint.pth"])
def test_the_whole_is_the_librarys_model(kind: str, file: str, made: dict[str, Any], saved: Path) -> None:
    config = ARGUMENTS[kind] if file.startswith("told") else {}
    probe = probe_of(kind.lower(), None, saved / kind / file, config)
    x = probe.inputs(1, "plain")
    assert x["past_values"].shape == (2, 24, 1)
    model = _all_attend(made[kind])
    with torch.no_grad():
        got = probe.run(probe.reference, x)[-1]
        torch.testing.assert_close(got, model({"insample_y": x["past_values"], "futr_exog": None}))


def _all_attend(model: Any) -> Any:
    """Every query attends in the references: in an Informer as it is, chance picks some of them."""
    for child in model.modules():
        if type(child).__name__ == "ProbAttention":
            child.factor = 99
    return model


@pytest.mark.parametrize("kind", ["Informer", "Autoformer"])
def test_parts_of_two_sides(kind: str, made: dict[str, Any], saved: Path) -> None:
    model, path = _all_attend(made[kind]), saved / kind / "model.ckpt"

    def of(part: str, inner: str) -> None:
        """A part against what the library's model gave where it stands."""
        probe = probe_of(kind.lower(), part, path)
        x = probe.inputs(2, probe.variants[-1])
        with torch.no_grad():
            for value, expected in zip(probe.run(probe.reference, x), outputs[part](inner, x), strict=True):
                torch.testing.assert_close(value, expected)

    def whole(x: dict[str, Tensor]) -> Callable[[], object]:
        return lambda: model({"insample_y": x["past_values"], "futr_exog": None})

    outputs: dict[str, Callable[[str, dict[str, Tensor]], tuple[Tensor, ...]]] = {
        "embedding": lambda inner, x: (model.get_submodule(inner)(x["past_values"]),),
        "encoder": lambda inner, x: (seen(model, inner, whole(x))[1][0],),
        "decoder": lambda inner, x: _decoded(model, x),
        "head": lambda inner, x: (model.get_submodule(inner)(x["hidden_states"]),),
    }
    of("embedding", "enc_embedding")
    of("encoder", "encoder")
    of("decoder", "decoder")
    of("head", "decoder.projection")


def _decoded(model: Any, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    also = {"trend": x["trend"]} if "trend" in x else {}
    found = model.decoder(model.dec_embedding(x["past_values"], None), x["encoder_hidden_states"], **also)
    return found if isinstance(found, tuple) else (found,)


def test_parts_of_patchtst(made: dict[str, Any], saved: Path) -> None:
    model, path = made["PatchTST"], saved / "PatchTST" / "model.ckpt"
    encoder = probe_of("patchtst", "encoder", path)
    x = encoder.inputs(1, "plain")
    with torch.no_grad():
        run = lambda: model({"insample_y": x["past_values"]})  # noqa: E731
        patches, hidden = seen(model, "model.backbone", run)
        torch.testing.assert_close(encoder.run(encoder.reference, x)[0], hidden.transpose(2, 3))
        embedded, _ = seen(model, "model.backbone.encoder", run)
        embedding = probe_of("patchtst", "embedding", path)
        (got,) = embedding.run(embedding.reference, {"patch_input": patches.transpose(2, 3)})
        torch.testing.assert_close(got.flatten(0, 1), embedded)
        head = probe_of("patchtst", "head", path)
        assert head.inputs(0, "plain")["hidden_states"].shape == (2, 1, 8, 8)
        (got,) = head.run(head.reference, {"hidden_states": hidden.transpose(2, 3)})
        torch.testing.assert_close(got, model.model.head(hidden))


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_tensor_tells_is_asked_for(kind: str, saved: Path) -> None:
    """The same tensors compute another thing with other heads, another activation, another number of periods."""
    path = saved / kind / "bare" / "checkpoint.pth"
    wanted = {
        "PatchTST": ["n_heads", "stride", "activation", "res_attention", "batch_normalization", "revin"],
        "Informer": ["activation"],
        "Autoformer": ["factor"],
        "TimesNet": ["top_k"],
    }
    with pytest.raises(zoo.ZooError) as caught:
        probe_of(kind.lower(), "encoder", path)
    assert all(name in str(caught.value) and name in caught.value.hint for name in wanted[kind])
    assert "config.json" in caught.value.hint
    for part in (None, "load"):
        with pytest.raises(zoo.ZooError):
            zoo.load(f"file:{path}") if part else probe_of(kind.lower(), None, path)


@pytest.mark.parametrize("kind", KINDS)
def test_other_functions_of_the_same_tensors(kind: str, made: dict[str, Any], saved: Path) -> None:
    """Each of what is asked for is no idle question: another value gives another output."""
    other: dict[str, dict[str, Any]] = {
        "PatchTST": {"n_heads": 4, "activation": "relu", "res_attention": False, "revin_subtract_last": False},
        "Informer": {"n_head": 4, "activation": "relu"},
        "Autoformer": {"factor": 1, "activation": "relu", "MovingAvg_window": 7},
        "TimesNet": {"top_k": 1},
    }
    right = probe_of(kind.lower(), "encoder", saved / kind / "told" / "checkpoint.pth", ARGUMENTS[kind])
    x = right.inputs(1, "plain")
    for name, value in other[kind].items():
        if (kind, name) == ("PatchTST", "n_heads"):
            continue  # the file holds a scale for each number of heads
        wrong = probe_of(
            kind.lower(), "encoder", saved / kind / "told" / "checkpoint.pth", {**ARGUMENTS[kind], name: value}
        )
        with torch.no_grad():
            a, b = right.run(right.reference, x)[0], wrong.run(wrong.reference, x)[0]
        assert float((a - b).abs().max()) > 1e-3, name


# ---------------------------------------------------------------------------------------------------- loaded


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_it_forecasts_as_neuralforecast_does(kind: str, made: dict[str, Any], saved: Path) -> None:
    """Against neuralforecast's own prediction of the steps after the series' end, with its scaling."""
    import pandas
    from neuralforecast.tsdataset import TimeSeriesDataset

    past = numpy.random.default_rng(0).normal(size=40).cumsum() * 3 + 20
    frame = pandas.DataFrame({"unique_id": "a", "ds": range(len(past)), "y": past.astype("float32")})
    dataset, *_ = TimeSeriesDataset.from_df(frame)
    model = _all_attend(
        models.__dict__[kind](**ARGUMENTS[kind], accelerator="cpu", logger=False, enable_progress_bar=False)
    )
    model.load_state_dict(made[kind].state_dict())
    expected = torch.as_tensor(model.predict(dataset)).reshape(1, 4, 1)
    loaded = zoo.load(f"file:{saved / kind / 'model.ckpt'}")
    _all_attend(loaded.model)
    got = loaded.run(past)
    torch.testing.assert_close(got.clone(), expected, rtol=1e-4, atol=1e-4)
    assert loaded.describe(got)["shape"] == [1, 4, 1]
    told = zoo.load(f"file:{saved / kind / 'told' / 'checkpoint.pth'}")
    _all_attend(told.model)
    torch.testing.assert_close(told.run(past), got)
    with pytest.raises(zoo.ZooError, match="1 channels"):
        loaded.run(numpy.ones((40, 2)))


# ---------------------------------------------------------------------------------------------------- grafted

MINE = Path(__file__).parent / "own_timeseries.py"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        status = cli.main([*arguments, "--json"])
        captured = capsys.readouterr()
        return status, json.loads(captured.out) if captured.out else {}, captured.err

    return call


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "TimesNet"])  # its example is grafted elsewhere
@pytest.mark.parametrize("file", ["model.ckpt", "lightning.ckpt", "told/checkpoint.pth"])
def test_grafted_into_a_module_of_ones_own(kind: str, file: str, saved: Path, run: Any) -> None:
    ref, mine = f"file:{saved / kind / file}#encoder", f"{MINE}:My{kind}"
    status, done, err = run("graft", ref, mine, "-o", "mine.safetensors")
    assert (status, done.get("verdict")) == (0, "proven"), err + json.dumps(done)[:2000]
    output = ENCODED.get(kind, "encoder_last_hidden_state")
    assert done["proof"]["passes"][0]["residuals"].keys() == {output}
    assert done["counts"]["new"] == 2
    status, done, err = run("verify", ref, mine, "--weights", "mine.safetensors")
    assert (status, done.get("verdict")) == (0, "proven"), err


LIBRARYS = """
import warnings
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from neuralforecast.models import {kind}


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, child in {kind}(**{arguments!r}).named_children():
            if name in {names!r}:
                setattr(self, name, child)
        {after}
"""
ENCODERS = {"PatchTST": ["model"], "TimesNet": ["model", "layer_norm"]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["encoder", "whole"])
def test_by_names_alone(kind: str, part: str, made: dict[str, Any], saved: Path, run: Any) -> None:
    """Without a configuration nothing is run. Into the library's own modules there is one mapping: name to name."""
    children = [name for name, child in made[kind].named_children() if child.state_dict()]
    names = ENCODERS.get(kind, ["enc_embedding", "encoder"]) if part == "encoder" else children
    after = "del self.model.head" if (part, kind) == ("encoder", "PatchTST") else ""
    Path("mine.py").write_text(LIBRARYS.format(kind=kind, arguments=ARGUMENTS[kind], names=names, after=after))
    ref = f"file:{saved / kind / 'bare' / 'checkpoint.pth'}" + ("#encoder" if part == "encoder" else "")
    accept: list[str] = []
    if part == "encoder" and kind in ("Informer", "Autoformer"):
        # All of its linear maps are square, and without others beside them nothing says which way they lie.
        status, done, err = run("graft", ref, "mine.py:Mine", "--static", "-o", "mine.safetensors")
        assert (status, done.get("verdict")) == (1, "ambiguous"), err
        assert "as it is or transposed" in done["message"]
        accept = ["--accept", "1"]
    status, done, err = run("graft", ref, "mine.py:Mine", "--static", *accept, "-o", "mine.safetensors")
    assert (status, done.get("verdict")) == (0, "consistent"), err + json.dumps(done)[:2000]
    written, source = surgery.open("mine.safetensors"), surgery.open(made[kind].state_dict())
    assert len(written) >= 18
    for name in written:
        assert torch.equal(written.read(name), source.read(name)), name
