"""Image-text models small enough to search and prove in seconds, as files of the layout that each is published in."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

VOCABULARY, LENGTH, WIDTH, SHARED, IMAGE, PATCH = 60, 12, 64, 24, 32, 8
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "intermediate_size": 4 * WIDTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "intermediate_size": 4 * WIDTH,
}
EFFICIENT: dict[str, Any] = {
    "kernel_sizes": [3, 5],
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "strides": [1, 2],
    "num_block_repeats": [1, 2],
    "expand_ratios": [1, 2],
    "hidden_dim": 256,  # what it pools over: more than any image leaves
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "image_size": IMAGE,
}
MODEL_CFG: dict[str, Any] = {
    "embed_dim": SHARED,
    "vision_cfg": {"image_size": IMAGE, "layers": 2, "width": WIDTH, "head_width": 32, "patch_size": PATCH},
    "text_cfg": {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 2, "layers": 2},
}
SIGLIP_CFG: dict[str, Any] = {
    "embed_dim": WIDTH,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": IMAGE, "timm_model_name": "tiny_siglip", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {
        **MODEL_CFG["text_cfg"],
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}
OPEN_CLIP = json.dumps({"model_cfg": MODEL_CFG, "preprocess_cfg": {**PREPROCESS, "resize_mode": "shortest"}}).encode()


@dataclass(frozen=True)
class Tiny:
    """A model in its own library, and its repository."""

    model: Any
    files: dict[str, bytes]

    def at(self, folder: Path) -> Path:
        """The weights, with the files beside them, in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder / self.weights

    @property
    def weights(self) -> str:
        return next(name for name in self.files if name.endswith((".safetensors", ".bin", ".pt")))


def shaken(model: nn.Module) -> nn.Module:
    """Seeded, so that no bias is zero and no norm the identity."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.2, generator=draw)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=draw)
    return model.eval()


def _saved(model: Any, **more: bytes) -> Tiny:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Tiny(model, {each.name: each.read_bytes() for each in Path(folder).iterdir()} | more)


def hf_clip() -> Tiny:
    import transformers

    text, vision = ({**each, "projection_dim": SHARED} for each in (TEXT, VISION))
    settings = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=SHARED)
    return _saved(shaken(transformers.CLIPModel(settings)))


def hf_siglip() -> Tiny:
    import transformers

    text = {**TEXT, "projection_size": WIDTH}
    return _saved(shaken(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))))


def hf_align() -> Tiny:
    import transformers

    settings = transformers.AlignConfig(text_config=TEXT, vision_config=EFFICIENT, projection_dim=24)
    return _saved(shaken(transformers.AlignModel(settings)))


def open_clip() -> Tiny:
    from open_clip.model import CLIP

    model = shaken(CLIP(**MODEL_CFG))
    return Tiny(model, {"open_clip_model.safetensors": save(model.state_dict()), "open_clip_config.json": OPEN_CLIP})


def open_clip_bin() -> Tiny:
    made = open_clip()
    out = io.BytesIO()
    torch.save(made.model.state_dict(), out)
    return Tiny(made.model, {"open_clip_pytorch_model.bin": out.getvalue(), "open_clip_config.json": OPEN_CLIP})


def open_siglip() -> Tiny:
    from open_clip.model import CustomTextCLIP

    register()
    settings = {name: value for name, value in SIGLIP_CFG.items() if name != "custom_text"}
    model = shaken(CustomTextCLIP(**settings))
    config = json.dumps({"model_cfg": SIGLIP_CFG, "preprocess_cfg": PREPROCESS}).encode()
    return Tiny(model, {"open_clip_model.safetensors": save(model.state_dict()), "open_clip_config.json": config})


def openai() -> Tiny:
    """As OpenAI's archives have it once their weights are saved alone: integers beside them, and mixed precision."""
    from open_clip.model import CLIP, convert_weights_to_fp16

    vision = {**MODEL_CFG["vision_cfg"], "head_width": 64}
    model = CLIP(SHARED, vision, {**MODEL_CFG["text_cfg"], "heads": 1}, quick_gelu=True)  # type: ignore[arg-type]
    shaken(model)
    convert_weights_to_fp16(model)
    sizes = {"input_resolution": IMAGE, "context_length": LENGTH, "vocab_size": VOCABULARY}
    out = io.BytesIO()
    torch.save({**model.state_dict(), **{name: torch.tensor(size) for name, size in sizes.items()}}, out)
    return Tiny(model.float(), {"ViT-T-8.pt": out.getvalue()})


def register() -> None:
    """A vision tower of timm's as open_clip's SigLIP has it, only smaller."""
    from timm.models import is_model, register_model
    from timm.models.vision_transformer import VisionTransformer

    def tiny_siglip(pretrained: bool = False, **settings: Any) -> nn.Module:
        del pretrained
        for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            settings.pop(name, None)
        fixed = {"img_size": IMAGE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
        made = VisionTransformer(**fixed, class_token=False, norm_layer=_norm(), **settings)
        return made

    tiny_siglip.__module__ = "timm.models.vision_transformer"
    if not is_model("tiny_siglip"):
        register_model(tiny_siglip)


def _norm() -> Any:
    from functools import partial

    return partial(nn.LayerNorm, eps=1e-6)


# name -> how it is made, the entry it is of, its layout
MODELS: dict[str, tuple[Callable[[], Tiny], str, str]] = {
    "clip in transformers": (hf_clip, "clip", "transformers"),
    "clip in open_clip": (open_clip, "clip", "open_clip"),
    "clip in open_clip, pickled": (open_clip_bin, "clip", "open_clip"),
    "clip of OpenAI": (openai, "clip", "open_clip"),
    "siglip in transformers": (hf_siglip, "siglip", "transformers"),
    "siglip in open_clip": (open_siglip, "siglip", "open_clip"),
    "align in transformers": (hf_align, "align", "transformers"),
}
