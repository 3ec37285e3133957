"""Encoder-decoder families of transformers, small."""

from typing import Any

import transformers
from family_cases import VOCABULARY, Family, randomise, text

TOKENS = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
# The names that Bart's relatives have in common.
BART = TOKENS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "forced_eos_token_id": None,
}
# 12 positions reach every bucket.
T5 = TOKENS | {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}


def both(padding: str) -> dict[str, Any]:
    """A text for the encoder and a shorter one for the decoder, padded alike."""
    return text(padding) | {f"decoder_{name}": x for name, x in text(padding, length=8).items()}


def encoder_decoder(name: str, label: str, config: dict[str, Any]) -> Family:
    def build() -> Any:
        made = getattr(transformers, f"{name}Config")(**config)
        model = transformers.AutoModelForSeq2SeqLM.from_config(made, attn_implementation="eager")
        return randomise(model)

    caches = ("dynamic", "static")
    return Family(label, "encoder-decoder", "hook", build, both, caches=caches)


FAMILIES = (
    encoder_decoder("T5", "T5", T5),
    encoder_decoder("MT5", "mT5", T5 | {"feed_forward_proj": "gated-gelu"}),
    encoder_decoder("UMT5", "UMT5", T5 | {"feed_forward_proj": "gated-gelu"}),
    encoder_decoder("Bart", "BART", BART),
    encoder_decoder("MBart", "mBART", BART),
    encoder_decoder("Marian", "Marian", BART | {"decoder_vocab_size": VOCABULARY}),
    encoder_decoder("Pegasus", "Pegasus", BART),
    encoder_decoder("M2M100", "M2M-100", BART),
    encoder_decoder("Blenderbot", "Blenderbot", BART),
)
