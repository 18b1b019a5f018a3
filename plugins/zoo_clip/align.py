"""ALIGN: a BERT for text and an EfficientNet for images, as transformers names their tensors."""

from __future__ import annotations

from zoo import Entry, Part, Source

LAYOUTS = {
    "transformers": (
        "text_model.embeddings.word_embeddings.weight",
        "text_projection.weight",
        "vision_model.embeddings.convolution.weight",
        "vision_model.encoder.blocks.0.*",
        "temperature",
    ),
}

PARTS = (
    Part(
        "text",
        {"transformers": ("text_model.*", "text_projection.*")},
        probe="zoo_clip.probes:align_text",
        outputs=("text_embeds_unnormalised",),
    ),
    Part(
        "vision",
        {"transformers": ("vision_model.*",)},
        probe="zoo_clip.probes:align_vision",
        outputs=("image_embeds_unnormalised",),
        aliases=("image",),
    ),
    # The logits are divided by it: it is the inverse of what CLIP calls the exponential of its logit scale.
    Part("temperature", {"transformers": ("temperature",)}, aliases=("logit_scale",)),
)

ENTRY = Entry(
    name="align",
    tags={"base": (Source("hub", "kakaobrain/align-base"),)},
    default_tag="base",
    modality="image-text",
    tasks=("zero-shot-image-classification", "feature-extraction"),
    licence="none stated",  # by the card of the repository
    layouts=LAYOUTS,
    requires="clip",
    load="zoo_clip.loading:align",
    probe="zoo_clip.probes:align_whole",
    outputs=("image_embeds_unnormalised", "text_embeds_unnormalised", "logits_per_image"),
    parts=PARTS,
)
