"""Time of one supervised step of rlvid and of transformers' `Trainer` with peft: the same LoRA, rows and frames.

`python -m benchmarks.sft_vs_trl`. Three settings on a tiny Qwen2-VL: `questions` (videos of about 1,000 tokens with
four questions each), `videos` and `images` (one question each). Answers of about 16 tokens, LoRA of rank 8 on the
language model, AdamW, float32. What makes it fair:

- Both start a step from decoded frames in memory, process every row by itself, and train, in one process with all
  cores. The token ids of both are asserted to be equal.
- Trainer pads the batch; it gets whichever is faster of one batch and a batch for each media with accumulated
  gradients. Gradient checkpointing and logging are off.
- The steps of both sides alternate. The first step of each is not counted; figures are medians.

`loss_diff` is the largest absolute difference of the first losses.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from actors.supervised_tasks import group_of
from benchmarks.harness import finish, median_ratio, medians
from benchmarks.tiny import TEXTS, family_of, frames_of, tiny_model
from rlvid.config import LoraConfig, ModelConfig, TrainConfig
from rlvid.models import torchvision_ops
from rlvid.models.families.qwen_vl import QwenVL
from rlvid.models.lora import peft_config
from rlvid.training.batch import Group
from rlvid.training.objectives import Supervised
from rlvid.training.shared_media import TRAINED, merged, with_trained
from rlvid.types import Clip, Medium, Message, Prompt, Sample

LR, WARMUP = 1e-4, 1
LORA = LoraConfig(rank=8, alpha=16)
IGNORED = -100  # label of a token that is not trained


@dataclass(frozen=True)
class Setting:
    """Of one batch."""

    kind: Literal["video", "image"]
    n_media: int
    questions: int  # about each
    n_tokens: int  # of each


SETTINGS = {
    "questions": Setting("video", 3, 4, 1000),
    "videos": Setting("video", 6, 1, 600),
    "images": Setting("image", 8, 1, 150),
}


@dataclass(frozen=True)
class Row:
    sample: Sample
    clip: Clip

    @property
    def frames(self) -> np.ndarray:
        return self.clip.frames


def rows_of(setting: Setting, step: int) -> list[Row]:
    """The rows of a step, with media of its own; those about the same media follow each other."""
    rows = []
    words = " ".join(TEXTS).split()
    for i in range(setting.n_media):
        frames = frames_of(setting.n_tokens, seed=step * setting.n_media + i)
        if setting.kind == "image":
            frames = frames[:1]
        media = (Medium(f"{step}-{i}", setting.kind),)
        clip = Clip(
            media[0].path, frames, np.arange(len(frames)) / 8, np.arange(len(frames)), len(frames), 8.0, "none", ""
        )
        for j in range(setting.questions):
            rng = np.random.default_rng([step, i, j])
            question, answer = (" ".join(rng.choice(words, n)) for n in (8, 12))
            rows.append(Row(Sample(f"{step}-{i}-{j}", media, (Message.about(media, question),), answer), clip))
    return rows


class RlvidSide:
    """Learner and groups, as a worker of `rlvid sft` with `sft.share_media` has them."""

    def __init__(self, model: Path, rows: Sequence[Sequence[Row]]):
        from rlvid.training.learner import Learner  # imports DeepSpeed

        self.rows, self.family, self.steps = rows, family_of(model), 0  # rows of each step
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # DeepSpeed's
        cfg = TrainConfig(lr=LR, micro_batch_tokens=65536, betas=(0.9, 0.999))
        self.learner = Learner(model, self.family, ModelConfig(path=model, lora=LORA), cfg)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # with them Trainer would add DistributedDataParallel
            del os.environ[name]
        self.first_loss = float("nan")

    def groups(self, step: int) -> list[Group[Prompt]]:
        rows = self.rows[step]
        prompts = [self.family.encode(row.sample, [row.clip]) for row in rows]
        groups = [
            with_trained(group_of(prompt, (row.sample.answer,), self.family))
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        total = sum(float(g.tokens[TRAINED].sum()) for g in groups)
        return [g.with_tokens(weights=g.tokens[TRAINED] / total) for g in merged(groups)]

    def step(self) -> None:
        loss = self.learner.step(self.groups(self.steps), Supervised(), LR)["loss"]
        self.first_loss = loss if self.steps == 0 else self.first_loss
        assert np.isfinite(loss)
        self.steps += 1


def collate(
    rows: Sequence[Row], processor: Any, family: QwenVL, kind: str, known: Mapping[str, tuple[list[int], int]]
) -> dict[str, torch.Tensor]:
    """A padded batch whose labels are the answers.

    Args:
        known: by sample id, the token ids and how many of them are the prompt's.
    """
    end = str(family.tokenizer.id_to_token(family.end_of_turn))
    texts = []
    for row in rows:
        parts = [{"type": kind}, {"type": "text", "text": row.sample.question}]
        texts.append(family.render([{"role": "user", "content": parts}]) + row.sample.answer + end)
    media: dict[str, Any] = {"videos": [[row.frames] for row in rows], "do_sample_frames": False, "do_resize": False}
    if kind == "image":
        media = {"images": [list(row.frames) for row in rows]}
    batch = processor(text=texts, padding=True, return_tensors="pt", **media)
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for i, row in enumerate(rows):
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        expected, n_prompt = known[row.sample.id]
        assert ids.tolist() == expected, "both sides must see the same row"
        begin = int(batch["attention_mask"][i].nonzero()[0])
        labels[i, begin + n_prompt : begin + len(ids)] = ids[n_prompt:]
    return {**batch, "labels": labels}


def trainer_of(
    model: Path, out: Path, setting: Setting, rows: Sequence[Sequence[Row]], is_accumulating: bool, family: QwenVL
) -> Any:
    """transformers' Trainer on the same rows in the same order."""
    n_steps, known = len(rows), {}
    for row in itertools.chain(*rows):
        prompt = family.encode(row.sample, [row.clip])
        known[row.sample.id] = ([*prompt.token_ids.tolist(), *family.encode_answer(row.sample.answer)], prompt.length)
    from peft import get_peft_model
    from torch.utils.data import Dataset, SequentialSampler
    from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

    class Rows(Dataset[Row]):
        def __len__(self) -> int:
            return n_steps * setting.n_media * setting.questions

        def __getitem__(self, index: int) -> Row:
            step, i = divmod(index, setting.n_media * setting.questions)
            return rows[step][i]

    network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    processor = AutoProcessor.from_pretrained(model)
    n_parts = setting.n_media if is_accumulating else 1
    arguments = TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=setting.n_media * setting.questions // n_parts,
        gradient_accumulation_steps=n_parts,
        max_steps=n_steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=0,
    )
    trainer = Trainer(
        model=get_peft_model(network, peft_config(LORA, family.no_lora)),
        args=arguments,
        train_dataset=Rows(),
        data_collator=lambda batch: collate(batch, processor, family, setting.kind, known),
    )
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    return trainer


def compare(
    model: Path, tmp: Path, name: str, rounds: int, is_accumulating: bool
) -> tuple[dict[str, list[float]], float]:
    """Seconds of the counted steps of both sides, and the difference of the first losses."""
    from transformers import PrinterCallback, TrainerCallback

    setting = SETTINGS[name]
    rows = [rows_of(setting, step) for step in range(WARMUP + rounds)]
    rlvid = RlvidSide(model, rows)
    trainer = trainer_of(model, tmp / "trainer", setting, rows, is_accumulating, rlvid.family)
    trainer.remove_callback(PrinterCallback)
    seconds: dict[str, list[float]] = {"trainer": [], "rlvid": []}

    class Turns(TrainerCallback):
        begin = time.perf_counter()  # of the batch, which the data loader makes before the step begins

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            theirs = time.perf_counter() - self.begin
            gc.collect()
            begin = time.perf_counter()
            rlvid.step()
            if state.global_step > WARMUP:
                seconds["trainer"].append(theirs)
                seconds["rlvid"].append(time.perf_counter() - begin)
            gc.collect()
            self.begin = time.perf_counter()

    losses: list[float] = []
    compute = trainer.compute_loss

    def noted(*args: Any, **kwargs: Any) -> Any:  # the log's loss is rounded
        loss = compute(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    trainer.compute_loss = noted
    trainer.add_callback(Turns())
    trainer.train()
    first = sum(losses[: trainer.args.gradient_accumulation_steps])
    median = medians(seconds)
    n_rows = setting.n_media * setting.questions
    print(
        f"{name}, {'accumulating' if is_accumulating else 'one batch'}: Trainer {median['trainer']:.3f} s, rlvid "
        f"{median['rlvid']:.3f} s a step of {n_rows} rows, ratio "
        f"{median_ratio(seconds['trainer'], seconds['rlvid']):.2f}; first loss {first:.8f} and {rlvid.first_loss:.8f}",
        flush=True,
    )
    return seconds, abs(first - rlvid.first_loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torchvision_ops.ensure()
    os.environ["DS_ACCELERATOR"] = "cpu"
    result: dict[str, float] = {}
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp}/meet", rank=0, world_size=1)
        model = tiny_model(tmp / "model")
        for name in args.settings:
            found = [compare(model, tmp, name, args.rounds, how) for how in (False, True)]
            seconds, _ = min(found, key=lambda one: medians(one[0])["trainer"])
            differences += [difference for _, difference in found]
            result |= {f"{side}_{name}_s": value for side, value in medians(seconds).items()}
            result[f"ratio_{name}"] = median_ratio(seconds["trainer"], seconds["rlvid"])
        torch.distributed.destroy_process_group()
    finish({**result, "loss_diff": max(differences)})


if __name__ == "__main__":
    main()
