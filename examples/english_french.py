"""Sentences of a small grammar in English and in French, and their words as numbers.

Adjectives change places, articles and adjectives agree with a noun still to come: few words can be
translated by themselves.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

PAD, BEGIN, END = range(3)


def entries(text: str) -> dict[str, list[str]]:
    return {english: french for english, *french in map(str.split, text.split(","))}


NOUNS = entries(
    "cat chat m, dog chien m, horse cheval m, wolf loup m, boy garçon m, king roi m, book livre m,"
    "baker boulanger m, garden jardin m, duck canard m, train train m, cow vache f, girl fille f,"
    "queen reine f, house maison f, car voiture f, mouse souris f, chair chaise f, flower fleur f,"
    "goat chèvre f, table table f, key clé f"
)
VERBS = entries(
    "sees voit, loves adore, finds trouve, follows suit, hides cache, sells vend, draws dessine"
)
ARTICLES = entries("the le la, a un une, this ce cette, my mon ma, your ton ta")
BEFORE = entries("big grand grande, small petit petite, beautiful beau belle, good bon bonne")
BEHIND = entries(  # the noun, in French
    "black noir noire, white blanc blanche, green vert verte, red rouge rouge, sad triste triste,"
    "happy heureux heureuse, clever rusé rusée"
)


def noun_phrase(rng: random.Random) -> tuple[list[str], list[str]]:
    """English and French, for instance: the big black cow, la grande vache noire."""
    article, noun = rng.choice([*ARTICLES]), rng.choice([*NOUNS])
    before = [rng.choice([*BEFORE])] if rng.random() < 0.4 else []
    behind = [rng.choice([*BEHIND])] if rng.random() < 0.5 else []
    french, gender = NOUNS[noun]
    words = ARTICLES | BEFORE | BEHIND
    front, back = (
        [words[word]["mf".index(gender)] for word in part] for part in ([article, *before], behind)
    )
    return [article, *before, *behind, noun], [*front, french, *back]


def sentence(rng: random.Random) -> tuple[str, str]:
    (subject, sujet), (target, objet) = noun_phrase(rng), noun_phrase(rng)
    verb = rng.choice([*VERBS])
    return " ".join([*subject, verb, *target]), " ".join([*sujet, *VERBS[verb], *objet])


class Vocabulary:
    def __init__(self, sentences: list[str]) -> None:
        self.words = ["<pad>", "<s>", "</s>", *sorted(set(" ".join(sentences).split()))]
        self.numbers = {word: number for number, word in enumerate(self.words)}

    def encode(self, sentences: list[str]) -> Tensor:
        """(sentences, length), padded."""
        rows = [[BEGIN, *(self.numbers[w] for w in words.split()), END] for words in sentences]
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

    def decode(self, tokens: Tensor) -> str:
        return " ".join(self.words[token] for token in tokens.tolist() if token > END)
