"""Time of one DPO step of rlvid and of TRL's `DPOTrainer`, with the same weights, reference, pairs and frames.

`python -m benchmarks.dpo_vs_trl` (needs `pip install trl`, which rlvid does not depend on). Three settings: only text
(a tiny Qwen2), a few small frames, and a video prompt of more than 1,000 tokens (tiny Qwen2-VL). 4 pairs of responses
of about 30 tokens, sigmoid loss with beta 0.1 and a reference that differs from the policy, AdamW, float32. What makes
it fair:

- TRL does not support video in DPO, so both sides get still frames: TRL as images, rlvid as one-frame clips. The
  rendered prompts are the same text, and the token ids are asserted to be equal.
- Both start a step from decoded frames in memory, process them, score the reference and train, in one process with all
  cores. Gradient checkpointing and logging are off, the whole batch is one micro-batch.
- The steps of both sides alternate. The first step of each is not counted; figures are medians.

`loss_diff` is the largest absolute difference of the first losses on the initial weights, text and images; `grad_diff`
is the largest relative difference of the gradient norms.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.supervised_tasks import group_of
from benchmarks.grpo_vs_trl import frames_of
from benchmarks.harness import finish, median_ratio, medians, require_trl
from benchmarks.tiny import QUESTION, TEXTS, tiny_model
from rlvid.config import DpoConfig, ModelConfig, TrainConfig
from rlvid.models import torchvision_ops
from rlvid.models.families import load_family
from rlvid.models.families.chat import ChatFamily
from rlvid.models.families.qwen_vl import QwenVL
from rlvid.models.loading import load_model
from rlvid.training.batch import Group
from rlvid.training.micro_batches import score
from rlvid.training.objectives import Preferred
from rlvid.training.packing import PackedPolicy, pack
from rlvid.types import Clip, Medium, Message, Preference, Prompt, Sample

N_PAIRS, LR, BETA, WARMUP = 4, 1e-5, 0.1, 1
SETTINGS = ("text", "short", "long")  # frames of the last two: benchmarks.grpo_vs_trl.SETTINGS


def pair_of(setting: str, index: int) -> Preference:
    """Pair `index`: two responses of about 30 tokens."""
    n_frames = 0 if setting == "text" else len(frames_of(setting, index))
    media = tuple(Medium(f"{i}.mp4") for i in range(n_frames))
    sample = Sample(f"{setting}-{index}", media, (Message.about(media, QUESTION),), "")
    rng = np.random.default_rng([index, 1])
    words = " ".join(TEXTS).split()
    chosen, rejected = (" ".join(rng.choice(words, 16)) for _ in range(2))
    return Preference(sample, chosen, rejected)


def encode(family: ChatFamily, setting: str, index: int) -> Group[Prompt]:
    """The pair with each frame as a clip of its own."""
    pair = pair_of(setting, index)
    clips = [
        Clip(f"{pair.sample.id}-{i}", frame[None], np.zeros(1), np.zeros(1, np.int64), 1, 8.0, "random", "")
        for i, frame in enumerate(frames_of(setting, index) if setting != "text" else ())
    ]
    return group_of(family.encode(pair.sample, clips), (pair.chosen, pair.rejected), family)


class RlvidSide:
    """Learner and frozen reference, as a worker of `rlvid dpo` has them."""

    def __init__(self, model: Path, reference: Path, setting: str):
        from rlvid.training.learner import Learner  # imports DeepSpeed

        self.setting, self.family = setting, load_family(model)
        cfg = TrainConfig(lr=LR, micro_batch_tokens=65536, betas=(0.9, 0.999))
        self.learner = Learner(model, self.family, ModelConfig(path=model), cfg)
        self.reference = PackedPolicy(load_model(reference, "float32"), self.family).eval()
        self.steps = 0

    def groups(self, first: int) -> list[Group[Prompt]]:
        groups = [encode(self.family, self.setting, first + i) for i in range(N_PAIRS)]
        scores = score(self.reference, groups, 65536)
        return [
            g.with_tokens(ref_logprobs=own, weights=np.zeros_like(own)) for g, own in zip(groups, scores, strict=True)
        ]

    def step(self) -> None:
        stats = self.learner.step(self.groups(N_PAIRS * self.steps), Preferred(DpoConfig(beta=BETA), N_PAIRS), LR)
        assert np.isfinite(stats["loss"])
        self.steps += 1

    def first_loss(self, model: Path) -> tuple[float, float]:
        """Loss and gradient norm of the first batch on the initial weights."""
        policy = PackedPolicy(load_model(model, "float32"), self.family)
        groups = self.groups(0)
        loss, _ = Preferred(DpoConfig(beta=BETA), N_PAIRS)(policy(pack(groups))[0], groups)
        loss.backward()
        return float(loss), _norm(policy)


def trl_trainer(model: Path, reference: Path, out: Path, setting: str, rounds: int, family: ChatFamily) -> Any:
    """TRL's trainer on the same pairs, its prompts rendered by rlvid; the frames are images."""
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = []
    for i in range(N_PAIRS * (WARMUP + rounds)):
        pair = pair_of(setting, i)
        frames = frames_of(setting, i) if setting != "text" else ()
        question = [{"type": "video"} for _ in frames] + [{"type": "text", "text": QUESTION}]
        prompt = family.render([{"role": "user", "content": question}]).replace("<|video_pad|>", "<|image_pad|>")
        end = str(family.tokenizer.id_to_token(family.end_of_turn))
        row = {"prompt": prompt, "chosen": pair.chosen + end, "rejected": pair.rejected + end}
        rows.append(row | ({"images": [Image.fromarray(f) for f in frames]} if len(frames) else {}))
    config = DPOConfig(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        per_device_train_batch_size=N_PAIRS,
        gradient_accumulation_steps=1,
        beta=BETA,
        max_length=None,
        gradient_checkpointing=False,
        max_steps=WARMUP + rounds,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        data_seed=0,
    )
    auto = AutoModelForCausalLM if setting == "text" else AutoModelForImageTextToText
    return DPOTrainer(
        model=auto.from_pretrained(model, dtype=torch.float32),
        ref_model=auto.from_pretrained(reference, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=(AutoTokenizer if setting == "text" else AutoProcessor).from_pretrained(model),
    )


def compare(model: Path, reference: Path, tmp: Path, setting: str, rounds: int) -> tuple[dict[str, list[float]], Any]:
    """Seconds of the counted steps of both sides; differences of the first loss and gradient norm."""
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback, TrainerCallback

    seconds: dict[str, list[float]] = {"trl": [], "rlvid": []}
    rlvid = RlvidSide(model, reference, setting)
    trainer = trl_trainer(model, reference, tmp / "trl", setting, rounds, rlvid.family)
    trainer.remove_callback(PrinterCallback)
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)  # the same batches
    initial = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    first: dict[str, Any] = {}
    collating: list[float] = []

    class Turns(TrainerCallback):
        begin = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trl = time.perf_counter() - self.begin + collating.pop(0)
            gc.collect()
            begin = time.perf_counter()
            rlvid.step()
            if state.global_step > WARMUP:
                seconds["trl"].append(trl)
                seconds["rlvid"].append(time.perf_counter() - begin)
            gc.collect()

    collate = trainer.data_collator

    def timed_collate(examples: Any) -> Any:  # the data loader calls it before the step begins
        begin = time.perf_counter()
        batch = collate(examples)
        first.setdefault("batch", {name: t.clone() for name, t in batch.items()})
        collating.append(time.perf_counter() - begin)
        return batch

    trainer.data_collator = timed_collate
    trainer.add_callback(Turns())
    trainer.train()
    trl_loss, trl_norm = first_trl_loss(trainer, initial, first["batch"])
    check_prompts(rlvid, first["batch"])
    loss, norm = rlvid.first_loss(model)
    median = medians(seconds)
    print(
        f"{setting}: {encode(rlvid.family, setting, 0).prompt.length} prompt tokens; TRL {median['trl']:.3f} s, rlvid "
        f"{median['rlvid']:.3f} s a step, ratio {median_ratio(seconds['trl'], seconds['rlvid']):.2f}; first loss "
        f"{trl_loss:.8f} and {loss:.8f}, gradient norm {trl_norm:.6f} and {norm:.6f}",
        flush=True,
    )
    return seconds, (abs(trl_loss - loss), abs(trl_norm - norm) / trl_norm)


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


def check_prompts(rlvid: RlvidSide, batch: dict[str, Any]) -> None:
    """Assert that both sides get the same tokens in the same order."""
    for i, group in enumerate(rlvid.groups(0)):
        for row, response in ((i, 0), (N_PAIRS + i, 1)):
            theirs = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            if isinstance(rlvid.family, QwenVL):
                image_pad = rlvid.family.tokenizer.token_to_id("<|image_pad|>")
                theirs = torch.where(theirs == image_pad, rlvid.family.video_token, theirs)
            ours = [*group.prompt.token_ids.tolist(), *group.responses[response].tolist()]
            assert theirs.tolist() == ours, "both sides must see the same pair"


def _norm(module: torch.nn.Module) -> float:
    return float(sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None) ** 0.5)


def make_models(tmp: Path, family: str) -> tuple[Path, Path]:
    """Make a tiny policy and a reference that differs from it slightly."""
    model, reference = tiny_model(tmp / family, family=family), tiny_model(tmp / f"{family}-reference", family=family)
    from safetensors.torch import load_file, save_file

    file = reference / "model.safetensors"
    generator = torch.Generator().manual_seed(1)
    state = {k: t + 0.02 * t.std() * torch.randn(t.shape, generator=generator) if t.numel() > 1 else t
             for k, t in load_file(file).items()}  # fmt: skip
    save_file(state, file, metadata={"format": "pt"})
    return model, reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()
    require_trl()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torchvision_ops.ensure()
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    result: dict[str, float] = {}
    losses, norms = [], []
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp}/meet", rank=0, world_size=1)
        for setting in args.settings:
            models = make_models(tmp / setting, "qwen2" if setting == "text" else "qwen2_vl")
            seconds, (loss, norm) = compare(*models, tmp, setting, args.rounds)
            losses.append(loss)
            norms.append(norm)
            result |= {f"{side}_{setting}_s": value for side, value in medians(seconds).items()}
            result[f"ratio_{setting}"] = median_ratio(seconds["trl"], seconds["rlvid"])
        torch.distributed.destroy_process_group()
    finish({**result, "loss_diff": max(losses), "grad_diff": max(norms)})


if __name__ == "__main__":
    main()
