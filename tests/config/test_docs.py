from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from jobs.cli import JOBS
from rlvid.config import GrpoConfig, GrpoJobConfig, JobConfig, Section
from rlvid.config import docs as config_docs
from rlvid.config.docs import MARKER, PAGE, main, page
from rlvid.config.jobs import JOB_CONFIGS
from rlvid.config.keys import keys_of, sections_of
from rlvid.config.load import load_config


def rows(text: str) -> dict[str, tuple[str, ...]]:
    """Key -> type, default, what a resumed run may do, meaning."""
    cells = (re.split(r"(?<!\\)\|", line.strip("|")) for line in text.splitlines() if line.startswith("| `"))
    found = (tuple(cell.strip() for cell in row) for row in cells if len(row) == 5)
    return {row[0].replace("`", ""): row[1:] for row in found}


@pytest.fixture(scope="module")
def text() -> str:
    return page("")


# --- the page of this repository --------------------------------------------------------------------------------------


def test_page_in_the_repository_is_current() -> None:
    assert main(["--check"]) == 0, "run `make docs`"


@pytest.mark.parametrize("job", sorted(JOB_CONFIGS))
def test_every_key_of_every_job_has_a_row_and_a_meaning(job: str, text: str) -> None:
    known = rows(text)
    for key, schema in keys_of(JOB_CONFIGS[job]):
        if "$ref" in schema and "." not in key:  # a section, it has a table
            assert f"\n## `{key}`\n" in text and re.search(rf"^\| `{key}` \|.*✓", text, re.MULTILINE)
        else:
            assert any(cells[3] for name, cells in known.items() if name.partition(" (")[0] == key), (
                f"write a docstring below {key} in rlvid/config"
            )


def test_every_job_of_the_command_line_is_documented() -> None:
    assert {name: job.config for name, job in JOBS.items()} == JOB_CONFIGS
    assert all(cls.__doc__ and cls.__doc__.startswith(f"`rlvid {job}`: ") for job, cls in JOB_CONFIGS.items())


@pytest.mark.parametrize(
    ("key", "type_words", "default", "resumed"),
    [
        ("model.path", "path of a checkpoint, or empty", "empty", "fixed"),
        ("model.tiny", "section, or empty", "empty", "fixed"),
        ("model.tiny.hidden_size", "whole number, at least 64, a multiple of 64", "`128`", "fixed"),
        ("data.train", "path of a file, or empty", "empty", "fixed"),
        ("data.cache_gib", "number, more than 0", "`50`", "may change: a cached clip equals a decoded one"),
        ("data.suffix", "text", '`""`', "fixed"),
        ("data.cache_dir", "path", "`~/.cache/rlvid/frames`", "may change: a cached clip equals a decoded one"),
        ("train.lr", "number, more than 0", "`1e-06`", "may change: a run that diverged may resume with a lower one"),
        ("train.betas", "list of 2: number, then number", "`[0.9, 0.95]`", "fixed"),
        ("train.zero_stage", "`0`, `1`, `2` or `3`", "`0`", "fixed"),
        ("train.steps", "whole number, at least 0", "`100`", "may change: a run may be made longer or shorter"),
        ("rollout.block_size", "whole number, at least 1, or empty", "empty", "may change: memory of an engine"),
        ("rollout.temperature", "number, at least 0.01", "`1`", "fixed"),
        ("evaluate.every", "whole number, at least 1", "`50`", "may change: evaluation does not affect training"),
        ("grpo.clip_low", "number, at least 0, at most 1", "`0.2`", "fixed"),
        ("rewards", "list (section)", "`[{kind: exact}]`", "fixed"),
        ("config", "path of a file", "required", "fixed"),
    ],
)
def test_hand_checked_entries(key: str, type_words: str, default: str, resumed: str, text: str) -> None:
    assert rows(text)[key][:3] == (type_words, default, resumed)


def test_sections_of_some_jobs_say_so(text: str) -> None:
    assert "## `warm_start`\n\nOnly in `grpo`, `ppo` or `isrt`." in text
    assert "## `train`\n\nOnly" not in text


def test_examples_of_the_page_work(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8").partition(MARKER)[0]
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
    assert [part.kind for part in cfg.rewards] == ["exact"]


def test_a_default_does_not_change_when_another_key_of_its_section_is_set() -> None:
    """pydantic builds a section that the file names from its class, not from the job's default for it."""
    for cls in JOB_CONFIGS.values():
        for name, info in cls.model_fields.items():
            default = info.get_default(call_default_factory=True)
            if isinstance(default, BaseModel):
                assert default == type(default)(), f"{cls.__name__}.{name}: put the defaults into the class"


# --- other shapes of configuration ------------------------------------------------------------------------------------


class _Rule(Section):
    """Checks a rule."""

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
    bounded: float | None = Field(None, ge=0, le=1)
    """Bounds of a union."""
    ratios: tuple[float, ...] = (0.5, 1e-7)
    """Numbers."""
    mixed: tuple[int, str] = (1, "on")
    """Fixed."""
    few: tuple[str, ...] = Field((), max_length=1)
    """Length."""
    weights: dict[str, float] = {"a": 1.0}  # noqa: RUF012  # pydantic copies it
    """Mapping."""
    parts: tuple[_Rule | _Judge, ...] = (_Judge(prompt="?"),)
    """Union of sections."""
    judges: dict[str, _Judge] = Field(default_factory=dict)
    """Mapping to sections."""


class NewJobConfig(JobConfig):
    """`rlvid new`: a job of tomorrow."""

    odd: _Odd = _Odd()
    """A section of tomorrow."""


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(JOB_CONFIGS, "new", NewJobConfig)
    return page("")


@pytest.mark.parametrize(
    ("key", "type_words", "default"),
    [
        ("odd.either", "whole number or text", "`3`"),
        ("odd.bounded", "number, at least 0, at most 1, or empty", "empty"),
        ("odd.ratios", "list (number)", "`[0.5, 1e-07]`"),
        ("odd.mixed", "list of 2: whole number, then text", "`[1, on]`"),
        ("odd.few", "list (text), at most 1 item(s)", "`[]`"),
        ("odd.weights", "section (name: number)", "`{a: 1.0}`"),
        ("odd.parts", "list (section)", '`[{prompt: "?"}]`'),
        ("odd.parts.N.prompt", "text", "`Rate <video> 1\\|2`"),
        ("odd.judges.NAME.prompt", "text", "`Rate <video> 1\\|2`"),
    ],
)
def test_new_sections_and_types_are_found(grown: str, key: str, type_words: str, default: str) -> None:
    assert rows(grown)[key][:2] == (type_words, default.replace("`Rate <video> 1\\|2`", '`"Rate <video> 1\\|2"`'))


def test_a_new_job_has_its_column_and_sections_in_place(grown: str) -> None:
    assert "- `rlvid new`: a job of tomorrow.\n" in grown
    first, *table = grown[grown.index("| key or section") : grown.index("\n\n## Keys")].splitlines()
    column = first.split("|").index(" `new` ")
    ticks = {line.split("|")[1].strip(): line.split("|")[column].strip() for line in table if line}
    assert (ticks["`odd`"], ticks["`train`"], ticks["`grpo`"]) == ("✓", "✓", "")
    assert "### `odd.parts.N (kind: judge)`\n\nOnly in `new`.\n\nAsks a model.\n" in grown
    assert grown.index("## `odd`") < grown.index("### `odd.parts.N (kind: rule)`")
    assert "What it is asked, `<video>` or &lt;b>." in grown


def test_keys_that_differ_between_jobs_have_a_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherGrpo(GrpoConfig):
        group_size: int = Field(16, ge=2)
        """Responses per prompt."""

    class OtherJobConfig(GrpoJobConfig):
        """`rlvid other`: the same with larger groups."""

        grpo: OtherGrpo = OtherGrpo()

    monkeypatch.setitem(JOB_CONFIGS, "other", OtherJobConfig)
    known = rows(page(""))
    assert known["grpo.group_size (in grpo)"][1] == "`8`" and known["grpo.group_size (in other)"][1] == "`16`"


def test_a_section_inside_itself_ends() -> None:
    class Tree(Section):
        """A tree."""

        left: Tree | None = None
        """Below."""

    class Forest(Section):
        trees: tuple[Tree, ...] = ()

    names: dict[str, Any] = {"Tree": Tree}
    Tree.model_rebuild(_types_namespace=names)
    Forest.model_rebuild(_types_namespace=names)
    assert [name for name, _ in sections_of(Forest)] == ["", "trees.N"]


def test_check_shows_what_differs_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "configuration.md"
    file.write_text("# My head\n" + MARKER)
    monkeypatch.setattr(config_docs, "PAGE", file)
    assert main(["--check"]) == 1 and file.read_text() == "# My head\n" + MARKER
    assert main([]) == 0 and main(["--check"]) == 0 and file.read_text().startswith("# My head\n")
    capsys.readouterr()
    stale = file.read_text().replace("| `16384` |", "| `1` |")
    file.write_text(stale)
    assert main(["--check"]) == 1 and file.read_text() == stale
    err = capsys.readouterr().err
    assert "-| `train.micro_batch_tokens`" in err and err.endswith("docs/configuration.md is not current: make docs\n")
