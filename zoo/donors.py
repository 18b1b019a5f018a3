"""Donors of a vocabulary: rules name another model by any reference, and here it is found and opened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError

if TYPE_CHECKING:
    from torch import nn

    from surgery.rules import Rule, Transplant
    from zoo.resolving import Source


def rule_of(tokenizer: Any, donor: str) -> Rule:
    """The rule that `--tokenizer` and `--donor` stand for."""
    import os

    from surgery.rules import transplant_vocabulary

    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        raise ZooError(
            "with a donor the tokenizer has to be a file: the plan names it, so that it can be applied again",
            hint='tokenizer.save("my_tokenizer.json") of tokenizers, save_pretrained(FOLDER) of transformers',
        )
    return transplant_vocabulary(tokenizer or "", donor=donor)


def placed(rules: Iterable[Rule], source: Source | None = None, model: nn.Module | None = None) -> tuple[Rule, ...]:
    """The rules, with the donors that they name pulled if need be. `source` and `model`: of what family the source is
    says where its rows of tokens are, and the model how many rows its own table has."""
    from surgery.rules import Transplant

    return tuple(_placed(rule, source, model) if isinstance(rule, Transplant) else rule for rule in rules)


def _placed(rule: Transplant, source: Source | None, model: nn.Module | None) -> Rule:
    from surgery.rules import Place
    from surgery.vocabulary import token_map
    from zoo.adapting import rows_for, tables_of_tokens

    place = rule.place
    if rule.donor and place.weights is None:
        other = _resolved(rule.donor)
        weights = other.located.weights
        place = Place(str(weights), other.whole, tables_of_tokens(replace(other, checkpoint=other.whole)))
    if source is not None:
        folder = source.located.weights.parent
        place = replace(place, tables=tables_of_tokens(source), tokenizer=str(folder))
        if model is not None and not rule.rows and place.tables:
            new = Path(rule.tokenizer) if rule.tokenizer else Path(place.donor).parent
            tokens = len(token_map(new, new).old)
            rows = rows_for(model, source, tokens)
            rule = replace(rule, rows=rows if rows != tokens else 0)
    return replace(rule, place=place)


def _resolved(donor: str) -> Source:
    """The donor by its reference; a path that is no reference is one to a file."""
    from zoo.resolving import resolve

    try:
        return resolve(donor)
    except ZooError as error:
        if error.kind != "unknown" or not Path(donor).exists():
            raise ZooError(f"the donor {donor}: {error}", kind=error.kind, hint=error.hint) from error
        return resolve(f"file:{donor}")
