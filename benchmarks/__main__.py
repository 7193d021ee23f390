"""`python -m benchmarks [NAME ...]`: run the benchmarks one after another and write their figures and the
machine into docs/performance.md. Without names, all of them are run.

Figures of benchmarks that are not run do not change; those of a benchmark that fails are removed. The exit code is 1 if
a benchmark fails or a figure misses its bound.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import machine

PAGE = Path("docs/performance.md")
FIGURES = Path("benchmarks/figures.json")  # the last figures of each benchmark, so that one can be run alone
BEGIN, END = "<!-- figures: written by `make bench` -->", "<!-- end of figures -->"

# The bounds of figures. Figures without a bound are in the table too.
BOUNDS: dict[str, dict[str, tuple[str, float]]] = {
    "shared_prefix": {
        "ratio_300": (">=", 3),
        "ratio_1000": (">=", 5),
        "max_logprob_diff": ("<=", 1e-5),
        "grad_rel_diff": ("<=", 1e-5),
    },
    "grpo_vs_trl": {"ratio_short": (">=", 1), "ratio_long": (">=", 4), "first_loss_diff": ("<=", 1e-5)},
    "weight_sync": {"memcpy_ratio_50m": (">=", 0.25), "memcpy_ratio_200m": (">=", 0.25), "calls_per_bucket": ("<=", 1)},
    "video_read": {"worst_ratio": ("<=", 1.15), "wrong_frames": ("<=", 0)},
    "memory": {"demo_peak_gib": ("<=", 8), "bytes_per_prompt_ratio": ("<=", 1.1), "stream_peak_gib": ("<=", 1)},
    "dpo_vs_trl": {"loss_diff": ("<=", 1e-5), "ratio_long": (">=", 2)},
    "videoscore_learns": {
        "spearman_regression": (">=", 0.8),
        "spearman_generation": (">=", 0.7),
        "prompt_swap_share": (">=", 0.8),
        "seconds": ("<=", 600),
    },
    "isrt": {"gain_points": (">=", 10), "length_ratio": ("<=", 1.1)},
    "demo_seeds": {"min_after": (">=", 0.9), "min_gain": (">=", 0.2), "max_seconds": ("<=", 420)},
    "trainer_memory": {
        "peak_ratio_g64_g1": ("<=", 1.1),
        "peak_ratio_ckpt": ("<=", 0.35),
        "mask_growth_4k_32k": ("<=", 10),
        "grad_rel_diff": ("<=", 1e-5),
        "load_bytes_ratio": ("<=", 1.3),
        "export_bytes_ratio": ("<=", 1.3),
    },
    "critic": {
        "ratio_shared_trunk": ("<=", 1.15),
        "ratio_own_critic": ("<=", 2.0),
        "max_value_diff": ("<=", 1e-5),
        "grad_rel_diff": ("<=", 1e-5),
    },
    "temporal": {"ratio": ("<=", 1.1), "max_diff": ("<=", 1e-5), "accuracy_ordered": (">=", 0.9)},
    "overlap": {"time_ratio": ("<=", 0.7), "max_staleness": ("<=", 1)},
    "resume": {"max_loss_diff": ("<=", 0)},
    "faults": {"samples_lost": ("<=", 0), "samples_doubled": ("<=", 0), "weights_equal": (">=", 1)},
    "algorithms": {"min_gain": (">=", 0.15)},
    "sft_vs_trl": {"ratio_questions": (">=", 2), "ratio_videos": (">=", 1), "loss_diff": ("<=", 1e-5)},
    "sft_learns": {"gain_points": (">=", 30), "packed_loss_diff": ("<=", 1e-5), "merged_diff": ("<=", 1e-5)},
    "driver": {"samples_per_s": (">=", 2000), "growth_64": ("<=", 1.5)},
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BOUNDS))
    names = parser.parse_args().names or list(BOUNDS)
    if unknown := set(names) - set(BOUNDS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(BOUNDS)}")
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    failed = False
    for name in names:
        print(f"--- {name}", flush=True)
        begin = time.monotonic()
        figures[name] = run(name)
        print(f"--- {name}: {time.monotonic() - begin:.0f} s", flush=True)
        missed = [key for key in figures[name] if is_missed(name, key, figures[name][key])]
        for key in missed:
            print(f"--- {name}: {key}={figures[name][key]} misses its bound", flush=True)
        failed |= not figures[name] or bool(missed)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(figures)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return int(failed)


def run(name: str) -> dict[str, float | str]:
    """Run a benchmark; return the JSON of its last line and the machine. Empty if it failed."""
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line
    return {**json.loads(last), "machine": machine()} if process.returncode == 0 else {}


def is_missed(name: str, key: str, value: float | str) -> bool:
    """True if a figure has a bound and misses it."""
    if key not in BOUNDS[name]:
        return False
    sign, bound = BOUNDS[name][key]
    return float(value) < bound if sign == ">=" else float(value) > bound


def table(figures: dict[str, dict[str, float | str]]) -> str:
    """Markdown table with one row per figure and its bound."""
    lines = ["| benchmark | figure | value | bound | machine |", "|---|---|---|---|---|"]
    for name, bounds in BOUNDS.items():
        for key, value in figures.get(name, {}).items():
            if key == "machine":
                continue
            sign, bound = bounds.get(key, ("", ""))
            shown = f"{value:g}" if isinstance(value, int | float) else str(value)
            shown += " (missed)" if is_missed(name, key, value) else ""
            lines.append(f"| {name} | `{key}` | {shown} | {sign} {bound} | {figures[name]['machine']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
