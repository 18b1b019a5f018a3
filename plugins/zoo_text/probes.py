"""Reference models of the BERT family, part by part: what each part's probe gives.

The part decides what is built: an encoder has no pooler, a head stands alone. A checkpoint with heads is run by the
class of transformers that has exactly these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor, nn

import zoo
from zoo_text.running import Inputs, configured, fill, hidden_inputs, token_inputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from surgery import Checkpoint

_NO_PADDING = ("plain", "shortest", "longest")


@dataclass(frozen=True)
class Family:
    """What tells one family of encoders from another: names in transformers, and names in checkpoints."""

    name: str  # its classes are NameModel, NameForMaskedLM ...
    prefix: str  # what precedes the body's tensors in a checkpoint that has heads
    heads: Mapping[frozenset[str], str]  # which heads a checkpoint has -> the class that has exactly these
    pooler: bool = True
    positions_from_padding: bool = False  # positions start behind the padding token's, and skip it

    # ------------------------------------------------------------------------------------------------ parts

    def embeddings(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        """From token ids to the sum of embeddings, normalised."""
        known = self._configured(config)
        module = zoo.unfilled(lambda: self._body(known, pooler=False).embeddings)
        at = self._prefix(checkpoint)
        fill(module, checkpoint, lambda name: f"{at}embeddings.{name}")
        return zoo.PartProbe(module, _embed, self._inputs(known), outputs=("embeddings",))

    def encoder(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        """From token ids to the last hidden state."""
        known = self._configured(config)
        module = zoo.unfilled(lambda: self._body(known, pooler=False))
        at = self._prefix(checkpoint)
        fill(module, checkpoint, lambda name: at + name)
        return zoo.PartProbe(module, _last_hidden, self._inputs(known), outputs=("last_hidden_state",))

    def pooling(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        """From hidden states to one vector per sequence, by the first token."""
        known = self._configured(config)
        module = zoo.unfilled(lambda: self._body(_without_layers(known), pooler=True).pooler)
        at = self._prefix(checkpoint)
        fill(module, checkpoint, lambda name: f"{at}pooler.{name}")
        return zoo.PartProbe(module, _call, hidden_inputs(known.hidden_size), _NO_PADDING, ("pooler_output",))

    def head(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        """From hidden states to logits. Where there are several heads, each gives its own."""
        known = self._configured(config)
        groups = self._groups(checkpoint)
        name = self.heads.get(groups) or self.heads.get(groups | {"pooler"})
        if name is None:
            raise _no_class(self.name, groups, checkpoint)
        model = zoo.unfilled(lambda: self._classed(name, _without_layers(known), checkpoint))
        module = Heads(model, str(model.base_model_prefix))
        fill(module, checkpoint)
        inputs = hidden_inputs(known.hidden_size)
        outputs = tuple(step.name for step in module.steps)
        return zoo.PartProbe(module, _call, inputs, _NO_PADDING, outputs)

    def whole(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        """From token ids to all there is: last hidden state, pooled vector, and the logits of the heads."""
        known = self._configured(config)
        groups = self._groups(checkpoint)
        at = self._prefix(checkpoint)
        inputs = self._inputs(known)
        if groups <= {"pooler"}:
            model = zoo.unfilled(lambda: self._body(known, pooler="pooler" in groups))
            fill(model, checkpoint, lambda name: at + name)
            return _whole(model, "", inputs)
        if groups not in self.heads:
            raise _no_class(self.name, groups, checkpoint)
        model = zoo.unfilled(lambda: self._classed(self.heads[groups], known, checkpoint))
        fill(model, checkpoint)
        return _whole(model, str(model.base_model_prefix), inputs)

    # ------------------------------------------------------------------------------------------------ pieces

    def _configured(self, config: Mapping[str, Any]) -> PretrainedConfig:
        return configured(getattr(transformers, f"{self.name}Config"), config)

    def _body(self, config: PretrainedConfig, *, pooler: bool) -> PreTrainedModel:
        kind = getattr(transformers, f"{self.name}Model")
        body: PreTrainedModel = kind(config, add_pooling_layer=pooler) if self.pooler else kind(config)
        return body

    def _classed(self, name: str, config: PretrainedConfig, checkpoint: Checkpoint) -> PreTrainedModel:
        """A model with heads. How many labels a classifier has is what its tensor says."""
        for last in ("classifier.weight", "classifier.out_proj.weight", "qa_outputs.weight"):
            if last in checkpoint:
                config.num_labels = checkpoint[last].shape[0]
        model: PreTrainedModel = getattr(transformers, name)(config)
        return model

    def _prefix(self, checkpoint: Checkpoint) -> str:
        return self.prefix if any(name.startswith(self.prefix) for name in checkpoint) else ""

    def _groups(self, checkpoint: Checkpoint) -> frozenset[str]:
        """The heads that a checkpoint has; a pooler counts as one."""
        found = set()
        for name in checkpoint:
            pieces = name.removeprefix(self.prefix).split(".")
            if pieces[0] in ("cls", "classifier"):
                found.add(".".join(pieces[:-1][:2]))
            elif pieces[0] not in ("embeddings", "encoder", "transformer"):
                found.add(pieces[0])
        return frozenset(found)

    def _inputs(self, config: PretrainedConfig) -> Inputs:
        longest = int(config.max_position_embeddings)
        types = int(getattr(config, "type_vocab_size", 0))
        if not self.positions_from_padding:
            return token_inputs(config, longest=longest, types=types)
        padding = int(config.pad_token_id)
        return token_inputs(config, longest=longest - padding - 1, types=types, keep_out=padding)


# ---------------------------------------------------------------------------------------------------- running


def _call(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    answer = module(**x)
    return answer if isinstance(answer, tuple) else (answer,)


def _last_hidden(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (module(**x).last_hidden_state,)


def _embed(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (module(**{name: value for name, value in x.items() if name != "attention_mask"}),)


def _without_layers(config: PretrainedConfig) -> PretrainedConfig:
    """The same model without its blocks: quick to make, where only what stands on top is wanted."""
    from copy import deepcopy

    changed = deepcopy(config)
    changed.num_hidden_layers = 0
    return changed


@dataclass(frozen=True)
class _Step:
    """One way through a model's heads: the children it calls in turn, and what its answer is called."""

    name: str
    children: tuple[str, ...]
    activation: Callable[[Tensor], Tensor] | None = None


class Heads(nn.Module):
    """The heads of a model, under their names in it, without the body."""

    def __init__(self, model: PreTrainedModel, body: str) -> None:
        super().__init__()
        for name, child in model.named_children():
            if name != body and any(True for _ in child.parameters()):
                self.add_module(name, child)
        self.steps = tuple(_steps(model))
        # Ties among the heads themselves; the one with the word embeddings leads out of here.
        ties: Mapping[str, str] = model._tied_weights_keys or {}
        self._tied_weights_keys = {name: to for name, to in ties.items() if not to.startswith(f"{body}.")}

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        found = []
        for step in self.steps:
            x = hidden_states
            for i, name in enumerate(step.children):
                x = self.get_submodule(name)(x)
                if i == 0 and step.activation is not None:
                    x = step.activation(x)
            found.append(x)
        return tuple(found)


def _steps(model: PreTrainedModel) -> list[_Step]:
    """How the heads of a model are called: as its class does in forward, with dropout left out."""
    names = dict(model.named_modules())
    if "vocab_projector" in names:  # DistilBERT keeps its masked head in three pieces, and a function between
        children = ("vocab_transform", "vocab_layer_norm", "vocab_projector")
        return [_Step("logits", children, model.activation)]
    if "pre_classifier" in names:
        return [_Step("logits", ("pre_classifier", "classifier"), nn.functional.relu)]
    found = []
    for path, name in (
        ("cls.predictions", "prediction_logits"),
        ("cls.seq_relationship", "seq_relationship_logits"),
        ("lm_head", "logits"),
        ("classifier", "logits"),
        ("qa_outputs", "logits"),
    ):
        if path in names:
            found.append(_Step(name, (path,)))
    return found


def _whole(model: PreTrainedModel, body: str, inputs: Inputs) -> zoo.PartProbe:
    """Runs a whole model, and keeps what its body gave on the way."""

    def run(module: nn.Module, x: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def keep(_module: nn.Module, _args: Any, answer: Any) -> None:
            kept = ("last_hidden_state", "pooler_output")
            found.update({name: answer[name] for name in kept if answer.get(name) is not None})

        hook = module.get_submodule(body).register_forward_hook(keep)
        try:
            answer = module(**x)
        finally:
            hook.remove()
        if body:
            found.update({name: value for name, value in answer.items() if name.endswith("logits")})
        return found

    import torch

    with torch.no_grad():
        outputs = tuple(run(model, inputs(0, "plain")))
    return zoo.PartProbe(model, lambda module, x: tuple(run(module, x).values()), inputs, outputs=outputs)


def _no_class(name: str, groups: frozenset[str], checkpoint: Checkpoint) -> zoo.ZooError:
    return zoo.ZooError(
        f"{checkpoint.source}: no {name} of transformers has just these heads: {', '.join(sorted(groups)) or 'none'}",
        kind="weights",
        hint="graft one part of it; or with --static, which runs nothing",
    )


def _heads(name: str, table: Mapping[str, tuple[str, ...]]) -> dict[frozenset[str], str]:
    return {frozenset(groups): f"{name}For{task}" for task, groups in table.items()}


BERT = Family(
    "Bert",
    "bert.",
    _heads(
        "Bert",
        {
            "PreTraining": ("pooler", "cls.predictions", "cls.seq_relationship"),
            "MaskedLM": ("cls.predictions",),
            "NextSentencePrediction": ("pooler", "cls.seq_relationship"),
            "SequenceClassification": ("pooler", "classifier"),
            "TokenClassification": ("classifier",),
            "QuestionAnswering": ("qa_outputs",),
        },
    ),
)
ROBERTA = Family(
    "Roberta",
    "roberta.",
    _heads(
        "Roberta",
        {
            "MaskedLM": ("lm_head",),
            "SequenceClassification": ("classifier.dense", "classifier.out_proj"),
            "TokenClassification": ("classifier",),
            "QuestionAnswering": ("qa_outputs",),
        },
    ),
    positions_from_padding=True,
)
DISTILBERT = Family(
    "DistilBert",
    "distilbert.",
    _heads(
        "DistilBert",
        {
            "MaskedLM": ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
            "SequenceClassification": ("pre_classifier", "classifier"),
            "TokenClassification": ("classifier",),
            "QuestionAnswering": ("qa_outputs",),
        },
    ),
    pooler=False,
)
