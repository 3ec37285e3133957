"""Decoder families of transformers, small."""

from typing import Any

import transformers
from family_cases import VOCABULARY, Family, randomise, text

CACHES = ("dynamic", "static")
PADDINGS = ("none", "right", "left", "packed")

# The names that most configurations have in common.
MODERN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def causal_lm(name: str, **config: Any) -> Any:
    """<name>ForCausalLM with a random small configuration."""
    made = getattr(transformers, f"{name}Config")(**config)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager")
    return randomise(model)


def modern(name: str, label: str, **config: Any) -> Family:
    def build() -> Any:
        return causal_lm(name, **(MODERN | config))

    return Family(label, "decoder", "hook", build, text, PADDINGS, CACHES)


FAMILIES = (
    modern("Llama", "LLaMA (GQA)"),
    modern("Llama", "LLaMA (MQA)", num_key_value_heads=1),
)
