"""How near texts are to their references: BLEU, ROUGE, METEOR, BERTScore.

A reported BLEU says whether it is the corpus's or the mean of samples: on the same 1,000 captions BLEU-4 is 0.134 or
0.078 (tests/evaluation/test_text_metrics.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rlvid.evaluation.metrics import mean

ORDERS = 4
_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's, in numerators and denominators

References = Sequence[Sequence[str]]  # of each sample, one or more


def bleu(texts: Sequence[str], references: References) -> tuple[list[float], list[list[float]]]:
    """BLEU-1 to BLEU-4 of the corpus [4] and of each sample [n, 4], as pycocoevalcap computes them.

    Tokens are what whitespace separates. The reference length is that of the closest reference, the shorter of two.
    """
    counts = [_counts(text.split(), [r.split() for r in own]) for text, own in zip(texts, references, strict=True)]
    return _bleu([sum(column) for column in zip(*counts, strict=True)]), [_bleu(own) for own in counts]


def _counts(tokens: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
    """Length of text and reference, then for each order the n-grams that a reference has too, and all n-grams."""
    lengths = [len(r) for r in references]
    found = [len(tokens), min(lengths, key=lambda n: (abs(n - len(tokens)), n))]
    for order in range(1, ORDERS + 1):
        most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            most |= _ngrams(reference, order)
        found += [(_ngrams(tokens, order) & most).total(), max(0, len(tokens) - order + 1)]
    return found


def _ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def _bleu(counts: Sequence[int]) -> list[float]:
    if not counts:
        return [math.nan] * ORDERS
    length, reference, *matches = counts
    ratio = (length + _TINY) / (reference + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, found = 1.0, []
    for order, (right, total) in enumerate(zip(matches[::2], matches[1::2], strict=True), start=1):
        product *= (right + _TINY) / (total + _SMALL)
        found.append(product ** (1 / order) * penalty)
    return found


def rouge(texts: Sequence[str], references: References) -> dict[str, list[float]]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F-scores with stemming [n]; the best reference of a sample counts."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score_multi(list(own), text) for text, own in zip(texts, references, strict=True)]
    return {name: [score[name].fmeasure for score in scores] for name in ("rouge1", "rouge2", "rougeL")}


class _NoSynonyms:
    """In place of WordNet, which is a download."""

    def synsets(self, word: str) -> list[Any]:
        return []


def meteor(texts: Sequence[str], references: References) -> list[float]:
    """METEOR [n] with equal words and stems, without synonyms; the best reference of a sample counts."""
    from nltk.translate.meteor_score import meteor_score  # type: ignore[import-untyped]

    pairs = zip(texts, references, strict=True)
    return [
        float(meteor_score([r.lower().split() for r in own], text.lower().split(), wordnet=_NoSynonyms()))
        for text, own in pairs
    ]


def bert_score(texts: Sequence[str], references: References, encoder: Path, layer: int = -1) -> list[float]:
    """BERTScore F [n] (Zhang et al. 2020, arXiv 1904.09675), without idf and rescaling; the best reference counts.

    Args:
        encoder: folder of a transformers checkpoint.
        layer: whose hidden states are compared; the last by default. The published layers: 9 of bert-base-uncased.
    """
    known = {text: _states(encoder, text, layer) for own in (texts, *references) for text in own}
    return [
        max(_greedy_f(known[text], known[reference]) for reference in own)
        for text, own in zip(texts, references, strict=True)
    ]


@cache
def _encoder(path: Path) -> tuple[Any, Any]:
    from rlvid.models import torchvision_ops

    torchvision_ops.ensure()  # before transformers
    from transformers import AutoModel, AutoTokenizer

    return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()


def _states(path: Path, text: str, layer: int) -> Any:
    """Unit vectors [T, D] of a text's tokens."""
    import torch

    tokenizer, model = _encoder(path)
    given = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
    with torch.no_grad():
        states = model(**given, output_hidden_states=True).hidden_states[layer][0]
    return torch.nn.functional.normalize(states, dim=-1)


def _greedy_f(text: Any, reference: Any) -> float:
    similar = text @ reference.T
    precision, recall = float(similar.amax(1).mean()), float(similar.amax(0).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def text_metrics(
    texts: Sequence[str], references: References, encoder: Path | None = None, layer: int = -1
) -> dict[str, float]:
    """All of them as flat names and numbers, each a mean over the samples unless its name says `corpus`."""
    corpus, per_sample = bleu(texts, references)
    found = {f"bleu{i + 1}_corpus": value for i, value in enumerate(corpus)}
    found |= {f"bleu{i + 1}_mean": mean(own[i] for own in per_sample) for i in range(ORDERS)}
    found |= {name: mean(values) for name, values in rouge(texts, references).items()}
    found["meteor"] = mean(meteor(texts, references))
    if encoder is not None:
        found["bert_score"] = mean(bert_score(texts, references, encoder, layer))
    return found
