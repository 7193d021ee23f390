"""What the parity check concludes from log-probs of engine and trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.15}  # of one token's log-prob; bfloat16 keeps 8 bits


@dataclass(frozen=True)
class Observation:
    """One prompt, answered by the engine and scored by both."""

    name: str
    engine: npt.NDArray[np.float32]  # [tokens] log-probs
    trainer: npt.NDArray[np.float32]  # [tokens]
    engine_change: float  # of the first token's log-prob when the frames change
    trainer_change: float  # largest change of a log-prob when the frames change

    @property
    def gap(self) -> float:
        return float(np.abs(self.engine - self.trainer).max())


def verdict(observations: Sequence[Observation], tolerance: float) -> list[str]:
    """What is wrong, one line each; empty when engine and trainer agree and both see the video."""
    problems = []
    for o in observations:
        blind = [
            side
            for side, change in (("engine", o.engine_change), ("trainer", o.trainer_change))
            if change < tolerance / 2
        ]
        problems += [f"{o.name}: the {side} does not see the video: other frames, same log-probs" for side in blind]
        if not np.isfinite(o.gap) or o.gap > tolerance:
            where = int(np.argmax(np.abs(o.engine - o.trainer)))
            problems.append(
                f"{o.name}: log-probs of engine and trainer differ by {o.gap:.2g} (at most {tolerance:g}), most at "
                f"response "
                f"token {where}: {o.engine[where]:.5f} and {o.trainer[where]:.5f}"
            )
    return problems
