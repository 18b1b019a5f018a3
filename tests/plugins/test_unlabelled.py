"""Files as people have them, without a word on what is in them: what `zoo show` says, and what runs from them alone.

Each is written by the library that writes such files, from a tiny seeded model. fairseq is not installable beside
current libraries: its files are made of transformers' models, under the names that transformers' conversion scripts
read (models/*/convert_*_original_*), with an argparse.Namespace as fairseq's trainer wrote it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import surgery
import zoo
from tests import tiny_speech
from tests.tiny_bert import SIZES
from tests.tiny_speech import LARGE, SPEECH, WAVLM

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# ---------------------------------------------------------------------------------------------------- what writes them


def seeded(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
    return model.eval()


def vit() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return seeded(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3))


def bert() -> Any:
    import transformers

    torch.manual_seed(0)
    return seeded(transformers.BertModel(transformers.BertConfig(**SIZES)))


def state_dict(folder: Path) -> Path:
    torch.save(vit().state_dict(), folder / "thing.pt")
    return folder / "thing.pt"


def pytorch_model(folder: Path) -> Path:
    made = bert()
    torch.save(made.state_dict(), folder / "pytorch_model.bin")
    made.config.save_pretrained(folder)
    return folder / "pytorch_model.bin"


def shards(folder: Path) -> Path:
    bert().save_pretrained(folder, max_shard_size="20KB")
    return next(folder.glob("*.index.json"))


def whisper(folder: Path) -> Path:
    """As whisper.load_model reads it: sizes and tensors. Its heads are not of the width that is published."""
    from dataclasses import asdict

    model = openai_whisper()
    torch.save({"dims": asdict(model.dims), "model_state_dict": model.half().state_dict()}, folder / "thing.pt")
    return folder / "thing.pt"


def openai_whisper() -> Any:
    whisper = pytest.importorskip("whisper.model")
    torch.manual_seed(0)
    model = whisper.Whisper(whisper.ModelDimensions(8, 12, 16, 2, 2, 50, 10, 16, 4, 1))
    with torch.no_grad():
        model.decoder.positional_embedding.zero_()  # it is made without values
    return seeded(model)


def openai_clip(layers: Any, patch: int | None) -> Callable[[Path], Path]:
    """A program of TorchScript's, traced from OpenAI's own class in their mixed precision, with the three sizes that
    OpenAI's archives have among their tensors."""

    def write(folder: Path) -> Path:
        clip = pytest.importorskip("clip.model")
        torch.manual_seed(0)
        model: Any = seeded(clip.CLIP(24, 32, layers, 64, patch, 12, 60, 64, 1, 2))
        clip.convert_weights(model)
        for name, size in (("input_resolution", 32), ("context_length", 12), ("vocab_size", 60)):
            vars(model).pop(name, None)
            model.register_buffer(name, torch.tensor(size))
        ids = torch.randint(1, 59, (2, 12))
        torch.jit.trace(model, (torch.randn(2, 3, 32, 32), ids), check_trace=False).save(str(folder / "thing.pt"))
        return folder / "thing.pt"

    return write


# What fairseq's Wav2Vec2Config calls the sizes of tests.tiny_speech.
ARGUMENTS = {
    "extractor_mode": "default",
    "encoder_embed_dim": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_embed_dim": 24,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "conv_feature_layers": "[(8, 10, 5)] + [(8, 3, 2)] * 1 + [(8,2,2)]",
    "conv_bias": False,
    "conv_pos": 8,
    "conv_pos_groups": 4,
    "dropout": 0.1,
}
LARGER = ARGUMENTS | {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}


def speaker(name: str, **sizes: Any) -> Callable[[], Any]:
    return lambda: tiny_speech.made(name, **SPEECH | sizes)


def fairseq(make: Callable[[], Any], beside: dict[str, Any], prefix: str = "", deep: bool = False) -> Any:
    def write(folder: Path) -> Path:
        named = tiny_speech.fairseq(make().state_dict(), prefix, deep=deep)
        extra = {"optimizer_history": [{"num_updates": 3}], "last_optimizer_state": {"state": {0: torch.ones(2)}}}
        torch.save({**beside, "model": named, **extra}, folder / "thing.pt")
        return folder / "thing.pt"

    return write


class Settings:
    """A class of a person's own, among the hyper-parameters."""

    def __init__(self) -> None:
        self.rate = 0.1


def lightning(folder: Path) -> Path:
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Classifier(pytorch_lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, settings: Any, width: int = 192) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = vit()

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pytorch_lightning.Trainer(**options, enable_model_summary=False)
    trainer.strategy.connect(Classifier(Settings()))
    trainer.save_checkpoint(folder / "thing.ckpt")
    return folder / "thing.ckpt"


def parallel(folder: Path) -> Path:
    torch.save({"model": nn.DataParallel(vit()).state_dict(), "optimizer": {"state": {}}}, folder / "thing.pth")
    return folder / "thing.pth"


def averaged(folder: Path) -> Path:
    """As timm's CheckpointSaver writes it."""
    from timm.utils import CheckpointSaver, ModelEmaV2

    model = vit()
    ema = ModelEmaV2(model)
    with torch.no_grad():
        for value in ema.module.state_dict().values():
            value.mul_(0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    args = argparse.Namespace(model="vit_tiny_patch16_224", lr=0.1)
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=str(folder))
    saver.save_checkpoint(0, 1.0)
    for path in folder.iterdir():
        if path.name != "last.pth.tar":
            path.unlink()
    return (folder / "last.pth.tar").rename(folder / "thing.pt")


def google_vit(folder: Path) -> Path:
    """The names and axes that timm's own reader of such files (vision_transformer._load_weights) takes."""
    model: Any = vit()
    own = {name: value.numpy() for name, value in model.state_dict().items()}
    q, k, v = np.split(own["blocks.0.attn.qkv.weight"].reshape(9, 64, 192), 3)
    biases = np.split(own["blocks.0.attn.qkv.bias"].reshape(9, 64), 3)
    block, inside = "Transformer/encoderblock_0", "MultiHeadDotProductAttention_1"
    arrays = {
        "embedding/kernel": own["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": own["patch_embed.proj.bias"],
        "cls": own["cls_token"],
        "Transformer/posembed_input/pos_embedding": own["pos_embed"],
        "Transformer/encoder_norm/scale": own["norm.weight"],
        "Transformer/encoder_norm/bias": own["norm.bias"],
        "head/kernel": own["head.weight"].T,
        "head/bias": own["head.bias"],
        f"{block}/{inside}/out/kernel": own["blocks.0.attn.proj.weight"].T.reshape(3, 64, 192),
        f"{block}/{inside}/out/bias": own["blocks.0.attn.proj.bias"],
    }
    for name, weight, bias in zip(("query", "key", "value"), (q, k, v), biases, strict=True):
        arrays[f"{block}/{inside}/{name}/kernel"] = weight.transpose(2, 0, 1)
        arrays[f"{block}/{inside}/{name}/bias"] = bias
    for i, norm in ((0, "norm1"), (2, "norm2")):
        arrays[f"{block}/LayerNorm_{i}/scale"] = own[f"blocks.0.{norm}.weight"]
        arrays[f"{block}/LayerNorm_{i}/bias"] = own[f"blocks.0.{norm}.bias"]
    for i in (0, 1):
        arrays[f"{block}/MlpBlock_3/Dense_{i}/kernel"] = own[f"blocks.0.mlp.fc{i + 1}.weight"].T
        arrays[f"{block}/MlpBlock_3/Dense_{i}/bias"] = own[f"blocks.0.mlp.fc{i + 1}.bias"]
    np.savez(folder / "thing.npz", **arrays)
    return folder / "thing.npz"


# ---------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """What writes the file; which entries it looks like, ties included; words of the evidence and of the notes; and the
    part of each entry that is then shown."""

    write: Callable[[Path], Path]
    entries: tuple[str, ...]
    evidence: str
    notes: tuple[str, ...] = ()
    part: str = "encoder"


NAMESPACE = argparse.Namespace(arch="wav2vec2", task="audio_pretraining", **ARGUMENTS)
TUNED = argparse.Namespace(arch="wav2vec_ctc", w2v_args=argparse.Namespace(arch="wav2vec2", **LARGER))
HUBERT = {"cfg": {"model": {"_name": "hubert", **ARGUMENTS}, "task": {"_name": "hubert_pretraining"}}, "args": None}
RELATIVE = {"relative_position_embedding": True, "num_buckets": 8, "max_distance": 20, "gru_rel_pos": True}
BODY = ("Wav2Vec2Model", "HubertModel", "WavLMModel")

ROWS = {
    "state dict": Row(state_dict, ("vit",), "named as in vit, layout timm"),
    "pytorch_model.bin": Row(pytorch_model, ("bert",), 'model_type is "bert"'),
    "sharded": Row(shards, ("bert",), 'model_type is "bert"'),
    "Whisper of OpenAI": Row(whisper, ("whisper",), "dims are those of openai-whisper: 2 and 1 layers"),
    "CLIP of OpenAI": Row(openai_clip(2, 8), ("clip",), "as OpenAI's own archives do", ("TorchScript",), "vision"),
    "ResNet of OpenAI": Row(
        openai_clip((1, 1, 1, 1), None), ("clip",), "as OpenAI's own archives do", ("TorchScript",), "vision"
    ),
    "fairseq": Row(
        fairseq(speaker("Wav2Vec2Model"), {"args": NAMESPACE}),
        ("wav2vec2",),
        'has arch "wav2vec2", as fairseq writes it',
        ("argparse.Namespace", "last_optimizer_state"),
    ),
    "fairseq, tuned": Row(
        fairseq(speaker("Wav2Vec2ForCTC", **LARGE), {"args": TUNED}, "w2v_encoder.w2v_model.", deep=True),
        ("wav2vec2",),
        'has arch "wav2vec_ctc", as fairseq writes it',
        ("argparse.Namespace",),
    ),
    "fairseq's HuBERT": Row(fairseq(speaker("HubertModel"), HUBERT), ("hubert",), 'has _name "hubert"'),
    "fairseq, and silent": Row(
        fairseq(speaker("HubertModel"), {"args": None}), ("hubert", "wav2vec2"), "layout fairseq"
    ),
    "WavLM": Row(
        fairseq(speaker("WavLMModel", **WAVLM), {"cfg": ARGUMENTS | RELATIVE}), ("wavlm",), "relative position bias"
    ),
    "Lightning": Row(
        lightning,
        ("vit",),
        "named as in vit",
        ("under 'state_dict'", "began with 'model.'", "test_unlabelled.Settings"),
    ),
    "DataParallel": Row(parallel, ("vit",), "named as in vit", ("under 'model'", "began with 'module.'")),
    "timm's average": Row(averaged, ("vit",), "named as in vit", ("An average", "key='state_dict_ema'", "Namespace")),
    "Google's ViT": Row(google_vit, ("vit",), "layout jax"),
}


@pytest.mark.parametrize("name", ROWS)
def test_shown(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from zoo.cli import main

    row = ROWS[name]
    path = row.write(tmp_path)
    capsys.readouterr()
    assert main(["show", f"file:{path}", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert tuple(shown["recognised"]) == row.entries
    assert all(row.evidence in " ".join(why) for why in shown["recognised"].values())
    assert all(any(words in note for note in shown["notes"]) for words in row.notes), shown["notes"]
    parts = {part["name"] for part in shown["parts"]}
    assert row.part in parts if len(row.entries) == 1 else parts == {""}
    assert main(["show", f"file:{path}"]) == 0
    human = capsys.readouterr().out
    assert all(f"looks like {entry}: " in human for entry in row.entries)
    assert main(["show", f"file:{path}#{row.part}", "--json"]) == 0


def test_the_average_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from zoo.cli import main

    path = averaged(tmp_path)
    assert main(["show", f"file:{path}:state_dict_ema#head", "--json"]) == 0
    assert "head.weight" in capsys.readouterr().out
    plain, average = zoo.open(f"file:{path}"), zoo.open(f"file:{path}:state_dict_ema")
    assert torch.equal(plain.read("head.weight") * 0.5, average.read("head.weight"))
    assert main(["show", f"file:{path}:ema"]) == 2
    assert "'state_dict_ema'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- run


def probed(path: Path, part: str | None = None) -> zoo.PartProbe:
    from zoo.resolving import resolve

    found = resolve(f"file:{path}" + (f"#{part}" if part else "")).reference()
    assert found is not None
    return found


def test_openais_whisper_runs_by_its_dims(tmp_path: Path) -> None:
    """Four heads of 4 in the decoder, and two of 8 in the encoder, which no shape tells."""
    path, model = whisper(tmp_path), openai_whisper().half().float()
    whole, encoder = probed(path), probed(path, "encoder")
    whole.reference.float(), encoder.reference.float()
    with torch.no_grad():
        x = whole.inputs(1, "plain")
        expected = model(x["input_features"], x["decoder_input_ids"])
        torch.testing.assert_close(whole.run(whole.reference, x)[0], expected, rtol=1e-4, atol=1e-4)
        heard = encoder.run(encoder.reference, {"input_features": x["input_features"]})[0]
        torch.testing.assert_close(heard, model.encoder(x["input_features"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["CLIP of OpenAI", "ResNet of OpenAI"])
def test_openais_clip_runs_as_open_clip_loads_it(name: str, tmp_path: Path) -> None:
    import open_clip

    path = ROWS[name].write(tmp_path)
    expected: Any = open_clip.load_openai_model(str(path), precision="fp32", device="cpu")
    expected.eval()
    loaded: Any = zoo.load(f"file:{path}")
    text, vision = probed(path, "text"), probed(path, "vision")
    with torch.no_grad():
        ids, pixels = text.inputs(1, "plain"), vision.inputs(1, "plain")
        for got in (loaded.model.encode_text(ids["input_ids"]), text.run(text.reference, ids)[0]):
            torch.testing.assert_close(got, expected.encode_text(ids["input_ids"]), rtol=1e-4, atol=1e-4)
        for got in (loaded.model.encode_image(pixels["pixel_values"]), vision.run(vision.reference, pixels)[0]):
            torch.testing.assert_close(got, expected.encode_image(pixels["pixel_values"]), rtol=1e-4, atol=1e-4)


SPOKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "fairseq": (speaker("Wav2Vec2Model"), "last_hidden_state"),
    "fairseq, tuned": (speaker("Wav2Vec2ForCTC", **LARGE), "logits"),
    "fairseq's HuBERT": (speaker("HubertModel"), "last_hidden_state"),
    "WavLM": (speaker("WavLMModel", **WAVLM), "last_hidden_state"),
}


@pytest.mark.parametrize("name", SPOKEN)
def test_fairseqs_models_run_by_their_arguments(name: str, tmp_path: Path) -> None:
    """Heads of 4, and kernels that no published model has."""
    path = ROWS[name].write(tmp_path)
    make, output = SPOKEN[name]
    model = make()
    whole, encoder = probed(path), probed(path, "encoder")
    assert whole.outputs == (output,)
    with torch.no_grad():
        for variant in whole.variants:
            x = whole.inputs(1, variant)
            torch.testing.assert_close(whole.run(whole.reference, x)[0], model(**x)[output], rtol=1e-4, atol=1e-4)
            body = getattr(model, model.base_model_prefix, model)
            heard = encoder.run(encoder.reference, x)[0]
            torch.testing.assert_close(heard, body(**x).last_hidden_state, rtol=1e-4, atol=1e-4)
    samples = np.sin(np.arange(4000) / 9).astype(np.float32)
    assert zoo.load(f"file:{path}").run(samples).isfinite().all()


@pytest.mark.parametrize("name", ["state dict", "Lightning", "DataParallel", "timm's average"])
def test_a_vit_in_wrappers_is_the_same_function(name: str, tmp_path: Path) -> None:
    path = ROWS[name].write(tmp_path)
    model = vit()
    opened = zoo.open(f"file:{path}")
    model.load_state_dict({key: opened.read(key) for key in opened})
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(x), vit()(x))


def test_grafted_from_openais_archive(tmp_path: Path) -> None:
    """The image tower of a TorchScript archive into the class that it was traced from, by running both."""
    clip = pytest.importorskip("clip.model")
    path = openai_clip(2, 8)(tmp_path)
    target = clip.VisionTransformer(32, 8, 64, 2, 1, 24)
    report = zoo.graft(f"file:{path}#vision", target, example=torch.randn(2, 3, 32, 32))
    assert str(report.verdict) == "proven", report
    assert torch.equal(target.proj, zoo.open(f"file:{path}").read("visual.proj").float())


def test_grafted_from_fairseqs_file(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an argparse.Namespace inside, from the command line into the example of a port."""
    from zoo.cli import main

    ROWS["fairseq"].write(tmp_path)
    shutil.copy(root / "examples" / "my_wav2vec2.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    sizes = ["channels=8", "kernels=(10,3,2)", "strides=(5,2,2)", "width=16", "layers=2", "heads=4", "inner=24"]
    sets = [word for size in [*sizes, "reach=8", "groups=4"] for word in ("--set", size)]
    for command in ("graft", "verify"):
        status = main([command, "file:thing.pt#encoder", "my_wav2vec2.py", *sets, "--json"])
        answer = json.loads(capsys.readouterr().out)
        assert (status, answer["verdict"]) == (0, "proven"), answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[(512, 10, 5)] + [(512, 3, 2)] * 2 + [(512,2,2)]", [(512, 10, 5), (512, 3, 2), (512, 3, 2), (512, 2, 2)]),
        (" [(1, 2, 3), (4, 5, 6)] ", [(1, 2, 3), (4, 5, 6)]),
    ],
)
def test_convolutions_are_read(text: str, expected: list[tuple[int, int, int]]) -> None:
    from zoo_audio.fairseq import layers

    assert layers(text) == expected


@pytest.mark.parametrize(
    "text", ["__import__('os').system('true')", "[(1,2,3)] * 10**9", "[(1,2)]", "", "[" * 5000, "[1] + 2", "x"]
)
def test_convolutions_are_not_evaluated(text: str) -> None:
    from zoo_audio.fairseq import layers

    with pytest.raises(zoo.ZooError, match="cannot be read"):
        layers(text)


def test_settings_that_have_no_reference(tmp_path: Path) -> None:
    other = argparse.Namespace(**{**vars(NAMESPACE), "activation_fn": "swish"})
    path = fairseq(speaker("Wav2Vec2Model"), {"args": other})(tmp_path)
    with pytest.raises(zoo.ZooError, match="activation_fn swish"):
        probed(path)


def test_a_name_of_ones_own_is_not_taken_for_a_wrapper(tmp_path: Path) -> None:
    """`model.` belongs to Whisper's names as published, and is recognised with it: it stays."""
    torch.save(
        tiny_speech.made("WhisperForConditionalGeneration", **tiny_speech.WHISPER).model.state_dict(), tmp_path / "a.pt"
    )
    assert next(iter(zoo.open(f"file:{tmp_path / 'a.pt'}"))).startswith("encoder.")
    held: dict[str, Tensor] = {f"model.{name}": value for name, value in torch.load(tmp_path / "a.pt").items()}
    torch.save(held, tmp_path / "b.pt")
    assert next(iter(zoo.open(f"file:{tmp_path / 'b.pt'}"))).startswith("model.encoder.")
    torch.save({"model.x": torch.ones(1)}, tmp_path / "c.pt")
    assert list(zoo.open(f"file:{tmp_path / 'c.pt'}")) == ["model.x"], "nothing recognises it without the prefix either"
    assert next(iter(surgery.open(tmp_path / "b.pt"))).startswith("model.")


def test_names_of_a_compiled_module_in_safetensors(tmp_path: Path) -> None:
    """surgery gives the names of such a file as they are; zoo leaves out what no plugin recognises."""
    from safetensors.torch import save_file

    save_file({f"_orig_mod.{name}": value for name, value in vit().state_dict().items()}, tmp_path / "a.safetensors")
    assert all(name.startswith("_orig_mod.") for name in surgery.open(tmp_path / "a.safetensors"))
    opened = zoo.open(f"file:{tmp_path / 'a.safetensors'}")
    assert list(opened.view(sorted(opened))) == sorted(vit().state_dict())
    assert "began with '_orig_mod.'" in opened.notes[-1]


def test_importing_what_reads_arguments_imports_no_torch() -> None:
    import subprocess

    code = "import sys, zoo_audio.fairseq; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\[\]\s*", done.stdout)
