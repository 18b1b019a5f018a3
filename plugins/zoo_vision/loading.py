"""A vision model in its own library, fed with pictures: what `load` of this plugin's entries is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor, nn

import zoo
from zoo_vision.catalogue import FAMILIES
from zoo_vision.naming import recognise
from zoo_vision.running import fill, filled

if TYPE_CHECKING:
    from surgery import Checkpoint

TOP = 5
# How ImageNet's pictures are shown to the models of torchvision, and of timm where a configuration says nothing else.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLASSIC = {"input_size": (3, 224, 224), "interpolation": "bilinear", "mean": _MEAN, "std": _STD, "crop_pct": 0.875}


def load(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    """By the library that config.json belongs to; without one, by names and shapes."""
    if isinstance(config.get("architecture"), str) and not any("/" in name for name in checkpoint):
        from zoo_vision import of_timm

        made = of_timm.configured(config)
        model = zoo.unfilled(made.build)
        fill(model, checkpoint, made.at)
        return _classifier(model, _transform(model, {}), _labels(config, made.classes), made.classes)
    if isinstance(config.get("model_type"), str):
        return _of_transformers(checkpoint, config, folder)
    return _unlabelled(checkpoint)


def _unlabelled(checkpoint: Checkpoint) -> zoo.Loaded:
    from zoo_vision.probes import unlabelled

    family = next((each for each in FAMILIES if recognise(each, {}, checkpoint)), None)
    if family is None:
        raise zoo.ZooError(f"{checkpoint.source}: of no family of vision models by its names", kind="weights")
    made, _ = unlabelled(family, "whole", checkpoint)
    model = filled(made, checkpoint)
    own = getattr(model, "pretrained_cfg", None)  # timm's say how they are fed; torchvision's are all fed alike
    shown = _transform(model, {} if own else _CLASSIC, made.sizes[0] if own and len(made.sizes) == 1 else 0)
    return _classifier(model, shown, _labels({}, made.classes), made.classes)


def _transform(model: nn.Module, given: Mapping[str, Any], side: int = 0) -> Callable[[Image.Image], Tensor]:
    """Resizing, cropping and normalising as the model's configuration has it; `side`: to that size instead."""
    from timm.data import create_transform, resolve_data_config

    settings = given or resolve_data_config({"input_size": (3, side, side)} if side else {}, model=model)
    made: Callable[[Image.Image], Tensor] = create_transform(**settings, is_training=False)
    return made


def _classifier(
    model: nn.Module, transform: Callable[[Image.Image], Tensor], label: Callable[[int], str], classes: int
) -> zoo.Loaded:
    def preprocess(x: Any) -> Tensor:
        return x if isinstance(x, Tensor) else transform(picture(x))[None]

    def forward(module: nn.Module, pixels: Tensor) -> Tensor:
        answer: Tensor = module(pixels)
        return answer

    return zoo.Loaded(model, preprocess, forward, lambda logits: _described(logits, label, classes))


def picture(x: Any) -> Image.Image:
    """The picture behind a path, in red, green and blue."""
    if isinstance(x, Image.Image):
        return x.convert("RGB")
    if not isinstance(x, (str, Path)):
        raise zoo.ZooError(f"a picture is given as a path, and this is a {type(x).__name__}", kind="file")
    try:
        with Image.open(x) as found:
            return found.convert("RGB")
    except OSError as error:
        raise zoo.ZooError(f"{x}: no picture could be read: {error}", kind="file") from error


def _described(answer: Tensor, label: Callable[[int], str], classes: int) -> Mapping[str, Any]:
    """The likeliest classes of the first picture; of a model without classes, its vector."""
    first = answer[0].float()
    if not classes:
        return {"features": list(first.shape), "norm": round(float(first.norm()), 4)}
    likely = first.softmax(-1).topk(min(TOP, classes))
    return {
        "top": [
            {"class": label(int(index)), "probability": round(float(value), 4)}
            for value, index in zip(likely.values, likely.indices, strict=True)
        ]
    }


def _labels(config: Mapping[str, Any], classes: int) -> Callable[[int], str]:
    """What a class is called: by the configuration, by ImageNet's order where there are as many, else its number."""
    given = config.get("pretrained_cfg") or {}
    names = config.get("label_names") or given.get("label_names")
    described = config.get("label_descriptions") or given.get("label_descriptions") or {}
    if names:
        ordered = names if isinstance(names, list) else [names[key] for key in sorted(names, key=int)]
        return lambda index: str(described.get(ordered[index], ordered[index]))
    if classes == 1000:
        from timm.data import ImageNetInfo

        known = ImageNetInfo("imagenet-1k")
        return lambda index: str(known.index_to_description(index))
    return str


def _of_transformers(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    import transformers

    from zoo_vision import of_transformers

    described = folder / "preprocessor_config.json"
    if not described.exists():
        raise zoo.ZooError(
            f"{folder}: there is no preprocessor_config.json, which says how pictures are shown to the model",
            kind="weights",
            hint="put the model's preprocessor_config.json beside the weights",
        )
    known = of_transformers.configured(config)
    model = zoo.unfilled(lambda: of_transformers.made(known, str(config["model_type"]), checkpoint))
    of_transformers.filled(model, checkpoint)
    # Read here, and not from the folder by name: nothing is then looked for elsewhere.
    settings = json.loads(described.read_text())
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "ViTImageProcessor"
    processor = getattr(transformers, kind.replace("FeatureExtractor", "ImageProcessor")).from_dict(settings)
    classes = known.num_labels if any("classifier." in name for name in checkpoint) else 0

    def preprocess(x: Any) -> Tensor:
        if isinstance(x, Tensor):
            return x
        pixels: Tensor = processor(images=picture(x), return_tensors="pt")["pixel_values"]
        return pixels

    def forward(module: nn.Module, pixels: Tensor) -> Tensor:
        answer = module(pixels)
        found: Tensor = answer.logits if classes else answer.last_hidden_state[:, 0]
        return found

    def label(index: int) -> str:
        return str(known.id2label[index])

    return zoo.Loaded(model, preprocess, forward, lambda logits: _described(logits, label, classes))
