"""MMLA's tables, and the faults of its published prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlvid.data.dialects import DIALECTS
from rlvid.data.dialects.conversion import convert
from rlvid.data.dialects.dialect import Roots
from rlvid.data.dialects.mmla import TASKS, dataset_of, label_faults, prompt
from rlvid.errors import UserError

REAL = Path(__file__).parents[4] / "shared" / "data" / "mmla"


def table(folder: Path, dataset: str, text: str) -> Path:
    file = folder / dataset / "dev.tsv"
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")
    return file


def rows_of(file: Path, dialect: str = "mmla") -> tuple[list[dict[str, str]], list[str]]:
    out = file.parent / "out"
    convert(file, out, DIALECTS[dialect], Roots())
    rows, refused = (
        [json.loads(line) for line in (out / n).read_text().splitlines()] for n in ("manifest.jsonl", "refused.jsonl")
    )
    return rows, [row["reason"] for row in refused]


def test_a_table_is_read_by_the_names_of_its_columns(tmp_path: Path) -> None:
    text = 'more\tutterance\tID\tid\temotion\n0\tSaid "so".\tx\t1_0\tjoy\n0\t你好\tx\t1_1\tSadness\n'
    text += "0\tOh\tx\t1_2\tblue\n0\tA\n"
    file = table(tmp_path, "MELD", text)
    (file.parent / "video").mkdir()
    for name in ("MELD_1_0", "MELD_1_1"):
        (file.parent / "video" / f"{name}.mp4").touch()
    rows, refused = rows_of(file)
    assert [(row["id"], row["answer"], row["text"]) for row in rows] == [
        ("MELD_1_0", "emotion: joy", 'Said "so".'),
        ("MELD_1_1", "emotion: sadness", "你好"),
    ]
    assert rows[0]["video"].endswith("MELD/video/MELD_1_0.mp4") and rows[0]["problem_type"] == "MELD"
    assert "label 'blue' is none of neutral, surprise" in refused[0] and "number of columns" in refused[1]
    text_rows, _ = rows_of(file, "mmla_text")
    assert "video" not in text_rows[0] and text_rows[0]["question"].startswith('The speaker says: Said "so". Based on')


def test_sets_without_video_and_other_names(tmp_path: Path) -> None:
    rows, _ = rows_of(table(tmp_path, "MOSI", "id\ttext\tlabel\na$_$1\tFine.\tpositive\n"))
    assert "video" not in rows[0] and rows[0]["id"] == "MOSI_a$_$1"
    assert [dataset_of(name) for name in ("CH-SIMSv2.0", "UR-FUNNY-v2", "mustard", "other")] == [
        "Ch-sims",
        "UR-FUNNY",
        "MUStARD",
        None,
    ]
    with pytest.raises(UserError, match="its folder is not named after a data set of MMLA"):
        rows_of(table(tmp_path, "other", "id\ttext\tlabel\n1\ta\tjoy\n"))


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data/mmla is not on this machine")
def test_the_prompt_is_that_of_the_published_training_files() -> None:
    item = json.loads((REAL / "llamafactory_MUStARD_dev_speaking_style.json").read_text())[0]
    published = item["conversations"][0]["value"].removeprefix("<video>")
    said = published.partition("the speaker says: ")[2].partition(" Based on")[0]
    assert prompt(TASKS["MUStARD"], said, sees_video=True) == published


def test_faults_of_labels() -> None:
    def faults(labels: str, answer: str) -> list[str]:
        return label_faults(f"The candidate labels for emotion are: [{labels}]. Respond.", answer)

    assert faults("joy, ask for help", "emotion: ask for help") == []
    assert faults("joy, fear", "emotion: Joy") == ["labels that differ from the candidates by case"]
    assert faults("'joy', 'fear'", "emotion: Joy") == [
        "candidate labels in quotes, as a Python list",
        "labels that differ from the candidates by case",
    ]
    assert faults("joyfear", "emotion: fear") == ["candidate labels without separators"]
    assert faults("joy, fear", "emotion: anger") == ["labels that are none of the candidates"]
    assert faults("joy, fear", "intent: joy") == ["answers that name another task than their prompt"]
    assert label_faults("What?", "x") == []
