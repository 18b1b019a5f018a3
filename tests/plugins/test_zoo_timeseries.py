"""The time-series plugin against the libraries' own models: tiny, seeded, saved as published, pulled and grafted."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import surgery
import zoo as package
from tests.hub_server import HubServer
from tests.zoo.conftest import Zoo
from zoo import cli

transformers = pytest.importorskip("transformers")

_LAGGED = {
    "prediction_length": 6,
    "context_length": 12,
    "lags_sequence": [1, 2, 3],
    "num_time_features": 2,
    "num_static_categorical_features": 1,
    "cardinality": [7],
    "embedding_dimension": [2],
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "num_parallel_samples": 3,
}
_PATCHED = {
    "num_input_channels": 2,
    "context_length": 20,
    "patch_length": 4,
    "patch_stride": 3,
    "d_model": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "ffn_dim": 12,
    "prediction_length": 5,
    "norm_type": "batchnorm",
    "pre_norm": True,
    "scaling": "std",
    "use_cls_token": False,
    "loss": "mse",
    "do_mask_input": False,
}
_LAGGED_SETS = {"feature_size": 9, "d_model": 8, "encoder_layers": 2, "encoder_ffn_dim": 12, "positions": 18}
_PARTS = {"embedding", "static", "encoder", "decoder", "head"}


@dataclass(frozen=True)
class Row:
    """A family: how it is made tiny, where it is published, and how its example is."""

    name: str
    kind: str
    settings: dict[str, Any]
    repository: str
    parts: set[str]
    sets: dict[str, int]
    steps: int  # of a series that is long enough
    channels: int = 1
    horizon: int = 6
    output: str = "encoder_last_hidden_state"


ROWS = [
    Row(
        "patchtst",
        "PatchTST",
        _PATCHED,
        "ibm-granite/granite-timeseries-patchtst",
        {"embedding", "encoder", "head"},
        {name: _PATCHED[name] for name in list(_PATCHED)[1:8]},
        steps=23,
        channels=2,
        horizon=5,
        output="last_hidden_state",
    ),
    Row(
        "informer",
        "Informer",
        _LAGGED,
        "huggingface/informer-tourism-monthly",
        _PARTS,
        {**_LAGGED_SETS, "encoder_attention_heads": 2},
        steps=20,
    ),
    Row(
        "autoformer",
        "Autoformer",
        {**_LAGGED, "label_length": 4, "moving_average": 5},
        "huggingface/autoformer-tourism-monthly",
        _PARTS,
        {**_LAGGED_SETS, "moving_average": 5},
        steps=20,
    ),
]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """So that no bias is zero, and no norm the identity; the tables of positions are what they are."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and "position" not in name:
                noise = 0.1 * torch.randn_like(value)
                value.add_(noise.abs() if "running_var" in name else noise)
    return model.eval()


def made(row: Row) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{row.kind}Config")(**row.settings)
    return shaken(getattr(transformers, f"{row.kind}ForPrediction")(config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Each model, and the folder that transformers saved it into."""
    found = {}
    for row in ROWS:
        folder = tmp_path_factory.mktemp(row.name)
        model = made(row)
        model.save_pretrained(folder)
        found[row.name] = (model, folder)
    return found


@pytest.fixture
def host() -> Iterator[package.Host]:
    import zoo_timeseries

    warned: list[str] = []
    yield package.Host({"timeseries": zoo_timeseries}, switches="", warn=warned.append)
    assert warned == []


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


def example(root: Path, name: str, sets: dict[str, int]) -> list[str]:
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    return [str(root / "examples" / f"my_{name}.py"), *words]


# ---------------------------------------------------------------------------------------------------- transformers


@rows
def test_pulled_and_shown(row: Row, saved: Any, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in saved[row.name][1].iterdir()}
    with HubServer() as hub:
        hub.add(row.repository, files)
        zoo = Zoo(tmp_path, tmp_path).online(hub.endpoint)
        done = zoo("show", row.name, "--json")
        assert done.status == 0, done.err
        assert {part["name"] for part in done.json["parts"]} == row.parts
        done = zoo("pull", row.name)
        assert done.status == 0, done.err
        assert "model.safetensors" in zoo.cached


@rows
@pytest.mark.parametrize("known", ["config and tensors", "tensors alone"])
def test_recognised(row: Row, known: str, saved: Any, host: package.Host) -> None:
    model, _ = saved[row.name]
    config = model.config.to_dict() if known == "config and tensors" else {}
    for tensors in (model.state_dict(), model.model.state_dict()):
        found = host.recognise(config, surgery.open(tensors))
        assert [each.entry for each in found] == [row.name]
    assert host.recognise({"model_type": "gpt2"}, surgery.open(model.state_dict())) == []


@rows
def test_every_tensor_is_in_a_part(row: Row, saved: Any, host: package.Host) -> None:
    tensors = surgery.open(saved[row.name][0].state_dict())
    entry = host.find(row.name)
    held = {part.name: set(entry.tensors_of(part, tensors)) for part in entry.parts}
    assert set(held) == row.parts
    assert set().union(*held.values()) == set(tensors)
    assert held["embedding"] < held["encoder"]
    assert sum(map(len, held.values())) - len(held["embedding"]) == len(tensors)


@rows
def test_the_reference_is_the_librarys_model(row: Row, saved: Any) -> None:
    """The whole probe against the model that was saved, on what a person would give it."""
    model, folder = saved[row.name]
    probe = _probe(f"file:{folder}")
    x = probe.inputs(3, "plain")
    if row.name == "informer":
        # Every query attends in the reference; in the model as saved, chance picks some of them.
        for layer in model.model.encoder.layers:
            layer.self_attn.factor = 99
    with torch.no_grad():
        got = dict(zip(probe.outputs, probe.run(probe.reference, x), strict=True))
        answer = model(**x)
        torch.testing.assert_close(got.pop(row.output), _hidden(row, model, answer, x))
        expected = [answer.prediction_outputs] if row.name == "patchtst" else answer.params
    for value, other in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(value, other)


def _hidden(row: Row, model: Any, answer: Any, x: dict[str, torch.Tensor]) -> torch.Tensor:
    if row.name == "patchtst":
        return model.model(**x).last_hidden_state
    return answer.encoder_last_hidden_state


def _probe(ref: str) -> package.PartProbe:
    from zoo.resolving import resolve

    found = resolve(ref).reference()
    assert found is not None
    return found


@rows
def test_parts_run_in_double(row: Row, saved: Any) -> None:
    for part in row.parts:
        probe = _probe(f"file:{saved[row.name][1]}#{part}")
        module = probe.reference.double()
        for variant in probe.variants:
            x = {k: v.double() if v.is_floating_point() else v for k, v in probe.inputs(1, variant).items()}
            with torch.no_grad():
                outputs = probe.run(module, x)
                again = probe.run(module, x)
            assert len(outputs) == len(probe.outputs)
            assert all(value.dtype == torch.float64 for value in outputs)
            assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


@rows
def test_the_example_is_proven_and_verified(row: Row, saved: Any, run: Any, root: Path) -> None:
    ref, mine = f"file:{saved[row.name][1]}#encoder", example(root, row.name, row.sets)
    status, done, err = run("graft", ref, *mine, "-o", "mine.safetensors")
    assert (status, done.get("verdict")) == (0, "proven"), err
    residuals = done["proof"]["passes"][0]["residuals"]
    assert list(residuals) == [row.output]
    assert residuals[row.output] < 1e-12
    status, done, err = run("verify", ref, *mine, "--weights", "mine.safetensors")
    assert (status, done.get("verdict")) == (0, "proven"), err
    # The sizes are in the configuration as well, but for the number of positions.
    longest = ["--set", "positions=18"] if "positions" in row.sets else []
    status, done, err = run("graft", ref, mine[0], "--fit", *longest, "-o", "fitted.safetensors")
    assert (status, done.get("verdict")) == (0, "proven"), err


@rows
def test_loaded_and_run(row: Row, saved: Any, tmp_path: Path) -> None:
    model, folder = saved[row.name]
    loaded = package.load(f"file:{folder}")
    past = numpy.random.default_rng(0).normal(size=(row.steps, row.channels)).cumsum(0)
    forecast = loaded.run(past)
    assert forecast.shape == (1, row.horizon, row.channels)
    assert forecast.isfinite().all()
    if row.name == "patchtst":
        x = torch.tensor(past, dtype=torch.float32)[None, -20:]
        with torch.no_grad():
            torch.testing.assert_close(forecast, model(past_values=x).prediction_outputs)
    numpy.save(tmp_path / "past.npy", past)
    numpy.savetxt(tmp_path / "past.csv", past, delimiter=",", header="a,b"[: 2 * row.channels - 1], comments="")
    for name in ("past.npy", "past.csv"):
        torch.testing.assert_close(loaded.run(tmp_path / name), forecast)
    said = json.loads(json.dumps(loaded.describe(forecast)))
    assert said["shape"] == [1, row.horizon, row.channels]
    assert len(said["first"]) == row.channels
    for wrong in (past[:5], numpy.ones((99, 3)), numpy.full_like(past, numpy.nan)):
        with pytest.raises(package.ZooError):
            loaded.run(wrong)


def test_files_that_are_no_series(saved: Any, tmp_path: Path) -> None:
    loaded = package.load(f"file:{saved['patchtst'][1]}")
    (tmp_path / "words.csv").write_text("a,b\nc,d\n")
    (tmp_path / "x.txt").write_text("1\n")
    for name in ("words.csv", "x.txt", "none.npy"):
        with pytest.raises(package.ZooError):
            loaded.run(tmp_path / name)


# ---------------------------------------------------------------------------------------------------- other layouts


@pytest.fixture(scope="module")
def forecasters() -> Any:
    """neuralforecast's models, which name most tensors as Time-Series-Library does."""
    pytest.importorskip("neuralforecast")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from neuralforecast import models
    return models


@pytest.mark.parametrize("kind", ["PatchTST", "Informer", "Autoformer"])
def test_neuralforecasts_models_are_recognised(forecasters: Any, host: package.Host, kind: str) -> None:
    sizes: dict[str, Any] = {"h": 4, "input_size": 12, "hidden_size": 8, "encoder_layers": 2}
    sizes |= {"patch_len": 4, "stride": 2, "n_heads": 2} if kind == "PatchTST" else {"n_head": 2}
    tensors = surgery.open(getattr(forecasters, kind)(**sizes).state_dict())
    assert [each.entry for each in host.recognise({}, tensors)] == [kind.lower()]
    entry = host.find(kind.lower())
    held = {part.name: set(entry.tensors_of(part, tensors)) for part in entry.parts if part.name != "static"}
    buffers = {name for name in tensors if name.endswith("sdp_attn.scale")}
    assert set().union(*held.values()) >= set(tensors) - buffers


@pytest.fixture(scope="module")
def timesnet(forecasters: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    sizes = {"hidden_size": 8, "conv_hidden_size": 6, "top_k": 2, "num_kernels": 2, "encoder_layers": 2}
    model = shaken(forecasters.TimesNet(h=4, input_size=12, **sizes))
    folder = tmp_path_factory.mktemp("timesnet")
    model.save(str(folder / "model.ckpt"))
    # As Time-Series-Library saves it; and as Lightning has it, as neuralforecast wrote it before its version 3.3.
    lightning = {"epoch": 1, "state_dict": model.state_dict(), "hyper_parameters": {"h": 4, "top_k": 2}}
    for place in (folder, folder / "told"):
        place.mkdir(exist_ok=True)
        torch.save(model.state_dict(), place / "checkpoint.pth")
        torch.save(lightning, place / "lightning.ckpt")
    (folder / "told" / "config.json").write_text(json.dumps({"top_k": 2}))
    return model, folder


@pytest.mark.parametrize("file", ["model.ckpt", "told/checkpoint.pth", "lightning.ckpt"])
def test_timesnet_from_a_file(timesnet: Any, run: Any, root: Path, file: str) -> None:
    ref = f"file:{timesnet[1] / file}"
    status, done, err = run("show", ref)
    assert status == 0, err
    assert {part["name"] for part in done["parts"]} == {"embedding", "encoder", "head"}
    mine = example(root, "timesnet", {"width": 8, "inner": 6, "kernels": 2, "periods": 2})
    status, done, err = run("graft", f"{ref}#encoder", *mine, "-o", "mine.safetensors")
    assert (status, done.get("verdict")) == (0, "proven"), err
    status, done, err = run("verify", f"{ref}#encoder", *mine, "--weights", "mine.safetensors")
    assert (status, done.get("verdict")) == (0, "proven"), err


def test_what_no_tensor_tells_is_not_assumed(timesnet: Any, run: Any, root: Path) -> None:
    """The same weights compute something else with another number of periods."""
    mine = example(root, "timesnet", {"width": 8, "inner": 6, "kernels": 2, "periods": 2})
    status, done, err = run("graft", f"file:{timesnet[1] / 'checkpoint.pth'}#encoder", *mine, "-o", "mine.safetensors")
    assert status == 2, err
    assert "top_k" in json.dumps(done)
    assert not Path("mine.safetensors").exists()


def test_timesnet_as_a_whole(timesnet: Any) -> None:
    model, folder = timesnet
    probe = _probe(f"file:{folder / 'model.ckpt'}")
    x = probe.inputs(1, "plain")
    with torch.no_grad():
        (got,) = probe.run(probe.reference, x)
        torch.testing.assert_close(got, model({"insample_y": x["past_values"], "futr_exog": None}))
    with pytest.raises(package.ZooError, match="is not from neuralforecast"):
        _probe(f"file:{folder / 'checkpoint.pth'}")


def test_timesnet_has_nothing_to_pull(run: Any) -> None:
    status, done, _ = run("pull", "timesnet")
    assert status == 1
    assert "publish no weights" in json.dumps(done)
