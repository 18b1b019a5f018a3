"""References for Informer and Autoformer, part by part.

What is not exercised: which queries an Informer's ProbSparse attention picks (it samples keys at random, so every query
is let attend, which no tensor depends on); and a batch of several series in an Autoformer, whose auto-correlation in
transformers pairs the delays of one series with the heads of another, nor constant series in it, of which any delay is
as good as another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

import zoo
from zoo_timeseries.running import Inputs, StaysDouble, configured, drawn, edges, prefix

if TYPE_CHECKING:
    from surgery import Checkpoint

_LENGTHS = ("plain", "longest")
_WHOLE = ("plain", "missing")


@dataclass(frozen=True)
class Family:
    """What tells the two apart."""

    name: str  # its classes are NameModel, NameForPrediction ...
    batch: int
    trend: bool  # whether the decoder keeps a trend beside the season

    def _configured(self, config: Mapping[str, Any]) -> Any:
        known = configured(getattr(transformers, f"{self.name}Config"), config)
        if not self.trend:
            known.sampling_factor = known.context_length + known.prediction_length
        return known

    def _model(self, known: Any) -> Any:
        return getattr(transformers, f"{self.name}Model")(known)

    def _features(self, known: Any, length: int) -> tuple[int, ...]:
        return (self.batch, length, known.feature_size)

    @property
    def _variants(self) -> tuple[str, ...]:
        return _LENGTHS if self.trend else (*_LENGTHS, "shortest", "edges")

    def _series(self, known: Any) -> Inputs:
        """Features of any length up to the context's; shortest is one short series alone."""
        longest = known.context_length
        normal = drawn(
            {
                "plain": {"inputs_embeds": self._features(known, max(2, longest - 3))},
                "longest": {"inputs_embeds": self._features(known, longest)},
                "shortest": {"inputs_embeds": (1, max(2, longest // 2), known.feature_size)},
            }
        )

        def inputs(seed: int, variant: str) -> dict[str, Tensor]:
            if variant == "edges":
                return {"inputs_embeds": edges(self._features(known, longest), seed)}
            return normal(seed, variant)

        return inputs

    def embedding(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        known = self._configured(config)

        def build() -> nn.Module:
            whole = self._model(known).encoder
            return nn.ModuleDict(
                {name: getattr(whole, name) for name in ("value_embedding", "embed_positions", "layernorm_embedding")}
            )

        module = zoo.unfilled(build)
        at = prefix(checkpoint)
        zoo.fill(module, checkpoint, lambda name: f"{at}encoder.{name}")

        def run(m: Any, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
            values = x["inputs_embeds"]
            return (m["layernorm_embedding"](m["value_embedding"](values) + m["embed_positions"](values.size())),)

        return zoo.PartProbe(module, run, self._series(known), self._variants, ("embeddings",))

    def static(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        known = self._configured(config)
        module = zoo.unfilled(lambda: self._model(known).embedder)
        at = prefix(checkpoint) or ("model." if any(name.startswith("model.") for name in checkpoint) else "")
        zoo.fill(module, checkpoint, lambda name: f"{at}embedder.{name}")

        def inputs(seed: int, variant: str) -> dict[str, Tensor]:
            if variant != "plain":
                raise ValueError(f'no variant "{variant}"; there is plain')
            return {"static_categorical_features": _categories(known, 4, torch.Generator().manual_seed(seed))}

        def run(m: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return (m(x["static_categorical_features"]),)

        return zoo.PartProbe(module, run, inputs, ("plain",), ("static_features",))

    def encoder(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        known = self._configured(config)
        module = zoo.unfilled(lambda: self._model(known).encoder)
        at = prefix(checkpoint)
        zoo.fill(module, checkpoint, lambda name: f"{at}encoder.{name}")

        def run(m: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
            with StaysDouble():
                return (m(**x).last_hidden_state,)

        return zoo.PartProbe(module, run, self._series(known), self._variants, ("encoder_last_hidden_state",))

    def decoder(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        known = self._configured(config)
        module = zoo.unfilled(lambda: self._model(known).decoder)
        at = prefix(checkpoint)
        zoo.fill(module, checkpoint, lambda name: f"{at}decoder.{name}")
        length = known.prediction_length + (known.label_length if self.trend else 0)
        shapes = {
            "inputs_embeds": self._features(known, length),
            "encoder_hidden_states": (self.batch, known.context_length, known.d_model),
        }
        if self.trend:
            shapes["trend"] = self._features(known, length)

        def run(m: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
            with StaysDouble():
                answer = m(**x, use_cache=False)
            return (answer.last_hidden_state, answer.trend) if self.trend else (answer.last_hidden_state,)

        outputs = ("last_hidden_state", "trend") if self.trend else ("last_hidden_state",)
        return zoo.PartProbe(module, run, drawn({"plain": shapes}), ("plain",), outputs)

    def head(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        """The parameters in the domain of the distribution, as transformers maps them."""
        known = self._configured(config)
        module = zoo.unfilled(lambda: self._predicting(known).parameter_projection)
        zoo.fill(module, checkpoint, lambda name: f"parameter_projection.{name}")
        width = known.feature_size if self.trend else known.d_model
        inputs = drawn({"plain": {"hidden_states": (self.batch, known.prediction_length, width)}})
        return zoo.PartProbe(module, lambda m, x: tuple(m(x["hidden_states"])), inputs, ("plain",), _params(known))

    def whole(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        known = self._configured(config)
        inputs = self._everything(known)
        if not any(name.startswith("parameter_projection.") for name in checkpoint):
            model = zoo.unfilled(lambda: self._model(known))
            at = prefix(checkpoint)
            zoo.fill(model, checkpoint, lambda name: at + name)
        else:
            model = zoo.unfilled(lambda: self._predicting(known))
            zoo.fill(model, checkpoint)
        headed = hasattr(model, "parameter_projection")

        def run(m: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
            with StaysDouble():
                answer = m(**x)
            last = tuple(answer.params) if headed else (answer.last_hidden_state,)
            return (answer.encoder_last_hidden_state, *last)

        last = _params(known) if headed else ("last_hidden_state",)
        return zoo.PartProbe(model, run, inputs, _WHOLE, ("encoder_last_hidden_state", *last))

    def _predicting(self, known: Any) -> Any:
        return getattr(transformers, f"{self.name}ForPrediction")(known)

    def _everything(self, known: Any) -> Inputs:
        """All that forward takes, with the future. `missing`: past values that the mask says were not observed."""
        past, future = known.context_length + max(known.lags_sequence), known.prediction_length
        width = () if known.input_size == 1 else (known.input_size,)
        times = known.num_time_features + known.num_dynamic_real_features

        def inputs(seed: int, variant: str) -> dict[str, Tensor]:
            if variant not in _WHOLE:
                raise ValueError(f'no variant "{variant}"; there are {", ".join(_WHOLE)}')
            draw = torch.Generator().manual_seed(seed)

            def normal(*shape: int) -> Tensor:
                return torch.randn(shape, generator=draw)

            found = {
                "past_values": normal(self.batch, past, *width),
                "past_time_features": normal(self.batch, past, times),
                "past_observed_mask": torch.ones(self.batch, past, *width),
                "future_values": normal(self.batch, future, *width),
                "future_time_features": normal(self.batch, future, times),
            }
            if variant == "missing":
                found["past_observed_mask"][:, past // 2 : past // 2 + 3] = 0.0
                found["past_observed_mask"][-1, -1] = 0.0
            if known.num_static_categorical_features:
                found["static_categorical_features"] = _categories(known, self.batch, draw)
            if known.num_static_real_features:
                found["static_real_features"] = normal(self.batch, known.num_static_real_features)
            return found

        return inputs


def _categories(known: Any, batch: int, draw: torch.Generator) -> Tensor:
    """Categories, the last of each among them."""
    columns = [torch.randint(0, count, (batch,), generator=draw) for count in known.cardinality]
    values = torch.stack(columns, dim=-1)
    values[-1] = torch.tensor(known.cardinality) - 1
    return values


def _params(known: Any) -> tuple[str, ...]:
    names = {
        "student_t": ("df", "loc", "scale"),
        "normal": ("loc", "scale"),
        "negative_binomial": ("total_count", "logits"),
    }
    return names[known.distribution_output]


FAMILIES = {"informer": Family("Informer", 2, False), "autoformer": Family("Autoformer", 1, True)}
