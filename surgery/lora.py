"""Adapters of PEFT: low-rank updates that a rule merges into the source's weights before anything is mapped.

    surgery.rules.merge_lora("adapter/")          # adapter_model.safetensors and adapter_config.json

The adapter's tensors stand beside the source's, their names after `lora:`, and rows read both:
`lora_merge(q.weight, lora:q.lora_B.weight, lora:q.lora_A.weight, scale=2.0)`. So the law of accounting holds for them.

The file's layout and the scale are PEFT's: `base_model.model.` before every name, lora_alpha / r, or
lora_alpha / sqrt(r) with use_rslora, and both by module where rank_pattern or alpha_pattern has it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery import checkpoint
from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError
from surgery.expr import Call, Expr, Name
from surgery.ops import show
from surgery.rules import MergeLora, RuleError

_WRAPPED = "base_model.model."
_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?")
_SHOWN = 5


@dataclass(frozen=True)
class Adapter:
    """What lies in an adapter's folder."""

    rule: MergeLora
    config: Mapping[str, Any]
    tensors: Checkpoint  # without what PEFT puts before every name

    @classmethod
    def read(cls, rule: MergeLora) -> Adapter:
        folder = Path(rule.path)
        if folder.is_file():
            folder = folder.parent
        weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
        if weights is None or not (folder / _CONFIG).is_file():
            raise RuleError(
                f"{rule}: {folder} is no adapter: it needs {_WEIGHTS[0]} and {_CONFIG}",
                hint="Give the folder that PEFT's save_pretrained wrote.",
            )
        try:
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RuleError(f"{folder / _CONFIG}: cannot be read: {error}", hint="Save the adapter again.") from None
        if not isinstance(config, dict) or str(config.get("peft_type", "LORA")).upper() != "LORA":
            what = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
            raise RuleError(f"{rule}: {folder} holds {what}, and not LoRA", hint="Only LoRA adapters can be merged.")
        if config.get("use_dora"):
            raise RuleError(
                f"{rule}: {folder} is a DoRA adapter, whose merge is another",
                hint="Merge it with PEFT: model.merge_and_unload().",
            )
        opened = checkpoint.open(weights)
        return cls(rule, config, opened.view({name.removeprefix(_WRAPPED): name for name in opened}))

    def scale(self, module: str, rank: int) -> float:
        alpha = self._by_module("alpha_pattern", module, self.config.get("lora_alpha", 8))
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
            raise RuleError(f"{self.rule}: lora_alpha of {module} is {alpha!r}, and no number")
        said = self._by_module("rank_pattern", module, self.config.get("r", rank))
        if said != rank:
            raise RuleError(
                f"{self.rule}: {module} has a rank of {rank}, and {_CONFIG} says {said!r}",
                hint="Adapter and config are not of one training. Save them again, together.",
            )
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _by_module(self, key: str, module: str, default: object) -> object:
        """PEFT's rule: the first pattern that is the module's name, or an end of it after a dot."""
        patterns = self.config.get(key) or {}
        return next((value for text, value in patterns.items() if re.match(rf"(.*\.)?({text})$", module)), default)

    def merged(self, rows: Mapping[str, Expr], source: Mapping[str, Any]) -> dict[str, Expr]:
        """{source tensor: what it becomes}, over the source's tensors and the adapter's. RuleError where a tensor of
        the adapter belongs to none of the source."""
        start = f"{self.rule.name}:"
        pairs: dict[tuple[str, bool], dict[str, str]] = {}
        plain: list[str] = []
        for name in self.tensors:
            found = _PAIR.fullmatch(name)
            if found is not None:
                pairs.setdefault((found["module"], bool(found["embedding"])), {})[found["side"]] = name
            else:
                plain.append(name)
        strange = [name for name in plain if ".lora_" in name]
        half = [module for (module, _), sides in pairs.items() if len(sides) != 2]
        if strange or half or not pairs:
            said = _listed(strange or half) if strange or half else "no pair of lora_A and lora_B"
            raise RuleError(
                f"{self.rule}: the adapter holds what cannot be merged: {said}",
                hint="Merge it with PEFT: model.merge_and_unload().",
            )
        # What PEFT wraps it calls base_layer, and so it saves the biases that it trained.
        bare = {name: name.replace(".base_layer.", ".") for name in plain}
        places = self._places([*(f"{module}.weight" for module, _ in pairs), *bare.values()], rows)
        new: dict[str, Expr] = {}
        for (module, embedding), sides in pairs.items():
            target = places[f"{module}.weight"]
            a, b = self.tensors[sides["A"]].shape, self.tensors[sides["B"]].shape
            turned = embedding or self._turned(module, source[target].shape, a, b)
            params = (("scale", self.scale(module, a[0])), ("transposed", int(turned)))
            args = (rows[target], Name(start + sides["B"]), Name(start + sides["A"]))
            new[target] = Call("lora_merge", args, params)
        for name in plain:  # modules_to_save, and biases that were trained: whole tensors
            target = places[bare[name]]
            theirs, ours = tuple(self.tensors[name].shape), tuple(source[target].shape)
            if theirs != ours:
                raise RuleError(
                    f"{self.rule}: the adapter's {name} has shape {show(theirs)}, the source's {target} {show(ours)}",
                    hint="This adapter is of another model.",
                )
            new[target] = Name(start + name)
        return new

    def _turned(self, module: str, weight: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
        """Is the weight stored [in, out]? Its shape tells; where it is square, fan_in_fan_out does."""
        made = (b[0], *a[1:])
        if tuple(weight) not in (made, made[::-1]):
            raise RuleError(
                f"{self.rule}: B @ A of {module} is {show(made)}, and its weight {show(tuple(weight))}",
                hint="This adapter is of another model.",
            )
        if len(weight) == 2 and weight[0] != weight[1]:
            return tuple(weight) != made
        return len(weight) == 2 and bool(self.config.get("fan_in_fan_out"))

    def _places(self, names: Sequence[str], source: Mapping[str, Any]) -> dict[str, str]:
        """Where each tensor belongs in the source: by its name, or by one prefix that one side has and the other not,
        as where a checkpoint was saved from within the model that was trained."""
        for away, before in _prefixes(names, source):
            if all(name.startswith(away) and before + name.removeprefix(away) in source for name in names):
                return {name: before + name.removeprefix(away) for name in names}
        lacking = [name for name in names if name not in source]
        raise RuleError(
            f"{self.rule}: {len(lacking)} of the {len(names)} tensors that the adapter changes are not in the source: "
            f"{_listed(lacking)}",
            hint="Merge the adapter into the very model that it was trained on, and into the whole of it.",
        )


def _prefixes(names: Sequence[str], source: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(what to take from the adapter's names, what to put before them), the plainest first."""
    yield "", ""
    first = names[0]
    parts = first.split(".")
    for n in range(1, len(parts) - 1):
        yield ".".join(parts[:n]) + ".", ""
    for name in source:
        if name.endswith(f".{first}"):
            yield "", name.removesuffix(first)


def merge(rule: MergeLora, rows: Mapping[str, Expr], source: Checkpoint) -> tuple[dict[str, Expr], dict[str, str], str]:
    """The rows of a derivation with an adapter merged; why a tensor that the adapter replaces is not used; and what is
    to be said. `source` holds the adapter's tensors (see surgery.beside)."""
    start = f"{rule.name}:"
    if not any(name.startswith(start) for name in source):
        raise CheckpointError(
            f"{rule}: the adapter was not joined to {source.source}",
            hint="Open both: surgery.beside.joined(source, rules)",
        )
    new = Adapter.read(rule).merged(rows, source)
    gone = {name: f"the adapter {rule.path} has its own" for name, expr in new.items() if isinstance(expr, Name)}
    count = f"{len(new)} tensor{'s' * (len(new) > 1)}"
    return {**rows, **new}, gone, f"the adapter {rule.path} is merged into {count}, as asked for"


def _listed(items: Sequence[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
