"""Families of images, of image and text, and of sound that have adapters, small."""

import functools
from typing import Any

import torch
import transformers
from family_cases import VOCABULARY, Family, randomise, text
from torch import Tensor

ROWS = 3


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def eager(name: str, config: Any) -> Any:
    """The model of that class with random parameters."""
    config._attn_implementation = "eager"
    return randomise(getattr(transformers, name)(config))


def pixels(padding: str, size: int) -> dict[str, Any]:
    return {"pixel_values": noise(ROWS, 3, size, size)}


def swinv2(**changes: Any) -> Any:
    config = transformers.Swinv2Config(
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        **changes,
    )
    model = eager("Swinv2Model", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                parameter += 2.0
    return model


def sam(**changes: Any) -> Any:
    vision = {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "mlp_dim": 48,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 4,
        "window_size": 4,
        "global_attn_indexes": [1],
        "num_pos_feats": 8,
    }
    prompt = {
        "hidden_size": 16,
        "image_size": 24,
        "patch_size": 4,
        "mask_input_channels": 4,
        "image_embedding_size": 6,
    }
    decoder = {
        "hidden_size": 16,
        "mlp_dim": 24,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    }
    config = transformers.SamConfig(
        vision_config=vision | changes, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    return eager("SamModel", config)


def points(padding: str) -> dict[str, Any]:
    """An image each with two points for each of two masks; one point is padding."""
    labels = torch.ones(ROWS, 2, 2, dtype=torch.int)
    labels[0, 1, 1] = -10
    return pixels(padding, 24) | {
        "input_points": (noise(ROWS, 2, 2, 2) * 4 + 12).clamp(0, 24),
        "input_labels": labels,
    }


def blip(name: str, of_text: Any = None, of_vision: Any = None) -> Any:
    small_text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "encoder_hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sep_token_id": 2,
        "pad_token_id": 0,
    }
    small_vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    config = transformers.BlipConfig(
        text_config=small_text | (of_text or {}),
        vision_config=small_vision | (of_vision or {}),
        projection_dim=16,
    )
    return eager(name, config)


def captions(padding: str) -> dict[str, Any]:
    return pixels(padding, 16) | text(padding)


def questions(padding: str) -> dict[str, Any]:
    """With answers, since without them no output depends on the text."""
    answers = torch.randint(3, VOCABULARY, (ROWS, 7), generator=torch.Generator().manual_seed(3))
    return captions(padding) | {"labels": answers}


def wavlm(**changes: Any) -> Any:
    config = transformers.WavLMConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        conv_dim=[16, 16],
        conv_kernel=[10, 4],
        conv_stride=[8, 2],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        num_buckets=16,
        max_bucket_distance=30,
        mask_time_prob=0.0,
        **changes,
    )
    return eager("WavLMModel", config)


def sounds(padding: str) -> dict[str, Any]:
    inputs = {"input_values": noise(ROWS, 240)}
    if padding == "right":
        lengths = torch.tensor([240, 170, 90])
        inputs["attention_mask"] = (torch.arange(240) < lengths[:, None]).long()
    return inputs


FAMILIES = (
    Family("Swin-v2", "vision", "adapter", swinv2, functools.partial(pixels, size=32), ("none",)),
    Family(
        "SAM",
        "vision",
        "adapter",
        sam,
        points,
        ("none",),
        note="the mask decoder goes through the interface",
    ),
    Family(
        "BLIP (captions)",
        "vision + text",
        "adapter",
        functools.partial(blip, "BlipForConditionalGeneration"),
        captions,
        caches=("dynamic",),
        note="eager does not generate with a static cache either",
    ),
    Family(
        "BLIP (answers)",
        "vision + text",
        "adapter",
        functools.partial(blip, "BlipForQuestionAnswering"),
        questions,
        note="cross-attention sees the padding of its keys, as in transformers",
    ),
    Family(
        "WavLM",
        "audio",
        "adapter",
        wavlm,
        sounds,
        ("none", "right"),
        note="only the length of a row counts, and so its padding is to the right",
    ),
    Family(
        "WavLM (large)",
        "audio",
        "adapter",
        functools.partial(wavlm, do_stable_layer_norm=True, feat_extract_norm="layer"),
        sounds,
        ("none", "right"),
        note="as WavLM",
    ),
)
