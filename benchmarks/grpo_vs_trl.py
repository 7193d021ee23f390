"""Time of one GRPO step of rlvid and of TRL's `GRPOTrainer`: the same tiny Qwen2-VL, prompts, frames, G and length.

`python -m benchmarks.grpo_vs_trl` (needs `pip install trl`, which rlvid does not depend on). Two settings: prompts of
fewer than 100 tokens, and of more than 1,000. 4 prompts, 8 completions of up to 32 tokens each, one update per step,
no KL, AdamW, float32. What makes it fair:

- TRL does not support video in GRPO, so both sides get still frames: TRL as images, rlvid as one-frame clips. Token ids
  (except for the name of the pad token), patches and rotary positions are then equal, which is asserted.
- Both start a step from decoded frames in memory and process them within it. rlvid prepares them in the driver, one
  after another, without the overlap that a job has.
- TRL generates with transformers: its vLLM mode does not run on a CPU (weights cannot be loaded after the start), its
  continuous batching does not support multimodal models. Gradient checkpointing and logging are off, the whole batch is
  one micro-batch (smaller ones were slower), `beta=0`. Both sides may use all cores.
- The steps of both sides alternate. The first step of each is not counted; figures are medians.
- rlvid's step is a complete step of a job: engine actor, trainer actor, weights sent back to the engine.

For the first losses, TRL's first batch (its own completions and advantages) goes through rlvid's forward and objective
on the same initial weights. `first_loss_diff` is the absolute difference, the larger one of both settings. With a ratio
of 1 the loss alone says little, so the table has the gradient norms too.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.actor_process import start_ray
from actors.roles import Roles
from benchmarks.harness import finish, median_ratio, medians, require_trl
from benchmarks.tiny import QUESTION, family_of, tiny_model
from jobs.specs import JOBS
from jobs.update import GrpoUpdate
from rlvid.config import GrpoJobConfig
from rlvid.models import torchvision_ops
from rlvid.models.families.chat import CHAT_TEMPLATE
from rlvid.models.families.qwen_vl import QwenVL
from rlvid.models.loading import load_model
from rlvid.rollout.engine import Refused, Sampling
from rlvid.training.batch import Group
from rlvid.training.objectives import PolicyGradient
from rlvid.training.packing import PackedPolicy, pack
from rlvid.training.policy_batch import Experience
from rlvid.types import Clip, Encoded, Medium, Message, Prompt, Reward, Rollout, Sample

N_PROMPTS, GROUP, RESPONSE, LR = 4, 8, 32, 1e-5
SETTINGS = {"short": (4, 56, 112), "long": (8, 308, 308)}  # frames, height, width
WARMUP = 1


def frames_of(setting: str, index: int) -> np.ndarray:
    """Random frames [n, H, W, 3] uint8 of prompt `index`."""
    rng = np.random.default_rng(index)
    return rng.integers(0, 256, (*SETTINGS[setting], 3), dtype=np.uint8)


def reward_of(token_ids: Iterable[int]) -> float:
    """Share of even token ids. It differs within every group, so all groups have a gradient on both sides."""
    return float(np.mean([i % 2 == 0 for i in token_ids]))


def encode(family: QwenVL, setting: str, index: int) -> tuple[Sample, Prompt]:
    """The prompt with each frame as a clip of its own."""
    frames = frames_of(setting, index)
    media = tuple(Medium(f"{i}.mp4") for i in range(len(frames)))
    sample = Sample(f"{setting}-{index}", media, (Message.about(media, QUESTION),), "")
    clips = [
        Clip(f"{sample.id}-{i}", frame[None], np.zeros(1), np.zeros(1, np.int64), 1, 8.0, "random", "")
        for i, frame in enumerate(frames)
    ]
    return sample, family.encode(sample, clips)


class RlvidSide:
    """A job's actors, and one GRPO step on them."""

    def __init__(self, model: Path, logs: Path, setting: str):
        self.setting = setting
        self.cfg = GrpoJobConfig.model_validate(
            {
                "model": {"path": model},
                "data": {"train": "none.jsonl"},
                "train": {"lr": LR, "batch_size": N_PROMPTS, "micro_batch_tokens": 65536},
                "rollout": {"max_tokens": RESPONSE, "max_model_len": 2048, "max_videos": SETTINGS[setting][0]},
                "grpo": {"group_size": GROUP},
            }
        )
        self.family = family_of(model)
        self.roles = Roles(model, self.cfg, JOBS["grpo"].roles(self.cfg), logs)
        self.roles.wait_ready()
        self.steps = 0
        self.roles.fleet.sync(self.roles.trainer, 0)
        self.lengths: list[float] = []

    def step(self) -> None:
        prompts = []
        for i in range(N_PROMPTS):
            sample, prompt = encode(self.family, self.setting, N_PROMPTS * self.steps + i)
            prompts.append(Encoded(sample, ray.put(prompt), prompt.length, prompt.cost))
        answers = self.roles.fleet.generate(prompts, Sampling(GROUP, 1.0, RESPONSE))
        groups = [group for group in answers if not isinstance(group, Refused)]
        rewards = [[Reward({"even": r}, r) for r in (reward_of(x.token_ids) for x in g)] for g in groups]
        _, stats = GrpoUpdate(self.cfg, self.roles.trainer)(0, Experience(prompts, groups, rewards))
        assert np.isfinite(stats["train/loss"])
        self.steps += 1
        self.roles.fleet.sync(self.roles.trainer, self.steps)
        self.lengths.append(_mean_length(groups))


def _mean_length(groups: Sequence[Sequence[Rollout]]) -> float:
    return float(np.mean([len(r.token_ids) for g in groups for r in g]))


def trl_trainer(model: Path, out: Path, setting: str, rounds: int, family: QwenVL) -> Any:
    """TRL's trainer on the same prompts; the frames are images."""
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoProcessor
    from trl import GRPOConfig, GRPOTrainer

    processor = AutoProcessor.from_pretrained(model)
    processor.chat_template = processor.tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{% else %}{{ part['text'] }}",
        "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}",
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": QUESTION}],
            "images": [Image.fromarray(f) for f in frames_of(setting, i)],
        }
        for i in range(N_PROMPTS * (WARMUP + rounds))
    ]
    config = GRPOConfig(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        per_device_train_batch_size=N_PROMPTS * GROUP,
        gradient_accumulation_steps=1,
        num_generations=GROUP,
        max_completion_length=RESPONSE,
        generation_kwargs={"suppress_tokens": list(family.banned_tokens)},  # its forward fails if they are sampled
        beta=0.0,
        loss_type="bnpo",  # the mean over all tokens of the batch, as grpo.loss_average: token
        shuffle_dataset=False,
        gradient_checkpointing=False,
        max_steps=WARMUP + rounds,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    reward = lambda completion_ids, **_: [reward_of(ids) for ids in completion_ids]  # noqa: E731
    reward.__name__ = "even"
    return GRPOTrainer(
        model=str(model),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )


def compare(model: Path, tmp: Path, setting: str, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of the counted steps of both sides, and the difference of the first losses."""
    from transformers import PrinterCallback, TrainerCallback

    seconds: dict[str, list[float]] = {"trl": [], "rlvid": []}
    rlvid = RlvidSide(model, tmp / f"logs-{setting}", setting)
    trainer = trl_trainer(model, tmp / "trl", setting, rounds, rlvid.family)
    trainer.remove_callback(PrinterCallback)
    initial = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    first: dict[str, Any] = {}

    class Turns(TrainerCallback):
        begin = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gc.collect()
            self.begin = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trl = time.perf_counter() - self.begin
            gc.collect()
            begin = time.perf_counter()
            rlvid.step()
            if state.global_step > WARMUP:
                seconds["trl"].append(trl)
                seconds["rlvid"].append(time.perf_counter() - begin)

    generate = trainer._generate_and_score_completions

    def remember(inputs: Any) -> Any:
        batch = generate(inputs)
        first.setdefault("batch", batch)
        return batch

    trainer._generate_and_score_completions = remember
    trainer.add_callback(Turns())
    trainer.train()
    log = trainer.state.log_history[0]
    # The loss that Trainer logs is rounded, so the first one is computed again on the initial weights.
    trl_loss, trl_norm = first_trl_loss(trainer, initial, first["batch"])
    loss, norm = first_loss(model, rlvid.family, setting, first["batch"])
    median = medians(seconds)
    n_tokens = encode(rlvid.family, setting, 0)[1].length
    print(
        f"{setting}: {n_tokens} prompt tokens; TRL {median['trl']:.3f} s, rlvid {median['rlvid']:.3f} s a step, ratio "
        f"{median_ratio(seconds['trl'], seconds['rlvid']):.2f}; completions {log['completions/mean_length']:.1f} and "
        f"{rlvid.lengths[0]:.1f} tokens; first loss {trl_loss:.8f} (logged {log['loss']}) and {loss:.8f}, gradient "
        f"norm {trl_norm:.6f} (logged {log['grad_norm']}) and {norm:.6f}",
        flush=True,
    )
    rlvid.roles.__exit__()
    return seconds, abs(trl_loss - loss)


def first_trl_loss(trainer: Any, initial: dict[str, torch.Tensor], batch: dict[str, Any]) -> tuple[float, float]:
    """TRL's own loss and gradient norm of its first batch, on the initial weights."""
    network = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(initial[name])
    network.zero_grad(set_to_none=True)
    loss = trainer.compute_loss(network, batch)
    loss.backward()
    return float(loss), _norm(network)


def first_loss(model: Path, family: QwenVL, setting: str, batch: dict[str, Any]) -> tuple[float, float]:
    """rlvid's loss and gradient norm of TRL's batch, on the initial weights."""
    policy = PackedPolicy(load_model(model, "float32"), family)
    family.__dict__["banned_tokens"] = ()  # TRL suppresses them in sampling, not in its log-probs
    lengths = batch["completion_mask"].sum(1)
    groups = []
    for i in range(N_PROMPTS):
        _, prompt = encode(family, setting, i)
        own = slice(GROUP * i, GROUP * (i + 1))
        theirs = batch["prompt_ids"][own.start][batch["prompt_mask"][own.start].bool()]
        image_pad = family.tokenizer.token_to_id("<|image_pad|>")
        theirs = torch.where(theirs == image_pad, family.video_token, theirs)
        assert theirs.tolist() == prompt.token_ids.tolist(), "both sides must see the same prompt"
        ids = tuple(
            row[:n].numpy().astype(np.int32)
            for row, n in zip(batch["completion_ids"][own], lengths[own].tolist(), strict=True)
        )
        n_tokens = [len(x) for x in ids]
        groups.append(
            Group(
                prompt,
                prompt.cost,
                ids,
                {
                    "weights": np.full(sum(n_tokens), 1 / float(lengths.sum()), dtype=np.float32),
                    "advantages": np.repeat(batch["advantages"][own].numpy(), n_tokens).astype(np.float32),
                },
                temperature=1.0,
            )
        )
    row = pack(groups)
    logprobs = policy(row)[0]
    old = iter(np.split(logprobs.detach().numpy(), np.cumsum([g.n_tokens for g in groups])[:-1]))
    groups = [group.with_tokens(rollout_logprobs=next(old)) for group in groups]  # the policy has not changed: ratio 1
    loss, _ = PolicyGradient(GrpoJobConfig.model_fields["grpo"].default)(logprobs, groups)
    loss.backward()
    return float(loss), _norm(policy)


def _norm(module: torch.nn.Module) -> float:
    return float(sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()
    require_trl()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torchvision_ops.ensure()
    result: dict[str, float] = {}
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        model = tiny_model(tmp / "model")
        start_ray()
        for setting in args.settings:
            seconds, difference = compare(model, tmp, setting, args.rounds)
            differences.append(difference)
            result |= {f"{side}_{setting}_s": value for side, value in medians(seconds).items()}
            result[f"ratio_{setting}"] = median_ratio(seconds["trl"], seconds["rlvid"])
        ray.shutdown()
    finish({**result, "first_loss_diff": max(differences)})


if __name__ == "__main__":
    main()
