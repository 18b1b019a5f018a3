"""wav2vec 2.0, HuBERT and WavLM: entries and parts, in the names of transformers and in those of fairseq.

HuBERT computes what wav2vec 2.0 computes and was trained otherwise; WavLM adds a relative position bias with gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from zoo import Entry, Part, Source
from zoo_audio import fairseq

if TYPE_CHECKING:
    from surgery import TensorInfo

_BODY = ("feature_extractor.*", "feature_projection.*", "encoder.*")
_FRONTEND = ("feature_extractor.*", "feature_projection.*")
_FAIR_BODY = ("feature_extractor.*", "post_extract_proj.*", "layer_norm.*", "encoder.*")
_FAIR_FRONTEND = ("feature_extractor.*", "post_extract_proj.*", "layer_norm.*")
_TUNED = {"wav2vec2": "w2v_encoder.w2v_model.", "hubert": "w2v_encoder.w2v_model.", "wavlm": ""}
_CONV = "feature_extractor.conv_layers.0.conv.weight"
_FAIR_CONV = "feature_extractor.conv_layers.0.0.weight"


def _under(prefix: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(prefix + pattern for pattern in patterns)


def _layouts(entry: str) -> dict[str, tuple[str, ...]]:
    """The layout "model" is the body alone, "task" has it under the family's name beside a head; fairseq's likewise."""
    keys = "gru_rel_pos_const" if entry == "wavlm" else "k_proj.weight"
    fair = "grep_linear.weight" if entry == "wavlm" else "k_proj.weight"
    found: dict[str, tuple[str, ...]] = {
        "model": (_CONV, f"encoder.layers.0.attention.{keys}"),
        "task": (f"{entry}.{_CONV}", f"{entry}.encoder.layers.0.attention.{keys}"),
        "fairseq": (_FAIR_CONV, f"encoder.layers.0.self_attn.{fair}"),
    }
    if _TUNED[entry]:
        found["fairseq-tuned"] = _under(_TUNED[entry], found["fairseq"])
    return found


def _parts(entry: str) -> tuple[Part, ...]:
    def spelled(ours: tuple[str, ...], fair: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        found = {"model": ours, "task": _under(f"{entry}.", ours), "fairseq": fair}
        return found | ({"fairseq-tuned": _under(_TUNED[entry], fair)} if _TUNED[entry] else {})

    # For CTC, for classes of recordings, and for speakers (told by its `tdnn`, and not run). A bare body has none.
    ours = ("lm_head.*", "projector.*", "classifier.*", "layer_weights", "tdnn.*")
    heads = {layout: ("w2v_encoder.proj.*",) if "fair" in layout else ours for layout in _layouts(entry)}
    return (
        # From a waveform to what enters the transformer: convolutions, normalised and projected.
        Part(
            "frontend",
            spelled(_FRONTEND, _FAIR_FRONTEND),
            probe="zoo_audio.speech_probes:frontend",
            outputs=("hidden_states",),
        ),
        Part(
            "encoder",
            spelled(_BODY, _FAIR_BODY),
            probe="zoo_audio.speech_probes:encoder",
            outputs=("last_hidden_state",),
        ),
        Part("head", heads, probe="zoo_audio.speech_probes:head", outputs=("logits",)),
    )


def _entry(name: str, tags: Mapping[str, str], licence: str) -> Entry:
    return Entry(
        name=name,
        tags={tag: (Source("hub", repository),) for tag, repository in tags.items()},
        default_tag="base",
        modality="audio",
        tasks=("automatic-speech-recognition", "audio-classification", "feature-extraction"),
        licence=licence,
        layouts=_layouts(name),
        requires="audio",
        load="zoo_audio.loading:speech",
        probe="zoo_audio.speech_probes:whole",
        outputs=("last_hidden_state",),
        parts=_parts(name),
    )


ENTRIES = (
    _entry(
        "wav2vec2",
        {
            "base": "facebook/wav2vec2-base",
            "base-960h": "facebook/wav2vec2-base-960h",
            "large": "facebook/wav2vec2-large",
            "large-960h": "facebook/wav2vec2-large-960h",
            "large-lv60": "facebook/wav2vec2-large-lv60",
            "large-960h-lv60-self": "facebook/wav2vec2-large-960h-lv60-self",
            "large-xlsr-53": "facebook/wav2vec2-large-xlsr-53",
        },
        "apache-2.0",
    ),
    _entry(
        "hubert",
        {
            "base": "facebook/hubert-base-ls960",
            "large": "facebook/hubert-large-ll60k",
            "large-ft": "facebook/hubert-large-ls960-ft",
        },
        "apache-2.0",
    ),
    _entry(
        "wavlm",
        {
            "base": "microsoft/wavlm-base",
            "base-plus": "microsoft/wavlm-base-plus",
            "large": "microsoft/wavlm-large",
        },
        # By the file that the cards link to; the repository of the code is under MIT, and which one holds for the
        # weights was asked there without an answer (github.com/microsoft/unilm/issues/1757).
        "cc-by-sa-3.0",
    ),
)

UNTOLD = (
    "a bare wav2vec2 and a bare hubert have tensors of the same names and shapes; the model_type in a config.json "
    "beside the file would settle it"
)


def file_says(entry: str, beside: Mapping[str, Any]) -> str | Literal[False]:
    """What fairseq wrote beside the weights."""
    found = fairseq.architecture(beside)
    if found is None:
        return ""
    return f"what lies beside the tensors has {found[1]}, as fairseq writes it" if found[0] == entry else False


def names_say(entry: str, tensors: Mapping[str, TensorInfo]) -> str | Literal[False]:
    """What only one of the three has. A body that has none of it may be wav2vec 2.0's or HuBERT's."""
    gated = any(".gru_rel_pos_const" in name or ".grep_linear." in name for name in tensors)
    if entry == "wavlm":
        return "its attention has a relative position bias with gates" if gated else False
    if gated:
        return False
    quantizer = any(name.startswith(("quantizer.", "project_q.")) for name in tensors)
    clusters = "label_embs_concat" in tensors
    if entry == "wav2vec2":
        if clusters:
            return False
        return "it has the quantizer that it was trained with" if quantizer else ""
    if quantizer:
        return False
    return "it has the clusters' embeddings that it was trained with" if clusters else ""
