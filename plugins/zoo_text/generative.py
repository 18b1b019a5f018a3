"""Reference models of T5 and GPT-2, part by part: what each part's probe gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

import zoo
from zoo_text.running import Inputs, configured, hidden_inputs, token_inputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from surgery import Checkpoint

# Relative positions beyond 128 share a bucket: so long must an input be to reach the last one (Raffel et al. 2020).
_FAR = 140
_NO_PADDING = ("plain", "shortest", "longest")
# Causal masks that older releases of transformers saved, and a bias that was never used.
_SPARE_GPT2 = (".attn.bias", ".attn.masked_bias")
_SPARE_T5 = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def _spare(checkpoint: Checkpoint, ends: tuple[str, ...]) -> list[str]:
    return [name for name in checkpoint if name.endswith(ends)]


class Head(nn.Module):
    """From hidden states to logits; T5 of the first version scales before a head that is its table."""

    def __init__(self, width: int, words: int, scale: float = 1.0) -> None:
        super().__init__()
        self.lm_head = nn.Linear(width, words, bias=False)
        self.scale = scale

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.lm_head(hidden_states * self.scale if self.scale != 1.0 else hidden_states)


def _one(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (module(**x),)


def _last_hidden(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (module(**x).last_hidden_state,)


# ---------------------------------------------------------------------------------------------------- GPT-2


def _gpt2_config(config: Mapping[str, Any]) -> PretrainedConfig:
    return configured(transformers.GPT2Config, config)


def _gpt2_at(checkpoint: Checkpoint) -> str:
    return "transformer." if any(name.startswith("transformer.") for name in checkpoint) else ""


def _gpt2_inputs(known: PretrainedConfig) -> Inputs:
    return token_inputs(known, longest=int(known.n_positions))


class _Gpt2Embeddings(nn.Module):
    def __init__(self, known: PretrainedConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(known.vocab_size, known.n_embd)
        self.wpe = nn.Embedding(known.n_positions, known.n_embd)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))


def gpt2_embeddings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From token ids to the sum of words and positions."""
    known = _gpt2_config(config)
    module, at = zoo.unfilled(lambda: _Gpt2Embeddings(known)), _gpt2_at(checkpoint)
    zoo.fill(module, checkpoint, lambda name: at + name)
    inputs = _without_mask(_gpt2_inputs(known))
    return zoo.PartProbe(module, _one, inputs, _NO_PADDING, ("embeddings",))


def gpt2_decoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From token ids to the last hidden state."""
    known = _gpt2_config(config)
    module, at = zoo.unfilled(lambda: transformers.GPT2Model(known)), _gpt2_at(checkpoint)
    zoo.fill(module, checkpoint, lambda name: at + name, spare=_spare(checkpoint, _SPARE_GPT2))
    return zoo.PartProbe(module, _last_hidden, _gpt2_inputs(known), outputs=("last_hidden_state",))


def gpt2_head(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From hidden states to logits."""
    known = _gpt2_config(config)
    module = zoo.unfilled(lambda: Head(known.n_embd, known.vocab_size))
    name = "lm_head.weight" if "lm_head.weight" in checkpoint else f"{_gpt2_at(checkpoint)}wte.weight"
    zoo.fill(module, checkpoint, lambda _: name, spare=list(checkpoint))
    return zoo.PartProbe(module, _one, hidden_inputs(known.n_embd), _NO_PADDING, ("logits",))


def gpt2_model(checkpoint: Checkpoint, config: Mapping[str, Any]) -> nn.Module:
    """GPT2LMHeadModel, filled; its head is tied to the table where the file has none."""
    known = _gpt2_config(config)
    at = _gpt2_at(checkpoint)
    module = zoo.unfilled(lambda: transformers.GPT2LMHeadModel(known))

    def spelled(name: str) -> str:
        return name if at else name.removeprefix("transformer.")

    zoo.fill(module, checkpoint, spelled, spare=_spare(checkpoint, _SPARE_GPT2))
    return module


def gpt2_whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From token ids to the last hidden state and the logits."""

    def run(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        hidden = module.get_submodule("transformer")(**x).last_hidden_state
        return hidden, module.get_submodule("lm_head")(hidden)

    module = gpt2_model(checkpoint, config)
    inputs = _gpt2_inputs(_gpt2_config(config))
    return zoo.PartProbe(module, run, inputs, outputs=("last_hidden_state", "logits"))


# ---------------------------------------------------------------------------------------------------- T5


def _t5_config(config: Mapping[str, Any]) -> PretrainedConfig:
    return configured(transformers.T5Config, config)


def _without_mask(inputs: Inputs) -> Inputs:
    def plain(seed: int, variant: str) -> dict[str, Tensor]:
        return {name: value for name, value in inputs(seed, variant).items() if name != "attention_mask"}

    return plain


def _both_sides(known: PretrainedConfig) -> Inputs:
    ours = token_inputs(known, longest=_FAR)

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        found = ours(seed, variant)
        theirs = ours(seed + 1000, "plain" if variant == "padded" else variant)["input_ids"]
        return {**found, "decoder_input_ids": theirs[: len(found["input_ids"])]}

    return inputs


def _decoder_inputs(known: PretrainedConfig) -> Inputs:
    ours = token_inputs(known, longest=_FAR)

    def inputs(seed: int, variant: str) -> dict[str, Tensor]:
        ids = ours(seed, variant)["input_ids"]
        draw = torch.Generator().manual_seed(seed)
        hidden = torch.randn(len(ids), 9, known.d_model, generator=draw)
        return {"input_ids": ids, "encoder_hidden_states": hidden}

    return inputs


class _Table(nn.Module):
    def __init__(self, known: PretrainedConfig) -> None:
        super().__init__()
        self.shared = nn.Embedding(known.vocab_size, known.d_model)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.shared(input_ids)


def t5_embeddings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From token ids to rows of the table."""
    known = _t5_config(config)
    module = zoo.unfilled(lambda: _Table(known))
    zoo.fill(module, checkpoint)
    inputs = _without_mask(token_inputs(known, longest=_FAR))
    return zoo.PartProbe(module, _one, inputs, _NO_PADDING, ("embeddings",))


def _tables(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint if name.endswith("embed_tokens.weight") or name == "shared.weight"]


def t5_encoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From token ids to the encoder's last hidden state."""
    known = _t5_config(config)
    module = zoo.unfilled(lambda: transformers.T5EncoderModel(known))
    zoo.fill(module, checkpoint, spare=_tables(checkpoint))
    inputs = token_inputs(known, longest=_FAR)
    return zoo.PartProbe(module, _last_hidden, inputs, outputs=("last_hidden_state",))


def t5_decoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From token ids and the encoder's hidden states to the decoder's last hidden state."""
    known = _t5_config(config)
    module = zoo.unfilled(lambda: transformers.T5Model(known).decoder)

    def spelled(name: str) -> str:
        return "shared.weight" if name == "embed_tokens.weight" else f"decoder.{name}"

    zoo.fill(module, checkpoint, spelled, spare=[*_tables(checkpoint), *_spare(checkpoint, _SPARE_T5)])
    return zoo.PartProbe(module, _last_hidden, _decoder_inputs(known), _NO_PADDING, ("last_hidden_state",))


def t5_head(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From the decoder's hidden states to logits, where the head is not the table of words."""
    known = _t5_config(config)
    scale = known.d_model**-0.5 if known.scale_decoder_outputs else 1.0
    module = zoo.unfilled(lambda: Head(known.d_model, known.vocab_size, scale))
    zoo.fill(module, checkpoint)
    return zoo.PartProbe(module, _one, hidden_inputs(known.d_model), _NO_PADDING, ("logits",))


def t5_model(checkpoint: Checkpoint, config: Mapping[str, Any]) -> nn.Module:
    """T5ForConditionalGeneration, filled; its head is tied to the table where the file has none."""
    known = _t5_config(config)
    module = zoo.unfilled(lambda: transformers.T5ForConditionalGeneration(known))
    zoo.fill(module, checkpoint, spare=[*_tables(checkpoint), *_spare(checkpoint, _SPARE_T5)])
    return module


def t5_whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    """From token ids of both sides to both last hidden states, and logits where there is a decoder."""
    if not any(name.startswith("decoder.") for name in checkpoint):
        return t5_encoder(checkpoint, config)
    known = _t5_config(config)

    def run(module: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        answer = module(**x, output_hidden_states=True, use_cache=False)
        return answer.encoder_last_hidden_state, answer.decoder_hidden_states[-1], answer.logits

    outputs = ("encoder_last_hidden_state", "last_hidden_state", "logits")
    return zoo.PartProbe(t5_model(checkpoint, config), run, _both_sides(known), outputs=outputs)
