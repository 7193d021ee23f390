"""Writes docs/families.md from the classes of the families. `python -m rlvid.models.families.docs [--check]`"""

from __future__ import annotations

import sys
from pathlib import Path

from rlvid.models.families import FAMILIES
from rlvid.models.families.frames import SquareFrames

FILE = Path(__file__).parents[3] / "docs" / "families.md"
NAMES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL (dense)",
    "llava_onevision": "LLaVA-OneVision, LLaVA-Video",
    "llava_next_video": "LLaVA-NeXT-Video",
    "internvl": "InternVL 2.5, 3, 3.5 (-hf)",
    "smolvlm": "SmolVLM2",
    "video_llama_3": "VideoLLaMA3",
    "idefics2": "Idefics2, Mantis-Idefics2 (VideoScore)",
    "video_llava": "Video-LLaVA",
    "cobra": "Cobra (each response is trained with a prompt of its own: Mamba's state belongs to one sequence)",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "llama": "Llama 2, 3",
}
HEAD = """\
# Model families

Written by `make docs` from rlvid/models/families. `model_type` is that of a checkpoint's config.json. All families can
be trained whole and by LoRA, with one forward of a prompt that responses share, and be merged (`rlvid merge`). Every
job takes every family; where vLLM does not serve a model, transformers generates, batch after batch. `make
test-families` trains each for two steps of `sft`, `dpo` and `grpo`.

| model_type | models | media | frames | generates with |
|---|---|---|---|---|
"""


def table() -> str:
    rows = []
    for name, family in FAMILIES.items():
        media = ", ".join([*(f"{kind}s" for kind in sorted(family.placeholders, reverse=True)), "text"])
        size = "of one size" if issubclass(family, SquareFrames) else "of any size" if family.placeholders else "-"
        engine = "vLLM" if family.vllm_module else "transformers (slow)"
        rows.append(f"| `{name}` | {NAMES[name]} | {media} | {size} | {engine} |\n")
    return HEAD + "".join(rows)


def main() -> None:
    if "--check" not in sys.argv:
        FILE.write_text(table())
    elif not FILE.exists() or FILE.read_text() != table():
        sys.exit("docs/families.md is not that of the code: run make docs")


if __name__ == "__main__":
    main()
