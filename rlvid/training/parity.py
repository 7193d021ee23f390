"""What the parity check concludes from log-probs of engine and trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.15}  # of one token's log-prob; bfloat16 keeps 8 bits
# A side that does not see the video computes the very same numbers for other frames; this is room for rounding.
BLIND_BELOW = {"float32": 1e-5, "bfloat16": 1e-3}


@dataclass(frozen=True)
class Observation:
    """One prompt, answered by the engine and scored by both."""

    name: str
    engine: npt.NDArray[np.float32]  # [tokens] log-probs
    trainer: npt.NDArray[np.float32]  # [tokens]
    engine_change: float  # largest change of a first token's log-prob when the frames change
    trainer_change: float

    @property
    def gap(self) -> float:
        return float(np.abs(self.engine - self.trainer).max())


def verdict(observations: Sequence[Observation], dtype: str) -> list[str]:
    """What is wrong, one line each; empty when engine and trainer agree and both see the video."""
    problems, tolerance = [], TOLERANCE[dtype]
    for o in observations:
        blind = [
            side
            for side, change in (("engine", o.engine_change), ("trainer", o.trainer_change))
            if change < BLIND_BELOW[dtype]
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
