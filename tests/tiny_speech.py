"""Speech models small enough to search and prove in seconds, from the libraries' own classes, saved as published."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WHISPER: dict[str, Any] = {
    "vocab_size": 50,
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_source_positions": 12,
    "max_target_positions": 10,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
SPEECH: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 3,
    "vocab_size": 11,
    "codevector_dim": 8,
    "proj_codevector_dim": 8,
    "num_codevectors_per_group": 4,
}
# Sizes at which everything can be told from shapes: the published kernels, and heads of 64.
SHAPED = {name: value for name, value in SPEECH.items() if name not in ("conv_kernel", "conv_stride", "conv_dim")}
SHAPED |= {"hidden_size": 64, "num_attention_heads": 1, "conv_dim": [8] * 7, "num_feat_extract_layers": 7}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
CLASSES = {"num_labels": 3, "classifier_proj_size": 6}
WAVLM = {"num_buckets": 8, "max_bucket_distance": 20}


def made(name: str, **sizes: Any) -> Any:
    """A seeded model of that class of transformers, none of whose norms is the identity."""
    import transformers

    family = re.sub(r"(Model|For\w+)$", "", name)
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def openai_whisper(layers: int) -> tuple[dict[str, int], Any]:
    """The dimensions and a seeded model of the package openai-whisper."""
    from whisper.model import ModelDimensions, Whisper

    dims = {"n_mels": 8, "n_audio_ctx": 12, "n_audio_state": 64, "n_audio_head": 1, "n_audio_layer": layers}
    dims |= {"n_vocab": 50, "n_text_ctx": 10, "n_text_state": 64, "n_text_head": 1, "n_text_layer": 1}
    torch.manual_seed(0)
    model = Whisper(ModelDimensions(**dims)).eval()
    with torch.no_grad():
        model.decoder.positional_embedding.zero_()  # it is made without values
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dims, model


def save(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return model


def _renamed(tensors: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        found[name] = tensor.clone()
    return found


def old_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """torch's old spelling of weight normalisation, as in every file from before 2.0."""
    return _renamed(
        tensors,
        [(r"parametrizations\.weight\.original0", "weight_g"), (r"parametrizations\.weight\.original1", "weight_v")],
    )


def fairseq(tensors: dict[str, Tensor], prefix: str = "", *, deep: bool = False) -> dict[str, Tensor]:
    """As fairseq names a wav2vec 2.0 or a HuBERT, and WavLM's authors a WavLM."""
    norm = r"conv_layers.\1.2.1." if deep else r"conv_layers.\1.2."
    found = _renamed(
        old_norm(tensors),
        [
            (r"^(wav2vec2|hubert|wavlm)\.", ""),
            (r"conv_layers\.(\d+)\.conv\.", r"conv_layers.\1.0."),
            (r"conv_layers\.(\d+)\.layer_norm\.", norm),
            (r"^feature_projection\.projection", "post_extract_proj"),
            (r"^feature_projection\.layer_norm", "layer_norm"),
            (r"pos_conv_embed\.conv", "pos_conv.0"),
            (r"(layers\.\d+)\.layer_norm", r"\1.self_attn_layer_norm"),
            (r"feed_forward\.intermediate_dense", "fc1"),
            (r"feed_forward\.output_dense", "fc2"),
            (r"attention\.gru_rel_pos_linear", "attention.grep_linear"),
            (r"attention\.gru_rel_pos_const", "attention.grep_a"),
            (r"attention\.rel_attn_embed", "attention.relative_attention_bias"),
            (r"\.attention\.", ".self_attn."),
            (r"^masked_spec_embed", "mask_emb"),
        ],
    )
    return {
        "w2v_encoder.proj" + n.removeprefix("lm_head") if n.startswith("lm_head") else prefix + n: t
        for n, t in found.items()
    }


SPELLINGS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {"new": dict, "old norm": old_norm}
