"""Similarity of two texts by the embeddings of an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rlvid.config import SimilarityPart
from rlvid.models import torchvision_ops
from rlvid.rewards.part import Group, Values, answers, right_answer


@cache
def _encoder(path: Path) -> tuple[Any, Any]:
    torchvision_ops.ensure()  # before transformers
    from transformers import AutoModel, AutoTokenizer

    return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()


def embeddings(part: SimilarityPart, texts: Sequence[str]) -> Any:
    """Unit vectors [n, D] of texts."""
    import torch

    tokenizer, model = _encoder(part.path)
    given = tokenizer(list(texts), padding=True, truncation=True, max_length=part.max_tokens, return_tensors="pt")
    with torch.no_grad():
        states = model(**given).last_hidden_state
    mask = given["attention_mask"][..., None]
    pooled = states[:, 0] if part.pooling == "cls" else (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=-1)


def similarity(part: SimilarityPart, group: Group) -> Values:
    right = right_answer(group)
    if not group.responses:
        return []
    vectors = embeddings(part, [right, *answers(part, group)])
    cosines = (vectors[1:] @ vectors[0]).clamp(0.0, 1.0)
    return [float(cosine) for cosine in cosines]
