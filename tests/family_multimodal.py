"""Families of image and text of transformers, small."""

from collections.abc import Callable
from typing import Any

import torch
from family_cases import LENGTH, VOCABULARY, Family, drawn, of_transformers, text

ROWS = 2
# Tokens that text() does not draw.
IMAGE, END = VOCABULARY, VOCABULARY + 1
TEXT = {
    "vocab_size": VOCABULARY + 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": END,
}
LLAMA = TEXT | {"model_type": "llama", "num_key_value_heads": 2}
GEMMA = TEXT | {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16}
# Four patches.
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 8,
    "patch_size": 4,
}
TOWERS = {"text_config": TEXT | {"projection_size": 24}, "vision_config": VISION}
LLAVA = {
    "vision_config": VISION | {"model_type": "clip_vision_model"},
    "text_config": LLAMA,
    "image_token_index": IMAGE,
    "vision_feature_layer": -1,
}
PALIGEMMA = {
    "vision_config": VISION
    | {"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 32},
    "text_config": GEMMA,
    "image_token_index": IMAGE,
    "projection_dim": 32,
    "hidden_size": 32,
}
UNFROZEN = {"freeze_text_layers": False, "freeze_vision_layers": False}
IDEFICS = (
    TEXT
    | UNFROZEN
    | {
        "vision_config": {"embed_dim": 24, "intermediate_size": 40, "num_hidden_layers": 2}
        | {"num_attention_heads": 3, "image_size": 8, "patch_size": 4},
        "use_resampler": True,
        "perceiver_config": {"use_resampler": True, "resampler_n_latents": 3, "resampler_depth": 1}
        | {"resampler_n_heads": 2, "resampler_head_dim": 8, "qk_layer_norms_perceiver": True},
        "qk_layer_norms": True,
        "alpha_type": "vector",
    }
)
IDEFICS2 = {
    "vision_config": VISION,
    "text_config": LLAMA,
    "image_token_id": IMAGE,
    "perceiver_config": {
        "hidden_size": 32,
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 4,
        "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    },
}
# 16 patches, 4 of them to a token.
IDEFICS3 = {
    "vision_config": VISION | {"image_size": 16},
    "text_config": LLAMA,
    "image_token_id": IMAGE,
    "scale_factor": 2,
}
MLLAMA = {
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 3,
        "image_size": 8,
        "patch_size": 4,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2]],
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 72,
    },
    "text_config": TEXT | {"num_key_value_heads": 2, "cross_attention_layers": [1]},
    "image_token_index": IMAGE,
}


def pairs(padding: str) -> dict[str, Any]:
    """Texts, each with its end, and images."""
    inputs = text(padding, ROWS)
    inputs["input_ids"][:, -4] = END  # not padding on either side
    return inputs | {"pixel_values": drawn(ROWS, 3, 8, 8)}


def tokens_of_images(padding: str) -> dict[str, Any]:
    """Texts with four tokens of an image in the midst, where nothing is padding."""
    inputs = text(padding, ROWS)
    inputs["input_ids"][:, 4:8] = IMAGE
    return inputs


def llava(padding: str) -> dict[str, Any]:
    return tokens_of_images(padding) | {"pixel_values": drawn(ROWS, 3, 8, 8)}


def paligemma(padding: str) -> dict[str, Any]:
    """The prefix, of type 0, sees all of itself."""
    suffix = (torch.arange(LENGTH) > 8).long().expand(ROWS, -1)
    return llava(padding) | {"token_type_ids": suffix}


def idefics(padding: str) -> dict[str, Any]:
    """Two images: the text sees none, the first, both."""
    seen = torch.arange(LENGTH)[:, None] >= torch.tensor([3, 7])
    images = {
        "pixel_values": drawn(ROWS, 2, 3, 8, 8),
        "image_attention_mask": seen.expand(ROWS, -1, -1),
    }
    return text(padding, ROWS) | images


def idefics2(padding: str) -> dict[str, Any]:
    """The second image is half as high."""
    there = torch.ones(ROWS, 1, 8, 8, dtype=torch.bool)
    there[1, :, 4:] = False
    images = {"pixel_values": drawn(ROWS, 1, 3, 8, 8), "pixel_attention_mask": there}
    return tokens_of_images(padding) | images


def idefics3(padding: str) -> dict[str, Any]:
    there = torch.ones(ROWS, 1, 16, 16, dtype=torch.bool)
    there[1, :, 8:] = False
    images = {"pixel_values": drawn(ROWS, 1, 3, 16, 16), "pixel_attention_mask": there}
    return tokens_of_images(padding) | images


def mllama(padding: str) -> dict[str, Any]:
    """An image of two tiles and one of one. Padded texts see the first tile, then both."""
    inputs = text(padding, ROWS) | {
        "pixel_values": drawn(ROWS, 1, 2, 3, 8, 8),
        "aspect_ratio_ids": torch.tensor([[2], [1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]]),
    }
    if padding != "none":
        seen = torch.arange(LENGTH)[:, None] >= torch.tensor([3, 7])
        inputs["cross_attention_mask"] = seen.long().expand(ROWS, -1, -1)[:, :, None]
    return inputs


def multimodal(
    name: str,
    label: str,
    config: dict[str, Any],
    inputs: Callable[[str], dict[str, Any]],
    model: str = "ForConditionalGeneration",
    seed: int = 0,
    **fields: Any,
) -> Family:
    def build() -> Any:
        return of_transformers(name, model, config, seed)

    return Family(label, "vision + text", "hook", build, inputs, **fields)


CACHES = {"caches": ("dynamic", "static")}
RESAMPLER = "its resampler's attention goes past the interface; `patch` has an adapter for it"

FAMILIES = (
    multimodal("CLIP", "CLIP", TOWERS, pairs, "Model"),
    multimodal("Siglip", "SigLIP", TOWERS, pairs, "Model"),
    multimodal("Llava", "LLaVA", LLAVA, llava, **CACHES),
    multimodal("PaliGemma", "PaliGemma", PALIGEMMA, paligemma, **CACHES),
    multimodal(
        "Idefics", "IDEFICS", IDEFICS, idefics, "ForVisionText2Text", note=RESAMPLER, **CACHES
    ),
    # With the weights of seed 0 rounding is much amplified, so that how far is off by chance.
    multimodal("Idefics2", "IDEFICS2", IDEFICS2, idefics2, seed=2, **CACHES),
    multimodal("Idefics3", "IDEFICS3", IDEFICS3, idefics3, **CACHES),
    multimodal("Mllama", "Mllama", MLLAMA, mllama, **CACHES),
)
