"""Vision families of transformers, small."""

from collections.abc import Callable
from typing import Any

import torch
from family_cases import Family, drawn, of_transformers

# The names that ViT's relatives have in common; 17 tokens.
VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
MAE = VIT | {
    "decoder_hidden_size": 16,
    "decoder_intermediate_size": 24,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "mask_ratio": 0.5,
}
YOLOS = VIT | {"image_size": [16, 16], "num_detection_tokens": 5}
DPT = VIT | {
    "num_hidden_layers": 4,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 16, 16],
    "fusion_hidden_size": 8,
}
# 10 x 10 patches, then 5 x 5: windows shifted and not, padded in both sizes.
SWIN = {
    "image_size": 40,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
BEIT = VIT | {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
DETR = {
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
        "out_features": ["stage2"],
    },
    "d_model": 32,
    "num_queries": 5,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [2, 1],
    "sr_ratios": [4, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
}


def pixels(size: int) -> Callable[[str], dict[str, Any]]:
    return lambda padding: {"pixel_values": drawn(2, 3, size, size)}


def pixels_and_noise(padding: str) -> dict[str, Any]:
    """What MAE hides, it chooses by the order of random numbers; these are exact in any dtype."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.stack([torch.randperm(16, generator=generator) for _ in range(2)])
    return {"pixel_values": drawn(2, 3, 16, 16), "noise": noise.float()}


def masked_pixels(padding: str) -> dict[str, Any]:
    """Images of different sizes in one batch."""
    inputs: dict[str, Any] = {"pixel_values": drawn(2, 3, 48, 48)}
    if padding == "right":
        inputs["pixel_mask"] = torch.ones(2, 48, 48, dtype=torch.long)
        inputs["pixel_mask"][1, :, 24:] = 0
    return inputs


def vision(
    name: str,
    label: str,
    config: dict[str, Any],
    inputs: Callable[[str], dict[str, Any]],
    model: str = "Model",
    **fields: Any,
) -> Family:
    def build() -> Any:
        return of_transformers(name, model, config)

    return Family(label, "vision", "hook", build, inputs, **{"paddings": ("none",)} | fields)


DETECTION = {"model": "ForObjectDetection", "paddings": ("none", "right")}

FAMILIES = (
    # 197 tokens, as ViT-B/16 has.
    vision("ViT", "ViT", VIT | {"image_size": 56}, pixels(56)),
    vision("DeiT", "DeiT", VIT, pixels(16)),
    vision("Dinov2", "DINOv2", VIT, pixels(16)),
    vision("ViTMAE", "MAE", MAE, pixels_and_noise, "ForPreTraining"),
    vision("Yolos", "YOLOS", YOLOS, pixels(16)),
    vision("DPT", "DPT", DPT, pixels(16), "ForDepthEstimation"),
    vision("Swin", "Swin", SWIN, pixels(40)),
    vision("Beit", "BEiT", BEIT, pixels(16)),
    vision("Detr", "DETR", DETR, masked_pixels, **DETECTION),
    vision("ConditionalDetr", "Conditional DETR", DETR, masked_pixels, **DETECTION),
    vision("Segformer", "SegFormer", SEGFORMER, pixels(64)),
)
