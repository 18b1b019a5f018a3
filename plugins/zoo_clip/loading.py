"""CLIP, SigLIP and ALIGN in their own libraries, ready for a text, for the path of an image, or for both.

A text gives its embedding, and an image its own. {"image": path, "texts": [...]} gives the probability of each text:
among the texts for CLIP and ALIGN, which were trained to choose one; of each by itself for SigLIP, which was trained
to say yes or no.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zoo
from zoo_clip.preparing import Images, Texts

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery import Checkpoint
    from zoo_clip.transformed import Family

_PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))


def clip(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    return _loaded("CLIP", checkpoint, config, folder)


def siglip(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    return _loaded("SIGLIP", checkpoint, config, folder)


def align(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    return _loaded("ALIGN", checkpoint, config, folder)


def _loaded(kind: str, checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    if any(name.startswith("text_model.") for name in checkpoint):
        from zoo_clip import transformed

        family: Family = getattr(transformed, kind)
        model, settings = family.built(checkpoint, config)
        pair = Pair(family, Texts.beside(family.stem, settings, folder), Images.beside(family.stem, settings, folder))
    else:
        from zoo_clip import openclip

        model, _ = openclip.built(checkpoint, config)
        pair = Pair(None, Texts.of_open_clip(model, config, folder), Images.of_open_clip(model, config))
    return zoo.Loaded(model, pair.preprocess, pair.forward, pair.describe)


@dataclass(frozen=True)
class Pair:
    """How one model is asked; `family` is None where open_clip runs it."""

    family: Family | None
    texts: Texts
    images: Images

    def preprocess(self, x: Any) -> dict[str, Any]:
        """What the model takes, and the texts themselves, which describe repeats."""
        if isinstance(x, Mapping):
            strange = set(x) ^ {"image", "texts"}
            if strange:
                raise zoo.ZooError(
                    f"an image and texts belong together; look at {', '.join(sorted(map(str, strange)))}",
                    kind="usage",
                    hint='as in {"image": "cat.png", "texts": ["a cat", "a dog"]}',
                )
            labels = [x["texts"]] if isinstance(x["texts"], str) else list(x["texts"])
            return {"labels": labels, **self.texts(labels), **self.images(x["image"])}
        if isinstance(x, Path) or (isinstance(x, str) and Path(x).suffix.lower() in _PICTURES):
            return {"labels": [], **self.images(x)}
        labels = [x] if isinstance(x, str) else list(x)
        return {"labels": labels, **self.texts(labels)}

    def forward(self, model: nn.Module, x: dict[str, Any]) -> dict[str, Any]:
        """`text_embeds` or `image_embeds`, not normalised; or the probabilities [texts] of an image's texts."""
        given = {name: value for name, value in x.items() if name != "labels"}
        if "pixel_values" in given and "input_ids" in given:
            logits = self._answer(model, given)[2][0]
            probabilities = logits.sigmoid() if self._each_by_itself(model) else logits.softmax(-1)
            return {"labels": x["labels"], "probabilities": probabilities}
        if "pixel_values" in given:
            return {"image_embeds": self._image(model, given["pixel_values"])}
        return {"text_embeds": self._text(model, given)}

    def describe(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "probabilities" in answer:
            found = zip(answer["labels"], answer["probabilities"].tolist(), strict=True)
            ranked: Sequence[tuple[str, float]] = sorted(found, key=lambda pair: -pair[1])
            return {"texts": [{"text": text, "probability": probability} for text, probability in ranked]}
        ((name, embedding),) = answer.items()
        return {
            "output": name,
            "shape": list(embedding.shape),
            "norm": embedding.norm(dim=-1).tolist(),
            "first": embedding[0, :5].tolist(),
        }

    def _answer(self, model: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if self.family is not None:
            return self.family.answer(model, x)
        from zoo_clip import openclip

        return openclip.answer(model, x)

    def _image(self, model: Any, pixels: Tensor) -> Tensor:
        if self.family is None:
            return model.encode_image(pixels)
        return model.get_image_features(pixels).pooler_output

    def _text(self, model: Any, x: dict[str, Tensor]) -> Tensor:
        return model.encode_text(x["input_ids"]) if self.family is None else model.get_text_features(**x).pooler_output

    def _each_by_itself(self, model: Any) -> bool:
        """A bias of the logits is what the sigmoid loss was trained with."""
        return getattr(model, "logit_bias", None) is not None
