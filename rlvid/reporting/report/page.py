"""Makes `report.html`: one page with the result, the curves, the latest rollouts with their frames, and the config.

The page loads nothing: images are inline, curves are SVG, and it has no script (its content security policy would block
one). All text from data and models is escaped. This module selects the content, `curves.py` makes the charts, and
`report.html.j2` is the layout.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rlvid.errors import UserError
from rlvid.files import write_atomic
from rlvid.reporting.metric_names import HEADLINE_TITLES, HEADLINES, METRICS
from rlvid.reporting.report import charts
from rlvid.reporting.report.curves import Rows, sections
from rlvid.reporting.run_folder import RunFolder

_MAX_GROUPS = 24
_OPEN_GROUPS = 6
_MAX_FRAMES = 16
_MAX_BAD_CLIPS = 200
_LONG_TEXT = 600  # characters of a response; more are folded

_JOB_NAMES = {
    "grpo": "GRPO",
    "sft": "Supervised fine-tuning",
    "dpo": "Preference optimisation",
    "isrt": "Self-judgement",
    "reward-model": "Reward model",
    "eval": "Evaluation",
}
# (label, section and key of the number); other jobs count steps
PLANNED = {"isrt": ("Iterations", "isrt", "iterations")}
MAX_ROWS = 2000  # of metrics: a curve has 300 points, and a page of 100,000 rows took 9 s


def write_report(folder: RunFolder) -> Path:
    """Write `report.html` from the files of the run folder and return its path. The job may still be running.

    Raises:
        UserError: the folder is not a run folder, or one of its files is broken.
    """
    if not folder.is_run:
        raise UserError(f"{folder.dir} is not a run folder: it has no {folder.config_file.name}")
    html = template("report.html.j2").render(_page(folder))
    write_atomic(folder.report_file, html.encode("utf-8", "replace"))
    return folder.report_file


def template(name: str) -> jinja2.Template:
    """Load a page template from the folder of this file, with autoescape."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": charts.percent_precise, "number": charts.number}
    return environment.get_template(name)


def _printable(value: Any) -> Any:
    """Replace control characters: HTML does not allow them, and a parser may drop or reinterpret them."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else "\ufffd" for c in value)
    return value


def _page(folder: RunFolder) -> dict[str, Any]:
    rows = folder.read_metrics(MAX_ROWS)
    warm = _by_step([row for row in rows if row.get("phase") == "warm_start"])
    train = _by_step([row for row in rows if row.get("phase") != "warm_start"])
    manifest, config = folder.manifest(), folder.config()
    bad_clips = folder.read_bad_clips()
    steps = folder.rollout_steps()
    return {
        "name": folder.name,
        "job": _JOB_NAMES.get(manifest.get("job", ""), manifest.get("job", "run")),
        "manifest": manifest,
        "facts": _facts(manifest, config),
        "tiles": _tiles(rows, train, manifest, config, len(bad_clips)),
        "evaluation": _evaluation(train, manifest) or _evaluation(warm, manifest),
        "sections": sections(train, warm),
        "has_rows": bool(rows),
        "rollouts": _rollouts(folder, steps[-1]) if steps else None,
        "bad_clips": bad_clips[:_MAX_BAD_CLIPS],
        "n_bad_clips": len(bad_clips),
        "config_text": folder.config_file.read_text(encoding="utf-8", errors="replace"),
        "details": _details(manifest),
    }


# --- headline ---------------------------------------------------------------------------------------------------------


def _by_step(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Finite numbers by step. Rows of the same step (training and evaluation) are merged; the later value is used."""
    by_step: dict[int, dict[str, float]] = {}
    for row in rows:
        numbers = {
            key: float(value)
            for key, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        by_step.setdefault(int(row.get("step") or 0), {}).update(numbers)
    return dict(sorted(by_step.items()))


def _facts(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    model = config.get("model") or {}
    tiny = model.get("tiny") if isinstance(model, dict) else None
    name = Path(str(model["path"])).name if isinstance(model, dict) and model.get("path") else ""
    data = config.get("data") or {}
    source = data.get("train") if isinstance(data, dict) else None
    commit = manifest.get("git_commit")
    facts = [
        ("model", name or ("tiny, made for this run" if tiny else "")),
        (
            "data",
            str(source) if source else "synthetic clips" if isinstance(data, dict) and data.get("synthetic") else "",
        ),
        ("seed", str(manifest.get("seed", ""))),
        ("started", str(manifest.get("started", "")).replace("T", " ").replace("+00:00", " UTC")),
        ("resumed", f"{n} ×" if (n := len(manifest.get("resumed") or [])) else ""),
        ("commit", str(commit)[:10] + ("-dirty" if str(commit).endswith("-dirty") else "") if commit else ""),
    ]
    return [(label, value) for label, value in facts if value]


def _tiles(
    rows: Sequence[Mapping[str, Any]], train: Rows, manifest: Mapping[str, Any], config: Mapping[str, Any], n_bad: int
) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the small numbers below the headline."""
    tiles: list[tuple[str, str, str]] = []
    if train:
        label, section, key = PLANNED.get(manifest.get("job", ""), ("Steps", "train", "steps"))
        planned = config[section].get(key) if isinstance(config.get(section), dict) else None
        tiles.append((label, str(max(train)), f"of {planned} planned" if planned and planned > max(train) else ""))
    times = [float(row["time_s"]) for row in rows if isinstance(row.get("time_s"), int | float)]
    if times:
        tiles.append(("Duration", duration(max(times)), ""))
    rewards = [row["reward/mean"] for row in train.values() if "reward/mean" in row]
    if rewards:
        n = max(1, len(rewards) // 10)
        first, last = sum(rewards[:n]) / n, sum(rewards[-n:]) / n
        remark = f"from {charts.number(first)}" + (f"; mean of {n} steps" if n > 1 else "")
        tiles.append(("Reward", charts.number(last), remark))
    speeds = [row["samples_per_s"] for row in train.values() if "samples_per_s" in row]
    if speeds:
        tiles.append(("Samples per second", charts.number(sum(speeds) / len(speeds)), "mean over steps"))
    if n_bad:
        tiles.append(("Bad clips", str(n_bad), "skipped, listed below"))
    return tiles


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _evaluation(rows: Rows, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """First and last evaluation, in percent (correlations x 100); compared only if their numbers of samples agree."""
    name = next((name for name in HEADLINES if any(name in row for row in rows.values())), "")
    found = [(step, row) for step, row in rows.items() if name in row]
    if not found:
        return None
    (first_step, first), (last_step, last) = found[0], found[-1]
    is_share = METRICS[name].form == "percent"
    scale = 100.0 if is_share else 1.0
    kinds = [key for key in last if key.startswith(f"{name}/")]
    is_comparable = len(found) > 1 and first.get("eval/n") == last.get("eval/n")
    points = scale * (last[name] - first[name])
    return {
        "title": HEADLINE_TITLES.get((manifest.get("job", ""), name), "Greedy accuracy"),
        "suffix": "%" if is_share else "",
        "before": scale * first[name] if len(found) > 1 else None,
        "before_step": first_step,
        "before_n": first.get("eval/n"),
        "after": scale * last[name],
        "after_step": last_step,
        "n": last.get("eval/n"),
        "is_comparable": is_comparable,
        "points": points,
        "trend": "" if abs(points) < 0.05 else "up" if points > 0 else "down",
        "kinds": [
            (
                key.removeprefix(f"{name}/"),
                scale * first[key] if is_comparable and key in first else None,
                scale * last[key],
            )
            for key in kinds
        ],
    }


# --- rollouts ---------------------------------------------------------------------------------------------------------


def _rollouts(folder: RunFolder, step: int) -> dict[str, Any]:
    rows, frames = folder.read_rollouts(step)
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["sample_id"], []).append(row)
    largest = max((abs(row["advantage"]) for row in rows if math.isfinite(row["advantage"])), default=0.0)
    groups = [_group(sample_id, members, frames.get(sample_id, []), largest) for sample_id, members in grouped.items()]
    groups.sort(key=lambda group: not group["is_mixed"])  # stable sort: groups with a gradient first
    shown = groups[:_MAX_GROUPS]
    return {
        "step": step,
        "n_groups": len(groups),
        "n_shown": len(shown),
        "open": shown[:_OPEN_GROUPS],
        "folded": shown[_OPEN_GROUPS:],
    }


def _group(sample_id: str, rows: list[dict[str, Any]], frames: Sequence[bytes], largest: float) -> dict[str, Any]:
    valid = [row["reward_total"] for row in rows if row["reward_total"] is not None]
    rows = sorted(rows, key=lambda row: row["group_index"])
    return {
        "sample_id": sample_id,
        "question": rows[0]["question"],
        "answer": rows[0]["answer"],
        "frames": _pictures(frames),
        "n_frames": len(frames),
        "mean_reward": sum(valid) / len(valid) if valid else None,
        "is_mixed": len(set(valid)) > 1,
        "responses": [_response(row, largest) for row in rows],
    }


def _response(row: Mapping[str, Any], largest: float) -> dict[str, Any]:
    advantage = row["advantage"] if math.isfinite(row["advantage"]) else 0.0
    text: str = row["response"]
    return {
        "head": text if len(text) <= _LONG_TEXT else text[: _LONG_TEXT * 2 // 3],
        "tail": "" if len(text) <= _LONG_TEXT else text[_LONG_TEXT * 2 // 3 :],
        "total": row["reward_total"],
        "parts": _parts(row["reward_parts"]),
        "invalid_reason": row["invalid_reason"],
        "advantage": advantage,
        "bar": round(50 * abs(advantage) / largest, 1) if largest else 0.0,
        "n_tokens": row["n_tokens"],
        "finish_reason": row["finish_reason"],
        "weights": _weights(row["weight_versions"]),
        "logprob_mean": row["logprob_mean"],
    }


def _parts(text: str) -> list[tuple[str, str]]:
    try:
        parts = json.loads(text)
    except ValueError:
        return [("unreadable", text)]
    if not isinstance(parts, dict):
        return [("unreadable", text)]
    return [(name, charts.number(v) if isinstance(v, int | float) else str(v)) for name, v in parts.items()]


def _weights(text: str) -> str:
    """[[11, 0, 5], [12, 5, 9]] -> "weights 11 to token 5, 12 to token 9"."""
    try:
        spans = [(int(version), int(end)) for version, _, end in json.loads(text)]
    except (ValueError, TypeError):
        return f"weights {text}"
    if len({version for version, _ in spans}) == 1:
        return f"weights {spans[0][0]}"
    return "weights " + (", ".join(f"{version} to token {end}" for version, end in spans) or "unknown")


def _pictures(frames: Sequence[bytes]) -> list[tuple[int, str | None]]:
    """(frame number from 1, data URL or None if the bytes are not an image), at most `_MAX_FRAMES`."""
    n = min(len(frames), _MAX_FRAMES)
    indices = [round(i * (len(frames) - 1) / (n - 1)) for i in range(n)] if n > 1 else list(range(n))
    return [(index + 1, _data_address(frames[index])) for index in indices]


def _data_address(picture: bytes) -> str | None:
    for signature, kind in ((b"\xff\xd8\xff", "jpeg"), (b"\x89PNG\r\n\x1a\n", "png")):
        if picture.startswith(signature):
            return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"
    return None


# --- details ----------------------------------------------------------------------------------------------------------


def _details(manifest: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Tables of `run.json`: versions, hashes, prompt templates, and other entries."""
    tables = []
    rest: list[tuple[str, str]] = []
    for key, value in manifest.items():
        if isinstance(value, dict):
            tables.append((key.replace("_", " "), [(str(k), str(v)) for k, v in value.items()]))
        elif not isinstance(value, list):
            rest.append((key.replace("_", " "), str(value)))
    return [("run", rest), *tables]
