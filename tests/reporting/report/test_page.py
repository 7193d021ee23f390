from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlvid.config import GrpoJobConfig
from rlvid.errors import BadClip, UserError
from rlvid.reporting import rollout_tables
from rlvid.reporting.report.charts import Series, line_chart
from rlvid.reporting.report.page import write_report
from rlvid.reporting.run_folder import RunFolder

JPEG = b"\xff\xd8\xff\xe0 picture"
PNG = b"\x89PNG\r\n\x1a\n picture"
HOSTILE = "<script>alert('x')</script>\"'><img src=http://evil/x onerror=alert(1)>"
_VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Text, elements and addresses of a page; fails on tags that are not closed in their order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.style = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.pieces))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def assert_loads_nothing(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {
            "script",
            "link",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "audio",
            "video",
            "source",
            "use",
        }
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "action", "poster", "srcset", "data", "background"}:
                assert value is not None and value.startswith(("data:image/", "#")), (tag, name, value)
            assert name == "content" or "url(" not in (value or "")
    assert "url(" not in page.style and "@import" not in page.style
    policies = [
        a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1 and "default-src 'none'" in (policies[0] or "")


def start(tmp_path: Path, name: str = "demo", **sections: Any) -> RunFolder:
    base: dict[str, Any] = {"model": {"tiny": {}}, "data": {"synthetic": {}}, "seed": 7}
    folder = RunFolder(tmp_path / name)
    with folder.start(GrpoJobConfig.model_validate(base | sections), "grpo"):
        pass
    return folder


def row(**changes: Any) -> dict[str, Any]:
    base = {
        "step": 40,
        "sample_id": "clip-1",
        "group_index": 0,
        "question": "Which shape is moving?",
        "answer": "triangle",
        "response": "square",
        "reward_total": 0.25,
        "reward_parts": json.dumps({"exact": 0.0, "length": 0.25}),
        "invalid_reason": None,
        "advantage": -0.77,
        "n_tokens": 2,
        "finish_reason": "stop",
        "weight_versions": "[[39, 0, 2]]",
        "logprob_mean": -0.042,
    }
    return base | changes


def full_run(tmp_path: Path) -> RunFolder:
    folder = start(tmp_path)
    for step in (1, 2):
        folder.append_metrics({"step": step, "time_s": step, "phase": "warm_start", "warm_start/loss": 3.0 / step})
    folder.append_metrics({"step": 0, "time_s": 3, "eval/accuracy": 0.5, "eval/n": 256, "eval/accuracy/count": 0.25})
    for step in range(1, 41):
        folder.append_metrics(
            {
                "step": step,
                "time_s": 3 + 10 * step,
                "reward/mean": step / 40,
                "reward/exact": step / 40,
                "train/accuracy": step / 40,
                "policy/kl": None,
                "policy/logprob_gap": 1e-5,
                "groups/zero_variance": 0.5,
                "response/length": 2.0,
                "time/generate": 2.0,
                "time/train": 3.0,
                "time/step": 5.0,
                "samples_per_s": 50.0,
                "video/decodes": 1024,
                "fleet/restarts": 0,
            }
        )
    folder.append_metrics(
        {"step": 40, "time_s": 410, "eval/accuracy": 0.9375, "eval/n": 256, "eval/accuracy/count": 0.875}
    )
    folder.append_bad_clip(BadClip("clips/broken.mp4", "no video stream"), "clip-9")
    rollout_tables.write(
        folder.dir,
        40,
        [
            row(),
            row(
                group_index=1,
                response="triangle",
                reward_total=1.0,
                advantage=0.77,
                weight_versions="[[38,0,1],[39,1,2]]",
            ),
            row(
                group_index=2,
                reward_total=None,
                invalid_reason="judge: no answer in 30 s",
                reward_parts="{}",
                advantage=0.0,
            ),
            row(sample_id="clip-2", response="", advantage=0.0),
        ],
        {"clip-1": [JPEG, PNG, b"GIF89a"], "clip-2": [JPEG] * 40},
    )
    return folder


def read(folder: RunFolder) -> Page:
    path = write_report(folder)
    assert path == folder.dir / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert_loads_nothing(page)
    return page


def test_full_run_shows_result_curves_and_rollouts(tmp_path: Path) -> None:
    page = read(full_run(tmp_path))
    for expected in (
        "demo",
        "Greedy accuracy on 256 held-out samples 50.0% → 93.8%",
        "+43.8 points",
        "from step 0 to step 40",
        "count 25 → 87.5 %",
        "Steps40of 100 planned",
        "6 min 50 s",
        "Warm start: loss",
        "Seconds per stage",
        "generate 2 s",
        "Other metrics 1",
        "step 40, 2 of 2 prompts",
        "Which shape is moving?",
        "right answer triangle",
        "exact 0 length 0.25",
        "−0.77",
        "+0.77",
        "weights 39 ·",
        "weights 38 to token 1, 39 to token 2",
        "no reward: judge: no answer in 30 s",
        "empty response",
        "no variance",
        "clips/broken.mp4",
        "no video stream",
        "kl_estimator: k3",
        "no picture",
    ):
        assert expected in page.text, expected
    assert "KL to the reference" not in page.text  # only nulls were logged


def test_frames_are_inline_and_limited(tmp_path: Path) -> None:
    page = read(full_run(tmp_path))
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert pictures[0] == "data:image/jpeg;base64," + base64.b64encode(JPEG).decode()
    assert pictures[1] == "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert len(pictures) == 2 + 16
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert alts[2] == "frame 1 of 40" and alts[-1] == "frame 40 of 40"


def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    folder = start(
        tmp_path, name="<b>&demo", data={"synthetic": {}, "suffix": HOSTILE, "system_prompt": "</pre>" + HOSTILE}
    )
    folder.record(model={HOSTILE: HOSTILE}, note=HOSTILE)
    folder.append_metrics({"step": 1, "time_s": 1, f"reward/{HOSTILE}": 0.5, HOSTILE: 1.0})
    folder.append_metrics({"step": 1, "time_s": 1, "eval/accuracy": 0.5, "eval/n": 1, f"eval/accuracy/{HOSTILE}": 0.5})
    folder.append_bad_clip(BadClip(HOSTILE, HOSTILE), HOSTILE)
    hostile = row(
        step=1,
        sample_id=HOSTILE,
        question=HOSTILE,
        answer=HOSTILE,
        response=HOSTILE,
        reward_parts=json.dumps({HOSTILE: HOSTILE}),
        finish_reason=HOSTILE,
        weight_versions=HOSTILE,
    )
    long = hostile | {"group_index": 1, "response": HOSTILE * 40, "invalid_reason": HOSTILE, "reward_parts": HOSTILE}
    rollout_tables.write(folder.dir, 1, [hostile, long], {HOSTILE: [JPEG]})
    page = read(folder)
    assert page.count("img") == 1
    assert page.count("script") == 0 and page.count("b") > 0
    assert page.text.count(HOSTILE) >= 15
    assert "<b>&demo" in page.text


def test_control_characters_do_not_reach_the_page(tmp_path: Path) -> None:
    folder = start(tmp_path)
    rollout_tables.write(folder.dir, 1, [row(response="a\x00b\x1b[31mc\x85d\n\te")], {})
    html = write_report(folder).read_text(encoding="utf-8")
    assert "a\ufffdb\ufffd[31mc\ufffdd\n\te" in html


def test_run_without_metrics_has_a_page(tmp_path: Path) -> None:
    page = read(start(tmp_path))
    assert "Nothing has been logged yet" in page.text
    assert page.count("svg") == 0


def test_one_step_without_evaluation_or_rollouts(tmp_path: Path) -> None:
    folder = start(tmp_path)
    folder.append_metrics({"step": 1, "time_s": 2.0, "reward/mean": 0.5, "time/generate": 1.0})
    page = read(folder)
    assert "Greedy accuracy" not in page.text and "Rollouts" not in page.text
    assert page.count("svg") == 2


def test_warm_start_only(tmp_path: Path) -> None:
    folder = start(tmp_path)
    folder.append_metrics({"step": 1, "time_s": 2.0, "phase": "warm_start", "warm_start/loss": 0.5})
    assert "Warm start: loss" in read(folder).text


def test_accuracies_over_different_samples_are_not_compared(tmp_path: Path) -> None:
    folder = start(tmp_path)
    folder.append_metrics({"step": 0, "eval/accuracy": 0.5, "eval/n": 64, "eval/accuracy/count": 0.1})
    folder.append_metrics({"step": 9, "eval/accuracy": 0.75, "eval/n": 256, "eval/accuracy/count": 0.2})
    text = read(folder).text
    assert " points" not in text and "10 →" not in text
    assert "The first evaluation had 64 samples (50.0 %): not comparable." in text


def test_only_evaluation_so_far_claims_no_gain(tmp_path: Path) -> None:
    folder = start(tmp_path)
    folder.append_metrics({"step": 0, "eval/accuracy": 0.5})
    text = read(folder).text
    assert "the only evaluation so far" in text and " points" not in text


def test_rows_of_one_step_are_merged_and_the_later_value_is_used(tmp_path: Path) -> None:
    folder = start(tmp_path)
    for accuracy in (0.1, 0.9):
        folder.append_metrics({"step": 5, "eval/accuracy": accuracy})
    assert "90.0%" in read(folder).text


def test_mixed_groups_come_first_and_the_rest_is_folded(tmp_path: Path) -> None:
    folder = start(tmp_path)
    rows = []
    for index in range(40):
        rows += [
            row(sample_id=f"clip-{index:02d}", group_index=g, reward_total=float(g and index == 30)) for g in (0, 1)
        ]
    rollout_tables.write(folder.dir, 3, rows, {})
    page = read(folder)
    assert "24 of 40 prompts" in page.text and "18 more prompts" in page.text
    assert page.text.index("clip-30") < page.text.index("clip-00")


def test_broken_json_in_a_table_is_shown(tmp_path: Path) -> None:
    folder = start(tmp_path)
    rollout_tables.write(
        folder.dir, 1, [row(reward_parts="nonsense", weight_versions="nonsense", advantage=float("nan"))], {}
    )
    text = read(folder).text
    assert "unreadable nonsense" in text and "weights nonsense" in text


@pytest.mark.parametrize(
    ("job", "metrics", "title", "shown"),
    [
        ("grpo", {"eval/accuracy": 0.75}, "Greedy accuracy", "75.0"),
        ("dpo", {"eval/accuracy": 0.75, "rewards/margins": 0.023}, "Pairs ranked right", "75.0"),
        ("reward-model", {"eval/spearman": 81.25, "eval/spearman/light": -3.0}, "Spearman correlation x 100", "81.2"),
    ],
)
def test_the_headline_is_what_the_job_measures(
    tmp_path: Path, job: str, metrics: dict[str, float], title: str, shown: str
) -> None:
    folder = start(tmp_path)
    folder.record(job=job)
    for step in (0, 10):
        folder.append_metrics({"step": step, "time_s": step, "eval/n": 64, **metrics})
    page = Page(write_report(folder).read_text())
    assert f"{title} on 64 held-out samples" in page.text and shown in page.text
    assert "+0.0 points" in page.text and not any("up" in (a.get("class") or "").split() for _, a in page.tags)
    if job == "dpo":
        assert "Margin of implicit rewards" in page.text and "nats" not in page.text


def test_self_judgement_counts_iterations(tmp_path: Path) -> None:
    folder = start(tmp_path)
    folder.record(job="isrt")
    folder.config_file.write_text("train: {steps: 100}\nisrt: {iterations: 3}\n")
    folder.append_metrics({"step": 2, "time_s": 5, "judge/consistency": 0.5, "judge/longer_wins": 0.25})
    text = Page(write_report(folder).read_text()).text
    assert re.search(r"Iterations ?2 ?of 3 planned", text) and "of 100 planned" not in text
    assert "same choice in both orders" in text and "chose the longer response" in text


def test_ticks_never_have_the_same_label() -> None:
    points = [(0.0, 0.9996), (10.0, 1.0004)]
    labels = re.findall(r'class="y">([^<]+)<', str(line_chart("ratio", [Series("ratio", points)])))
    assert len(set(labels)) == len(labels) > 2


def test_folder_without_a_run_is_a_readable_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.yaml"):
        write_report(RunFolder(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()
