"""Encoder families of transformers, small."""

from typing import Any

import transformers
from family_cases import VOCABULARY, Family, randomise, text

# The names that most configurations have in common.
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
NARROW = {"embedding_size": 16}
DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
# Its local layers see 2 keys on either side.
MODERNBERT = {
    "local_attention": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "cls_token_id": 2,
    "sep_token_id": 2,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
ESM = {"position_embedding_type": "rotary", "mask_token_id": 2, "token_dropout": True}


def encoder(name: str, label: str, config: dict[str, Any] | None = None, **fields: Any) -> Family:
    def build() -> Any:
        made = getattr(transformers, f"{name}Config")(**(BERT | (config or {})))
        return randomise(transformers.AutoModel.from_config(made, attn_implementation="eager"))

    return Family(label, "encoder", "hook", build, text, **fields)


FAMILIES = (
    encoder("Bert", "BERT"),
    encoder("Roberta", "RoBERTa"),
    encoder("XLMRoberta", "XLM-R"),
    encoder("Albert", "ALBERT", NARROW),
    encoder("DistilBert", "DistilBERT", DISTILBERT),
    encoder("Electra", "ELECTRA", NARROW),
    encoder("ModernBert", "ModernBERT", MODERNBERT, note="packed sequences by cu_seq_lens_q alone"),
    encoder("Esm", "ESM", ESM),
)
