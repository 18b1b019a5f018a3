"""CLIP and SigLIP as references in open_clip: built from its configuration, or from what OpenAI's tensors say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from open_clip.model import CLIP, CustomTextCLIP, _build_text_tower, _build_vision_tower
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo_clip.feeding import Inputs, both, images, texts
from zoo_clip.recognising import OPENAI_SIZES, openai_precision

if TYPE_CHECKING:
    from surgery import Checkpoint

_OUTPUTS = ("image_embeds_unnormalised", "text_embeds_unnormalised", "logits_per_image")
_VARIANTS = ("plain", "shortest", "longest")
_HEAD = 64  # the width of every head of OpenAI's, in both towers
_STRIDE = 32  # pixels of an image that become one place of a residual network's last map
# What a configuration says beyond the classes' own arguments: which class, and what was only used in training.
_ELSEWHERE = ("custom_text", "cast_dtype", "multimodal_cfg")


def settings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's model_cfg: as the configuration has it; for OpenAI's own tensors, read off their shapes."""
    if isinstance(config.get("model_cfg"), Mapping):
        found = {name: value for name, value in config["model_cfg"].items() if name not in _ELSEWHERE}
        if config["model_cfg"].get("multimodal_cfg"):
            raise zoo.ZooError("the configuration has a multimodal_cfg, and is of another model", kind="weights")
        # A tower that its own library would fetch weights for is only built here.
        found["vision_cfg"] = {**found["vision_cfg"], "timm_model_pretrained": False}
        found["text_cfg"] = {**found["text_cfg"], "hf_model_pretrained": False}
        return found
    text = config.get("text_config")
    if isinstance(text, Mapping) and "model_type" in config:  # transformers' configuration lies beside such files too
        quick = text.get("hidden_act", "quick_gelu") == "quick_gelu"
    elif any(name in checkpoint for name in OPENAI_SIZES) or openai_precision(checkpoint):
        quick = True
    else:
        raise zoo.ZooError(
            f"nothing in {checkpoint.source} says which activation it was trained with, GELU or OpenAI's quick one",
            kind="weights",
            hint="put the model's open_clip_config.json beside the weights; or graft with --static, which runs nothing",
        )
    return {**_from_shapes(checkpoint), "quick_gelu": quick}


def _from_shapes(checkpoint: Checkpoint) -> dict[str, Any]:
    found: dict[str, Any] = {"vision_cfg": {}, "text_cfg": {}}
    if "visual.proj" in checkpoint:
        patch = checkpoint["visual.conv1.weight"].shape[-1]
        grid = round((checkpoint["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        width, found["embed_dim"] = checkpoint["visual.proj"].shape
        found["vision_cfg"] = {
            "layers": _count(checkpoint, "visual.transformer.resblocks."),
            "width": width,
            "head_width": _HEAD,
            "patch_size": patch,
            "image_size": patch * grid,
        }
    elif "visual.attnpool.positional_embedding" in checkpoint:
        found["embed_dim"] = checkpoint["visual.attnpool.c_proj.weight"].shape[0]
        width = checkpoint["visual.layer1.0.conv1.weight"].shape[0]
        grid = round((checkpoint["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
        found["vision_cfg"] = {
            "layers": [_count(checkpoint, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)],
            "width": width,
            "head_width": _HEAD,
            "image_size": _STRIDE * grid,
        }
    elif any(name.startswith("visual.") for name in checkpoint):
        raise zoo.ZooError(
            f"{checkpoint.source} has a vision tower that is neither a ViT nor OpenAI's residual network, and no "
            "open_clip_config.json that describes it",
            kind="weights",
            hint="put the model's open_clip_config.json beside the weights",
        )
    text = "text." if "text.token_embedding.weight" in checkpoint else ""
    if f"{text}token_embedding.weight" in checkpoint:
        vocabulary, width = checkpoint[f"{text}token_embedding.weight"].shape
        found["embed_dim"] = checkpoint[f"{text}text_projection"].shape[1]
        found["text_cfg"] = {
            "layers": _count(checkpoint, f"{text}transformer.resblocks."),
            "width": width,
            "heads": width // _HEAD,
            "vocab_size": vocabulary,
            "context_length": checkpoint[f"{text}positional_embedding"].shape[0],
        }
    return found


def _count(checkpoint: Checkpoint, prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in checkpoint if name.startswith(prefix)})


def built(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The whole model of open_clip, filled."""
    own = settings(checkpoint, config)
    kind = CustomTextCLIP if "text.token_embedding.weight" in checkpoint else CLIP
    model = zoo.unfilled(lambda: kind(**own))
    zoo.fill(model, checkpoint, spare=[name for name in OPENAI_SIZES if name in checkpoint])
    return model.float(), own


def text(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """The text tower: token ids [N, L] to [N, E]."""
    own = settings(checkpoint, config)
    tower = zoo.unfilled(lambda: _build_text_tower(own["embed_dim"], own["text_cfg"], own.get("quick_gelu", False)))
    prefix = "text." if "text.token_embedding.weight" in checkpoint else ""
    zoo.fill(tower, checkpoint, lambda name: prefix + name)
    return zoo.PartProbe(
        tower.float(), lambda module, x: (module(x["input_ids"]),), _texts(tower), _VARIANTS, _OUTPUTS[1:2]
    )


def vision(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """The vision tower: images [N, 3, S, S] to [N, E]."""
    own = settings(checkpoint, config)
    tower = zoo.unfilled(lambda: _build_vision_tower(own["embed_dim"], own["vision_cfg"], own.get("quick_gelu", False)))
    zoo.fill(tower, checkpoint, lambda name: f"visual.{name}")
    return zoo.PartProbe(
        tower.float(), lambda module, x: (module(x["pixel_values"]),), _images(tower), _VARIANTS, _OUTPUTS[:1]
    )


def whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """Both embeddings and the logits."""
    model, own = built(checkpoint, config)
    tower = zoo.unfilled(lambda: _build_text_tower(own["embed_dim"], own["text_cfg"], own.get("quick_gelu", False)))
    inputs = both(_texts(tower), _images(model.get_submodule("visual")))
    return zoo.PartProbe(model, answer, inputs, _VARIANTS, _OUTPUTS)


def answer(model: Any, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Both embeddings, and the logits that the model's own get_logits makes of them, but for the order of factors."""
    image, words = model.encode_image(x["pixel_values"]), model.encode_text(x["input_ids"])
    logits = F.normalize(image, dim=-1) @ F.normalize(words, dim=-1).T * model.logit_scale.exp()
    return image, words, logits if model.logit_bias is None else logits + model.logit_bias


def _texts(tower: Any) -> Inputs:
    vocabulary = int(tower.vocab_size)
    end = {"argmax": vocabulary - 1, "eos": getattr(tower, "eos_id", None)}.get(tower.pool_type)
    return texts(vocabulary=vocabulary, length=int(tower.context_length), end=end)


def _images(tower: Any) -> Inputs:
    size = tower.image_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return images(size=(height, width))
