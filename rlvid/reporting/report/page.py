"""Makes `report.html`: one page with the result, the curves, the latest rollouts with their frames, and the config.

The page loads nothing: images are inline, curves are SVG, and it has no script (its content security policy would block
one). All text from data and models is escaped. This module selects the content, `charts.py` draws the curves, and
`report.html.j2` is the layout.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from rlvid.errors import UserError
from rlvid.files import write_atomic
from rlvid.reporting import metric_names, rollout_tables
from rlvid.reporting.metric_names import Chart
from rlvid.reporting.report import charts
from rlvid.reporting.run_folder import RunFolder

_MAX_GROUPS = 24
_OPEN_GROUPS = 6
_MAX_FRAMES = 16
_MAX_BAD_CLIPS = 200
_MAX_OTHER = 40  # charts of metrics that have no place of their own
_LONG_TEXT = 600  # characters of a response; more are folded
_MAX_ROWS = 2000  # of metrics: a curve has 300 points, and a page of 100,000 rows took 9 s

_JOB_NAMES = {
    "grpo": "GRPO",
    "sft": "Supervised fine-tuning",
    "dpo": "Preference optimisation",
    "isrt": "Self-judgement",
    "reward-model": "Reward model",
    "eval": "Evaluation",
    "audit": "Audit",
}
_PLANNED = {"isrt": ("Iterations", "isrt", "iterations")}  # (label, section and key of the number); others count steps
_FORMS = {"percent": charts.percent, "seconds": charts.seconds}  # of curves; the other forms are plain numbers
Rows = Mapping[int, Mapping[str, float]]  # step -> metrics


def write_report(folder: RunFolder) -> Path:
    """Write `report.html` from the files of the run folder and return its path. The job may still be running.

    Raises:
        UserError: the folder is not a run folder, or one of its files is broken.
    """
    if not folder.is_run:
        raise UserError(f"{folder.dir} is not a run folder: it has no {folder.config_file.name}")
    write_page(folder.report_file, "report.html.j2", _page(folder))
    return folder.report_file


def write_page(file: Path, template: str, content: Mapping[str, Any]) -> None:
    """Write a page atomically. All text of `content` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = charts.number
    write_atomic(file, environment.get_template(template).render(content).encode("utf-8", "replace"))


def _printable(value: Any) -> Any:
    """Replace control characters: HTML does not allow them, and a parser may drop or reinterpret them."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else "\ufffd" for c in value)
    return value


def _page(folder: RunFolder) -> dict[str, Any]:
    rows = folder.read_metrics(_MAX_ROWS)
    warm = _by_step([row for row in rows if row.get("phase") == "warm_start"])
    train = _by_step([row for row in rows if row.get("phase") != "warm_start"])
    manifest, config = folder.manifest(), folder.config()
    bad_clips = folder.read_bad_clips()
    steps = rollout_tables.steps(folder.dir)
    job = manifest.get("job", "run")
    return {
        "name": folder.name,
        "job": _JOB_NAMES.get(job, job),
        "facts": _facts(manifest, config),
        "tiles": _tiles(rows, train, job, config, len(bad_clips)),
        "evaluation": _evaluation(train, job) or _evaluation(warm, job),
        "sections": _sections(train, warm),
        "has_rows": bool(rows),
        "rollouts": _rollouts(folder, steps[-1]) if steps else None,
        "bad_clips": bad_clips[:_MAX_BAD_CLIPS],
        "n_bad_clips": len(bad_clips),
        "config_text": folder.config_file.read_text(encoding="utf-8", errors="replace"),
        "details": _details(manifest),
    }


def _by_step(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Finite numbers by step. Rows of the same step (training and evaluation) are merged; the later value is used."""
    by_step: dict[int, dict[str, float]] = {}
    for row in rows:
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
        by_step.setdefault(int(row.get("step") or 0), {}).update(numbers)
    return dict(sorted(by_step.items()))


# --- headline ---------------------------------------------------------------------------------------------------------


def _facts(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, data = config.get("model") or {}, config.get("data") or {}
    commit = str(manifest.get("git_commit") or "")
    n_resumed = len(manifest.get("resumed", ()))
    facts = [
        ("model", Path(model.get("path") or "").name or ("tiny, made for this run" if model.get("tiny") else "")),
        ("data", data.get("train") or ("synthetic clips" if data.get("synthetic") else "")),
        ("seed", str(manifest.get("seed", ""))),
        ("started", manifest.get("started", "").replace("T", " ").replace("+00:00", " UTC")),
        ("resumed", f"{n_resumed} ×" if n_resumed else ""),
        ("commit", commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")),
    ]
    return [(label, value) for label, value in facts if value]


def _tiles(
    rows: Sequence[Mapping[str, Any]], train: Rows, job: str, config: Mapping[str, Any], n_bad: int
) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the small numbers below the headline."""
    tiles: list[tuple[str, str, str]] = []
    if train:
        label, section, key = _PLANNED.get(job, ("Steps", "train", "steps"))
        planned = config.get(section, {}).get(key, 0)
        tiles.append((label, str(max(train)), f"of {planned} planned" if planned > max(train) else ""))
    if times := [float(row["time_s"]) for row in rows if "time_s" in row]:
        tiles.append(("Duration", duration(max(times)), ""))
    if rewards := [row["reward/mean"] for row in train.values() if "reward/mean" in row]:
        n = max(1, len(rewards) // 10)
        remark = f"from {charts.number(fmean(rewards[:n]))}" + (f"; mean of {n} steps" if n > 1 else "")
        tiles.append(("Reward", charts.number(fmean(rewards[-n:])), remark))
    if speeds := [row["samples_per_s"] for row in train.values() if "samples_per_s" in row]:
        tiles.append(("Samples per second", charts.number(fmean(speeds)), "mean over steps"))
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


def _evaluation(rows: Rows, job: str) -> dict[str, Any] | None:
    """First and last evaluation, in percent (correlations x 100); compared only if their numbers of samples agree."""
    name = next((name for name in metric_names.HEADLINES if any(name in row for row in rows.values())), "")
    found = [(step, row) for step, row in rows.items() if name in row]
    if not found:
        return None
    (first_step, first), (last_step, last) = found[0], found[-1]
    is_share = metric_names.metric_of(name).form == "percent"
    scale = 100.0 if is_share else 1.0
    is_comparable = len(found) > 1 and first.get("eval/n") == last.get("eval/n")
    points = scale * (last[name] - first[name])
    kinds = [key for key in last if key.startswith(f"{name}/")]
    compared = first if is_comparable else {}
    return {
        "title": metric_names.HEADLINE_TITLES.get((job, name), "Greedy accuracy"),
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
        "kinds": [  # (kind, before or None, after)
            (key.removeprefix(f"{name}/"), scale * compared[key] if key in compared else None, scale * last[key])
            for key in kinds
        ],
    }


# --- curves -----------------------------------------------------------------------------------------------------------


def _sections(train: Rows, warm: Rows) -> list[dict[str, Any]]:
    """Sections of the page with their charts; metrics that are in no chart are last, folded."""
    drawn: set[str] = set(metric_names.NO_CHART)
    found = []
    for title, charts_of_section in metric_names.CHARTS.items():
        cards = [_card(chart, train, drawn) for chart in charts_of_section]
        if title == "Learning":
            cards += [_card(chart, warm, set(metric_names.NO_CHART)) for chart in metric_names.WARM_START_CHARTS]
        found.append({"title": title, "cards": [*filter(None, cards)], "is_folded": False})
    others = sorted({key for row in train.values() for key in row} - drawn)[:_MAX_OTHER]
    cards = [_card(Chart((key,)), train, set()) for key in others]
    found.append({"title": "Other metrics", "cards": cards, "is_folded": True})
    return [section for section in found if section["cards"]]


def _card(chart: Chart, rows: Rows, drawn: set[str]) -> dict[str, Any] | None:
    """A chart with its legend; None if no row has its metrics. Adds the metrics that it shows to `drawn`."""
    known = dict.fromkeys(key for row in rows.values() for key in row if key not in drawn)
    matches = [k for key in chart.keys for k in known if (k.startswith(key[:-1]) if key.endswith("*") else k == key)]
    keys = list(dict.fromkeys(matches))
    if not keys:
        return None
    drawn |= set(keys)
    metrics = [metric_names.metric_of(key) for key in keys]
    title, form = chart.title or metrics[0].title, _FORMS.get(chart.form or metrics[0].form, charts.number)
    series = [
        charts.Series(
            metric.series or _series_name(chart, key),
            [(float(step), row[key]) for step, row in rows.items() if key in row],
            has_dots=key.startswith("eval/"),
            is_noisy=not (key.startswith("eval/") or metric.is_exact),
        )
        for key, metric in zip(keys, metrics, strict=True)
    ]
    if chart.is_stacked:
        picture = charts.stacked_chart(title, series, form)
    else:
        bounds = (0.0, 1.0) if form is charts.percent and "accuracy" in keys[0] else None
        picture = charts.line_chart(title, series, form, bounds, chart.allow_log)
    is_smoothed = not chart.is_stacked and max(map(charts.smoothing_window, series)) > 1
    shown = charts.percent_precise if form is charts.percent else form
    return {
        "title": title,
        "unit": metrics[0].unit,
        "note": "bold: moving mean" if is_smoothed else "",
        "legend": [(index % 6, s.name, shown(s.points[-1][1])) for index, s in enumerate(series)],
        "has_names": len(series) > 1 or any(key.endswith("*") for key in chart.keys) or bool(metrics[0].series),
        "picture": picture,
    }


def _series_name(chart: Chart, key: str) -> str:
    prefixes = [pattern[:-1] for pattern in chart.keys if pattern.endswith("*") and key.startswith(pattern[:-1])]
    return key.removeprefix(prefixes[0]) if prefixes else key.split("/")[-1]


# --- rollouts ---------------------------------------------------------------------------------------------------------


def _rollouts(folder: RunFolder, step: int) -> dict[str, Any]:
    rows, frames = rollout_tables.read(folder.dir, step)
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["sample_id"], []).append(row)
    largest = max((abs(row["advantage"]) for row in rows if math.isfinite(row["advantage"])), default=0.0)
    groups = [_group(members, frames.get(sample_id, []), largest) for sample_id, members in grouped.items()]
    groups.sort(key=lambda group: not group["is_mixed"])  # stable sort: groups with a gradient first
    shown = groups[:_MAX_GROUPS]
    return {"step": step, "n_groups": len(groups), "open": shown[:_OPEN_GROUPS], "folded": shown[_OPEN_GROUPS:]}


def _group(rows: list[dict[str, Any]], frames: Sequence[bytes], largest: float) -> dict[str, Any]:
    """The sample, as each of its rows has it, and its responses."""
    valid = [row["reward_total"] for row in rows if row["reward_total"] is not None]
    shown = np.linspace(0, len(frames) - 1, min(len(frames), _MAX_FRAMES)).round().astype(int).tolist()
    return rows[0] | {
        "frames": [(index + 1, data_address(frames[index])) for index in shown],
        "n_frames": len(frames),
        "mean_reward": fmean(valid) if valid else None,
        "is_mixed": len(set(valid)) > 1,
        "responses": [_response(row, largest) for row in sorted(rows, key=lambda row: row["group_index"])],
    }


def _response(row: dict[str, Any], largest: float) -> dict[str, Any]:
    """A row of the rollout table, as it is shown. `largest` is the advantage whose bar is the longest."""
    advantage = row["advantage"] if math.isfinite(row["advantage"]) else 0.0
    cut = len(row["response"]) if len(row["response"]) <= _LONG_TEXT else _LONG_TEXT * 2 // 3
    return row | {
        "head": row["response"][:cut],
        "tail": row["response"][cut:],
        "parts": _parts(row["reward_parts"]),
        "advantage": advantage,
        "bar": round(50 * abs(advantage) / largest, 1) if largest else 0.0,
        "weights": _weights(row["weight_versions"]),
    }


def _parts(text: str) -> list[tuple[str, str]]:
    try:
        parts = json.loads(text).items()
    except (ValueError, AttributeError):
        return [("unreadable", text)]
    return [(name, charts.number(v) if isinstance(v, int | float) else str(v)) for name, v in parts]


def _weights(text: str) -> str:
    """[[11, 0, 5], [12, 5, 9]] -> "weights 11 to token 5, 12 to token 9"."""
    try:
        spans = [(int(version), int(end)) for version, _, end in json.loads(text)]
    except (ValueError, TypeError):
        return f"weights {text}"
    if len({version for version, _ in spans}) == 1:
        return f"weights {spans[0][0]}"
    return "weights " + (", ".join(f"{version} to token {end}" for version, end in spans) or "unknown")


def data_address(picture: bytes) -> str | None:
    """The picture as an address; None if the bytes are not an image."""
    for signature, kind in ((b"\xff\xd8\xff", "jpeg"), (b"\x89PNG\r\n\x1a\n", "png")):
        if picture.startswith(signature):
            return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"
    return None


# --- details ----------------------------------------------------------------------------------------------------------


def _details(manifest: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Tables of `run.json`: versions, hashes, prompt templates, and other entries."""
    rest = {key.replace("_", " "): value for key, value in manifest.items() if not isinstance(value, dict | list)}
    tables = [(key.replace("_", " "), value) for key, value in manifest.items() if isinstance(value, dict)]
    return [("run", rest), *tables]
