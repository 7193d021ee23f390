"""The config of `rlvid tune`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from rlvid.config.section import InputFile, LocalPath, Section


class SpaceConfig(Section):
    """The distribution that a hyperparameter is drawn from: exactly one of these."""

    uniform: tuple[float, float] | None = None
    """Uniform between two numbers."""
    loguniform: tuple[float, float] | None = None
    """Uniform between the logarithms of two positive numbers."""
    randint: tuple[int, int] | None = None
    """A whole number from the first up to, but not including, the second."""
    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """One of these values."""
    grid: tuple[Any, ...] | None = Field(None, min_length=1)
    """Each of these values. Several grids are crossed; `trials` says how often the whole grid is repeated."""

    @property
    def given(self) -> dict[str, tuple[Any, ...]]:
        """The distribution by its name."""
        return {name: value for name, value in self if value is not None}

    def faults(self) -> Iterator[str]:
        if len(self.given) != 1:
            yield f"give exactly one of uniform, loguniform, randint, choice, grid; got {sorted(self.given)}"
        ((name, value),) = self.given.items()
        if any(isinstance(item, float) and not math.isfinite(item) for item in value):
            yield f"{name} must have finite numbers, got {value}"
        if name in ("uniform", "loguniform", "randint") and value[0] >= value[1]:
            yield f"{name}: {value[0]} is not below {value[1]}"
        if name == "loguniform" and value[0] <= 0:
            yield "loguniform needs positive numbers"


class TuneJobConfig(Section):
    """`rlvid tune`: Ray Tune over any job's config."""

    seed: int = Field(0, ge=0)
    """Seed of the search. The trials' seed is a key of the job's config."""
    dir: LocalPath = Path("runs/tune")
    """Folder of the sweep: trials, their run folders, sweep.html, best.yaml. The same command resumes the sweep."""
    job: Literal["grpo", "ppo", "sft", "dpo", "isrt", "reward-model"]
    """What a trial runs."""
    config: InputFile
    """The job's config file."""
    overrides: tuple[str, ...] = ()
    """Overrides for all trials, key.sub=value."""
    space: dict[str, SpaceConfig]
    """Keys of the job's config, each with its distribution: train.lr: {loguniform: [1e-7, 1e-5]}."""
    metric: str = "eval/accuracy"
    """Name in metrics.jsonl that trials are compared by. A trial is compared each time the metric is logged."""
    mode: Literal["max", "min"] = "max"
    """Whether a larger or a smaller metric is better."""
    trials: int = Field(8, ge=1)
    """Number of trials."""
    parallel: int = Field(1, ge=1)
    """Trials at a time. Each has placement groups of its own; trials wait while the cluster has no room for them."""
    search: Literal["random", "optuna"] = "random"
    """random: random values, and grids. optuna: Optuna's tree-structured Parzen estimator."""
    scheduler: Literal["none", "asha", "pbt"] = "asha"
    """asha: stops the worst trials at each rung (arXiv 1810.05934). pbt: weak trials copy the weights of strong ones,
    and their values with changes (arXiv 1711.09846). none: all trials run to their end."""
    grace_steps: int = Field(10, ge=1)
    """asha: first step at which a trial may be stopped. pbt: steps between two changes. A step is that of the job's
    metrics; for isrt it is an iteration."""
    reduction_factor: float = Field(2.0, gt=1)
    """asha: one in this number of the trials continues after a rung, and each rung is this many times as far as the
    previous one."""

    needs: ClassVar = {"grace_steps": ("scheduler", "asha", "pbt"), "reduction_factor": ("scheduler", "asha")}

    def faults(self) -> Iterator[str]:
        if self.job == "isrt" and self.scheduler == "pbt":
            yield "scheduler=pbt copies checkpoints between steps, job=isrt has none: use asha or none"
        if not self.space:
            yield "space is empty: give at least one key of the job and its distribution"
        fixed = {override.split("=")[0] for override in self.overrides}
        for key in sorted(fixed & self.space.keys()):
            yield f"{key} is in overrides and in space: remove one"
        if "run.dir" in fixed | self.space.keys():
            yield "run.dir: the sweep sets the run folders of its trials; set dir, the folder of the sweep"
        for key in (key for key, space in self.space.items() if space.grid is not None):
            if self.search == "optuna":
                yield f"space.{key}: search=optuna has no grid, use choice"
            if self.scheduler == "pbt":
                yield f"space.{key}: scheduler=pbt has no grid, use choice"
