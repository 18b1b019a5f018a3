"""Image-text models loaded and asked: beside the processors and models of their own libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from tests.tiny_clip import IMAGE, LENGTH, MODELS, VOCABULARY

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pillow = pytest.importorskip("PIL.Image")

WORDS = ["a", "cat", "dog", "of", "photo"]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "cat.png"
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    pillow.fromarray(noise).resize((90, 60), pillow.Resampling.BICUBIC).save(path)
    return path


def tokenizer() -> Any:
    """Words to ids, with the largest id at the end."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", *WORDS])} | {"<end>": VOCABULARY - 1}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", VOCABULARY - 1)]
    )
    return made


def loaded(name: str, folder: Path) -> tuple[zoo.Loaded, Any]:
    tiny = MODELS[name][0]()
    path = tiny.at(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    return zoo.load(f"file:{path}"), tiny.model


@pytest.mark.parametrize("name", ["clip in transformers", "siglip in transformers", "align in transformers"])
def test_asked_in_all_three_ways(name: str, picture: Path, tmp_path: Path) -> None:
    model, reference = loaded(name, tmp_path)
    texts = ["a photo of a cat", "dog"]
    x = model.preprocess({"image": str(picture), "texts": texts})
    assert x["input_ids"][1, 0] == 2 + WORDS.index("dog")
    assert x["input_ids"].shape[1] == (6 if name.startswith("align") else LENGTH)
    with torch.no_grad():
        expected = reference(**{key: x[key] for key in x if key != "labels"})
    logits = expected.logits_per_image[0]
    probabilities = logits.sigmoid() if name.startswith("siglip") else logits.softmax(-1)
    answer = model.run({"image": str(picture), "texts": texts})
    torch.testing.assert_close(answer["probabilities"], probabilities, rtol=1e-4, atol=1e-5)
    described = model.describe(answer)["texts"]
    assert {each["text"] for each in described} == set(texts)
    assert described[0]["probability"] >= described[1]["probability"]
    text, image = model.run(texts)["text_embeds"], model.run(str(picture))["image_embeds"]
    torch.testing.assert_close(torch.nn.functional.normalize(text, dim=-1), expected.text_embeds, rtol=1e-4, atol=1e-5)
    norm = torch.nn.functional.normalize(image, dim=-1)
    torch.testing.assert_close(norm, expected.image_embeds, rtol=1e-4, atol=1e-5)
    assert model.describe({"image_embeds": image})["shape"] == list(image.shape)
    assert model.entry is not None
    assert model.entry.name == MODELS[name][1]


def test_open_clips_own_preprocessing(picture: Path, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    model, reference = loaded("clip in open_clip", tmp_path)
    pixels = model.preprocess(str(picture))["pixel_values"]
    half = (0.5, 0.5, 0.5)
    transform = open_clip.image_transform(IMAGE, False, half, half, resize_mode="shortest", interpolation="bicubic")
    with pillow.open(picture) as image:
        torch.testing.assert_close(pixels[0], transform(image), rtol=1e-5, atol=1e-5)
    ids = model.preprocess("a cat")["input_ids"]
    assert torch.equal(ids, open_clip.tokenizer.SimpleTokenizer(context_length=LENGTH)(["a cat"]))
    with torch.inference_mode():
        torch.testing.assert_close(
            model.run(str(picture))["image_embeds"], reference.encode_image(pixels), rtol=1e-5, atol=1e-5
        )


def test_siglip_of_open_clip(picture: Path, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    model, reference = loaded("siglip in open_clip", tmp_path)
    pixels = model.preprocess(str(picture))["pixel_values"]
    half = (0.5, 0.5, 0.5)
    transform = open_clip.image_transform(IMAGE, False, half, half, resize_mode="squash", interpolation="bicubic")
    with pillow.open(picture) as image:
        torch.testing.assert_close(pixels[0], transform(image), rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.run(str(picture))["image_embeds"], reference.encode_image(pixels), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("clip in transformers", "CLIPImageProcessor", {"size": {"shortest_edge": IMAGE}, "crop_size": IMAGE}),
        ("siglip in transformers", "SiglipImageProcessor", {"size": {"height": IMAGE, "width": IMAGE}}),
        (
            "align in transformers",
            "EfficientNetImageProcessor",
            {
                "include_top": False,
                "size": {"height": 40, "width": 40},
                "crop_size": {"height": IMAGE, "width": IMAGE},
                "do_center_crop": True,
                "do_normalize": False,
                "rescale_factor": 1 / 127.5,
                "rescale_offset": True,
                "resample": 2,
            },
        ),
    ],
)
def test_images_as_the_processor_beside_the_weights_makes_them(
    name: str, kind: str, settings: dict[str, Any], picture: Path, tmp_path: Path
) -> None:
    made = getattr(transformers, f"{kind}Pil", None)
    if made is None:
        pytest.skip("this transformers has no processor that works in PIL")
    processor = made(**settings)
    processor.save_pretrained(tmp_path)
    model, _ = loaded(name, tmp_path)
    with pillow.open(picture) as image:
        expected = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(model.preprocess(str(picture))["pixel_values"], expected, rtol=1e-4, atol=1e-4)


def test_what_is_wrong_is_said(picture: Path, tmp_path: Path) -> None:
    model, _ = loaded("clip in transformers", tmp_path)
    for x, message in (
        ({"image": str(picture)}, "belong together"),
        ({"image": str(picture), "texts": []}, "no text"),
        (str(tmp_path / "none.png"), "no image"),
    ):
        with pytest.raises(zoo.ZooError, match=message):
            model.run(x)
    (tmp_path / "odd.png").write_bytes(b"not a picture")
    with pytest.raises(zoo.ZooError, match="cannot be read as an image"):
        model.run(str(tmp_path / "odd.png"))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(zoo.ZooError, match=r"no tokenizer\.json"):
        model.run("a cat")
