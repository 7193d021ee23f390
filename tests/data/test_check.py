"""`rlvid data check` on the real files of MMLA, and every fault planted in a file of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cli import main
from rlvid.data.check import Report, check
from rlvid.data.dialects.dialect import Roots
from rlvid.synthetic.moving_shapes import write_mp4

REAL = Path(__file__).parents[3] / "shared" / "data" / "mmla"
ROWS = {
    "llamafactory_AnnoMi-therapist_dev_communication_behavior.json.gz": 472,
    "llamafactory_Ch-sims_dev_sentiment.json.gz": 647,
    "llamafactory_MUStARD_dev_speaking_style.json": 138,
    "llamafactory_MUStARD_dev_text_speaking_style.json": 138,
    "swift_AnnoMi-client_dev.jsonl.gz": 461,
    "swift_AnnoMi-client_test.jsonl.gz": 1129,
    "swift_AnnoMi-client_train.jsonl.gz": 3123,
    "swift_AnnoMi-therapist_dev.jsonl.gz": 472,
    "swift_AnnoMi-therapist_test.jsonl.gz": 1140,
    "swift_AnnoMi-therapist_train.jsonl.gz": 3161,
    "swift_Ch-sims_dev.jsonl.gz": 644,
    "swift_Ch-sims_test.jsonl.gz": 1031,
    "swift_Ch-sims_train.jsonl.gz": 2713,
    "swift_Instruct_test_dev.jsonl": 30,
    "swift_Instruct_test_train.jsonl": 50,
    "swift_MELD-DA_dev.jsonl.gz": 999,
    "swift_MELD-DA_test.jsonl.gz": 1998,
    "swift_MELD_dev.jsonl.gz": 1109,
    "swift_MELD_test.jsonl.gz": 2610,
    "swift_MIntRec2.0_dev.jsonl.gz": 1106,
    "swift_MUStARD_dev.jsonl.gz": 138,
    "swift_MUStARD_test.jsonl": 138,
    "swift_MUStARD_train.jsonl.gz": 414,
    "videollama2_MUStARD_train_speaking_style.json.gz": 414,
}
real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data/mmla is not on this machine")


def faults_of(*names: str) -> Report:
    return check([REAL / name for name in names], None, Roots())


@real
@pytest.mark.parametrize("name", ROWS)
def test_all_rows_of_a_real_file_are_read(name: str) -> None:
    report = check([REAL / name], "sharegpt" if "_text_" in name else None, Roots())
    assert report.counts["rows"] == ROWS[name] and "rows that cannot be used" not in report.faults
    kind = "rows of text" if "_text_" in name else "rows with videos"
    assert report.counts[kind] == ROWS[name]


@real
def test_the_known_faults_of_the_real_files_are_named() -> None:
    client = faults_of("swift_AnnoMi-client_dev.jsonl.gz", "swift_AnnoMi-client_test.jsonl.gz")
    assert len(client.faults["blank lines"]) == 1 and len(client.faults["missing media"]) == 461 + 1129
    (names,) = client.faults["one set of labels under several names of its task"]
    assert "'talk_type'" in names and "'communication_behavior'" in names
    therapist = faults_of("swift_AnnoMi-therapist_train.jsonl.gz")
    assert len(therapist.faults["candidate labels without separators"]) == 3161
    instruct = faults_of("swift_Instruct_test_dev.jsonl")
    assert len(instruct.faults["candidate labels in quotes, as a Python list"]) == 30
    assert instruct.faults["labels that differ from the candidates by case"]
    acts = faults_of("swift_MELD-DA_dev.jsonl.gz", "swift_MELD-DA_test.jsonl.gz")
    (folders,) = acts.faults["files of one task with media in different folders"]
    assert "/MELD/video" in folders and "/MELD-DA/video" in folders
    styles = faults_of("swift_MUStARD_dev.jsonl.gz", "llamafactory_MUStARD_dev_speaking_style.json")
    (names,) = styles.faults["one set of labels under several names of its task"]
    assert "'speaking_style'" in names and "'speaking style'" in names


ROW = {"id": "1", "video": "a.mp4", "question": "What?", "answer": "x"}


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


def test_every_planted_fault_is_named_with_file_and_row(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", np.zeros((4, 32, 32, 3), dtype=np.uint8), 8)
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:400])
    train = write(
        tmp_path / "train.jsonl",
        ROW,
        {**ROW, "question": "And then?"},
        "\n",
        {**ROW, "id": "2", "question": "Where?", "answer": ""},
        {**ROW, "id": "3", "question": "<video> and <video>?"},
        {**ROW, "id": "4", "video": "gone.mp4"},
        {**ROW, "id": "5", "video": "broken.mp4"},
        {**ROW, "id": "6", "video": None, "question": "A question alone?"},
        "{\n",
        {
            "id": "7",
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 1,
            "answer": "x",
        },
    )
    held_out = write(tmp_path / "eval.jsonl", {**ROW, "id": "9", "question": "WHAT?"})
    report = check([train, held_out], None, Roots(), decodes=True)
    assert report.counts["rows"] == 10 and report.counts["rows of text"] == 1
    found = {
        name: [line.replace(f"{tmp_path}/", "") for line in lines] for name, lines in report.faults.items() if lines
    }
    assert found["duplicate ids"] == ["train.jsonl:2: '1' is that of train.jsonl:1"]
    assert found["blank lines"] == ["before train.jsonl:4"]
    assert found["empty answers"] == ["train.jsonl:4"]
    unusable = found["rows that cannot be used"]
    assert [line.split(":")[1] for line in unusable] == ["5", "9", "10"]
    assert "more <video> than the row has media" in unusable[0] and "not valid JSON" in unusable[1]
    assert found["missing media"] == ["train.jsonl:6: there is no file gone.mp4"]
    assert found["rows in two files"] == ["eval.jsonl:1: the same media and question as train.jsonl:1"]
    assert len(found["media that cannot be decoded"]) == 1 and "broken.mp4" in found["media that cannot be decoded"][0]
    assert len(found) == 7


def test_the_command_prints_counts_faults_and_a_last_line_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "good.jsonl", {**ROW, "video": None})
    assert main(["data", "check", str(good)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"rows": 1, "faults": {}}
    bad = write(tmp_path / "bad.jsonl", *({**ROW, "id": str(i)} for i in range(5)))
    assert main(["data", "check", str(good), str(bad)]) == 1
    out = capsys.readouterr().out
    assert "... and 2 more" in out
    faults = {"missing media": 5, "duplicate rows": 4}
    assert json.loads(out.splitlines()[-1])["faults"] == faults
    (tmp_path / "below").mkdir()
    assert main(["data", "check", str(tmp_path / "below" / ".." / "bad.jsonl")]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["faults"] == faults
    unclear = write(tmp_path / "unclear.jsonl", {"a": 1})
    assert main(["data", "check", str(unclear)]) == 2
    assert "it is not clear which dialect this is; name it: --from" in capsys.readouterr().err
