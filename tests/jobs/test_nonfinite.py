"""A run whose loss is not finite says so, stops with an error, and exports nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs.runs import LIMIT_S, metrics_of, start


@pytest.mark.engine
@pytest.mark.timeout(1800)
def test_a_run_that_diverges_stops_with_an_error_and_exports_nothing(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
model: {{tiny: {{layers: 1, vision_layers: 1}}}}
data: {{synthetic: {{train: 8, eval: 1}}, cache_dir: {tmp_path}/cache}}
video: {{height: 56, width: 56}}
run: {{dir: {tmp_path}/run, wandb: disabled, checkpoint_every: 100}}
train: {{steps: 20, batch_size: 4, lr: 1.0e+30, max_skipped: 2}}
placement: {{threads: 1, encoders: 1}}
rollout: {{max_tokens: 4, max_model_len: 512}}
"""
    )
    process = start("sft", config)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2, out + err
    assert "2 steps in a row were skipped" in err and "Resume the run with a smaller train.lr" in err
    assert "was skipped, loss or gradient was not finite" in out
    rows = metrics_of(tmp_path / "run")
    assert [row["train/skipped"] for row in rows if "train/skipped" in row] == [0.0, 1.0]
    assert not (tmp_path / "run" / "policy").exists()
    assert not any((tmp_path / "run").glob("checkpoints/step_*"))
