"""Text models ready to run: `zoo.load`. A text goes in; what comes out depends on what the checkpoint has heads for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor, nn

import zoo
from zoo_text import bert as _bert
from zoo_text import distilbert as _distilbert
from zoo_text import generative
from zoo_text import roberta as _roberta

if TYPE_CHECKING:
    from surgery import Checkpoint

NEW_TOKENS = 20  # that are written after a text
BEST = 5


def _tokenizer(folder: Path, name: str) -> Any:
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")):
        raise zoo.ZooError(
            f"{name}: there is no tokenizer beside the weights in {folder}",
            kind="weights",
            hint="put tokenizer.json there; zoo.open gives the tensors without one",
        )
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _texts(x: Any) -> list[str]:
    texts = [x] if isinstance(x, str) else list(x) if isinstance(x, (list, tuple)) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise zoo.ZooError("a text model takes a text, or a list of texts", kind="usage")
    return texts


def _tokens(tokenizer: Any, longest: int | None) -> Callable[[Any], dict[str, Tensor]]:
    def preprocess(x: Any) -> dict[str, Tensor]:
        found = tokenizer(
            _texts(x), padding=True, truncation=longest is not None, max_length=longest, return_tensors="pt"
        )
        return {**found}

    return preprocess


def _rounded(values: Tensor) -> list[float]:
    return [round(float(v), 4) for v in values]


# ---------------------------------------------------------------------------------------------------- encoders


def _encoder(
    probe: Callable[[Checkpoint, Mapping[str, Any]], zoo.PartProbe],
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    folder: Path,
) -> zoo.Loaded:
    """Words for [MASK] where there is a head for them; else one vector for each text, by the pooling that the folder
    names (sentence-transformers' 1_Pooling), of length 1 where it says so."""
    made = probe(checkpoint, config)
    tokenizer = _tokenizer(folder, str(config.get("model_type")))
    longest = int(config["max_position_embeddings"])
    if config.get("model_type") == "roberta":
        longest -= 2  # its first two positions are never used
    sentence = folder / "sentence_bert_config.json"
    if sentence.is_file():
        longest = min(longest, int(json.loads(sentence.read_text()).get("max_seq_length") or longest))
    words = next((name for name in made.outputs if name in ("logits", "prediction_logits")), None)
    fills = words is not None and tokenizer.mask_token is not None and _is_vocabulary(checkpoint)
    mean = _pools_by_mean(folder)

    def forward(module: nn.Module, x: Mapping[str, Tensor]) -> dict[str, Any]:
        taken = {k: v for k, v in x.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
        found = dict(zip(made.outputs, made.run(module, taken), strict=True))
        hidden, mask = found["last_hidden_state"], x["attention_mask"].unsqueeze(-1)
        pooled = (hidden * mask).sum(1) / mask.sum(1) if mean else hidden[:, 0]
        found["embedding"] = nn.functional.normalize(pooled, dim=-1) if mean else pooled
        found["input_ids"] = x["input_ids"]
        return found

    def describe(found: Mapping[str, Any]) -> dict[str, Any]:
        masked = (found["input_ids"] == tokenizer.mask_token_id).nonzero().tolist() if fills else []
        if masked and words is not None:
            text, at = masked[0]
            chances = found[words][text, at].softmax(-1).topk(BEST)
            names = tokenizer.convert_ids_to_tokens(chances.indices.tolist())
            return {
                "fills the gap": [
                    {"word": n, "probability": p} for n, p in zip(names, _rounded(chances.values), strict=True)
                ]
            }
        vectors = found["embedding"]
        said: dict[str, Any] = {"embedding": {"size": vectors.shape[-1], "first values": _rounded(vectors[0, :8])}}
        if len(vectors) > 1:
            unit = nn.functional.normalize(vectors, dim=-1)
            said["similarity"] = [_rounded(row) for row in unit @ unit.T]
        return said

    return zoo.Loaded(made.reference, _tokens(tokenizer, longest), forward, describe)


def _is_vocabulary(checkpoint: Checkpoint) -> bool:
    return any(name.startswith(("cls.predictions", "lm_head", "vocab_")) for name in checkpoint)


def _pools_by_mean(folder: Path) -> bool:
    """sentence-transformers says in 1_Pooling/config.json how a text's vector is made."""
    file = folder / "1_Pooling" / "config.json"
    return file.is_file() and bool(json.loads(file.read_text()).get("pooling_mode_mean_tokens"))


def bert(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    return _encoder(_bert.whole_probe, checkpoint, config, folder)


def roberta(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    return _encoder(_roberta.whole_probe, checkpoint, config, folder)


def distilbert(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    return _encoder(_distilbert.whole_probe, checkpoint, config, folder)


# ---------------------------------------------------------------------------------------------------- writers


def _writer(model: nn.Module, tokenizer: Any, longest: int | None, *, after: bool) -> zoo.Loaded:
    """`after`: the text goes on; else another one is written for it."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left" if after else "right"

    def forward(module: Any, x: Mapping[str, Tensor]) -> Any:
        ids = x["input_ids"]
        made = module.generate(
            input_ids=ids,
            attention_mask=x["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        return made[:, ids.shape[1] :] if after else made

    def describe(ids: Tensor) -> dict[str, Any]:
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return {"goes on" if after else "text": texts[0] if len(texts) == 1 else texts}

    room = None if longest is None else longest - NEW_TOKENS if after else longest
    return zoo.Loaded(model, _tokens(tokenizer, room), forward, describe)


def gpt2(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    """Writes on, greedily."""
    model = generative.gpt2_model(checkpoint, config)
    return _writer(model, _tokenizer(folder, "gpt2"), int(config.get("n_positions", 1024)), after=True)


def t5(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> zoo.Loaded:
    """Writes a text for a text ("translate English to German: ..."), greedily."""
    model = generative.t5_model(checkpoint, config)
    return _writer(model, _tokenizer(folder, "t5"), 512, after=False)
