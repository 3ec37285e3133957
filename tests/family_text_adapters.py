"""Families of text whose attention is replaced by an adapter, or was in older versions, small."""

from typing import Any

import transformers
from family_cases import VOCABULARY, Family, randomise, text

from fastattn.integrations.huggingface.adapters import ADAPTERS

CACHES = ("dynamic", "static")
PADDINGS = ("none", "right", "left")

TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def model(kind: str, name: str, implementation: str, config: dict[str, Any]) -> Any:
    made = getattr(transformers, f"{name}Config")(**config)
    auto = getattr(transformers, f"AutoModel{kind}")
    return randomise(auto.from_config(made, attn_implementation=implementation))


def encoder(label: str, name: str, **config: Any) -> Family:
    def build() -> Any:
        return model("", name, "eager", ENCODER | config)

    return Family(label, "encoder", "adapter", build, text, PADDINGS)


def decoder(
    label: str,
    name: str,
    paddings: tuple[str, ...] = PADDINGS,
    caches: tuple[str, ...] = CACHES,
    implementation: str = "eager",
    way: str = "adapter",
    note: str = "",
    **config: Any,
) -> Family:
    def build() -> Any:
        return model("ForCausalLM", name, implementation, TOKENS | config)

    return Family(label, "decoder", way, build, text, paddings, caches, note=note)


def deberta(label: str, name: str, kinds: tuple[str, ...], **config: Any) -> Family:
    relative = {"relative_attention": True, "pos_att_type": list(kinds), "type_vocab_size": 2}
    return encoder(label, name, **(relative | config))


def falcon(label: str, **config: Any) -> Family:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return decoder(label, "Falcon", **(sizes | {"bias": True, "ffn_hidden_size": 48} | config))


BOTH = ("c2p", "p2c")
BUCKETS = {"max_relative_positions": 16, "position_buckets": 4}
DEBERTA = (
    deberta("DeBERTa", "Deberta", BOTH),
    deberta("DeBERTa (c2p)", "Deberta", ("c2p",), max_relative_positions=5),
    deberta("DeBERTa (p2c)", "Deberta", ("p2c",), position_biased_input=False),
    deberta("DeBERTa (absolute positions)", "Deberta", (), relative_attention=False),
    deberta("DeBERTa-v2", "DebertaV2", BOTH, conv_kernel_size=3, norm_rel_ebd="layer_norm"),
    deberta(
        "DeBERTa-v3", "DebertaV2", BOTH, share_att_key=True, norm_rel_ebd="layer_norm", **BUCKETS
    ),
    deberta("DeBERTa-v2 (c2p)", "DebertaV2", ("c2p",), **BUCKETS),
    deberta("DeBERTa-v2 (p2c)", "DebertaV2", ("p2c",), max_relative_positions=5),
    deberta("DeBERTa-v2 (p2c, shared keys)", "DebertaV2", ("p2c",), share_att_key=True),
    deberta("DeBERTa-v2 (no relative kind)", "DebertaV2", ()),
    deberta("DeBERTa-v2 (absolute positions)", "DebertaV2", (), relative_attention=False),
)

NO_PACKING = "transformers makes no mask of position_ids"
GPT_NEO = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "window_size": 4,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]],
}
GPTJ = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 2, "n_positions": 64}
BLOOM = {"hidden_size": 32, "n_layer": 2}
ALIBI = (
    "against transformers' default, sdpa (its eager code adds the biases twice), which takes no "
    f"static cache; {NO_PACKING}"
)

FAMILIES = (
    *DEBERTA,
    encoder("MPNet", "MPNet"),
    decoder("GPT-Neo", "GPTNeo", (*PADDINGS, "packed"), **GPT_NEO),
    decoder(
        "GPT-J",
        "GPTJ",
        (*PADDINGS, "packed"),
        way="adapter" if "transformers.models.gptj.modeling_gptj" in ADAPTERS else "hook",
        note="an adapter before transformers 5.24",
        rotary_dim=8,
        **GPTJ,
    ),
    decoder("BLOOM", "Bloom", note=NO_PACKING, n_head=4, **BLOOM),
    decoder("BLOOM (6 heads)", "Bloom", note=NO_PACKING, n_head=6, **(BLOOM | {"hidden_size": 48})),
    falcon("Falcon (multi-query)", note=NO_PACKING),
    falcon("Falcon (multi-head)", note=NO_PACKING, multi_query=False, parallel_attn=False),
    falcon(
        "Falcon (grouped-query)", note=NO_PACKING, new_decoder_architecture=True, num_kv_heads=2
    ),
    falcon(
        "Falcon (ALiBi)",
        note=ALIBI,
        alibi=True,
        implementation="sdpa",
        caches=("dynamic",),
        multi_query=False,
        parallel_attn=False,
    ),
    falcon(
        "Falcon (ALiBi, multi-query)",
        note=ALIBI,
        alibi=True,
        implementation="sdpa",
        caches=("dynamic",),
    ),
)
