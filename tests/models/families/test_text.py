from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlvid.errors import UserError
from rlvid.models.families import load_family
from rlvid.models.families.text import TextModel
from rlvid.types import Message, Sample
from tests.prompts import clip_of, noise, sample_of

CHAT = (
    Message("system", ("Be brief.",)),
    Message("user", ("Which shape?",)),
    Message("assistant", ("square",)),
    Message("user", ("Which colour?",)),
)


@pytest.fixture(params=["qwen2", "qwen3"])
def family(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> TextModel:
    return load_family(tiny_models[request.param])  # type: ignore[return-value]


def test_prompt_equals_the_tokenizers(family: TextModel) -> None:
    from transformers import AutoTokenizer

    prompt = family.encode(Sample("s", (), CHAT, "red"), [])
    theirs = AutoTokenizer.from_pretrained(family.folder).apply_chat_template(
        [{"role": m.role, "content": m.text} for m in CHAT], add_generation_prompt=True, return_dict=False
    )
    assert prompt.token_ids.tolist() == theirs
    assert prompt.positions.tolist() == [list(range(prompt.length))]
    assert prompt.next_position == prompt.length == prompt.cost
    assert prompt.spans == () and prompt.patches.size == 0


def test_videos_are_refused_by_name(family: TextModel) -> None:
    with pytest.raises(UserError, match=r"'s' has the video .*ForCausalLM.*accepts only text"):
        family.encode(sample_of(), [clip_of(noise(2, 28, 28), "c")])


def test_prompt_is_never_truncated(family: TextModel) -> None:
    with pytest.raises(UserError, match=r"0 of them video.*raise rollout.max_model_len.*or shorten the prompt"):
        family.encode(sample_of(n_videos=0), [], max_tokens=5)


def test_answer_ends_with_the_tokenizers_eos_token(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(tiny_models["qwen2"], folder)
    for file, change in (
        ("tokenizer_config.json", {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|im_start|>"}),
        ("config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
    ):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[-1]['content'] | trim }}{{ eos_token }}")
    family = load_family(folder)
    assert family.vllm_module == "vllm.model_executor.models.llama"
    end, begin = (family.tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>"))
    assert family.encode_answer("red")[-1] == family.end_of_turn == end
    ids = family.encode(sample_of(n_videos=0), []).token_ids
    assert (ids[0], ids[-1]) == (begin, end)  # its template got both tokens


def test_tokenizer_without_an_eos_token_is_an_error(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_models["qwen3"], folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    with pytest.raises(UserError, match="has no eos_token"):
        load_family(folder)


def test_added_tokens_that_are_not_special_stay_text(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_models["qwen3"], folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    new = max(token["id"] for token in tokenizer["added_tokens"]) + max(tokenizer["model"]["vocab"].values()) + 1
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": new, "content": "<think>", "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    family = load_family(folder)
    ids = family.encode_answer("<think>red<|im_end|>").tolist()
    assert ids[0] == family.tokenizer.token_to_id("<think>") and family.end_of_turn not in ids[:-1]
    assert family.decode(ids).startswith("<think>red")  # rewards read it
