from __future__ import annotations

from pathlib import Path

import pytest

from jobs.cli import JOBS
from rlvid.config import ExactPart, GrpoJobConfig, SftJobConfig
from rlvid.config.load import dump_config, load_config
from rlvid.errors import UserError

GOOD = """\
seed: 3
model:
  tiny: {hidden_size: 64}
data:
  synthetic:
    train: 16
train:
  lr: 1e-4
  steps: 5
"""


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(GOOD)
    return path


def load(path: Path, *overrides: str) -> GrpoJobConfig:
    return load_config(GrpoJobConfig, path, list(overrides))


def mistake(path: Path, *overrides: str, text: str | None = None) -> str:
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(path, *overrides)
    return str(caught.value)


def test_file_then_overrides_from_left_to_right(config_path: Path) -> None:
    config = load(config_path, "train.steps=7", "train.lr=2e-5", "train.steps=9", "model.tiny.layers=2")
    assert (config.seed, config.train.steps, config.train.lr) == (3, 9, 2e-5)
    assert config.model.tiny is not None
    assert (config.model.tiny.hidden_size, config.model.tiny.layers) == (64, 2)


def test_exponent_without_dot_is_a_number(config_path: Path) -> None:
    assert load(config_path).train.lr == 1e-4
    assert load(config_path, "rollout.max_tokens=1e2").rollout.max_tokens == 100


def test_override_makes_sections_the_file_does_not_have(config_path: Path) -> None:
    assert load(config_path, "grpo.kl_coef=0.1", "warm_start.steps=4").grpo.kl_coef == 0.1


def test_override_sets_sections_and_lists_in_flow_syntax(config_path: Path) -> None:
    config = load(
        config_path, "model.tiny={layers: 2}", "rewards=[{kind: choice}, {kind: format, tags: [think, answer]}]"
    )
    assert config.model.tiny is not None
    assert (config.model.tiny.layers, config.model.tiny.hidden_size) == (2, 128)  # replaced, not merged
    assert [part.kind for part in config.rewards] == ["choice", "format"]
    assert config.rewards[1].tags == ("think", "answer")


def test_override_indexes_lists_also_default_ones(config_path: Path) -> None:
    assert load(config_path, "rewards.0.weight=2").rewards == (ExactPart(kind="exact", weight=2),)
    assert [p.kind for p in load(config_path, "rewards.1.kind=length", "rewards.1.weight=0.1").rewards] == [
        "exact",
        "length",
    ]
    assert load(config_path, "train.betas.1=0.99").train.betas == (0.9, 0.99)


def test_override_value_may_hold_an_equals_sign_and_an_empty_text(config_path: Path) -> None:
    assert load(config_path, "data.suffix=a=b").data.suffix == "a=b"
    assert load(config_path, "data.suffix=''").data.suffix == ""


def test_anchors_and_merges_work(config_path: Path) -> None:
    config_path.write_text(GOOD + "  warmup_steps: &w 7\nwarm_start:\n  warmup_steps: *w\n")
    assert load(config_path).warm_start.warmup_steps == 7


def test_home_is_expanded_everywhere(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/person")
    config = load(config_path, "run.dir=~/runs/a", "data.train=data~/b.jsonl")
    assert config.run.dir == Path("/home/person/runs/a")
    assert config.data.cache_dir == Path("/home/person/.cache/rlvid/frames")
    assert config.data.train == Path("data~/b.jsonl")


def test_dump_loads_back_equal(config_path: Path, tmp_path: Path) -> None:
    config = load(
        config_path,
        "data.suffix='1e-6'",
        "data.system_prompt='yes: \\n \"ünïcode\" # no comment'",
        "rewards=[{kind: format, tags: [think, answer]}]",
        "run.project='null'",
        "video.height=56",
        "video.width=84",
    )
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load(tmp_path / "dumped.yaml") == config
    assert dump_config(load(tmp_path / "dumped.yaml")) == dump_config(config)


def test_default_config_of_another_job_loads_back_equal(tmp_path: Path) -> None:
    config = SftJobConfig.model_validate({"model": {"path": "m"}, "data": {"train": "t.jsonl"}})
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(SftJobConfig, tmp_path / "dumped.yaml", []) == config


# --- bad input --------------------------------------------------------------------------------------------------------


def test_unknown_key_names_key_nearest_file_and_line(config_path: Path) -> None:
    message = mistake(config_path, text=GOOD + "  lerning_rate: 3\n  stepz: 4\n")
    assert f"{config_path}:11: unknown key train.stepz; did you mean train.steps?" in message
    assert f"{config_path}:10: unknown key train.lerning_rate" in message


def test_unknown_key_at_the_top_and_in_lists(config_path: Path) -> None:
    assert f"{config_path}:10: unknown key gpro; did you mean grpo?" in mistake(
        config_path, text=GOOD + "gpro:\n  a: 1\n"
    )
    message = mistake(config_path, text=GOOD + "rewards:\n  - kind: exact\n  - kind: choice\n    wieght: 2\n")
    assert f"{config_path}:13: unknown key rewards.1.wieght; did you mean rewards.1.weight?" == message


def test_key_in_the_wrong_section_is_pointed_to_the_right_one(config_path: Path) -> None:
    assert "unknown key group_size; did you mean grpo.group_size?" in mistake(
        config_path, text=GOOD + "group_size: 4\n"
    )


def test_unknown_key_without_neighbour_lists_the_section(config_path: Path) -> None:
    message = mistake(config_path, text=GOOD + "grpo:\n  zzzzzz: 4\n")
    assert "unknown key grpo.zzzzzz; known here: group_size, minibatches, epochs" in message


def test_unknown_key_in_override_names_the_override(config_path: Path) -> None:
    assert mistake(config_path, "train.stepps=4") == (
        'override "train.stepps=4": unknown key train.stepps; did you mean train.steps?'
    )
    assert mistake(config_path, "tran.steps=4") == 'override "tran.steps=4": unknown key tran; did you mean train?'


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=many", "train.steps must be a whole number, got 'many'"),
        ("train.steps=1.5", "train.steps must be a whole number, got 1.5"),
        ("train.steps=-1", "train.steps must be at least 0, got -1"),
        ("train.steps=", "train.steps must be a whole number, got nothing"),
        ("train.steps=true", "train: steps must be a number, got true or false"),
        ("train.steps=yes", "train.steps must be a whole number, got 'yes'"),
        ("train.betas=[0.9, true]", "train: betas must be a number, got a list with true or false"),
        ("train.betas=[0.9]", "train.betas.1 is missing"),
        ("train.betas=[1,2,3]", "train.betas must have at most 2 items, got [1, 2, 3]"),
        ("train.lr=0", "train.lr must be greater than 0, got 0"),
        ("train.lr=fast", "train.lr must be a number, got 'fast'"),
        ("train=5", "train must be a section (keys and values), got 5"),
        ("rewards=exact", "rewards must be a list, got 'exact'"),
        ("rewards=[{weight: 1}]", "rewards.0.kind is missing"),
        ("rewards=[]", "rewards is empty: give at least one part, for example [{kind: exact}]"),
        ("rewards=[{kind: exakt}]", "rewards.0.kind must be 'exact', 'choice', 'number', 'verbatim', 'numerical'"),
        ("rewards=[{kind: exact, max_tokens: 3}]", "unknown key rewards.0.max_tokens; did you mean"),
        (
            "rewards=[{kind: length, max_tokns: 3}]",
            "unknown key rewards.0.max_tokns; did you mean rewards.0.max_tokens?",
        ),
        ("rewards=[{kind: length, max_tokens: true}]", "rewards.0: max_tokens must be a number, got true or false"),
        ("rewards=[{kind: length, min_tokens: 5, max_tokens: 4}]", "rewards.0: min_tokens=5 is more than max_tokens=4"),
        ("rewards=[{kind: exact}, {kind: exact}]", "rewards.1: the name 'exact' is taken by an earlier part"),
        ("rewards=[{kind: exact}, {kind: length, name: exact}]", "rewards.1: the name 'exact' is taken"),
        ("rewards=[{kind: exact, weight: .nan}]", "rewards.0.weight must be a finite number"),
        ("rewards=[{kind: format}]", "rewards.0.tags is missing"),
        ("rewards=[{kind: format, tags: []}]", "rewards.0.tags must have at least 1 item"),
        ("rewards=[{kind: format, tags: [<answer>]}]", "rewards.0.tags: tags are names without brackets"),
        ("rewards=[{kind: choice, tags: [answer, answer]}]", "rewards.0.tags: tags names a tag twice"),
        ("rewards=[{kind: model}]", "rewards.0.path is missing"),
        ("grpo.kl_estimator=k4", "grpo.kl_estimator must be 'k1', 'k2' or 'k3', got 'k4'"),
        ("rollout={temperature: hot}", "rollout.temperature must be a number, got 'hot'"),
        ("video.reader=pyva", "video.reader must be 'pyav' or 'decord', got 'pyva'; did you mean pyav?"),
        ("grpo.normalise_std=maybe", "grpo.normalise_std must be true or false, got 'maybe'"),
        ("data.suffix=Answer: A or B", "data.suffix must be text, got a section; put text in quotes"),
        ("data.train=[1]", "data.train must be a path, got [1]"),
        ("run.wandb=off", "run.wandb must be 'offline', 'online' or 'disabled', got 'off'; did you mean offline?"),
        ("video.frames=7", "video.frames must be a multiple of 2, got 7"),
        ("video.height=56", "video: height and width go together: give both or none"),
        ("rewards.3.weight=1", "rewards is a list of 1, its indices are 0 to 1 (1 appends); got 3"),
        ("rewards.first.weight=1", "rewards is a list of 1, its indices are 0 to 1 (1 appends); got first"),
        ("seed.a=1", "seed is 3, it has no key a"),
        ("train.steps", "expected key.sub=value"),
        ("=4", "expected key.sub=value"),
        ("train..steps=4", "expected key.sub=value"),
        ("model.tiny={a: [1", "not valid YAML"),
        ("model.tiny={layers: 1, layers: 2}", "key layers appears twice"),
    ],
)
def test_bad_override_is_one_readable_line(config_path: Path, override: str, expected: str) -> None:
    message = mistake(config_path, override)
    assert message.startswith(f'override "{override}": {expected}')
    assert "\n" not in message and "pydantic" not in message


def test_wrong_value_in_the_file_names_its_line(config_path: Path) -> None:
    message = mistake(config_path, text=GOOD.replace("steps: 5", "steps: five"))
    assert message == f"{config_path}:9: train.steps must be a whole number, got 'five'"


def test_rule_over_several_sections_names_the_file(config_path: Path) -> None:
    message = mistake(config_path, "grpo.minibatches=5")
    assert message == 'override "grpo.minibatches=5": grpo.minibatches=5 must divide train.batch_size=32'
    message = mistake(config_path, text=GOOD + "grpo:\n  minibatches: 5\n")
    assert message == f"{config_path}:11: grpo.minibatches=5 must divide train.batch_size=32"
    assert mistake(config_path, text="seed: 1\n").startswith(f"{config_path}: model.path is empty")
    assert mistake(config_path, text="").startswith(f"{config_path}: model.path is empty")


def test_several_mistakes_are_listed_together_in_order(config_path: Path) -> None:
    message = mistake(config_path, "sed=1", "nonsense", text=GOOD + "grpo: {groop_size: 3}\nvideo: {frames: x}\n")
    lines = message.splitlines()
    assert lines[0] == f"{config_path}: 4 mistakes"
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [
        f"{config_path}:10",
        f"{config_path}:11",
        'override "sed=1"',
        'override "nonsense"',
    ]


def test_duplicate_key_names_both_lines(config_path: Path) -> None:
    message = mistake(config_path, text=GOOD + "  steps: 6\n")
    assert message == f"{config_path}:10: key train.steps appears twice, first in line 9"
    assert "key train appears twice" in mistake(config_path, text=GOOD + "train:\n  steps: 6\n")


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: [1,\n", 2), ("a: 1\n\tb: 2\n", 2), ("a: b: c\n", 1), ("a: *nowhere\n", 1), ("a: !!python/x 1\n", 1)],
)
def test_bad_yaml_names_the_line(config_path: Path, text: str, line: int) -> None:
    message = mistake(config_path, text=text)
    assert message.startswith(f"{config_path}:{line}: not valid YAML: ")
    assert "\n" not in message


def test_yaml_that_contains_itself_is_an_error(config_path: Path) -> None:
    assert "an alias contains itself" in mistake(config_path, text="a: &a\n  b: *a\n")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "3\n"])
def test_file_without_keys_is_an_error(config_path: Path, text: str) -> None:
    assert "expected keys and values" in mistake(config_path, text=text)


def test_missing_file_names_the_nearest(config_path: Path) -> None:
    assert mistake(config_path.parent / "jop.yaml").endswith(f"no such config file; did you mean {config_path}?")
    assert mistake(config_path.parent / "no" / "x.yaml").endswith("no such config file")


def test_folder_and_binary_file_are_errors(config_path: Path) -> None:
    assert "cannot read the config file: Is a directory" in mistake(config_path.parent)
    config_path.write_bytes(b"\xff\xfe\x00")
    assert "cannot read the config file: not UTF-8 text" in mistake(config_path)
    assert "not valid YAML" in mistake(config_path, text="a: \x07\n")


def test_unknown_home_is_an_error(config_path: Path) -> None:
    assert "run.dir: no home folder for ~no_such_person/x" in mistake(config_path, "run.dir=~no_such_person/x")


SHIPPED = {
    "demo": "grpo",
    "dpo_demo": "dpo",
    "dpo_llava_hound": "dpo",
    "eval_demo": "eval",
    "isrt_demo": "isrt",
    "ppo_demo": "ppo",
    "ppo_multimood": "ppo",
    "ppo_vlm_rlaif": "ppo",
    "reward_model_demo": "reward-model",
    "sft_demo": "sft",
    "videoscore": "reward-model",
}


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "jobs" / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_shipped_config_is_one_of_its_job(path: Path) -> None:
    job = SHIPPED.get(path.stem, path.stem.partition("_")[0])
    load_config(JOBS[job].config, path, [])
