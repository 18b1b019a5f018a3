"""The audio plugin as a person uses it: pull, show, recognise, load, graft into a module of one's own, verify."""

from __future__ import annotations

import json
import shutil
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
import zoo
from tests import tiny_speech
from tests.hub_server import HubServer
from tests.tiny_speech import LARGE, SPEECH, WAVLM, WHISPER
from tests.zoo.conftest import Zoo

pytest.importorskip("transformers")

ONE_SECOND = WHISPER | {"max_source_positions": 50}
HEARD = ["mels=8", "width=16", "layers=2", "heads=4", "inner=24"]
SPOKEN = ["channels=8", "kernels=(10,3,2)", "strides=(5,2,2)", "width=16", "layers=2", "heads=4", "inner=24"]
SPOKEN += ["reach=8", "groups=4"]

# entry -> class, its sizes, repository, part, example, the example's sizes
ROWS: dict[str, tuple[str, dict[str, Any], str, str, str, list[str]]] = {
    "whisper-encoder": (
        "WhisperForConditionalGeneration",
        WHISPER,
        "openai/whisper-base",
        "encoder",
        "my_whisper.py",
        [*HEARD, "positions=12"],
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        WHISPER,
        "openai/whisper-base",
        "",
        "my_whisper_decoder.py",
        [*HEARD, "frames=12", "vocab=50", "longest=10"],
    ),
    "wav2vec2-encoder": (
        "Wav2Vec2ForPreTraining",
        SPEECH,
        "facebook/wav2vec2-base",
        "encoder",
        "my_wav2vec2.py",
        SPOKEN,
    ),
    "hubert-encoder": ("HubertModel", SPEECH, "facebook/hubert-base-ls960", "encoder", "my_hubert.py", SPOKEN),
    "wavlm-encoder": (
        "WavLMModel",
        SPEECH | WAVLM,
        "microsoft/wavlm-base",
        "encoder",
        "my_wavlm.py",
        [*SPOKEN, "buckets=8", "farthest=20"],
    ),
}

# A decoder alone, of the example's blocks; its arguments are told by their names.
SPEAKER = """
from my_whisper_decoder import Block, nn, torch

class Speaker(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.order = nn.Embedding(50, 64), nn.Parameter(torch.zeros(10, 64))
        self.speak, self.spoken = Block(64, 1, 256, cross=True), nn.LayerNorm(64)

    def forward(self, tokens, memory):
        return self.spoken(self.speak(self.words(tokens) + self.order[: tokens.shape[1]], memory))
"""

# Every command in one process, because each would import torch anew.
COMMANDS = """
import contextlib, io, json, sys
from zoo.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main([*arguments, "--json"])
    found.append([status, json.loads(out.getvalue())])
print(json.dumps(found))
"""


@pytest.mark.parametrize("ref", ROWS)
def test_from_the_hub_into_a_module_of_ones_own(ref: str, root: Path, tmp_path: Path) -> None:
    name, sizes, repository, part, example, sets = ROWS[ref]
    tiny_speech.save(tiny_speech.made(name, **sizes), tmp_path / "saved")
    if name != "WhisperForConditionalGeneration":  # published before torch spelled weight norm anew
        weights = tmp_path / "saved" / "model.safetensors"
        save_file(tiny_speech.old_norm(load_file(weights)), weights, {"format": "pt"})
    (tmp_path / "work").mkdir()
    shutil.copy(root / "examples" / example, tmp_path / "work")
    arguments = [ref, example, *(word for each in sets for word in ("--set", each))]
    commands = [["pull", ref], ["show", ref], ["graft", *arguments], ["verify", *arguments]]
    with HubServer() as hub:
        hub.add(repository, {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()})
        person = Zoo(tmp_path / "home", tmp_path / "work").online(hub.endpoint)
        done = person.python(COMMANDS, json.dumps(commands))
    assert done.status == 0, done.err
    (pulled, _), (shown, about), (grafted, graft), (verified, _) = json.loads(done.out.splitlines()[-1])
    assert [pulled, shown, grafted, verified] == [0, 0, 0, 0], done.err + done.out
    assert graft["verdict"] == "proven"
    assert ref.partition("-")[0] in json.dumps(about)
    if part:
        assert part in json.dumps(about)


def test_bare_files_into_a_module_of_ones_own(root: Path, tmp_path: Path) -> None:
    """OpenAI's own file and fairseq's, with no configuration beside them."""
    pytest.importorskip("whisper.model")
    dims, model = tiny_speech.openai_whisper(layers=1)
    torch.save({"dims": dims, "model_state_dict": model.state_dict()}, tmp_path / "openai.pt")
    speaker = tiny_speech.made("Wav2Vec2Model", **tiny_speech.SHAPED | {"num_hidden_layers": 1})
    fair = tiny_speech.fairseq(speaker.state_dict()) | {"quantizer.vars": torch.zeros(1, 4, 8)}
    torch.save({"args": None, "model": fair}, tmp_path / "fairseq.pt")
    heard = ["mels=8", "width=64", "layers=1", "heads=1", "inner=256", "positions=12"]
    spoken = ["channels=8", "width=64", "layers=1", "heads=1", "inner=24", "reach=8", "groups=4"]
    (tmp_path / "speaker.py").write_text(SPEAKER)
    shutil.copy(root / "examples" / "my_whisper_decoder.py", tmp_path)
    commands = [["graft", "file:openai.pt#decoder", "speaker.py"]]
    for ref, example, sets in (
        ("file:openai.pt#encoder", "my_whisper.py", heard),
        ("file:fairseq.pt#encoder", "my_wav2vec2.py", spoken),
    ):
        shutil.copy(root / "examples" / example, tmp_path)
        commands.append(["graft", ref, example, *(word for each in sets for word in ("--set", each))])
    done = Zoo(tmp_path / "home", tmp_path).python(COMMANDS, json.dumps(commands))
    assert done.status == 0, done.err
    for status, answer in json.loads(done.out.splitlines()[-1]):
        assert status == 0, answer
        assert answer["verdict"] == "proven"


# ---------------------------------------------------------------------------------------------------- recognise


def host() -> zoo.Host:
    import zoo_audio

    return zoo.Host({"audio": zoo_audio}, switches="", warn=lambda _: None)


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("WhisperForConditionalGeneration", WHISPER, ["whisper"]),
        ("WhisperModel", WHISPER, ["whisper"]),
        ("Wav2Vec2ForPreTraining", SPEECH, ["wav2vec2"]),
        ("Wav2Vec2ForCTC", SPEECH | LARGE, ["wav2vec2"]),
        ("HubertForCTC", SPEECH | LARGE, ["hubert"]),
        ("HubertModel", SPEECH, ["hubert", "wav2vec2"]),  # nothing in such a body tells the two apart
        ("WavLMModel", SPEECH | WAVLM, ["wavlm"]),
        ("WavLMForCTC", SPEECH | WAVLM, ["wavlm"]),
    ],
)
def test_recognised(name: str, sizes: dict[str, Any], expected: list[str]) -> None:
    model = tiny_speech.made(name, **sizes)
    for tensors in (model.state_dict(), tiny_speech.old_norm(model.state_dict())):
        found = host().recognise({}, surgery.open(tensors))
        assert [each.entry for each in found] == expected
        assert len({each.matched for each in found}) == 1
        assert all(("config.json" in each.evidence[-1]) == (len(found) > 1) for each in found)  # what would settle it
        told = host().recognise(model.config.to_dict(), surgery.open(tensors))
        assert [each.entry for each in told] == [expected[0]]


def test_fairseq_says_more() -> None:
    body = tiny_speech.fairseq(tiny_speech.made("HubertModel", **SPEECH).state_dict())
    hubert = surgery.open(body | {"label_embs_concat": torch.zeros(3, 4)})
    assert [each.entry for each in host().recognise({}, hubert)] == ["hubert"]
    wav2vec2 = surgery.open(body | {"quantizer.vars": torch.zeros(1, 3, 4)})
    assert [each.entry for each in host().recognise({}, wav2vec2)] == ["wav2vec2"]
    assert host().recognise({"model_type": "bert"}, wav2vec2) == []


# ---------------------------------------------------------------------------------------------------- load


def recording(path: Path, rate: int = 16000, seconds: float = 0.5) -> np.ndarray[Any, Any]:
    samples = (np.sin(np.arange(int(rate * seconds)) / 9) * 9000).astype(np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(struct.pack(f"<{len(samples)}h", *samples.tolist()))
    return samples.astype(np.float32) / 2**15


def test_load_ctc(tmp_path: Path) -> None:
    from zoo_audio.loading import collapsed

    model = tiny_speech.save(tiny_speech.made("Wav2Vec2ForCTC", **SPEECH), tmp_path)
    letters = {letter: i for i, letter in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEF"])}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    samples = recording(tmp_path / "a.wav")
    loaded = zoo.load(f"file:{tmp_path}")
    answer = loaded.run(tmp_path / "a.wav")
    normalised = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
    with torch.no_grad():
        torch.testing.assert_close(answer, model(torch.tensor(normalised)[None]).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded.run(samples), answer)
    told = loaded.describe(answer)
    by_number = {number: letter for letter, number in letters.items()}
    assert told["text"].replace(" ", "") == "".join(by_number[i] for i in told["ids"] if i > 4)
    assert collapsed([0, 5, 5, 0, 5, 6, 6, 0], 0) == [5, 5, 6]


@pytest.mark.parametrize("name", ["HubertModel", "WavLMModel"])
def test_load_a_body(name: str, tmp_path: Path) -> None:
    tiny_speech.save(tiny_speech.made(name, **SPEECH), tmp_path)
    recording(tmp_path / "a.wav")
    loaded = zoo.load(f"file:{tmp_path}")
    told = loaded.describe(loaded.run(str(tmp_path / "a.wav")))
    assert told["output"] == "last_hidden_state"
    assert told["shape"][0::2] == [1, 16]


def test_load_whisper(tmp_path: Path) -> None:
    model = tiny_speech.save(tiny_speech.made("WhisperForConditionalGeneration", **ONE_SECOND), tmp_path)
    recording(tmp_path / "a.wav")
    loaded = zoo.load(f"file:{tmp_path}")
    features = loaded.preprocess(tmp_path / "a.wav")["input_features"]
    assert features.shape == (1, 8, 100)
    ids = loaded.describe(loaded.run(tmp_path / "a.wav"))["ids"]
    expected = [1]  # greedily, by hand
    with torch.no_grad():
        while len(expected) <= len(ids):
            logits = model(features, decoder_input_ids=torch.tensor([expected])).logits
            expected.append(int(logits[0, -1].argmax()))
    assert len(ids) > 1
    assert expected[1:] == ids  # what it began with is no answer

    tokens = ["<|endoftext|>", "<|startoftranscript|>", "<|x|>", *(chr(33 + i) for i in range(47))]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    loaded = zoo.load(f"file:{tmp_path}")
    told = loaded.describe(loaded.run(tmp_path / "a.wav"))
    assert told["text"] == "".join(tokens[i] for i in ids if i > 2)


def test_recordings_that_do_not_fit(tmp_path: Path) -> None:
    from zoo_audio.loading import read_wav

    recording(tmp_path / "a.wav", rate=8000)
    with pytest.raises(zoo.ZooError, match="8000 samples a second, and the model takes 16000"):
        read_wav(tmp_path / "a.wav", 16000)
    (tmp_path / "b.wav").write_bytes(b"not one")
    with pytest.raises(zoo.ZooError, match="no wav file"):
        read_wav(tmp_path / "b.wav", 16000)
    with pytest.raises(zoo.ZooError, match="No such file"):
        read_wav(tmp_path / "c.wav", 16000)
