"""From texts and images to tensors, by the files beside the weights, else by the constants that were published."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import zoo

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_BICUBIC, _BILINEAR = 3, 2  # as PIL numbers them
# What each family's processor does where no file says otherwise; sizes are the model's own but for ALIGN's.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "CLIP": {"resample": _BICUBIC, "do_center_crop": True, **_CLIP},
    "Siglip": {"resample": _BICUBIC, "do_center_crop": False, **_HALF},
    "Align": {
        "resample": _BILINEAR,
        "size": {"height": 346, "width": 346},
        "crop_size": {"height": 289, "width": 289},
        "do_center_crop": True,
        "do_normalize": False,
        "rescale_factor": 1 / 127.5,
        "rescale_offset": True,
        "include_top": False,
        **_HALF,
    },
}


@dataclass(frozen=True)
class Texts:
    """Texts to `input_ids` (and an attention mask where the model takes one): all of one length."""

    encode: Callable[[list[str]], dict[str, Tensor]]

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        if not texts:
            raise zoo.ZooError("there is no text", kind="usage")
        return self.encode(texts)

    @classmethod
    def beside(cls, stem: str, settings: Any, folder: Path) -> Texts:
        """transformers' layout: by tokenizer.json."""
        text = settings.text_config
        padding = {"CLIP": text.pad_token_id, "Siglip": 1, "Align": text.pad_token_id}[stem]
        longest = int(text.max_position_embeddings)
        # CLIP and SigLIP were always fed texts of full length; SigLIP pools the last place, whatever stands there.
        length = None if stem == "Align" else longest
        clean = _canonical if stem == "Siglip" else str
        return cls(_by_tokenizer(folder, longest, length, int(padding or 0), mask=stem != "Siglip", clean=clean))

    @classmethod
    def of_open_clip(cls, model: Any, config: Mapping[str, Any], folder: Path) -> Texts:
        """open_clip's own tokenizer; the one beside the weights where the configuration names one of the hub's."""
        length = int(model.context_length)
        text = config.get("model_cfg", {}).get("text_cfg", {})
        if text.get("hf_tokenizer_name"):
            clean = _canonical if (text.get("tokenizer_kwargs") or {}).get("clean") == "canonicalize" else str
            padding = 1 if text.get("pool_type") == "last" else 0
            return cls(_by_tokenizer(folder, length, length, padding, mask=False, clean=clean))
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer = SimpleTokenizer(context_length=length)
        return cls(lambda texts: {"input_ids": tokenizer(texts)})


def _canonical(text: str) -> str:
    """Lower case, without punctuation, as SigLIP was trained."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def _by_tokenizer(
    folder: Path, longest: int, length: int | None, padding: int, *, mask: bool, clean: Callable[[str], str]
) -> Callable[[list[str]], dict[str, Tensor]]:
    def encode(texts: list[str]) -> dict[str, Tensor]:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise zoo.ZooError(f"there is no tokenizer.json in {folder}", kind="file", hint="put it beside the weights")
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.enable_truncation(longest)
        tokenizer.enable_padding(length=length, pad_id=padding)
        found = tokenizer.encode_batch([clean(text) for text in texts])
        ids = {"input_ids": torch.tensor([each.ids for each in found])}
        return {**ids, "attention_mask": torch.tensor([each.attention_mask for each in found])} if mask else ids

    return encode


@dataclass(frozen=True)
class Images:
    """The path of an image to `pixel_values` [1, 3, H, W]. `settings` are spelled as in preprocessor_config.json."""

    settings: Mapping[str, Any]
    size: int

    @classmethod
    def beside(cls, stem: str, settings: Any, folder: Path) -> Images:
        path = folder / "preprocessor_config.json"
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if stem == "Align" and said:  # a file of its processor's that does not name it means yes
            said = {"include_top": True, **said}
        return cls({**_PUBLISHED[stem], **said}, int(settings.vision_config.image_size))

    @classmethod
    def of_open_clip(cls, model: Any, config: Mapping[str, Any]) -> Images:
        """By open_clip's preprocess_cfg: "shortest" crops the middle, "squash" takes all of it."""
        said = config.get("preprocess_cfg") or {}
        size = model.visual.image_size
        mode = said.get("resize_mode") or "shortest"
        if mode not in ("shortest", "squash"):
            raise zoo.ZooError(f'images are resized by "{mode}", which is not known here', kind="weights")
        found = {
            "resample": _BILINEAR if said.get("interpolation") == "bilinear" else _BICUBIC,
            "do_center_crop": mode == "shortest",
            "image_mean": said.get("mean", _CLIP["image_mean"]),
            "image_std": said.get("std", _CLIP["image_std"]),
        }
        return cls(found, int(size if isinstance(size, int) else size[0]))

    def __call__(self, path: str | Path) -> dict[str, Tensor]:
        from PIL import Image

        if not Path(path).is_file():
            raise zoo.ZooError(f"there is no image {path}", kind="file")
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except OSError as error:
            raise zoo.ZooError(f"{path} cannot be read as an image: {error}", kind="file") from error
        pixels: Any = np.asarray(self._cut(self._resized(image)), dtype=np.float32)
        if self.settings.get("do_rescale", True):
            pixels = pixels * np.float32(self.settings.get("rescale_factor", 1 / 255))
            pixels = pixels - 1 if self.settings.get("rescale_offset", False) else pixels
        if self.settings.get("do_normalize", True):
            mean, std = (np.asarray(self.settings[name], np.float32) for name in ("image_mean", "image_std"))
            pixels = (pixels - mean) / std
        if self.settings.get("include_top", False):
            pixels = pixels / np.asarray(self.settings["image_std"], np.float32)
        return {"pixel_values": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]}

    def _resized(self, image: Image) -> Image:
        if not self.settings.get("do_resize", True):
            return image
        crop = bool(self.settings.get("do_center_crop", False))
        size = self.settings.get("size") or ({"shortest_edge": self.size} if crop else {})
        if isinstance(size, int):
            size = {"shortest_edge": size}
        if "shortest_edge" in size:
            short, scale = int(size["shortest_edge"]), min(image.size)
            width, height = (short if side == scale else int(short * side / scale) for side in image.size)
        else:
            width, height = int(size.get("width", self.size)), int(size.get("height", self.size))
        return image.resize((width, height), int(self.settings["resample"]))

    def _cut(self, image: Image) -> Image:
        if not self.settings.get("do_center_crop", False):
            return image
        size = self.settings.get("crop_size") or self.size
        width, height = (size["width"], size["height"]) if isinstance(size, Mapping) else (size, size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))
