"""Models of neuralforecast, and of Time-Series-Library by neuralforecast's modules: what they are built with.

neuralforecast took most of Time-Series-Library's modules over, names and functions alike. Sizes are read off the
tensors. What no tensor tells (how many heads, which activation) has to be said, by the hyper-parameters in a file or by
a config.json that holds the arguments of either library; it is never assumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import zoo

if TYPE_CHECKING:
    from surgery import Checkpoint

# neuralforecast's arguments, and what Time-Series-Library calls them.
_ALSO = {
    "n_head": ("n_heads",),
    "n_heads": ("n_head",),
    "input_size": ("seq_len",),
    "h": ("pred_len",),
    "MovingAvg_window": ("moving_avg",),
}
_EXAMPLES = {"activation": '"gelu"', "res_attention": "true", "batch_normalization": "false", "revin": "true"}
_EXAMPLES |= {"revin_subtract_last": "true", "scaler_type": '"identity"', "decoder_input_size_multiplier": "0.5"}
_TEMPORAL = ".temporal_embedding."


def library(wanted: str) -> Any:
    """A module of neuralforecast; where it is not installed, an error that says how to get it."""
    from importlib import import_module

    try:
        return import_module(f"neuralforecast.{wanted}")
    except ModuleNotFoundError as error:
        raise zoo.ZooError(
            f"this is run by neuralforecast, and {error.name} is not installed",
            kind="extra",
            hint="pip install neuralforecast; or graft with --static, which runs nothing",
        ) from error


@dataclass(frozen=True)
class Settings:
    """What is said of a model beside its tensors."""

    given: Mapping[str, Any]
    source: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: Mapping[str, Any]) -> Settings:
        """The hyper-parameters in the file, which neuralforecast and Lightning write; for the rest, config.json."""
        told = json.loads(checkpoint.metadata.get("hyper_parameters", "{}"))
        return cls({**config, **(told if isinstance(told, dict) else {})}, checkpoint.source)

    def get(self, name: str, default: Any = None) -> Any:
        for each in (name, *_ALSO.get(name, ())):
            if each in self.given:
                return self.given[each]
        return default

    def need(self, *names: str) -> list[Any]:
        """The values, or a ZooError ("weights") that names all that are missing."""
        missing = [name for name in names if self.get(name) is None]
        if missing:
            shown = ", ".join(f'"{name}": {_EXAMPLES.get(name, "N")}' for name in missing)
            raise zoo.ZooError(
                f"{self.source} does not say {', '.join(missing)}, which no tensor tells",
                kind="weights",
                hint=f"put a config.json with {{{shown}}} beside it, each as in training; or graft with --static, "
                "which runs nothing",
            )
        return [self.get(name) for name in names]

    @property
    def length(self) -> int:
        """Of the series that it looks at; where a part takes any, one that will do."""
        return int(self.get("input_size", 24))


def univariate(settings: Settings) -> None:
    """Refuse what neuralforecast was given beside the series."""
    for name in ("futr_exog_list", "hist_exog_list", "stat_exog_list", "cat_exog_list"):
        if settings.get(name):
            raise zoo.ZooError(
                f"{settings.source} takes exogenous series ({name}), which have no reference here",
                kind="weights",
                hint="graft its part encoder; or with --static, which runs nothing",
            )


def count(checkpoint: Checkpoint, prefix: str) -> int:
    """How many modules a list holds, whose tensors are named PREFIX.0.x, PREFIX.1.x."""
    at = len(prefix.split("."))
    return len({name.split(".")[at] for name in checkpoint if name.startswith(f"{prefix}.")})


def embedding(checkpoint: Checkpoint, at: str, *, positions: bool) -> nn.Module:
    """neuralforecast's embedding of values, and of calendar features where Time-Series-Library has them as numbers.

    `positions`: whether it adds them; Time-Series-Library keeps a table of them also where it does not.
    """
    modules = library("common._modules")
    width, channels, _ = checkpoint[f"{at}.value_embedding.tokenConv.weight"].shape
    calendar = f"{at}{_TEMPORAL}embed.weight"
    if calendar not in checkpoint and any(name.startswith(at + _TEMPORAL) for name in checkpoint):
        raise zoo.ZooError(
            f"{checkpoint.source} embeds months, days and hours by number, which has no reference here",
            kind="weights",
            hint="graft with --static, which runs nothing",
        )
    marks = checkpoint[calendar].shape[1] if calendar in checkpoint else 0
    made: nn.Module = modules.DataEmbedding(channels, marks, width, pos_embedding=positions)
    return made


def marks_of(module: nn.Module) -> int:
    """How many calendar features an embedding takes."""
    temporal: Any = getattr(module, "temporal_embedding", None)
    return 0 if temporal is None else int(temporal.embed.in_features)


class Reached(Exception):
    """A module was reached, and this is what it gave."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def until(module: nn.Module, inner: str, call: Callable[[], object]) -> Tensor:
    """What an inner module gives while `call` runs, which goes no further."""

    def stop(_module: nn.Module, _args: Any, answer: Tensor) -> None:
        raise Reached(answer)

    hook = module.get_submodule(inner).register_forward_hook(stop)
    try:
        call()
    except Reached as reached:
        return reached.value
    finally:
        hook.remove()
    raise AssertionError(f"{inner} was not reached")  # pragma: no cover
