"""CLIP: OpenAI's models and LAION's, as transformers, open_clip and OpenAI itself name their tensors.

Layouts: `transformers` (CLIPModel); `open_clip` (its class CLIP, and OpenAI's own state dicts, which are spelled the
same); `open_clip_text` (CustomTextCLIP, whose text tower lies under `text.`).
"""

from __future__ import annotations

from zoo import Entry, Part, Source

LAYOUTS = {
    "transformers": (
        "text_model.embeddings.token_embedding.weight",
        "vision_model.embeddings.class_embedding",
        "visual_projection.weight",
        "text_projection.weight",
    ),
    "open_clip": ("visual.conv1.weight", "transformer.resblocks.0.*", "token_embedding.weight", "text_projection*"),
    "open_clip_text": ("visual.conv1.weight", "text.transformer.resblocks.0.*", "text.token_embedding.weight"),
}

PARTS = (
    Part(
        "text",
        {
            "transformers": ("text_model.*", "text_projection.*"),
            "open_clip": (
                "token_embedding.*",
                "positional_embedding",
                "transformer.*",
                "ln_final.*",
                "text_projection*",
            ),
            "open_clip_text": ("text.*",),
        },
        probe="zoo_clip.probes:clip_text",
        outputs=("text_embeds_unnormalised",),
    ),
    Part(
        "vision",
        {
            "transformers": ("vision_model.*", "visual_projection.*"),
            "open_clip": ("visual.*",),
            "open_clip_text": ("visual.*",),
        },
        probe="zoo_clip.probes:clip_vision",
        outputs=("image_embeds_unnormalised",),
        aliases=("image",),
    ),
    Part("logit_scale", dict.fromkeys(LAYOUTS, ("logit_scale", "logit_bias"))),
)

ENTRY = Entry(
    name="clip",
    tags={
        "b32": (Source("hub", "openai/clip-vit-base-patch32"),),
        "b16": (Source("hub", "openai/clip-vit-base-patch16"),),
        "l14": (Source("hub", "openai/clip-vit-large-patch14"),),
        "l14-336": (Source("hub", "openai/clip-vit-large-patch14-336"),),
        "b32-laion2b": (Source("hub", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),),
        "b16-laion2b": (Source("hub", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),),
        "l14-laion2b": (Source("hub", "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"),),
        "h14-laion2b": (Source("hub", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),),
    },
    default_tag="b32",
    modality="image-text",
    tasks=("zero-shot-image-classification", "feature-extraction"),
    licence="mit",
    layouts=LAYOUTS,
    requires="clip",
    load="zoo_clip.loading:clip",
    probe="zoo_clip.probes:clip_whole",
    outputs=("image_embeds_unnormalised", "text_embeds_unnormalised", "logits_per_image"),
    parts=PARTS,
    sizes="zoo_clip.sizes:sizes",
)
