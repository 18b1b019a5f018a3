"""Speech models in transformers, ready to run on a recording: what `zoo.load` gives.

A plain input is the path of a wav file, or samples (a tensor, an array, a list) at the model's rate.
"""

from __future__ import annotations

import json
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

import zoo
from zoo_audio import speech_probes, whisper_probes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery import Checkpoint


def whisper(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    """From a recording to text, decoded greedily; to token ids where there is no tokenizer beside the weights."""
    model: Any = whisper_probes.whole(checkpoint, config).reference
    known = model.config
    given = _beside(folder, "preprocessor_config.json")
    # Without its file: half a minute in the published sizes, which is two positions for each 20 ms.
    seconds = max(1, known.max_source_positions // 50)
    made = transformers.WhisperFeatureExtractor
    extractor = made.from_dict(given) if given else made(feature_size=known.num_mel_bins, chunk_length=seconds)
    generation = _beside(folder, "generation_config.json")
    if generation:
        model.generation_config = transformers.GenerationConfig.from_dict(generation)
    if not generation.get("max_length"):
        model.generation_config.max_length = known.max_target_positions
    tokenizer = None
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        tokenizer = transformers.WhisperTokenizer.from_pretrained(str(folder))

    def preprocess(x: Any) -> dict[str, Tensor]:
        samples = _samples(x, extractor.sampling_rate)
        features = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return {"input_features": features["input_features"]}

    def forward(m: nn.Module, x: dict[str, Tensor]) -> Tensor:
        ids: Tensor = m.generate(**x, do_sample=False, num_beams=1)  # type: ignore[operator]
        return ids

    def describe(ids: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {"ids": ids[0].tolist()}
        if tokenizer is not None:
            found["text"] = tokenizer.decode(ids[0], skip_special_tokens=True).strip()
        return found

    return zoo.Loaded(model, preprocess, forward, describe)


def speech(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    """From a recording to text where there is a head for CTC and a vocabulary, to classes where there is a head for
    them, else to hidden states."""
    probe = speech_probes.whole(checkpoint, config)
    given = _beside(folder, "preprocessor_config.json")
    made = transformers.Wav2Vec2FeatureExtractor
    extractor = made.from_dict(given) if given else made()
    vocabulary = _beside(folder, "vocab.json")
    known: Any = probe.reference.config
    blank = int(getattr(known, "pad_token_id", None) or 0)

    def preprocess(x: Any) -> dict[str, Tensor]:
        samples = _samples(x, extractor.sampling_rate)
        values = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return dict(values)

    def forward(m: nn.Module, x: dict[str, Tensor]) -> Tensor:
        return probe.run(m, x)[0]

    def describe(answer: Tensor) -> dict[str, Any]:
        if probe.outputs != ("logits",):
            kind = probe.outputs[0]
            return {"output": kind, "shape": list(answer.shape), "mean": float(answer.double().mean())}
        if answer.dim() == 2:  # one row a recording
            best = answer[0].double().softmax(-1).topk(min(5, answer.shape[1]))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            return {"top": [{"class": str(known.id2label[i]), "probability": round(value, 4)} for i, value in pairs]}
        ids = collapsed(answer[0].argmax(-1).tolist(), blank)
        return {"ids": ids} | ({"text": _spoken(ids, vocabulary)} if vocabulary else {})

    return zoo.Loaded(probe.reference, preprocess, forward, describe)


def collapsed(ids: list[int], blank: int) -> list[int]:
    """What CTC means by one id a frame: repetitions are one, and then blanks are none."""
    return [each for i, each in enumerate(ids) if each != blank and (i == 0 or ids[i - 1] != each)]


def _spoken(ids: list[int], vocabulary: Mapping[str, int]) -> str:
    """The published vocabularies are of letters, with | between words, and of marks such as <s>."""
    tokens = {number: token for token, number in vocabulary.items()}
    heard = (tokens.get(each, "") for each in ids)
    text = "".join(token for token in heard if not (token.startswith("<") and token.endswith(">")))
    return " ".join(text.replace("|", " ").split())


# ---------------------------------------------------------------------------------------------------- files


def _beside(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file that lies beside the weights; empty where there is none."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise zoo.ZooError(f"{path} is no JSON: {error}", kind="weights", hint="download it again") from error
    if not isinstance(found, dict):
        raise zoo.ZooError(f"{path} holds no object", kind="weights", hint="download it again")
    return found


def _samples(x: Any, rate: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One channel of samples in -1..1."""
    if isinstance(x, (str, Path)):
        return read_wav(Path(x), rate)
    found = np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x, dtype=np.float32)
    if found.ndim != 1 or not found.size:
        raise zoo.ZooError(
            f"samples of shape {list(found.shape)}, and one recording of one channel is wanted: [samples]", kind="file"
        )
    return found


_WIDTHS: Mapping[int, Callable[[bytes], Any]] = {
    1: lambda data: (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128,
    2: lambda data: np.frombuffer(data, "<i2").astype(np.float32) / 2**15,
    4: lambda data: (np.frombuffer(data, "<i4") / 2**31).astype(np.float32),
}


def read_wav(path: Path, rate: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The samples of a wav file of whole numbers; several channels are averaged. It is not resampled."""
    wanted = f"convert it: ffmpeg -i {path} -ac 1 -ar {rate} -c:a pcm_s16le converted.wav"
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, own = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise zoo.ZooError(f"{path}: no wav file that can be read: {error}", kind="file", hint=wanted) from error
    except OSError as error:
        raise zoo.ZooError(f"{path}: {error.strerror or error}", kind="file") from error
    if own != rate:
        raise zoo.ZooError(f"{path} has {own} samples a second, and the model takes {rate}", kind="file", hint=wanted)
    if width not in _WIDTHS:
        raise zoo.ZooError(f"{path} has samples of {8 * width} bits", kind="file", hint=wanted)
    samples = _WIDTHS[width](data).reshape(-1, channels).mean(axis=1, dtype=np.float32)
    if not samples.size:
        raise zoo.ZooError(f"{path} has no samples", kind="file")
    return np.ascontiguousarray(samples)
