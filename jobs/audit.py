"""`rlvid data audit`: which rows of a manifest are answered right without their video, from one frame, or whatever the
order of the frames, and which are near copies of others."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.roles import Roles
from jobs.evaluate import VIDEO, generators, held_out, read_ahead
from jobs.inputs import Inputs, open_job
from jobs.run import Run
from rlvid.config import AuditJobConfig
from rlvid.data.items import Refused, read_items
from rlvid.errors import UserError
from rlvid.evaluation.audit import MARKS, duplicates, mark_of, signature
from rlvid.evaluation.benchmarks.held_out import HeldOut
from rlvid.evaluation.metrics import mean
from rlvid.evaluation.predictions import Prediction
from rlvid.files import RowFile, write_rows
from rlvid.models.families.views import View
from rlvid.reporting.report.evaluation import Shown, write_evaluation_page
from rlvid.rollout.engine import Sampling
from rlvid.types import Sample

VIEWS: tuple[View | None, ...] = (None, "blank", "one_frame", "first_frame", "shuffled", "reversed")
MOST_OTHERS = 200  # answers to other rows that a row is compared with, about
SHOWN = 8  # rows of each mark on the page
COPY, UNREADABLE = "duplicate", "unreadable"


def run(cfg: AuditJobConfig) -> dict[str, Any]:
    """Audit `data.eval` by the answers of `model.path`."""
    with open_job(cfg, "audit") as (run, inputs):
        if not inputs.held_out:
            raise UserError("data.eval is empty: give the manifest to audit, data.eval=train.jsonl for example")
        samples = inputs.held_out[: cfg.evaluate.max_samples]
        if cfg.audit.write is not None:
            _check_place(cfg)
        with generators(run, inputs.model) as roles, run.stage("audit"):
            shares = {str(view or VIDEO): _shares(cfg, run, inputs, roles, samples, view) for view in VIEWS}
        usual = _usual(held_out(inputs, samples), RowFile(run.folder.predictions_file(0, "blank")))
        strips = inputs.clips.strips([sample for sample in samples if sample.media])
        copies = duplicates(samples, {name: signature(frames) for name, frames in strips.items() if frames})
        rows = []
        for sample in samples:
            own = {view: found[sample.id] for view, found in shares.items() if sample.id in found}
            mark = mark_of(own, cfg.audit.right_from, usual.get(sample.id, 0.0)) if VIDEO in own else UNREADABLE
            about = {"duplicate_of": copies.get(sample.id), "blank_usual": usual.get(sample.id)}
            rows.append({"id": sample.id, "mark": mark, **about, **own})
        write_rows(run.folder.dir / "audit.jsonl", rows)
        counts = {str(mark): sum(row["mark"] == mark for row in rows) for mark in MARKS}
        counts[COPY] = len(copies)
        _write_page(run, samples, rows, strips)
        kept = _write_kept(cfg, rows) if cfg.audit.write is not None else len(rows)
        whole = {f"accuracy_{view}": mean(found.values()) for view, found in shares.items()}
        run.log(0, {f"audit/{name}": value for name, value in {**counts, **whole}.items()})
        return {**counts, "rows": len(rows), "kept": kept, "page": str(run.folder.evaluation_page), **run.ending()}


def _shares(
    cfg: AuditJobConfig, run: Run, inputs: Inputs, roles: Roles, samples: Sequence[Sample], view: View | None
) -> dict[str, float]:
    """The share of right answers in a view, by sample id; of those that could be answered and scored."""
    sampling = Sampling(cfg.audit.samples, cfg.audit.temperature, cfg.rollout.max_tokens, seed=cfg.seed, view=view)
    file = RowFile(run.folder.predictions_file(0, view))
    missing = set(file.missing([sample.id for sample in samples]))
    asked, size = [sample for sample in samples if sample.id in missing], cfg.evaluate.batch_size
    for prompts in read_ahead(inputs.clips, (asked[i : i + size] for i in range(0, len(asked), size))):
        prompts, groups = inputs.clips.answered(prompts, roles.fleet.generate(prompts, sampling))
        pairs = zip(prompts, groups, strict=True)
        file.append([{"id": p.sample.id, "texts": [r.text for r in group]} for p, group in pairs])
    benchmark, found = held_out(inputs, samples), {}
    for sample in samples:
        if sample.id in file:
            verdicts = [_is_right(benchmark, sample, text) for text in file[sample.id]["texts"]]
            if known := [verdict for verdict in verdicts if verdict is not None]:
                found[sample.id] = mean(known)
    return found


def _usual(benchmark: HeldOut, blank: RowFile) -> dict[str, float]:
    """The share of the answers to other rows of a row's problem type, without their video, that would be right here."""
    said: dict[str | None, list[tuple[str, str]]] = defaultdict(list)
    for sample in benchmark.samples:
        if sample.id in blank:
            said[sample.problem_type] += [(sample.id, text) for text in blank[sample.id]["texts"]]
    found = {}
    for sample in benchmark.samples:
        others = [text for name, text in said[sample.problem_type] if name != sample.id]
        counts = Counter(others[:: max(1, len(others) // MOST_OTHERS)])
        right = sum(n for text, n in counts.items() if _is_right(benchmark, sample, text))
        found[sample.id] = right / counts.total() if counts else 0.0
    return found


def _is_right(benchmark: HeldOut, sample: Sample, text: str) -> bool | None:
    return benchmark.parse(sample, Prediction(text, len(text.split()), "stop")).is_right


def _write_page(
    run: Run, samples: Sequence[Sample], rows: Sequence[Mapping[str, Any]], strips: Mapping[str, list[bytes]]
) -> None:
    """Shares of marks by problem type, and rows of each mark with their frames."""
    total = Counter(sample.problem_type or "all" for sample in samples)
    marked = Counter((row["mark"], s.problem_type or "all") for s, row in zip(samples, rows, strict=True))
    metrics = {f"{mark}/{kind}": marked[mark, kind] / n for kind, n in total.items() for mark in MARKS}
    metrics |= {f"rows/{kind}": n for kind, n in total.items()}
    metrics |= {str(mark): sum(row["mark"] == mark for row in rows) / len(rows) for mark in MARKS}
    shown, taken = [], Counter[str]()
    order = (*MARKS, UNREADABLE)
    for sample, row in sorted(zip(samples, rows, strict=True), key=lambda pair: order.index(pair[1]["mark"])):
        taken[row["mark"]] += 1
        if taken[row["mark"]] <= SHOWN:
            views = ", ".join(f"{view} {row[view]:.2f}" for view in map(str, (VIDEO, *VIEWS[1:])) if view in row)
            copy = f"; near copy of {row['duplicate_of']}" if row["duplicate_of"] else ""
            turns = [(message.role, message.text) for message in sample.messages]
            about, frames = row["mark"] + copy, strips.get(sample.id, ())
            shown.append(Shown(sample.id, turns, sample.answer, f"right: {views}", None, frames, about))
    write_evaluation_page(run.folder.evaluation_page, f"audit of {run.folder.name}", metrics, [], shown)


def _check_place(cfg: AuditJobConfig) -> None:
    """
    Raises:
        UserError: the filtered manifest would not find its media, or its rows cannot be copied.
    """
    data, out = cfg.data, cfg.audit.write
    assert out is not None
    if data.eval is None or data.mix or data.dialect is not None:
        raise UserError("audit.write copies rows of the manifest data.eval: convert it first (rlvid data convert)")
    if data.root is None and out.absolute().parent != data.eval.absolute().parent:
        raise UserError(
            f"audit.write={out}: relative paths start at the manifest's folder; write it beside {data.eval}, or set "
            f"data.root"
        )


def _write_kept(cfg: AuditJobConfig, rows: Sequence[Mapping[str, Any]]) -> int:
    """Write the rows of the manifest that stay; returns their number."""
    assert cfg.audit.write is not None and cfg.data.eval is not None
    dropped = {row["id"] for row in rows if row["mark"] in cfg.audit.drop}
    if COPY in cfg.audit.drop:
        dropped |= {row["id"] for row in rows if row["duplicate_of"]}
    known = {row["id"] for row in rows} - dropped
    items = [item for _, item in read_items(cfg.data.eval) if not isinstance(item, Refused)]
    kept = [item for item in items if str(item.get("id")) in known]
    out: Path = cfg.audit.write
    write_rows(out, kept)
    return len(kept)
