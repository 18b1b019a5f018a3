"""CLIP, SigLIP and ALIGN as references in transformers: built from config.json, filled tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo_clip.feeding import Inputs, both, images, texts

if TYPE_CHECKING:
    from surgery import Checkpoint

_OUTPUTS = ("image_embeds_unnormalised", "text_embeds_unnormalised", "logits_per_image")
# ALIGN's images are 289 pixels wide as published, and smaller ones show the same.
_SMALL, _PUBLISHED = 64, 97


@dataclass(frozen=True)
class Family:
    """A family of transformers, by the stem of its class names."""

    stem: str

    def settings(self, config: Mapping[str, Any]) -> Any:
        """Its configuration, with attention in plain operations."""
        if not config:
            raise zoo.ZooError(
                "there is no config.json beside the weights, and without it no reference can be built",
                kind="weights",
                hint="put the model's config.json beside the weights; or graft with --static, which runs nothing",
            )
        made = getattr(transformers, f"{self.stem}Config").from_dict(dict(config))
        for each in (made, made.text_config, made.vision_config):
            each._attn_implementation = "eager"
        return made

    def built(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[nn.Module, Any]:
        """The whole model of transformers, filled."""
        settings = self.settings(config)
        model = zoo.unfilled(lambda: getattr(transformers, f"{self.stem}Model")(settings))
        zoo.fill(model, checkpoint)
        return model.float(), settings

    def text(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        settings = self.settings(config)
        tower = zoo.unfilled(lambda: Tower(self, settings, "text"))
        zoo.fill(tower, checkpoint)
        return zoo.PartProbe(tower.float(), _call, self._texts(settings), self._variants(), _OUTPUTS[1:2])

    def vision(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        settings = self.settings(config)
        tower = zoo.unfilled(lambda: Tower(self, settings, "vision"))
        zoo.fill(tower, checkpoint)
        variants = ("plain", "shortest", "longest")
        return zoo.PartProbe(tower.float(), _call, self._images(settings), variants, _OUTPUTS[:1])

    def whole(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
        model, settings = self.built(checkpoint, config)
        inputs = both(self._texts(settings), self._images(settings))
        return zoo.PartProbe(model, self.answer, inputs, self._variants(), _OUTPUTS)

    def answer(self, model: Any, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Both embeddings, and the logits that the model's own forward makes of them."""
        image = model.get_image_features(x["pixel_values"]).pooler_output
        text = model.get_text_features(**{name: x[name] for name in x if name != "pixel_values"}).pooler_output
        cosines = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        if self.stem == "Align":
            return image, text, cosines / model.temperature
        logits = cosines * model.logit_scale.exp()
        return image, text, logits + model.logit_bias if self.stem == "Siglip" else logits

    def _texts(self, settings: Any) -> Inputs:
        text = settings.text_config
        vocabulary, length = int(text.vocab_size), int(text.max_position_embeddings)
        if self.stem == "Siglip":  # it pools the last place, and was trained without a mask
            return texts(vocabulary=vocabulary, length=length)
        if self.stem == "Align":
            return texts(vocabulary=vocabulary, length=min(length, 32), mask=True)
        # Before transformers set it right, eos_token_id was 2, and meant the largest id of a text.
        end = vocabulary - 1 if text.eos_token_id == 2 else int(text.eos_token_id)
        return texts(vocabulary=vocabulary, length=length, end=end, mask=True)

    def _images(self, settings: Any) -> Inputs:
        vision = settings.vision_config
        if self.stem == "Align":
            small, large = (min(int(vision.image_size), most) for most in (_SMALL, _PUBLISHED))
            return images(size=(small, small), longest=(large, large), channels=int(vision.num_channels))
        return images(size=(int(vision.image_size), int(vision.image_size)), channels=int(vision.num_channels))

    def _variants(self) -> tuple[str, ...]:
        masked = () if self.stem == "Siglip" else ("padded",)
        return ("plain", *masked, "shortest", "longest")


class Tower(nn.Module):
    """One tower with its projection, under the names that both have in the whole model."""

    def __init__(self, family: Family, settings: Any, side: str) -> None:
        super().__init__()
        self.side = side
        own = settings.text_config if side == "text" else settings.vision_config
        kind = getattr(transformers, f"{family.stem}{side.title()}Model")
        self.add_module(f"{side}_model", kind(own))
        width, to = int(own.hidden_size) if hasattr(own, "hidden_size") else 0, getattr(settings, "projection_dim", 0)
        self.projection = ""
        self.first = family.stem == "Align" and side == "text"  # it projects the first token, not what it pools
        if family.stem == "CLIP":
            self.projection = "text_projection" if side == "text" else "visual_projection"
            self.add_module(self.projection, nn.Linear(width, to, bias=False))
        elif self.first:
            self.projection = "text_projection"
            self.add_module(self.projection, nn.Linear(width, to))

    def forward(self, **x: Tensor) -> Tensor:
        answer = self.get_submodule(f"{self.side}_model")(**x)
        pooled: Tensor = answer.last_hidden_state[:, 0] if self.first else answer.pooler_output
        return self.get_submodule(self.projection)(pooled) if self.projection else pooled


def _call(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (module(**x),)


CLIP, SIGLIP, ALIGN = Family("CLIP"), Family("Siglip"), Family("Align")
