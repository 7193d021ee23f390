"""What the benchmarks share: alternating rounds, medians, and a last line of JSON.

Two busy cores are noisy: only ratios of contestants that alternate in one process are reliable.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping

Contestants = Mapping[str, Callable[[], object]]


def in_turns(contestants: Contestants, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Wall seconds of each contestant in each round; A B C, A B C, ... so that drift affects all equally."""
    return _measure(contestants, rounds, warmup, time.perf_counter)


def cpu_in_turns(contestants: Contestants, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """CPU seconds (all threads of this process) of each contestant in each round."""
    return _measure(contestants, rounds, warmup, time.process_time)


def _measure(contestants: Contestants, rounds: int, warmup: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(warmup + rounds):
        for name, run in contestants.items():
            gc.collect()
            begin = clock()
            run()
            if i >= warmup:
                seconds[name].append(clock() - begin)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios of the rounds, so that a slow round does not matter."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def require_trl() -> None:
    """Exit with the command that installs TRL, where it is missing."""
    if importlib.util.find_spec("trl") is None:
        sys.exit("this benchmark compares rlvid with TRL, which is not installed: .venv/bin/python -m pip install trl")


def machine() -> str:
    """Processor and number of cores, for the table in docs/performance.md."""
    model = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores"


def finish(result: Mapping[str, float | int | str | None]) -> None:
    """Print the result as the last line, JSON, floats rounded to four significant digits."""
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}
    print(json.dumps(rounded), flush=True)
