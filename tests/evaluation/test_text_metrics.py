"""BLEU against the stored values of 1,000 captions; the others by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from rlvid.evaluation.text_metrics import bert_score, bleu, meteor, rouge, text_metrics

LOGS = Path(__file__).parents[3] / "shared" / "data" / "llava_cot"


@pytest.mark.skipif(not LOGS.is_dir(), reason="the captions of Thinking-Cobra are not here")
@pytest.mark.parametrize("method", ["baseline", "scratchpad"])
def test_bleu_equals_the_stored_values_of_corpus_and_samples(method: str) -> None:
    stored = json.loads(gzip.decompress((LOGS / f"cobra_coco1000_{method}.json.gz").read_bytes()))
    rows, names = stored["results"], [f"BLEU-{i}" for i in range(1, 5)]
    corpus, per_sample = bleu([r["generated_caption"] for r in rows], [r["reference_captions"] for r in rows])
    assert corpus == pytest.approx([stored["aggregate_metrics"][name] for name in names], abs=1e-9)
    for own, row in zip(per_sample, rows, strict=True):
        assert own == pytest.approx([row["metrics"][name] for name in names], abs=1e-9)


@pytest.mark.skipif(not LOGS.is_dir(), reason="the captions of Thinking-Cobra are not here")
def test_the_mean_of_samples_is_what_the_summary_calls_bleu() -> None:
    """The summary's numbers under the name of BLEU-4 are not those of the corpus, which the results have."""
    rows = {
        m: json.loads(gzip.decompress((LOGS / f"cobra_coco1000_{m}.json.gz").read_bytes()))
        for m in ("baseline", "scratchpad")
    }
    means = {}
    for method, stored in rows.items():
        texts = [r["generated_caption"] for r in stored["results"]]
        _, per_sample = bleu(texts, [r["reference_captions"] for r in stored["results"]])
        means[method] = sum(own[3] for own in per_sample) / len(per_sample)
    summary = json.loads((LOGS / "cobra_coco1000_comparison_summary.json").read_text())
    assert means["scratchpad"] - means["baseline"] == pytest.approx(summary["aggregate_diffs"]["BLEU-4"], abs=1e-9)


def test_bleu_takes_the_closest_reference_and_the_shorter_of_two() -> None:
    corpus, _ = bleu(["a b c"], [["a b", "a b c d"]])  # both are one token away: no penalty
    assert corpus[0] == pytest.approx(1.0) and corpus[1] == pytest.approx(1.0)
    short, _ = bleu(["a b"], [["a b c d"]])
    assert short[0] == pytest.approx(2.718281828 ** (1 - 4 / 2))


def test_rouge_and_meteor_take_the_best_reference() -> None:
    assert rouge(["the cats"], [["a dog", "the cat"]])["rouge1"] == [1.0]
    assert meteor(["the cats"], [["a dog", "the cat"]])[0] == pytest.approx(meteor(["the cat"], [["the cat"]])[0])
    assert meteor(["fish"], [["dog"]]) == [0.0]


def test_names_say_corpus_or_mean() -> None:
    found = text_metrics(["a b c d e", "x"], [["a b c d e"], ["y"]])
    assert found["bleu1_corpus"] == pytest.approx(5 / 6) and found["bleu1_mean"] == pytest.approx(0.5)
    assert "bert_score" not in found


def test_bert_score_of_equal_texts_is_one(tiny_encoder: Path) -> None:
    same, other = bert_score(["red square", "red square"], [["red square"], ["blue moves left"]], tiny_encoder)
    assert same == pytest.approx(1.0) and other < same
