"""SigLIP, as transformers names its tensors and as open_clip does, with a vision tower of timm's."""

from __future__ import annotations

from zoo import Entry, Part, Source

LAYOUTS = {
    "transformers": (
        "text_model.embeddings.token_embedding.weight",
        "text_model.head.weight",
        "vision_model.head.probe",
        "logit_bias",
    ),
    "open_clip": (
        "visual.trunk.attn_pool.latent",
        "text.transformer.resblocks.0.*",
        "text.token_embedding.weight",
        "logit_bias",
    ),
}

PARTS = (
    Part(
        "text",
        {"transformers": ("text_model.*",), "open_clip": ("text.*",)},
        probe="zoo_clip.probes:siglip_text",
        outputs=("text_embeds_unnormalised",),
    ),
    Part(
        "vision",
        {"transformers": ("vision_model.*",), "open_clip": ("visual.*",)},
        probe="zoo_clip.probes:siglip_vision",
        outputs=("image_embeds_unnormalised",),
        aliases=("image",),
    ),
    Part("logit_scale", dict.fromkeys(LAYOUTS, ("logit_scale", "logit_bias"))),
)

ENTRY = Entry(
    name="siglip",
    tags={
        "b16": (Source("hub", "google/siglip-base-patch16-224"),),
        "l16-256": (Source("hub", "google/siglip-large-patch16-256"),),
        "so400m": (Source("hub", "google/siglip-so400m-patch14-384"),),
        "b16-openclip": (Source("hub", "timm/ViT-B-16-SigLIP"),),
    },
    default_tag="b16",
    modality="image-text",
    tasks=("zero-shot-image-classification", "feature-extraction"),
    licence="apache-2.0",
    layouts=LAYOUTS,
    requires="clip",
    load="zoo_clip.loading:siglip",
    probe="zoo_clip.probes:siglip_whole",
    outputs=("image_embeds_unnormalised", "text_embeds_unnormalised", "logits_per_image"),
    parts=PARTS,
    sizes="zoo_clip.sizes:sizes",
)
