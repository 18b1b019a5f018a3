"""Reference models of Whisper, part by part, built by transformers and filled in any of the layouts.

Names between OpenAI's files and transformers are those of transformers' own conversion script
(models/whisper/convert_openai_to_hf.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

import zoo

if TYPE_CHECKING:
    from transformers import WhisperConfig

    from surgery import Checkpoint

_OPENAI = (
    (".layers.", ".blocks."),
    (".self_attn.q_proj.", ".attn.query."),
    (".self_attn.k_proj.", ".attn.key."),
    (".self_attn.v_proj.", ".attn.value."),
    (".self_attn.out_proj.", ".attn.out."),
    (".self_attn_layer_norm.", ".attn_ln."),
    (".encoder_attn.q_proj.", ".cross_attn.query."),
    (".encoder_attn.k_proj.", ".cross_attn.key."),
    (".encoder_attn.v_proj.", ".cross_attn.value."),
    (".encoder_attn.out_proj.", ".cross_attn.out."),
    (".encoder_attn_layer_norm.", ".cross_attn_ln."),
    (".final_layer_norm.", ".mlp_ln."),
    (".fc1.", ".mlp.0."),
    (".fc2.", ".mlp.2."),
    ("encoder.layer_norm.", "encoder.ln_post."),
    ("decoder.layer_norm.", "decoder.ln."),
    ("decoder.embed_tokens.", "decoder.token_embedding."),
    (".embed_positions.weight", ".positional_embedding"),
)


class Names:
    """How a checkpoint spells what transformers' WhisperModel calls encoder.x and decoder.x."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.prefix = "model." if any(name.startswith("model.") for name in checkpoint) else ""
        self.openai = any(
            ".blocks." in name or name.endswith(("positional_embedding", "token_embedding.weight"))
            for name in checkpoint
        )

    def __call__(self, name: str) -> str:
        if self.openai:
            for theirs, own in _OPENAI:
                name = name.replace(theirs, own)
        return self.prefix + name

    def under(self, prefix: str) -> Callable[[str], str]:
        return lambda name: self(prefix + name)


# ---------------------------------------------------------------------------------------------------- configuration


def configured(checkpoint: Checkpoint, config: Mapping[str, Any]) -> WhisperConfig:
    """The configuration; where there is none, what the shapes say. How many heads there are is in no shape: the `dims`
    of OpenAI's files have it, and heads are 64 wide in every size published."""
    made = transformers.WhisperConfig.from_dict(dict(config) if config else _by_shapes(checkpoint))
    made._attn_implementation = "eager"
    return made


_HEADS = {"n_audio_head": "encoder_attention_heads", "n_text_head": "decoder_attention_heads"}


def _by_shapes(checkpoint: Checkpoint) -> dict[str, Any]:
    at = Names(checkpoint)
    found: dict[str, Any] = {"suppress_tokens": None, "begin_suppress_tokens": None}

    def shape(name: str) -> tuple[int, ...]:
        return tuple(checkpoint[at(name)].shape) if at(name) in checkpoint else ()

    for side, positions in (("encoder", "max_source_positions"), ("decoder", "max_target_positions")):
        if table := shape(f"{side}.embed_positions.weight"):
            found |= {positions: table[0], "d_model": table[1]}
        layers = 0
        while wide := shape(f"{side}.layers.{layers}.fc1.weight"):
            layers += 1
            found |= {f"{side}_ffn_dim": wide[0], "d_model": wide[1]}
        found[f"{side}_layers"] = layers
    if kernel := shape("encoder.conv1.weight"):
        found["num_mel_bins"] = kernel[1]
    if table := shape("decoder.embed_tokens.weight"):
        found |= {"vocab_size": table[0], "d_model": table[1]}
        # By default the padding token is row 50256, and a small table has no such row.
        found |= {name: 0 for name in ("pad_token_id", "bos_token_id", "eos_token_id") if table[0] <= 50256}
    dims = zoo.described(checkpoint).get("dims", {})
    if heads := {ours: dims[theirs] for theirs, ours in _HEADS.items() if isinstance(dims.get(theirs), int)}:
        return found | heads
    width = found.get("d_model", 0)
    if width % 64 or not width:
        raise zoo.ZooError(
            f"there is no config.json beside the weights, and a width of {width} is none that is published",
            kind="weights",
            hint="put the model's config.json beside the weights; or graft with --static, which runs nothing",
        )
    return found | {"encoder_attention_heads": width // 64, "decoder_attention_heads": width // 64}


def _with(config: WhisperConfig, **changes: Any) -> WhisperConfig:
    changed = deepcopy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


# ---------------------------------------------------------------------------------------------------- parts


class Frontend(nn.Module):
    """Convolutions and positions of an encoder, under their names in it."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.conv1: nn.Module = encoder.conv1
        self.conv2: nn.Module = encoder.conv2
        self.embed_positions: nn.Embedding = encoder.embed_positions

    def forward(self, input_features: Tensor) -> Tensor:
        x = nn.functional.gelu(self.conv1(input_features))
        x = nn.functional.gelu(self.conv2(x)).transpose(1, 2)
        return x + self.embed_positions.weight


def _encoder(config: WhisperConfig) -> nn.Module:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(config)


def _decoder(config: WhisperConfig) -> nn.Module:
    from transformers.models.whisper.modeling_whisper import WhisperDecoder

    return WhisperDecoder(config)


def frontend(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From log-mel features [B, mels, 2 * positions] to [B, positions, width]."""
    known = configured(checkpoint, config)
    module = zoo.unfilled(lambda: Frontend(_encoder(_with(known, encoder_layers=0))))
    zoo.fill(module, checkpoint, Names(checkpoint).under("encoder."))
    return zoo.PartProbe(module, lambda m, x: (m(**x),), _features(known), variants=_SOUNDS, outputs=("embeddings",))


def encoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From log-mel features to the encoder's last hidden state."""
    known = configured(checkpoint, config)
    module = zoo.unfilled(lambda: _encoder(known))
    zoo.fill(module, checkpoint, Names(checkpoint).under("encoder."))
    return zoo.PartProbe(
        module,
        lambda m, x: (m(**x).last_hidden_state,),
        _features(known),
        variants=_SOUNDS,
        outputs=("last_hidden_state",),
    )


def decoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From token ids and the encoder's hidden states to the decoder's last hidden state."""
    known = configured(checkpoint, config)
    module = zoo.unfilled(lambda: _decoder(known))
    zoo.fill(module, checkpoint, Names(checkpoint).under("decoder."))

    def run(m: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        answer = m(input_ids=x["decoder_input_ids"], encoder_hidden_states=x["encoder_hidden_states"], use_cache=False)
        return (answer.last_hidden_state,)

    return zoo.PartProbe(module, run, _decoded(known), variants=_IDS, outputs=("last_hidden_state",))


def head(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From hidden states to logits."""
    known = configured(checkpoint, config)
    tied = Names(checkpoint)("decoder.embed_tokens.weight")
    module = zoo.unfilled(lambda: nn.Linear(known.d_model, known.vocab_size, bias=False))
    own = "proj_out.weight" if "proj_out.weight" in checkpoint else tied
    zoo.fill(module, checkpoint, lambda _: own, spare=(tied,))

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        length = {"plain": 6, "shortest": 1}[variant]
        return {"hidden_states": torch.randn(2, length, known.d_model, generator=draw)}

    return zoo.PartProbe(
        module, lambda m, x: (m(x["hidden_states"]),), inputs, variants=("plain", "shortest"), outputs=("logits",)
    )


def whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From log-mel features and token ids to logits, also of a body alone: the head is tied to the decoder's table."""
    known = configured(checkpoint, config)
    at = Names(checkpoint)
    module = zoo.unfilled(lambda: transformers.WhisperForConditionalGeneration(known))

    def spelled(name: str) -> str:
        return name if name == "proj_out.weight" else at(name.removeprefix("model."))

    zoo.fill(module, checkpoint, spelled)
    features, ids = _features(known), _ids(known)

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        return features(seed, "plain") | ids(seed, variant)

    return zoo.PartProbe(
        module, lambda m, x: (m(**x, use_cache=False).logits,), inputs, variants=_IDS, outputs=("logits",)
    )


# ---------------------------------------------------------------------------------------------------- inputs

Inputs = Callable[[int, str], dict[str, Tensor]]
_IDS = ("plain", "shortest", "longest")
_SOUNDS = ("plain", "clip")
_SILENCE = 1e-10  # below it no power of a mel band counts, as in Whisper's own front end


def _batch(config: WhisperConfig) -> int:
    return 2 if config.max_source_positions <= 256 else 1  # half a minute of audio, always: one is enough


def _features(config: WhisperConfig) -> Inputs:
    """The encoder takes one length only, which its table of positions fixes. `clip` is a short and loud recording with
    silence after it; where several fit into a batch, the second is silent throughout, and a third is loud throughout.
    """

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        shape = (_batch(config), config.num_mel_bins, 2 * config.max_source_positions)
        if variant == "plain":
            return {"input_features": torch.randn(shape, generator=draw)}
        if variant != "clip":
            raise ValueError(f'no variant "{variant}"; there are {", ".join(_SOUNDS)}')
        rows = 3 if shape[0] > 1 else 1
        power = 1e4 * torch.rand((rows, *shape[1:]), generator=draw).square()
        power[0, :, max(1, shape[2] // 8) :] = 0.0
        power[1:2] = 0.0
        return {"input_features": _logged(power)}

    return inputs


def _logged(power: Tensor) -> Tensor:
    """Features of a mel spectrogram of powers, by the rule of Whisper's front end (transformers,
    WhisperFeatureExtractor): logarithm, at most eight decades below the loudest, and scaled."""
    found = power.clamp_min(_SILENCE).log10()
    loudest = found.amax(dim=(1, 2), keepdim=True)
    return (torch.maximum(found, loudest - 8.0) + 4.0) / 4.0


def _ids(config: WhisperConfig) -> Inputs:
    """plain holds the first and the last row of the vocabulary; longest fills the table of positions."""

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        longest = config.max_target_positions
        length = {"plain": min(9, longest), "shortest": 1, "longest": longest}[variant]
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, config.vocab_size, (_batch(config), length), generator=draw)
        if length > 1:
            ids[0, 0], ids[-1, -1] = 0, config.vocab_size - 1
        return {"decoder_input_ids": ids}

    return inputs


def _decoded(config: WhisperConfig) -> Inputs:
    ids = _ids(config)

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed + 1000)
        shape = (_batch(config), min(config.max_source_positions, 24), config.d_model)
        return ids(seed, variant) | {"encoder_hidden_states": torch.randn(shape, generator=draw)}

    return inputs
