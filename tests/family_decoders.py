"""Decoder families of transformers, small."""

from typing import Any

import transformers
from family_cases import VOCABULARY, Family, randomise, text

CACHES = ("dynamic", "static")
PADDINGS = ("none", "right", "left", "packed")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# The names that most configurations have in common.
MODERN = TOKENS | {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PHI = {
    "hidden_size": 160,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "partial_rotary_factor": 0.5,
}
GPT2 = TOKENS | {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}
OPT = MODERN | {"ffn_dim": 48, "word_embed_proj_dim": 32}
WINDOW = {"sliding_window": 4}
ALTERNATING = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA2 = ALTERNATING | {
    "head_dim": 16,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 8,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "truncate": False,
    }
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
LLAMA4 = {
    "head_dim": 8,
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
    "attention_chunk_size": 4,
    "no_rope_layers": [1, 0],
}


def causal_lm(name: str, seed: int = 0, **config: Any) -> Any:
    """<name>ForCausalLM with a random small configuration."""
    made = getattr(transformers, f"{name}Config")(**config)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(made, **eager)
    return randomise(model, seed)


def decoder(name: str, label: str, config: dict[str, Any], **fields: Any) -> Family:
    fields = {"paddings": PADDINGS, "caches": CACHES} | fields
    return Family(label, "decoder", "hook", lambda: causal_lm(name, **config), text, **fields)


def modern(name: str, label: str, config: dict[str, Any] | None = None, **fields: Any) -> Family:
    return decoder(name, label, MODERN | (config or {}), **fields)


FAMILIES = (
    decoder("GPT2", "GPT-2", GPT2),
    modern("GPTNeoX", "GPT-NeoX"),
    decoder("OPT", "OPT", OPT),
    modern("Llama", "LLaMA (GQA)"),
    modern("Llama", "LLaMA (MHA)", {"num_key_value_heads": 4}),
    modern("Llama", "LLaMA (MQA)", {"num_key_value_heads": 1}),
    modern("Mistral", "Mistral", WINDOW),
    modern("Mixtral", "Mixtral", WINDOW | EXPERTS),
    modern("Qwen2", "Qwen2", ALTERNATING | {"use_sliding_window": True}),
    modern("Qwen3", "Qwen3", {"head_dim": 16}),
    modern("Phi", "Phi", PHI),
    modern("Phi3", "Phi-3", WINDOW),
    # Seed 0 draws weights that make any rounding a hundred times larger: norms of small numbers.
    modern("Olmo2", "OLMo2", {"seed": 1}),
    modern("StableLm", "StableLM", {"partial_rotary_factor": 0.25}),
    modern("Cohere", "Cohere"),
    modern("Starcoder2", "Starcoder2", WINDOW),
    modern("Granite", "Granite", {"attention_multiplier": 0.2}),
    modern("Gemma", "Gemma", {"head_dim": 256}),
    modern("Gemma2", "Gemma2", GEMMA2),
    modern("Gemma3Text", "Gemma3", ALTERNATING | {"head_dim": 16, "query_pre_attn_scalar": 8}),
    modern("GptOss", "gpt-oss", ALTERNATING | EXPERTS | YARN | {"head_dim": 8}),
    modern("DeepseekV3", "DeepSeek-V3", DEEPSEEK),
    modern("Llama4Text", "Llama 4", LLAMA4),
)
