"""Time-series models, ready to forecast: an array, or a .csv or .npy file with one column a channel.

Those of transformers are run by it, and neuralforecast's own by that. What Time-Series-Library saved is not loaded: its
models want calendar features beside the series, and do different things for different tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

import zoo
from zoo_timeseries import lagged_forecasters, patchtst_forecasters
from zoo_timeseries.forecasters import Settings
from zoo_timeseries.running import configured

if TYPE_CHECKING:
    from surgery import Checkpoint


def series(x: Any) -> Tensor:
    """[T, channels] of an array, or of a file: a .npy, or a .csv of numbers whose first line may be a heading."""
    if isinstance(x, (str, Path)):
        x = _file(Path(x))
    found = torch.as_tensor(numpy.asarray(x)).to(torch.float32)
    if found.dim() not in (1, 2) or not found.numel():
        raise zoo.ZooError(f"a series is [T] or [T, channels], and this is {list(found.shape)}", kind="file")
    if not found.isfinite().all():
        raise zoo.ZooError("the series has values that are missing or infinite", kind="file", hint="fill them first")
    return found[:, None] if found.dim() == 1 else found


def _file(path: Path) -> Any:
    if path.suffix not in (".npy", ".csv"):
        raise zoo.ZooError(f"{path} is neither a .npy nor a .csv", kind="file", hint="one column a channel")
    try:
        if path.suffix == ".npy":
            return numpy.load(path, allow_pickle=False)
        lines = path.read_text(encoding="utf-8").splitlines()
        if lines and not _numbers(lines[0]):
            lines = lines[1:]
        return numpy.loadtxt(lines, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise zoo.ZooError(
            f"{path} is not a series: {error}", kind="file", hint="numbers, one column a channel"
        ) from None


def _numbers(line: str) -> bool:
    try:
        [float(word) for word in line.split(",")]
    except ValueError:
        return False
    return True


def last(found: Tensor, length: int, channels: int) -> Tensor:
    """The last steps of a series, which has to have as many, and these channels."""
    if found.shape[1] != channels:
        raise zoo.ZooError(f"the model takes {channels} channels, and the series has {found.shape[1]}", kind="file")
    if len(found) < length:
        raise zoo.ZooError(f"the model looks at {length} steps, and the series has {len(found)}", kind="file")
    return found[-length:]


def describe(forecast: Any) -> Mapping[str, Any]:
    """The forecast's shape, [batch, horizon, channels], and its first values for each channel of the first series."""
    return {"shape": list(forecast.shape), "first": [column[:3].tolist() for column in forecast[0].double().T]}


def _filled(build: Callable[[], nn.Module], checkpoint: Checkpoint) -> nn.Module:
    model = zoo.unfilled(build)
    zoo.fill(model, checkpoint)
    return model


def patchtst(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    """PatchTST scales a series itself, and what it forecasts is in the series' own units."""
    if patchtst_forecasters.forecasters(checkpoint):
        return _forecaster(patchtst_forecasters.model(checkpoint, config), checkpoint, config)
    if patchtst_forecasters.librarys(checkpoint, config):
        patchtst_forecasters.library_whole(checkpoint, config)
    import transformers

    known: Any = configured(transformers.PatchTSTConfig, config)
    known.do_mask_input = False
    model = _filled(lambda: transformers.PatchTSTForPrediction(known), checkpoint)

    def preprocess(x: Any) -> Tensor:
        return last(series(x), known.context_length, known.num_input_channels)[None]

    def forward(module: Any, past: Tensor) -> Tensor:
        if known.loss == "mse":
            return module(past_values=past).prediction_outputs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return module.generate(past_values=past).sequences.mean(1)

    return zoo.Loaded(model, preprocess, forward, describe)


def informer(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    """See _lagged."""
    return _lagged("Informer", checkpoint, config)


def autoformer(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    """See _lagged."""
    return _lagged("Autoformer", checkpoint, config)


def _lagged(name: str, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.Loaded:
    """The mean of seeded samples of the forecast.

    An array has no dates, and does not say which of the training series it is: calendar features stay 0, the middle of
    their range, the last time feature is the age of the series, log10(2 + step), as in GluonTS, and the category is the
    first. Who knows better gives a mapping of all that `generate` takes.
    """
    if lagged_forecasters.named(checkpoint):
        return _forecaster(lagged_forecasters.FAMILIES[name.lower()].model(checkpoint, config), checkpoint, config)
    import transformers

    known: Any = configured(getattr(transformers, f"{name}Config"), config)
    model = _filled(lambda: getattr(transformers, f"{name}ForPrediction")(known), checkpoint)
    past = known.context_length + max(known.lags_sequence)
    times = known.num_time_features + known.num_dynamic_real_features

    def preprocess(x: Any) -> dict[str, Tensor]:
        if isinstance(x, Mapping):
            return {key: torch.as_tensor(value) for key, value in x.items()}
        whole = series(x)
        values = last(whole, past, known.input_size)
        steps = torch.arange(len(whole) - past, len(whole) + known.prediction_length)
        features = torch.zeros(1, len(steps), times)
        if known.num_time_features:
            features[..., known.num_time_features - 1] = torch.log10(2.0 + steps)
        values = values[None, :, 0] if known.input_size == 1 else values[None]
        found = {
            "past_values": values,
            "past_time_features": features[:, :past],
            "past_observed_mask": torch.ones_like(values),
            "future_time_features": features[:, past:],
        }
        if known.num_static_categorical_features:
            shape = (1, known.num_static_categorical_features)
            found["static_categorical_features"] = torch.zeros(shape, dtype=torch.long)
        if known.num_static_real_features:
            found["static_real_features"] = torch.zeros(1, known.num_static_real_features)
        return found

    def forward(module: Any, x: dict[str, Tensor]) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # of the CPU: an Informer samples keys there, and both sample forecasts
            torch.manual_seed(0)
            mean = module.generate(**x).sequences.mean(1)
        return mean if mean.dim() == 3 else mean[..., None]

    return zoo.Loaded(model, preprocess, forward, describe)


def timesnet(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    """What neuralforecast wrote, or a checkpoint of its names with a config.json that says how it was made."""
    from zoo_timeseries import timesnet_probes

    return _forecaster(timesnet_probes.model(checkpoint, config), checkpoint, config)


def _forecaster(model: Any, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.Loaded:
    """A model of neuralforecast as that predicts with it: one series, scaled over the window as in training.

    How it is scaled differs from class to class where it is not said, and so it has to be said.
    """
    Settings.of(checkpoint, config).need("scaler_type")

    def preprocess(x: Any) -> Tensor:
        return last(series(x), model.input_size, 1)[None]

    def forward(module: Any, past: Tensor) -> Tensor:
        scaled = module.scaler.transform(x=past, mask=torch.ones_like(past))
        with torch.random.fork_rng(devices=[]):  # an Informer samples keys
            torch.manual_seed(0)
            forecast = module({"insample_y": scaled, "futr_exog": None})
        found: Tensor = module.scaler.inverse_transform(forecast)
        return found

    return zoo.Loaded(model, preprocess, forward, describe)
