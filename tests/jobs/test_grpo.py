"""Complete runs as a user starts them: real clips, Ctrl-C, kill -9."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs.runs import LIMIT_S, finish, metrics_of, start, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

SMALL = """
model: {{tiny: {{layers: 1, vision_layers: 1}}}}
data: {data}
run: {{wandb: disabled, checkpoint_every: 1, log_rollouts_every: 1}}
rollout: {{max_tokens: 4, max_model_len: 2048, max_sequences: 32}}
train: {{steps: {steps}, batch_size: 4, lr: 1.0e-4}}
grpo: {{group_size: 2}}
evaluate: {{every: 100}}
video: {video}
placement: {{threads: 1}}
"""


def test_real_clips_of_which_some_are_bad(real_clips: Path, tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    shutil.copytree(real_clips, clips)
    clips.chmod(0o755)
    shutil.copy(real_clips.parent / "decode_edge_cases" / "corrupted.mp4", clips / "corrupted.mp4")
    names = [*sorted(p.name for p in real_clips.iterdir()), "corrupted.mp4", "missing.mp4"]
    rows = [{"id": name, "video": f"clips/{name}", "question": "What is seen?", "answer": "people"} for name in names]
    (tmp_path / "real.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "config.yaml"
    data = f"{{train: {tmp_path}/real.jsonl, cache_dir: {tmp_path}/cache}}"
    config.write_text(SMALL.format(data=data, steps=3, video="{frames: 8, max_pixels: 25088}"))

    first = tmp_path / "first"
    result = finish(start("grpo", config, f"run.dir={first}", "train.batch_size=10"))
    assert result["steps"] == 3 and Path(result["report"]).is_file()
    bad = {
        Path(row["path"]).name: row["reason"]
        for row in map(json.loads, (first / "bad_clips.jsonl").read_text().splitlines())
    }
    assert set(bad) == {"corrupted.mp4", "missing.mp4"} and all(bad.values())
    last = metrics_of(first)[-1]
    assert last["video/decodes"] == 8 and last["video/cache_hits"] > 0
    page = (first / "report.html").read_text()
    assert "corrupted.mp4" in page and "data:image/jpeg;base64" in page

    # Adapters, with a reference and old log-probs; and a folder that has the run of another config.
    second = tmp_path / "second"
    lora = (f"run.dir={second}", "train.batch_size=10", "train.steps=1", "model.lora={rank: 4}")
    lora += ("grpo.kl_coef=0.1", "grpo.old_logprobs=trainer")
    finish(start("grpo", config, *lora))
    assert metrics_of(second)[-1]["video/decodes"] == 0  # all from the first run's cache
    assert (second / "policy" / "adapter" / "adapter_model.safetensors").is_file()
    (step,) = (row for row in metrics_of(second) if "policy/kl" in row)
    assert step["policy/logprob_gap"] < 1e-4 and step["policy/kl"] == pytest.approx(0.0, abs=1e-9)
    process = start("grpo", config, *lora, "grpo.group_size=4")
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2
    assert "grpo.group_size" in err and "Traceback" not in err


@pytest.mark.slow
def test_run_resumes_after_ctrl_c_in_warm_start_and_training_and_after_kill_9(tmp_path: Path) -> None:
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    data = f"{{synthetic: {{train: 12, eval: 6}}, cache_dir: {tmp_path}/cache}}"
    config.write_text(SMALL.format(data=data, steps=400, video="{height: 56, width: 56}"))
    arguments = (
        f"run.dir={run}",
        "warm_start.steps=40",
        "warm_start.batch_size=4",
        "grpo.kl_coef=0.05",
        "grpo.epochs=2",
    )

    def newest() -> int:
        # not those that are being written, or replaced
        return max((int(p.name.split("_")[1]) for p in run.glob("checkpoints/step_*") if not p.suffix), default=-1)

    def interrupt_when(condition: Callable[[], bool]) -> str:
        process = start("grpo", config, *arguments)
        wait_for(condition, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 130, out + err
        assert "resumes after step" in err and "Traceback" not in out + err
        return out

    interrupt_when(lambda: (run / "metrics.jsonl").exists() and len(metrics_of(run)) > 2)
    warmed = len(metrics_of(run))
    assert newest() == 0 and warmed < 40, "not interrupted within the warm start"
    out = interrupt_when(lambda: newest() >= 2)
    assert f"resuming after step {warmed} of the warm start" in out
    stopped = newest()
    assert metrics_of(run)[-1]["step"] == stopped  # Ctrl-C saved the step it waited for
    seen = {(r.get("phase"), r["step"]): r for r in metrics_of(run)}

    process = start("grpo", config, *arguments)
    wait_for(lambda: newest() >= stopped + 2, process)
    process.kill()  # kill -9
    process.communicate(timeout=60)
    killed = newest()

    result = finish(start("grpo", config, *arguments, f"train.steps={killed + 2}"))
    assert result["steps"] == killed + 2
    rows = [r for r in metrics_of(run) if "reward/mean" in r]
    assert [r["step"] for r in rows] == list(range(1, killed + 3))  # each step once
    assert all(rows[i]["reward/mean"] == seen[(None, i + 1)]["reward/mean"] for i in range(stopped))
    assert rows[-1]["video/decodes"] == 18 and all("policy/kl" in r for r in rows)
    assert [r["step"] for r in metrics_of(run) if r.get("phase") == "warm_start"] == list(range(1, 41))
    assert (run / "policy" / "model.safetensors").is_file()
    assert newest() == killed + 2
