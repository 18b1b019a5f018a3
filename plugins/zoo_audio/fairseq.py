"""What fairseq writes beside the weights of a speech model: its arguments, in the words of transformers' configuration.

Older files have an argparse.Namespace under `args`, newer ones a config in groups under `cfg`; a model that was tuned
has those of the model that it was tuned from inside, under `w2v_args`. The meaning of each is that of fairseq's
Wav2Vec2Config (models/wav2vec/wav2vec2.py) and, for the relative positions, of WavLM's own (WavLM.py).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import zoo

if TYPE_CHECKING:
    from surgery import TensorInfo

# fairseq's name: that of transformers.
_SAME = {
    "encoder_embed_dim": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_embed_dim": "intermediate_size",
    "activation_fn": "hidden_act",
    "layer_norm_first": "do_stable_layer_norm",
    "conv_bias": "conv_bias",
    "conv_pos": "num_conv_pos_embeddings",
    "conv_pos_groups": "num_conv_pos_embedding_groups",
    "num_buckets": "num_buckets",
    "max_distance": "max_bucket_distance",
}
_NEEDED = ("encoder_embed_dim", "encoder_layers", "encoder_attention_heads", "conv_feature_layers", "extractor_mode")
_ACTIVATIONS = ("gelu", "relu")
_NORMS = {"default": "group", "layer_norm": "layer"}
_ARCHITECTURES = {"wav2vec2": "wav2vec2", "wav2vec": "wav2vec2", "hubert": "hubert", "wavlm": "wavlm"}
_LEVELS = 4


def arguments(beside: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Those of the body, among all that a file has beside its tensors."""
    return next((each for each in _groups(beside, _LEVELS) if all(name in each for name in _NEEDED)), None)


def _groups(found: Any, levels: int) -> Iterator[Mapping[str, Any]]:
    if not isinstance(found, Mapping) or not levels:
        return
    yield found
    for name in ("args", "cfg", "w2v_args", "model"):
        yield from _groups(found.get(name), levels - 1)


def architecture(beside: Mapping[str, Any]) -> tuple[str, str] | None:
    """(the entry's name, how the file has it), by the name that the model was trained under."""
    for group in _groups(beside, _LEVELS):
        for key in ("arch", "_name"):
            name = group.get(key)
            entry = _ARCHITECTURES.get(name.partition("_")[0]) if isinstance(name, str) else None
            if entry is not None:
                return entry, f'{key} "{name}"'
    return None


def configured(checkpoint: Any, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json as it is; where there is none, the same of fairseq's arguments, or nothing where there are none."""
    beside = config or zoo.described(checkpoint)
    given = None if config else arguments(beside)
    if given is None:
        return config
    activation, mode, depth = (
        given.get("activation_fn", "gelu"),
        given["extractor_mode"],
        given.get("pos_conv_depth", 1),
    )
    if activation not in _ACTIVATIONS or mode not in _NORMS or depth != 1:
        raise zoo.ZooError(
            f"{checkpoint.source} was trained with activation_fn {activation}, extractor_mode {mode}, pos_conv_depth "
            f"{depth}, which have no reference here",
            kind="weights",
            hint="graft with --static, which runs nothing",
        )
    found = {ours: given[theirs] for theirs, ours in _SAME.items() if theirs in given}
    convolutions = layers(str(given["conv_feature_layers"]))
    kind = architecture(beside)
    found |= {
        "model_type": kind[0] if kind is not None else _by_names(checkpoint),
        "feat_extract_norm": _NORMS[given["extractor_mode"]],
        "conv_dim": [each[0] for each in convolutions],
        "conv_kernel": [each[1] for each in convolutions],
        "conv_stride": [each[2] for each in convolutions],
    }
    return found


def _by_names(checkpoint: Mapping[str, TensorInfo]) -> str:
    return "wavlm" if any(".grep_linear." in name for name in checkpoint) else "wav2vec2"


def layers(text: str) -> list[tuple[int, int, int]]:
    """(channels, kernel, stride) of each convolution, of text such as "[(512, 10, 5)] + [(512, 3, 2)] * 4". ZooError
    where it is something else: it is read, and not evaluated."""
    try:
        return _layers(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise zoo.ZooError(f"conv_feature_layers {text[:80]!r} cannot be read: {error}", kind="weights") from error


def _layers(node: ast.expr) -> list[tuple[int, int, int]]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _layers(node.left) + _layers(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        times = ast.literal_eval(node.right)
        if type(times) is not int or not 0 < times < 100:
            raise ValueError("so many layers are none")
        return _layers(node.left) * times
    found = ast.literal_eval(node)
    if not isinstance(found, list) or any(not isinstance(each, tuple) or len(each) != 3 for each in found):
        raise ValueError("it is no list of (channels, kernel, stride)")
    return found
