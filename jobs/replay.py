"""`rlvid replay`: trains steps of a run again from their dumps, without engines, and says what differs.

It needs the checkpoint before the first step, and dumps (`run.dump_every`). In the run folder it writes logs only.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import ray

from actors.actor_process import start_ray
from actors.roles import Roles
from jobs.specs import JOBS
from jobs.update import UPDATES
from rlvid.config.load import load_config
from rlvid.errors import UserError
from rlvid.reporting.run_folder import RunFolder
from rlvid.training.dumps import load_dump


def replay(run_dir: Path, first: int, count: int) -> None:
    """Train steps `first` to `first + count - 1` again; prints each metric that the run logged beside the new value.

    Raises:
        UserError: the run has no such dump or checkpoint.
    """
    folder = RunFolder(run_dir)
    job = str(folder.manifest().get("job"))
    if job not in UPDATES:
        raise UserError(f"{run_dir} is a run of rlvid {job}: only {' and '.join(UPDATES)} have steps to replay")
    cfg = load_config(JOBS[job].config, run_dir / "config.yaml", [])
    checkpoint = run_dir / "checkpoints" / f"step_{first - 1}"
    if not checkpoint.is_dir():
        there = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
        raise UserError(
            f"{checkpoint} is missing, the state before step {first}; there are {', '.join(there) or 'none'}"
        )
    experiences = [load_dump(folder.dump_dir(step)) for step in range(first, first + count)]
    rows = {row["step"]: row for row in folder.read_metrics() if "phase" not in row and "reward/mean" in row}
    model = cfg.model.path or run_dir / "model"
    start_ray()
    try:
        with Roles(model, cfg, ("trainer",), run_dir / "logs" / "replay") as roles:
            roles.trainer.wait_ready()
            roles.trainer.load(checkpoint.resolve())
            update = UPDATES[job](cfg, roles.trainer)
            for step, experience in zip(range(first, first + count), experiences, strict=True):
                prompts = [replace(p, prompt=ray.put(p.prompt)) for p in experience.prompts]
                _, stats = update(step - 1, replace(experience, prompts=prompts))
                print(f"step {step}{'metric':>32}{'in the run':>14}{'again':>14}{'difference':>14}")
                for name, value in stats.items():
                    logged = rows.get(step, {}).get(name)  # null where it was not finite
                    before = float("nan") if logged is None else logged
                    print(f"{name:>{len(f'step {step}') + 32}}{before:14.6g}{value:14.6g}{value - before:14.3g}")
    finally:
        ray.shutdown()


def main(arguments: argparse.Namespace) -> None:
    replay(arguments.run_dir, arguments.step, arguments.count)
