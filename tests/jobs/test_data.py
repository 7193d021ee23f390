"""`rlvid data convert` and `rlvid synth` as a person calls them."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jobs.cli import main
from rlvid.data.dialects import DIALECTS
from rlvid.data.dialects.dialect import Dialect, Item, Roots, Row
from rlvid.data.manifest import load_manifest
from rlvid.synthetic.moving_shapes import write_mp4


@pytest.fixture
def items(tmp_path: Path) -> Path:
    """One item of LLaVA-Hound and its video."""
    write_mp4(tmp_path / "v.mp4", np.zeros((4, 32, 32, 3), dtype=np.uint8), 8)
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"id": 1, "video": "v", "prompt": "What?", "chosen": "A dog.", "rejected": "A cat."}))
    return path


def test_a_dialect_can_be_added_from_outside(
    items: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(item: Item, roots: Roots) -> Row:
        return {"video": roots.find(f"{item['video']}.mp4"), "question": item["prompt"], "answer": item["chosen"]}

    monkeypatch.setitem(DIALECTS, "mine", Dialect(read, "mine alone", lambda item: "prompt" in item))
    out = items.parent / "out"
    assert main(["data", "convert", str(items), str(out), "--from", "mine"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}/manifest.jsonl: 1 rows",
        f"its videos are elsewhere: set data.root={items.parent}",
    ]
    [sample] = load_manifest(out / "manifest.jsonl", items.parent, None, "")
    assert (sample.media[0].path, sample.question, sample.answer) == (str(items.parent / "v.mp4"), "What?", "A dog.")
    with pytest.raises(SystemExit):
        main(["data", "convert", "--help"])
    assert "mine alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--map", "x"], "--map x: expected OLD=NEW"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--source", "real"], "--source real: expected one of none in this dialect"),
        (["--mismatched", "0.5"], "--mismatched: this dialect has no rows"),
    ],
)
def test_wrong_options_are_the_users_errors(
    items: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "convert", str(items), str(items.parent / "out"), "--from", "hound", *arguments]) == 2
    assert message in capsys.readouterr().err and not (items.parent / "out").exists()


@pytest.mark.parametrize("command", ["synth", "data"])
def test_an_out_that_cannot_be_written_is_named(items: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(out: Path) -> str:
        convert = ["data", "convert", str(items), str(out), "--from", "hound"]
        assert main(["synth", str(out), "--train", "1", "--eval", "1"] if command == "synth" else convert) == 2
        return capsys.readouterr().err

    (items.parent / "file").touch()
    for out in (items.parent / "file", items.parent / "file" / "below"):
        error = run(out)
        assert f"set {out}: " in error and "name another folder" in error


@pytest.mark.parametrize("command", ["synth", "convert"])
def test_a_full_disk_is_named(items: Path, command: str) -> None:
    """A limit on the size of files fails as a full disk does: in the middle of a write."""
    item = json.loads(items.read_text().splitlines()[0])
    items.write_text("".join(json.dumps({**item, "id": str(i)}) + "\n" for i in range(50)))
    out = items.parent / "out"
    arguments = {
        "synth": ["synth", str(out), "--train", "1", "--eval", "1", "--size", "448"],
        "convert": ["data", "convert", str(items), str(out), "--from", "hound"],
    }[command]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments], preexec_fn=limit, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr and f"set {out}: File too large" in done.stderr


def test_synth_prints_the_files_of_both_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", str(tmp_path), "--train", "1", "--eval", "1", "--kinds", "colour"]) == 0
    names = ("train.jsonl", "train_pairs.jsonl", "eval.jsonl", "eval_pairs.jsonl")
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]


def test_a_wrong_size_names_its_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", str(tmp_path / "out"), "--size", "31"]) == 2
    assert "--size" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_check_writes_a_page_with_faults_and_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mp4(tmp_path / "v.mp4", np.full((8, 64, 64, 3), 120, dtype=np.uint8), 8)
    rows = [
        {
            "id": "seen",
            "video": "v.mp4",
            "question": "What <b>moves</b>?",
            "answer": "a square",
            "problem_type": "shape",
        },
        {"id": "gone", "video": "w.mp4", "question": "Which?", "answer": "none", "problem_type": "shape"},
        {"id": "told", "question": "Why?", "answer": ""},
    ]
    manifest, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(manifest), "--page", str(page)]) == 1
    assert f"{page}: examples with their frames" in capsys.readouterr().out
    html = page.read_text()
    assert html.count("data:image/jpeg;base64,") == 6 and "What &lt;b&gt;moves&lt;/b&gt;?" in html
    assert "there is no file" in html and "missing media: <b>1</b>" in html and "empty answers: <b>1</b>" in html
    assert "rows.jsonl, shape, video" in html and "rows.jsonl, text" in html
