"""What all families share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlvid.models.families import load_family


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "idefics2", "video_llava", "qwen3"])
def test_the_opening_is_the_text_of_the_response_that_the_template_writes(
    tiny_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    """Fault 14: templates of thinking models end the prompt with <think>."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_models[family], folder)
    template = load_family(folder).chat_template
    assert load_family(folder).opening == ""
    for path in folder.glob("chat_template*"):
        path.unlink()
    for tail in ("<think>\n", "<think>\n\n</think>\n\n"):
        head, end = template.rsplit("{% endif %}", 1)
        (folder / "chat_template.jinja").write_text(f"{head}{tail}{{% endif %}}{end}")
        assert load_family(folder).opening == tail
