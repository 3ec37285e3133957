"""Audio families of transformers, small."""

from collections.abc import Callable
from typing import Any

import torch
from family_cases import VOCABULARY, Family, drawn, of_transformers, text

ROWS = 2
# 60 frames to the encoder.
WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "num_mel_bins": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": 60,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "begin_suppress_tokens": None,
}
TRANSFORMER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# 400 samples are 39 frames.
WAV2VEC2 = TRANSFORMER | {
    "vocab_size": VOCABULARY,
    "conv_dim": [8, 8],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
AST = TRANSFORMER | {
    "patch_size": 8,
    "frequency_stride": 4,
    "time_stride": 4,
    "max_length": 40,
    "num_mel_bins": 16,
}


def mel_and_text(padding: str) -> dict[str, Any]:
    """Sound of one length, whatever it holds, and a text for the decoder, which is padded."""
    decoder = {f"decoder_{name}": x for name, x in text(padding, ROWS).items()}
    return {"input_features": drawn(ROWS, 8, 120)} | decoder


def samples(padding: str) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_values": drawn(ROWS, 400)}
    if padding == "right":
        inputs["attention_mask"] = (torch.arange(400) < torch.tensor([[400], [250]])).long()
    return inputs


def spectrogram(padding: str) -> dict[str, Any]:
    return {"input_values": drawn(ROWS, 40, 16)}


def audio(
    name: str,
    label: str,
    config: dict[str, Any],
    inputs: Callable[[str], dict[str, Any]],
    model: str = "Model",
    **fields: Any,
) -> Family:
    def build() -> Any:
        return of_transformers(name, model, config)

    return Family(label, "audio", "hook", build, inputs, **fields)


RIGHT = {
    "paddings": ("none", "right"),
    "note": "frames are taken from the left, so that padding is on the right",
}
GENERATION = {"model": "ForConditionalGeneration", "caches": ("dynamic", "static")}

FAMILIES = (
    audio("Whisper", "Whisper", WHISPER, mel_and_text, **GENERATION),
    audio("Wav2Vec2", "Wav2Vec2", WAV2VEC2, samples, **RIGHT),
    audio("Hubert", "HuBERT", WAV2VEC2, samples, **RIGHT),
    audio("AST", "AST", AST, spectrogram, paddings=("none",)),
)
