"""Reference models of wav2vec 2.0, HuBERT and WavLM, built by transformers and filled in any of the layouts.

Names between fairseq and transformers are those of transformers' own conversion scripts
(models/*/convert_*_original_pytorch_checkpoint_to_pytorch.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

import zoo
from zoo_audio import fairseq

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from surgery import Checkpoint

_CLASSES = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM"}
_PREFIXES = ("w2v_encoder.w2v_model.", "wav2vec2.", "hubert.", "wavlm.")

# Weight normalisation, as torch spelled it before 2.0.
_OLD = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}

# transformers' name, and fairseq's.
_FAIRSEQ = (
    (r"(conv_layers\.\d+)\.conv\.", r"\1.0."),
    (r"feature_projection\.projection\.", "post_extract_proj."),
    (r"feature_projection\.layer_norm\.", "layer_norm."),
    (r"encoder\.pos_conv_embed\.conv\.", "encoder.pos_conv.0."),
    (r"(layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
    (r"feed_forward\.intermediate_dense\.", "fc1."),
    (r"feed_forward\.output_dense\.", "fc2."),
    (r"attention\.gru_rel_pos_linear\.", "self_attn.grep_linear."),
    (r"attention\.gru_rel_pos_const", "self_attn.grep_a"),
    (r"attention\.rel_attn_embed\.", "self_attn.relative_attention_bias."),
    (r"\.attention\.", ".self_attn."),
)
_FAIRSEQ_NORM = r"(conv_layers\.\d+)\.layer_norm\."

# What is used in training only: the vector for masked spans, the quantizer and its projections.
_TRAINING: tuple[str, ...] = (
    "masked_spec_embed",
    "mask_emb",
    "quantizer.",
    "project_q.",
    "project_hid.",
    "final_proj.",
    "label_embs_concat",
)


# A head for classes of recordings, which only transformers has; it stands beside the body.
_TOP = ("projector.", "classifier.", "layer_weights")
_PROJECTOR, _MIXED = "projector.weight", "layer_weights"


class Names:
    """How a checkpoint spells what transformers' Wav2Vec2Model and its relatives call by a name."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        found = [prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in checkpoint)]
        self.prefix = found[0] if found else ""
        self.fairseq = any(re.search(r"conv_layers\.\d+\.0\.weight", name) for name in checkpoint)
        # Where every convolution has a norm of its own, fairseq keeps it one level deeper, between transpositions.
        deep = any(re.search(r"conv_layers\.\d+\.2\.1\.", name) for name in checkpoint)
        self.norm = r"\1.2.1." if deep else r"\1.2."
        self.training = tuple(name for name in checkpoint if name.removeprefix(self.prefix).startswith(_TRAINING))

    def __call__(self, name: str) -> str:
        if name.startswith(_TOP):
            return name
        if name.startswith("lm_head."):
            tuned = self.fairseq or self.prefix == _PREFIXES[0]
            return name.replace("lm_head.", "w2v_encoder.proj.") if tuned else name
        if self.fairseq:
            name = re.sub(_FAIRSEQ_NORM, self.norm, name)
            for pattern, own in _FAIRSEQ:
                name = re.sub(pattern, own, name)
        return self.prefix + name


# ---------------------------------------------------------------------------------------------------- configuration


def configured(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[str, PretrainedConfig]:
    """The family's name in transformers, and the configuration: of transformers, or as fairseq writes its own; where
    there is none, what names and shapes say."""
    config = fairseq.configured(checkpoint, config)
    gated = any(".gru_rel_pos_const" in name or ".grep_a" in name for name in checkpoint)
    family = str(config.get("model_type", "wavlm" if gated else "wav2vec2"))
    if family not in _CLASSES:
        raise zoo.ZooError(f'model_type "{family}" is none of {", ".join(_CLASSES)}', kind="weights")
    given = dict(config) if config else _by_shapes(checkpoint)
    made = getattr(transformers, f"{_CLASSES[family]}Config").from_dict(given)
    made._attn_implementation = "eager"
    made.mask_time_prob = made.mask_feature_prob = 0.0  # spans are hidden in training only
    return _CLASSES[family], made


_KERNELS, _STRIDES = [10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 2]


def _by_shapes(checkpoint: Checkpoint) -> dict[str, Any]:
    """What shapes say, and what they do not: as published, heads are 64 wide, strides are _STRIDES, and a model has its
    norms first in each block just where every convolution has a norm of its own."""
    at = Names(checkpoint)

    def shape(name: str) -> tuple[int, ...]:
        for end in (name, *(name.replace(new, old) for new, old in _OLD.items())):
            if at(end) in checkpoint:
                return tuple(checkpoint[at(end)].shape)
        return ()

    convolutions: list[tuple[int, ...]] = []
    while kernel := shape(f"feature_extractor.conv_layers.{len(convolutions)}.conv.weight"):
        convolutions.append(kernel)
    positions = shape("encoder.pos_conv_embed.conv.parametrizations.weight.original1")
    width = (shape("feature_projection.projection.weight") or (0,))[0]
    kernels = [kernel[-1] for kernel in convolutions]
    if kernels != _KERNELS or width % 64 or not width:
        raise zoo.ZooError(
            f"there is no config.json beside the weights, and convolutions of {kernels} to a width of {width} are none "
            "that are published",
            kind="weights",
            hint="put the model's config.json beside the weights; or graft with --static, which runs nothing",
        )
    each = bool(shape("feature_extractor.conv_layers.1.layer_norm.weight"))
    layers = 0
    while shape(f"encoder.layers.{layers}.attention.k_proj.weight"):
        layers += 1
    found: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "conv_dim": [kernel[0] for kernel in convolutions],
        "conv_kernel": kernels,
        "conv_stride": _STRIDES,
        "conv_bias": bool(shape("feature_extractor.conv_layers.0.conv.bias")),
        "feat_extract_norm": "layer" if each else "group",
        "do_stable_layer_norm": each,
    }
    if layers:
        found["intermediate_size"] = shape("encoder.layers.0.feed_forward.intermediate_dense.weight")[0]
    if positions:
        found |= {"num_conv_pos_embeddings": positions[-1], "num_conv_pos_embedding_groups": width // positions[1]}
    if table := shape("encoder.layers.0.attention.rel_attn_embed.weight"):
        found["num_buckets"] = table[0]
    return found


# ---------------------------------------------------------------------------------------------------- parts


class Frontend(nn.Module):
    """Convolutions and projection of a model, under their names in it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.feature_extractor: nn.Module = model.feature_extractor
        self.feature_projection: nn.Module = model.feature_projection

    def forward(self, input_values: Tensor) -> Tensor:
        projected = self.feature_projection(self.feature_extractor(input_values).transpose(1, 2))
        # wav2vec 2.0 and WavLM also give what was projected, for the quantizer.
        return projected[0] if isinstance(projected, tuple) else projected


def _body(family: str, config: PretrainedConfig) -> nn.Module:
    model: nn.Module = getattr(transformers, f"{family}Model")(config)
    return model


def frontend(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From a waveform [B, samples] to [B, frames, width]."""
    family, known = configured(checkpoint, config)
    known.num_hidden_layers = 0
    module = zoo.unfilled(lambda: Frontend(_body(family, known)))
    zoo.fill(module, checkpoint, Names(checkpoint))
    return zoo.PartProbe(module, lambda m, x: (m(**x),), _unmasked(waves(known)), _NO_PADDING, ("hidden_states",))


def encoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From a waveform [B, samples], and perhaps a mask of its samples, to the last hidden state [B, frames, width]."""
    family, known = configured(checkpoint, config)
    module = zoo.unfilled(lambda: _body(family, known))
    zoo.fill(module, checkpoint, Names(checkpoint), spellings=_OLD)
    return zoo.PartProbe(module, _last_hidden, waves(known), outputs=("last_hidden_state",))


class Classifier(nn.Module):
    """From hidden states to logits of the whole recording, as transformers' *ForSequenceClassification has it.

    `layers`: how many layers' hidden states are mixed first, [B, layers, frames, width]; 0: the last ones alone come
    in, [B, frames, width].
    """

    def __init__(self, width: int, projected: int, classes: int, layers: int) -> None:
        super().__init__()
        self.projector = nn.Linear(width, projected)
        self.classifier = nn.Linear(projected, classes)
        if layers:
            self.layer_weights = nn.Parameter(torch.ones(layers) / layers)
        self.layers = layers

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.layers:
            hidden_states = (hidden_states * self.layer_weights.softmax(-1)[:, None, None]).sum(1)
        pooled: Tensor = self.classifier(self.projector(hidden_states).mean(1))
        return pooled


def head(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From hidden states to the logits of CTC, one row a frame, or to those of classes, one row a recording."""
    name = next((n for n in ("lm_head", "w2v_encoder.proj") if f"{n}.weight" in checkpoint), "")
    layers = 0
    if name:
        rows, width = checkpoint[f"{name}.weight"].shape
        module = zoo.unfilled(lambda: nn.Linear(width, rows))
        zoo.fill(module, checkpoint, lambda leaf: f"{name}.{leaf}")
    elif _PROJECTOR in checkpoint and "classifier.weight" in checkpoint:
        projected, width = checkpoint[_PROJECTOR].shape
        classes = checkpoint["classifier.weight"].shape[0]
        layers = checkpoint[_MIXED].shape[0] if _MIXED in checkpoint else 0
        module = zoo.unfilled(lambda: Classifier(width, projected, classes, layers))
        zoo.fill(module, checkpoint)
    else:
        raise zoo.ZooError(
            f"{checkpoint.source} has no head that is known here: one for CTC (lm_head), or one for classes of "
            "recordings (projector and classifier)",
            kind="weights",
            hint="graft the part encoder; or graft with --static, which runs nothing",
        )

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        frames = {"plain": 6, "shortest": 1}[variant]
        shape = (2, layers, frames, width) if layers else (2, frames, width)
        return {"hidden_states": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}

    return zoo.PartProbe(module, lambda m, x: (m(x["hidden_states"]),), inputs, ("plain", "shortest"), ("logits",))


def whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From a waveform to the logits of CTC or of classes where there is such a head, else to the last hidden state."""
    at = Names(checkpoint)
    family, known = configured(checkpoint, config)
    spoken = at("lm_head.weight")
    if spoken in checkpoint:
        known.vocab_size = checkpoint[spoken].shape[0]
        kind = f"{family}ForCTC"
    elif _PROJECTOR in checkpoint and "classifier.weight" in checkpoint:
        known.classifier_proj_size = checkpoint[_PROJECTOR].shape[0]
        if known.num_labels != checkpoint["classifier.weight"].shape[0]:
            known.num_labels = checkpoint["classifier.weight"].shape[0]
        known.use_weighted_layer_sum = _MIXED in checkpoint
        kind = f"{family}ForSequenceClassification"
    else:
        module = zoo.unfilled(lambda: _body(family, known))
        zoo.fill(module, checkpoint, at, spellings=_OLD, spare=at.training)
        return zoo.PartProbe(module, _last_hidden, waves(known), outputs=("last_hidden_state",))
    module = zoo.unfilled(lambda: getattr(transformers, kind)(known))
    body = f"{module.base_model_prefix}."
    zoo.fill(module, checkpoint, lambda name: at(name.removeprefix(body)), spellings=_OLD, spare=at.training)
    return zoo.PartProbe(module, lambda m, x: (m(**x).logits,), waves(known), outputs=("logits",))


def _last_hidden(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (module(**x).last_hidden_state,)


# ---------------------------------------------------------------------------------------------------- inputs

_NO_PADDING = ("plain", "shortest", "longest")
Inputs = Callable[[int, str], dict[str, Tensor]]


def waves(config: PretrainedConfig) -> Inputs:
    """Waveforms [B, samples] of so many frames, with a sample that fills no frame, and the mask of their samples.

    padded: a recording that ends early is silent from there on, and masked, as the feature extractor pads it. Those of
    models with a group norm give no mask (their training had none), so a target need not take one; one that takes it is
    run with it. longest is long enough for every row of WavLM's table of distances.
    """
    longest = max(40, getattr(config, "max_bucket_distance", 0) + 2)

    def length(frames: int) -> int:
        samples = frames
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples + 1

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        shapes = {"plain": (2, 14), "padded": (2, 14), "shortest": (1, 2), "longest": (1, longest)}
        batch, frames = shapes[variant]
        draw = torch.Generator().manual_seed(seed)
        values = torch.randn(batch, length(frames), generator=draw)
        mask = torch.ones(values.shape, dtype=torch.long)
        if variant == "padded":
            values[1:, length(9) :] = 0
            mask[1:, length(9) :] = 0
        return {"input_values": values, "attention_mask": mask}

    return inputs


def _unmasked(inputs: Inputs) -> Inputs:
    return lambda seed, variant: {"input_values": inputs(seed, variant)["input_values"]}
