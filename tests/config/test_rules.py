"""What a config refuses by itself: values that no engine takes, keys without an effect, paths that are none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from rlvid.config import (
    DpoConfig,
    EvalJobConfig,
    GrpoConfig,
    GrpoJobConfig,
    IsrtJobConfig,
    JobConfig,
    JudgeConfig,
    PpoConfig,
    PpoJobConfig,
    RewardModelConfig,
    RolloutConfig,
    SftJobConfig,
    SpaceConfig,
    TuneJobConfig,
    VideoConfig,
)
from rlvid.config.jobs import JOB_CONFIGS
from rlvid.config.keys import keys_of
from rlvid.config.load import load_config
from rlvid.config.policy_gradient import VARIANTS
from rlvid.errors import UserError

TINY: dict[str, Any] = {"model": {"tiny": {}}, "data": {"synthetic": {}}}
CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
LOADABLE = {
    "grpo": CONFIGS / "demo.yaml",
    "sft": CONFIGS / "sft_demo.yaml",
    "dpo": CONFIGS / "dpo_demo.yaml",
    "isrt": CONFIGS / "isrt_demo.yaml",
    "eval": CONFIGS / "eval_demo.yaml",
    "reward-model": CONFIGS / "reward_model_demo.yaml",
    "tune": CONFIGS / "tune_dpo_demo.yaml",
}


def refusal(cls: type[BaseModel], values: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        cls.model_validate(values)
    return str(caught.value)


def keys_with(job: str, **wanted: Any) -> list[str]:
    """Plain keys whose schema, or an alternative of it, has these entries; a list's index is 0. Without the sections of
    which there is one for each kind."""
    found = []
    for key, schema in keys_of(JOB_CONFIGS[job]):
        kinds = [schema, *schema.get("anyOf", ())]
        if any(all(kind.get(name) == value for name, value in wanted.items()) for kind in kinds):
            found.append(key.replace(".N.", ".0."))
    return [key for key in found if "NAME" not in key and not key.startswith(("rewards", "benchmark"))]


# --- numbers (fault 16, 20) -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("job", sorted(LOADABLE))
def test_no_number_of_any_job_may_be_infinite(job: str, value: str) -> None:
    keys = keys_with(job, type="number")
    assert len(keys) > 5 or job == "tune"
    for key in keys:
        with pytest.raises(UserError, match=r"finite number|must be (greater|less) than"):
            load_config(JOB_CONFIGS[job], LOADABLE[job], [f"{key}={value}"])


@pytest.mark.parametrize("space", [{"uniform": [0, math.inf]}, {"choice": [1.0, math.nan]}, {"grid": [math.inf]}])
def test_a_sweep_draws_finite_numbers_only(space: dict[str, Any]) -> None:
    assert "finite number" in refusal(SpaceConfig, space)


def test_temperatures_are_those_that_vllm_samples_with() -> None:
    assert RolloutConfig(temperature=0.01).temperature == 0.01
    assert "temperature" in refusal(RolloutConfig, {"temperature": 0.002})
    assert JudgeConfig(temperature=0).temperature == 0  # greedy
    assert "below 0.01, the lowest that vLLM samples with" in refusal(JudgeConfig, {"temperature": 0.002})
    isrt = {"isrt": {"context_temperature": 0.005}}
    assert "below 0.01, the lowest that vLLM samples with" in refusal(IsrtJobConfig, TINY | isrt)


# --- known from the configuration alone (fault 21) --------------------------------------------------------------------


def test_a_context_too_small_for_the_frames_is_refused() -> None:
    # 8 frames of 64 x 96 pixels: 4 pairs of 2 x 3 patches of 32 pixels, a question of 16 and a response of 64 tokens
    values = TINY | {"video": {"frames": 8, "height": 64, "width": 96}}
    assert GrpoJobConfig.model_validate(values | {"rollout": {"max_model_len": 104}})
    message = refusal(GrpoJobConfig, values | {"rollout": {"max_model_len": 103}})
    assert "rollout.max_model_len=103 is less than 104: 8 frames are at least 24 tokens" in message
    # The judge of i-SRT reads video, context and two responses: 24 + 16 + 256 + 2 * 64, and answers 64.
    assert IsrtJobConfig.model_validate(values | {"rollout": {"max_model_len": 488}})
    message = refusal(IsrtJobConfig, values | {"rollout": {"max_model_len": 487}})
    assert "rollout.max_model_len=487 is less than 488: the judge reads the video, a context of" in message
    small = refusal(GrpoJobConfig, TINY | {"rollout": {"max_model_len": 16, "max_tokens": 8}})
    assert "rollout.max_model_len=16 is less than" in small


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://host/v1/chat/completions"])
def test_a_judge_url_must_be_the_base_of_an_api(url: str) -> None:
    message = refusal(JudgeConfig, {"backend": "endpoint", "model": "m", "url": url})
    assert "is not the base URL of an API, expected for example http://localhost:8000/v1" in message


def test_each_job_asks_for_the_manifest_that_it_needs() -> None:
    model = {"model": {"tiny": {}}}
    assert "data.eval is empty" in refusal(EvalJobConfig, model | {"data": {"train": "t.jsonl"}})
    assert "data.train is empty" in refusal(SftJobConfig, model | {"data": {"eval": "e.jsonl"}})
    assert EvalJobConfig.model_validate(model | {"data": {"eval": "e.jsonl"}}).data.train is None


# --- paths (fault 28) -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", sorted(LOADABLE))
def test_no_path_of_any_job_may_be_a_url(job: str) -> None:
    forms = ("path", "file-path", "directory-path", "checkpoint-path")
    keys = [key for form in forms for key in keys_with(job, format=form)]
    assert len(keys) >= (2 if job == "tune" else 6)
    for key in keys:
        for url in ("s3://bucket/x", "gs://bucket/x", "http://host/x", "hf://org/model", "file:///x"):
            with pytest.raises(UserError, match=f"{key}: {url} is a URL; expected a path on a local or mounted disk"):
                load_config(JOB_CONFIGS[job], LOADABLE[job], [f"{key}={url}"])


def test_a_path_is_not_empty_text() -> None:
    assert "empty text" in refusal(GrpoJobConfig, TINY | {"run": {"dir": ""}})


# --- switches without an effect (fault 37) ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (JudgeConfig, {"path": "judge"}, "path has no effect with backend=policy: it needs backend=local"),
        (JudgeConfig, {"url": "http://h/v1"}, "url has no effect with backend=policy: it needs backend=endpoint"),
        (JudgeConfig, {"send_frames": True}, "send_frames has no effect with backend=policy"),
        (JudgeConfig, {"backend": "local", "path": "j", "concurrency": 2}, "concurrency has no effect with"),
        (VideoConfig, {"fps": 3}, "fps has no effect with sampling=linspace: it needs sampling=fps"),
        (VideoConfig, {"seconds": 3}, "seconds has no effect with sampling=linspace"),
        (VideoConfig, {"height": 56, "width": 56, "max_pixels": 1000}, "max_pixels has no effect with height=56"),
        (DpoConfig, {"simpo_margin": 1}, "simpo_margin has no effect with loss=sigmoid: it needs loss=simpo"),
        (DpoConfig, {"chosen_weight": 2}, "chosen_weight has no effect with loss=sigmoid: it needs loss=kto"),
        (DpoConfig, {"loss": "simpo", "reference_path": "m"}, "reference_path has no effect with loss=simpo"),
        (DpoConfig, {"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing has no effect with loss=ipo"),
        (GrpoConfig, {"kl_estimator": "k1"}, "kl_estimator=k1 has no effect with kl_coef=0"),
        (RewardModelConfig, {"kind": "bradley_terry", "scale": [1, 5]}, "scale has no effect with kind=bradley_terry"),
        (
            TuneJobConfig,
            {
                "job": "sft",
                "config": "c",
                "space": {"train.lr": {"choice": [1]}},
                "scheduler": "none",
                "grace_steps": 2,
            },
            "grace_steps has no effect with scheduler=none: it needs scheduler=asha or pbt",
        ),
    ],
)
def test_a_key_without_an_effect_is_refused(cls: type[BaseModel], values: dict[str, Any], message: str) -> None:
    assert message in refusal(cls, values)


def test_keys_at_their_default_are_no_switches() -> None:
    judge = JudgeConfig.model_validate({"concurrency": 8, "api_key_env": "OPENAI_API_KEY"})
    assert JudgeConfig.model_validate(judge.model_dump()) == judge


# --- kinds imply templates (fault 29) ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "template"), [("thinking", "thinking"), ("bradley_terry", "question"), ("regression", "integer")]
)
def test_the_kind_of_a_reward_model_implies_its_template(kind: str, template: str) -> None:
    cfg = RewardModelConfig.model_validate({"kind": kind})
    assert cfg.template == template and RewardModelConfig.model_validate(cfg.model_dump()) == cfg


def test_a_template_of_another_kind_is_refused() -> None:
    assert "kind=thinking does not go with template=integer" in refusal(
        RewardModelConfig, {"kind": "thinking", "template": "integer"}
    )
    assert "set template to question" in refusal(RewardModelConfig, {"kind": "bradley_terry", "template": "integer"})


# --- files of other jobs (fault 29) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["sft", "eval", "dpo", "grpo", "isrt"])
@pytest.mark.parametrize("source", ["demo", "isrt_demo", "dpo_demo", "sft_demo"])
def test_a_file_of_one_job_can_be_given_to_another(
    job: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"{source}.yaml"  # a notice is printed once per file
    file.write_bytes((CONFIGS / f"{source}.yaml").read_bytes())
    cfg = load_config(JOB_CONFIGS[job], file, [])
    assert isinstance(cfg, JobConfig) and cfg.model.tiny is not None
    foreign = {"demo": {"grpo", "warm_start"}, "isrt_demo": {"isrt", "warm_start", "dpo"}, "dpo_demo": {"dpo"}}
    ignored = sorted(foreign.get(source, set()) - JOB_CONFIGS[job].model_fields.keys())
    notice = f"rlvid: {file}: ignored, sections of other jobs: {', '.join(ignored)}\n" if ignored else ""
    assert capsys.readouterr().err == notice


def test_unknown_keys_and_overrides_of_other_jobs_stay_errors(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: {tiny: {}}\ndata: {synthetic: {}}\ngropo: {group_size: 4}\n")
    with pytest.raises(UserError, match=f"{file}:3: unknown key gropo"):
        load_config(SftJobConfig, file, [])
    with pytest.raises(UserError, match="unknown key grpo; known here"):
        load_config(SftJobConfig, CONFIGS / "demo.yaml", ["grpo.group_size=4"])
    with pytest.raises(UserError, match="unknown key space"):  # a sweep is no job's config
        load_config(SftJobConfig, CONFIGS / "tune_dpo_demo.yaml", [])


# --- policy gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (GrpoConfig, {"group_size": 1}, "group_size=1: advantage=group compares the responses of a group"),
        (GrpoConfig, {"kl_in": "reward"}, "kl_in=reward has no effect with kl_coef=0"),
        (GrpoConfig, {"correction": "truncate"}, "old_logprobs=rollout takes the engine's for both: set old_logprobs"),
        (GrpoConfig, {"overlong_penalty": 2}, "overlong_penalty=2 has no effect with overlong_buffer=0"),
        (GrpoConfig, {"temporal_bonus": 1}, "temporal_bonus has no effect with temporal=off"),
        (
            GrpoConfig,
            {"dynamic_sampling": 2, "advantage": "batch"},
            "dynamic_sampling=2 needs advantage=group or leave_one_out",
        ),
        (GrpoConfig, {"variant": "dapo", "group_size": 1}, "group_size=1"),
        (PpoConfig, {"critic_steps": 2}, "critic_steps has no effect with critic=shared: it needs critic=own"),
        (PpoConfig, {"critic": "own", "value_coef": 1}, "value_coef has no effect with critic=own"),
        (GrpoJobConfig, TINY | {"grpo": {"temporal": "code"}, "video": {"frames": 2}}, "set video.frames to 4 or more"),
        (
            GrpoJobConfig,
            TINY | {"rollout": {"replicas": 2, "max_replicas": 1}},
            "rollout.max_replicas=1 is less than rollout.replicas=2",
        ),
        (
            GrpoJobConfig,
            TINY | {"rewards": [{"kind": "custom", "path": "my.py"}]},
            "does not name a file and a function",
        ),
        (
            GrpoJobConfig,
            TINY | {"rewards": [{"kind": "custom", "path": "my.py:f", "accuracy": True}]},
            "accuracy needs range",
        ),
        (GrpoJobConfig, TINY | {"rewards": [{"kind": "endpoint", "url": "localhost:9"}]}, "is not a URL"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    cls: type[BaseModel], values: dict[str, Any], message: str
) -> None:
    assert message in refusal(cls, values)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_variant_sets_keys_that_are_not_given(variant: str) -> None:
    cfg = GrpoConfig.model_validate({"variant": variant, "kl_coef": 0.1})
    assert {key: getattr(cfg, key) for key in VARIANTS[variant]} == VARIANTS[variant]
    assert GrpoConfig.model_validate(cfg.model_dump()) == cfg  # a saved config says the same
    given = GrpoConfig.model_validate({"variant": variant, "clip_high": 0.5})
    assert given.clip_high == 0.5 and given.kl_in == "loss"  # without a KL term there is none to place


def test_engines_sleep_where_they_share_a_gpu_and_wait_for_the_trainer() -> None:
    def sleeps(**values: Any) -> bool:
        return GrpoJobConfig.model_validate({**TINY, **values}).engines_sleep

    gpu, ahead = {"gpus": 1}, {"async_steps": 1}
    assert sleeps(placement=gpu)
    assert not sleeps()
    assert not sleeps(placement={**gpu, "colocate": False})
    assert not sleeps(placement=gpu, grpo=ahead)
    assert not sleeps(placement=gpu, rollout={"sleep": False})
    said = refusal(GrpoJobConfig, {**TINY, "rollout": {"sleep": True}, "grpo": ahead})
    assert "grpo.async_steps=1 generates while the trainer works" in said


# --- stages, parts, the best model ------------------------------------------------------------------------------------


def test_a_stage_has_the_keys_of_the_config_but_for_its_own(tmp_path: Path) -> None:
    stages = [{"train": {"lr_factors": {"text": 0}, "steps": 5}}, {"train": {"lr": 2e-5}, "sft": {"loss": "all"}}]
    run, train = {"dir": str(tmp_path), "wandb": "disabled"}, {"lr": 1e-3, "batch_size": 4}
    cfg = SftJobConfig.model_validate({**TINY, "run": run, "train": train, "stages": stages})
    first, second = cfg.stage(1), cfg.stage(2)
    assert (first.train.lr, first.train.steps, first.train.lr_factors) == (1e-3, 5, {"text": 0})
    assert (second.train.lr, second.train.batch_size, second.train.lr_factors) == (2e-5, 4, {})
    assert (first.sft.loss, second.sft.loss) == ("last", "all")
    assert [s.run.dir.name for s in (first, second)] == ["stage_1", "stage_2"] and second.run.wandb == "disabled"


def test_stages_are_checked_before_the_first_one_starts() -> None:
    wrong = [{"train": {"steps": 5}}, {"train": {"lrr": 1}}]
    assert "stages.1: train.lrr" in refusal(SftJobConfig, {**TINY, "stages": wrong})
    assert "stages.0: model is set for all stages" in refusal(SftJobConfig, {**TINY, "stages": [{"model": {}}]})


def test_parts_and_the_best_model() -> None:
    lora = {"model": {"tiny": {}, "lora": {}}, "train": {"lr_factors": {"tower": 0}}}
    assert "train.lr_factors is of the whole model" in refusal(SftJobConfig, TINY | lora)
    assert "tower" in refusal(SftJobConfig, {**TINY, "train": {"lr_factors": {"towr": 0}}})
    assert "patience needs a metric" in refusal(SftJobConfig, {**TINY, "evaluate": {"patience": 2}})
    for job in (GrpoJobConfig, PpoJobConfig, IsrtJobConfig):
        assert "evaluate.best is for sft, dpo and reward-model" in refusal(job, {**TINY, "evaluate": {"best": "loss"}})
