"""A model in its own hub library, ready to run: what `zoo.load` gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from zoo.entry import Entry


@dataclass(frozen=True)
class Loaded:
    """What an entry's `load`, "module:f(checkpoint, config, folder) -> zoo.Loaded", gives. `folder` is where the
    weights lie, with the tokenizer or the processor's files beside them.

    `preprocess` makes of a plain input (a text; the path of an image or of a recording; an array) what the model takes;
    `forward` runs the model on that; `describe` says in words and numbers what came out, as data that JSON can hold.
    """

    model: nn.Module
    preprocess: Callable[[Any], Any]
    forward: Callable[[nn.Module, Any], Any]
    describe: Callable[[Any], Mapping[str, Any]]
    entry: Entry | None = None

    def run(self, x: Any) -> Any:
        """The model's answer to a plain input, without gradients."""
        import torch
        from torch.utils._pytree import tree_map

        first = next(self.model.parameters(), None)

        def moved(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or first is None:
                return value
            return value.to(first.device, first.dtype if value.is_floating_point() else None)

        with torch.inference_mode():
            return self.forward(self.model, tree_map(moved, self.preprocess(x)))


def load(ref: str, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Loaded:
    """The model behind a reference, in its own hub library and in eval mode, with the preprocessing that belongs to it.

    Raises ZooError: "extra" where a library is missing (with the `pip install` it takes), "weights" where the files do
    not make a model.
    """
    from zoo import api
    from zoo.resolving import imported, resolve

    source = resolve(ref)
    entry = source.entry
    if entry is None or entry.load is None:
        raise ZooError(
            f"{ref}: "
            + (f"{entry.name} does not say how it is loaded" if entry is not None else "it was not recognised"),
            kind="unknown",
            hint=f"zoo.open({ref!r}) gives its tensors",
        )
    with api.needs(entry.requires):
        found = imported(entry.load)(source.whole, source.config, source.located.weights.parent)
    if not isinstance(found, Loaded):
        raise ZooError(f"{entry.load} gave a {type(found).__name__}, and not a zoo.Loaded", kind="plugin")
    found.model.to(device=device, dtype=dtype).eval()
    return replace(found, entry=entry)
