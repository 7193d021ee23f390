from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from jobs import cli
from rlvid import config
from rlvid.config import EvaluateConfig, ExactPart, GrpoConfig, GrpoJobConfig, JobConfig, Section
from rlvid.config import docs as config_docs
from rlvid.config.docs import blocks_of, job_classes, main, page
from rlvid.config.load import load_config


def rows(text: str) -> dict[str, tuple[str, ...]]:
    """Key -> type, default, meaning, from the tables of four columns."""
    cells = (re.split(r"(?<!\\)\|", line.strip("|")) for line in text.splitlines() if line.startswith("| `"))
    found = (tuple(cell.strip() for cell in row) for row in cells if len(row) == 4)
    return {row[0].strip("`"): row[1:] for row in found}


def keys_of(value: Any, name: str = "") -> Iterator[str]:
    """Dotted names in dumped data, another way to them than the classes."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{name}.{key}".lstrip(".")
            yield from keys_of(item, f"{name}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from keys_of(item, f"{name}.N")


# --- the page of this repository --------------------------------------------------------------------------------------


def test_page_in_the_repository_is_current() -> None:
    assert main(["--check"]) == 0, "run `make docs`"


def test_every_key_of_every_job_is_there() -> None:
    text = page()
    # the sweep has no sections of a job: its keys stand among the sections
    assert all(f"`{key}`" in text for key in job_classes()["tune"].model_fields)
    for job, cls in job_classes().items():
        if job == "tune":
            continue
        cfg = cls.model_validate({"model": {"tiny": {}}, "data": {"synthetic": {}}})
        keys = set(keys_of(cfg.model_dump(mode="json")))
        assert len(keys) > 60
        sections = set(cls.model_fields)
        assert keys - sections <= set(rows(text)), f"rlvid {job}"
        for section in sections:
            assert re.search(rf"^\| \[?`{section}`.*✓", text, re.MULTILINE), section


def test_every_key_has_a_meaning() -> None:
    lacking = [key for key, (_, _, meaning) in rows(page()).items() if not meaning]
    assert not lacking, "write a docstring below the key in rlvid/config"


def test_every_job_of_the_command_line_is_documented() -> None:
    documented = {job: cls.__name__ for job, cls in job_classes().items()}
    assert {name: job.config for name, job in cli.JOBS.items()}.items() <= documented.items()


@pytest.mark.parametrize(
    ("key", "type_words", "default"),
    [
        ("model.path", "path, or empty", "empty"),
        ("model.tiny", "section, or empty", "empty"),
        ("model.tiny.hidden_size", "whole number, at least 64, a multiple of 64", "`128`"),
        ("data.cache_gib", "number, more than 0", "`50`"),
        ("data.suffix", "text", "`''`"),
        ("data.cache_dir", "path", "`~/.cache/rlvid/frames`"),
        ("video.max_pixels", "whole number, at least 784", "`100352`"),
        ("train.lr", "number, more than 0", "`1e-06`"),
        ("train.betas", "list of 2 numbers", "`[0.9, 0.95]`"),
        ("train.zero_stage", "`0`, `1`, `2` or `3`", "`0`"),
        ("train.shared_prefix", "true or false", "`true`"),
        ("rollout.block_size", "whole number, at least 1, or empty", "empty"),
        ("rewards.N.problem_types", "list of texts", "`[]`"),
        ("grpo.clip_low", "number, at least 0, less than 1", "`0.2`"),
    ],
)
def test_hand_checked_entries(key: str, type_words: str, default: str) -> None:
    assert rows(page())[key][:2] == (type_words, default)


def test_sections_of_one_job_say_so() -> None:
    text = page()
    assert "## `warm_start`\n\nOnly in `isrt` or `grpo`." in text
    assert "## `train`\n\nOnly" not in text


def test_links_lead_to_headings() -> None:
    text = page()
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)", text, re.M)
    }
    links = re.findall(r"\]\(#([^)]*)\)", text)
    assert len(links) >= 9 and set(links) <= anchors


def test_examples_of_the_page_work(tmp_path: Path) -> None:
    text = page()
    file = tmp_path / "my.yaml"
    file.write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    quoted = re.findall(r"`'([a-z_.]+=.*?)'`", text)
    plain = re.findall(r"`((?!key\.)[a-z_0-9.]+\.[a-z_0-9]+=[^`']+)`", text)
    line = re.findall(r"^rlvid grpo my.yaml (.*)", text, re.MULTILINE)[0]
    of_line = [quoted or bare for quoted, bare in re.findall(r"'([^']*)'|(\S+)", line)]
    assert len(quoted) >= 4 and len(plain) >= 3 and len(of_line) == 3
    for override in (*quoted, *plain):
        load_config(GrpoJobConfig, file, ["model.tiny={}", override])
    cfg = load_config(GrpoJobConfig, file, of_line)
    assert (cfg.train.steps, cfg.train.lr, cfg.train.betas) == (200, 1e-6, (0.9, 0.99))
    assert cfg.data.suffix == "Answer: A or B." and cfg.data.eval is None
    assert cfg.rewards == (ExactPart(kind="exact"),)
    cfg = load_config(GrpoJobConfig, file, ["rewards.0.weight=2"])
    assert [part.weight for part in cfg.rewards] == [2.0, 1.0]


def test_a_default_does_not_change_when_another_key_of_its_section_is_set() -> None:
    """pydantic builds a section that the file names from its class, not from the job's default for it."""
    for cls in job_classes().values():
        for name, info in cls.model_fields.items():
            if isinstance(info.default, BaseModel):
                assert info.default == type(info.default)(), f"{cls.__name__}.{name}: put the defaults into the class"


# --- other shapes of configuration ------------------------------------------------------------------------------------


class _Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class _Rule(Section):
    kind: Literal["rule"] = "rule"
    """Which."""


class _Judge(Section):
    """Asks a model."""

    kind: Literal["judge"] = "judge"
    """Which."""
    prompt: str = "Rate <video> 1|2"
    """What it is asked, `<video>` or <b>."""


class _Odd(Section):
    """Types that no job has yet."""

    either: int | str = 3
    """Union."""
    bounded: Annotated[float, Field(ge=0, le=1)] | None = None
    """Bounds inside a union."""
    ratios: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 1e-7)
    """Bounds of items."""
    grid: list[list[int]] = [[1, 2], [3]]  # noqa: RUF012  # pydantic copies it
    """Nested."""
    mixed: tuple[int, str] = (1, "on")
    """Fixed."""
    few: tuple[Path, ...] = Field((), min_length=0, max_length=1)
    """Length."""
    weights: dict[str, float] = {"a": 1.0}  # noqa: RUF012
    """Mapping."""
    colour: _Colour = _Colour.RED
    """Enumeration."""
    maybe: Literal["x", None] = None
    """Literal with nothing."""
    parts: tuple[_Rule | _Judge, ...] = (_Judge(prompt="?"),)
    """Union of sections."""
    judges: dict[str, _Judge] = Field(default_factory=dict)
    """Mapping to sections."""


class NewJobConfig(JobConfig):
    """`rlvid new`: a job of tomorrow."""

    odd: _Odd = _Odd()
    """A section of tomorrow."""
    evaluate: EvaluateConfig | None = None  # type: ignore[assignment]


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(config, "NewJobConfig", NewJobConfig, raising=False)
    return page()


@pytest.mark.parametrize(
    ("key", "type_words", "default"),
    [
        ("odd.either", "whole number or text", "`3`"),
        ("odd.bounded", "number, at least 0, at most 1, or empty", "empty"),
        ("odd.ratios", "list of numbers, each more than 0", "`[0.5, 1e-07]`"),
        ("odd.grid", "list of lists of whole numbers", "`[[1, 2], [3]]`"),
        ("odd.mixed", "list of 2: whole number, then text", "`[1, 'on']`"),
        ("odd.few", "list of paths, at least 0 items, at most 1 item", "`[]`"),
        ("odd.weights", "section of text: number", "`{a: 1}`"),
        ("odd.colour", "`red` or `blue`", "`red`"),
        ("odd.maybe", "`x` or empty", "empty"),
        ("odd.parts", "list of sections", "`[{prompt: '?'}]`"),
        ("odd.parts.N.prompt", "text", "`Rate <video> 1\\|2`"),
        ("odd.judges.NAME.prompt", "text", "`Rate <video> 1\\|2`"),
    ],
)
def test_new_jobs_sections_and_types_are_found(grown: str, key: str, type_words: str, default: str) -> None:
    assert rows(grown)[key][:2] == (type_words, default)


def test_a_new_job_has_its_column_and_sections_in_place(grown: str) -> None:
    assert "- `rlvid new`: a job of tomorrow.\n" in grown
    heading = next(line for line in grown.splitlines() if line.startswith("| key or section"))
    column = heading.split("|").index(" `new` ")
    marks = {
        line.split("|")[1].strip(): line.split("|")[column].strip()
        for line in grown.splitlines()
        if line.startswith("| [`")
    }
    assert marks["[`odd`](#odd)"] == "✓" and marks["[`train`](#train)"] == "✓" and marks["[`grpo`](#grpo)"] == ""
    assert "### `odd.parts.N (kind: judge)`\n\nAsks a model.\n" in grown
    assert grown.index("## `odd`") < grown.index("### `odd.parts.N (kind: rule)`")
    assert "What it is asked, `<video>` or &lt;b>." in grown


def test_keys_that_differ_between_jobs_have_a_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherGrpo(GrpoConfig):
        group_size: int = Field(16, ge=2)
        """Responses per prompt."""

    class OtherJobConfig(GrpoJobConfig):
        """`rlvid other`: the same with larger groups."""

        grpo: OtherGrpo = OtherGrpo()

    monkeypatch.setattr(config, "OtherJobConfig", OtherJobConfig, raising=False)
    table = [line for line in page().splitlines() if line.startswith("| `grpo.group_size`")]
    assert [line.split("|")[1].strip() for line in table] == [
        "`grpo.group_size` (in `grpo`)",
        "`grpo.group_size` (in `other`)",
    ]
    assert "`16`" in table[1] and "`8`" in table[0]


def test_a_section_inside_itself_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tree(Section):
        """A tree."""

        left: Tree | None = None
        """Below."""

    Tree.model_rebuild(_types_namespace={"Tree": Tree})
    assert [block.name for block in blocks_of(Tree, "tree")] == ["tree"]


def test_check_shows_what_differs_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "configuration.md"
    monkeypatch.setattr(config_docs, "PAGE", file)
    assert main(["--check"]) == 1 and not file.exists()
    assert main([]) == 0 and main(["--check"]) == 0
    capsys.readouterr()
    stale = file.read_text().replace("| `16384` |", "| `1` |")
    file.write_text(stale)
    assert main(["--check"]) == 1 and file.read_text() == stale
    err = capsys.readouterr().err
    assert "-| `train.micro_batch_tokens`" in err and err.endswith("docs/configuration.md is not current: make docs\n")
