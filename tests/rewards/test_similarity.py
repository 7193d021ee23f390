"""Similarity by a real, small encoder with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlvid.config import SimilarityPart
from rlvid.models import torchvision_ops
from rlvid.rewards.part import Group, NoReward, Response
from rlvid.rewards.rules import make_parts
from tests.prompts import sample_of


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    torchvision_ops.ensure()  # before transformers
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "square", "moves", "left"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), initializer_range=0.5, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_same_text_has_similarity_1_in_any_company(encoder: Path, pooling: str) -> None:
    cfg = SimilarityPart.model_validate(
        {"kind": "similarity", "path": str(encoder), "pooling": pooling, "tags": ["answer"]}
    )
    (part,) = make_parts([cfg])
    sample = replace(sample_of(), answer="a red square")
    texts = ("<answer>a red square</answer>", "<answer>blue</answer>", "<answer>a blue square moves left left</answer>")
    same, other, long = part(Group(sample, tuple(Response(text, 1) for text in texts)))
    assert same == pytest.approx(1.0, abs=1e-5) and 0 <= other < 0.999 and 0 <= long < 0.999  # type: ignore[operator]
    (alone,) = part(Group(sample, (Response(texts[1], 1),)))  # padding beside longer texts changes nothing
    assert alone == pytest.approx(other, abs=1e-5)
    nothing = part(Group(replace(sample, answer=" "), (Response("x", 1),)))
    assert isinstance(nothing[0], NoReward)
