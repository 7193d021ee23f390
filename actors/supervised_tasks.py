"""What a supervised job trains: answers, preference pairs, or a reward model.

A task says how a row of the manifest becomes a training group, what a step minimises, what an evaluation measures, and
under which names. Everything else is the worker's (actors/supervised_worker.py). Tasks are made by the driver and sent
to the workers, so nothing here imports torch before `start`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rlvid.config import DpoConfig, SftConfig
from rlvid.errors import SampleUnusable, UserError
from rlvid.evaluation.metrics import accuracy_metrics, rank_metrics
from rlvid.rewards.videoscore import RUBRIC_FOLDER, NoScore, Rubric
from rlvid.types import Preference, Prompt, Sample, Span

if TYPE_CHECKING:
    from actors.supervised_worker import Worker
    from rlvid.models.families.chat import ChatFamily
    from rlvid.models.heads import Head
    from rlvid.training.batch import Group
    from rlvid.training.objectives import Objective

LogProbs = npt.NDArray[np.float32]
Metrics = dict[str, float]
REFERENCE_FILE = "reference.safetensors"  # sample id -> reference log-probs [chosen tokens, rejected tokens]
SCORED_AT_A_TIME = 64  # pairs
ANSWERED_AT_A_TIME = 16  # prompts


@dataclass(frozen=True)
class Example:
    """A row of a manifest, and the texts that are trained or compared; none where the prompt itself is scored."""

    sample: Sample
    responses: tuple[str, ...] = ()

    @classmethod
    def of_answer(cls, sample: Sample) -> Example:
        return cls(sample, (sample.answer,))

    @classmethod
    def of_pair(cls, pair: Preference) -> Example:
        return cls(pair.sample, (pair.chosen, pair.rejected))


def group_of(prompt: Prompt, responses: Sequence[str], family: ChatFamily) -> Group[Prompt]:
    """Responses that share their prompt's forward and are never separated."""
    from rlvid.training.batch import Group

    ids = tuple(family.encode_answer(text) for text in responses)
    return Group(prompt, prompt.cost, ids, unit_size=max(1, len(ids)))


class Supervised:
    """Given answers: negative log-likelihood, a mean over the tokens of the mini-batch. The base of the other tasks.

    All workers call `start`, `batch` and `score` together, `batch` and `score` with at least one group each.
    """

    names: Mapping[str, str] = {"loss": "loss"}  # statistic of `Learner.step` -> metric
    merges_media = False  # conversations about the same media share the forward of what they begin with

    @property
    def head(self) -> Head | None:
        """Of a reward model whose scores are numbers, not text."""
        return None

    def start(self, worker: Worker) -> None:
        """Called once the worker has its learner."""
        self.worker = worker

    def group(self, prompt: Prompt, example: Example) -> Group[Prompt]:
        return group_of(prompt, example.responses, self.worker.family)

    def batch(self, step: int, groups: list[Group[Prompt]]) -> tuple[list[Group[Prompt]], Objective, Metrics]:
        """This rank's groups with the arrays of the objective, the objective, and metrics of its own."""
        from rlvid.training import objectives
        from rlvid.training.shared_media import TRAINED, merged, with_trained

        groups = [with_trained(group) for group in groups]
        if self.merges_media and self.worker.cfg.train.shared_prefix:
            groups = merged(groups)
        (n_tokens,) = self.worker.sum(sum(float(g.tokens[TRAINED].sum()) for g in groups))
        return [g.with_tokens(weights=g.tokens[TRAINED] / n_tokens) for g in groups], objectives.Supervised(), {}

    def score(self, groups: list[Group[Prompt]]) -> list[Any]:
        """What an evaluation keeps of each held-out group: small values that can be pickled."""
        return [(-float(own.sum()), len(own)) for own in self.worker.learner.outputs(groups)]

    def summarize(self, examples: Sequence[Example], scored: Sequence[Any]) -> Metrics:
        """Metrics of an evaluation, from what `score` kept of each example."""
        loss, tokens = np.sum(scored, axis=0)
        return {"loss": float(loss / tokens), "n": float(len(scored))}

    def save(self, folder: Path) -> None:
        """Add to the exported checkpoint; rank 0 alone."""


class Answers(Supervised):
    """Given answers, and earlier turns of the assistant, in one forward of the conversation.

    Evaluated by their loss, and by their accuracy: the share of samples whose greedy answer is the given one. That is
    so where each token of the answer is the most likely one after those before it, which the forward of the loss shows.
    """

    names: Mapping[str, str] = {"loss": "loss", "tokens": "train/tokens", "rows": "train/rows", "fill": "train/fill"}
    merges_media = True

    def __init__(self, cfg: SftConfig):
        self._cfg = cfg

    def group(self, prompt: Prompt, example: Example) -> Group[Prompt]:
        group = super().group(prompt, example)
        return replace(group, in_prompt=trained_turns(example.sample, prompt, self._cfg.loss))

    def score(self, groups: list[Group[Prompt]]) -> list[Any]:
        of_groups = zip(groups, self.worker.learner.outputs(groups, both=True), strict=True)
        return [(-float(own[:, 0].sum()), len(own), bool(own[-len(g.responses[0]) :, 1].all())) for g, own in of_groups]

    def summarize(self, examples: Sequence[Example], scored: Sequence[Any]) -> Metrics:
        accuracy = accuracy_metrics([one[2] for one in scored], [e.sample.problem_type for e in examples])
        return super().summarize(examples, [one[:2] for one in scored]) | accuracy


def trained_turns(sample: Sample, prompt: Prompt, loss: str) -> tuple[Span, ...]:
    """Runs of the prompt's tokens that are trained; `loss` is `sft.loss`.

    Raises:
        SampleUnusable: the chat template writes an earlier turn in another form than it was generated in.
    """
    if loss == "last":
        return ()
    turns = [message for message in sample.messages if message.role == "assistant"]
    chosen = [span for m, span in zip(turns, prompt.answered, strict=True) if loss == "all" or m.is_marked]
    if None in chosen:
        raise SampleUnusable(
            "the model's chat template writes an earlier answer in another form than it is generated in, so it cannot "
            "be trained inside the conversation: set sft.loss to last, and make a row of each turn to be trained"
        )
    return tuple(span for span in chosen if span is not None)


Task = Supervised


# --- preference pairs -------------------------------------------------------------------------------------------------


class Preferred(Supervised):
    """Pairs: DPO and its relatives, with the log-probs of a reference model.

    Args:
        reference: checkpoint folder of the reference.
        is_start: the reference is the checkpoint that training starts from.

    Raises:
        UserError: kto has no response to another prompt.
    """

    names: Mapping[str, str] = {
        "loss": "loss",
        "pair/loss": "preference/loss",
        "pair/chosen": "rewards/chosen",
        "pair/rejected": "rewards/rejected",
        "pair/margin": "rewards/margins",
        "pair/accuracy": "rewards/accuracies",
        "pair/logps_chosen": "logps/chosen",
        "pair/logps_rejected": "logps/rejected",
        "pair/length_chosen": "response/length_chosen",
        "pair/length_rejected": "response/length_rejected",
    }

    def __init__(self, cfg: DpoConfig, reference: Path, is_start: bool, pairs: Sequence[Preference]):
        if cfg.loss == "kto" and len({prompt_of(pair.sample) for pair in pairs}) < 2:
            raise UserError(
                "dpo.loss=kto compares each prompt with a response to another one, but all pairs have the same prompt: "
                "give pairs of at least two prompts, or choose another loss"
            )
        self.cfg, self.reference, self._is_start = cfg, reference.resolve(), is_start
        self._known: dict[str, LogProbs] = {}  # reference log-probs by sample id
        self._frozen: Any = None

    def start(self, worker: Worker) -> None:
        super().start(worker)
        # Adapters beside the reference's own weights: switched off, they leave the reference.
        self._is_own_reference = worker.cfg.model.lora is not None and self._is_start
        if self.cfg.needs_reference and self.cfg.reference == "precomputed":
            from safetensors.numpy import load_file

            worker.report("stage", "scoring all pairs with the reference")
            file = worker.plan.folder / REFERENCE_FILE
            if not file.exists():
                self._precompute(file)
            self._known = load_file(file)

    def batch(self, step: int, groups: list[Group[Prompt]]) -> tuple[list[Group[Prompt]], Objective, Metrics]:
        from rlvid.training import objectives

        n_pairs, n_tokens = self.worker.sum(len(groups), sum(len(g.responses[0]) for g in groups))
        metrics, kl = {"train/pairs": n_pairs}, 0.0
        if self.cfg.loss == "kto":
            kl = metrics["preference/kl"] = self._reference_point(step, groups)
        share = np.array([1 / n_tokens, 0], dtype=np.float32)  # the likelihood is the chosen response's
        weighted = [
            g.with_tokens(weights=np.repeat(share, [len(ids) for ids in g.responses]))
            for g in self._with_reference(groups)
        ]
        return weighted, objectives.Preferred(self.cfg, int(n_pairs), kl), metrics

    def score(self, groups: list[Group[Prompt]]) -> list[Any]:
        import torch

        from rlvid.training import objectives

        objective, scored = objectives.Preferred(self.cfg, 1), []
        groups = self._with_reference(groups, is_kept=True)
        for group, own in zip(groups, self.worker.learner.outputs(groups), strict=True):
            _, stats = objective(torch.from_numpy(own), [group.with_tokens(weights=np.zeros_like(own))])
            scored.append([float(stats[name]) for name in ("pair/accuracy", "pair/margin", "pair/loss")])
        return scored

    def summarize(self, examples: Sequence[Example], scored: Sequence[Any]) -> Metrics:
        """Implicit-reward accuracy: the share of pairs whose chosen response has the larger reward."""
        means = dict(zip(("accuracy", "margin", "loss"), np.mean(scored, axis=0).tolist(), strict=True))
        return means | {"n": float(len(scored))}

    # --- the reference

    def _with_reference(self, groups: list[Group[Prompt]], is_kept: bool = False) -> list[Group[Prompt]]:
        """The groups with their reference log-probs.

        Args:
            is_kept: remember them, of the held-out pairs.
        """
        if not self.cfg.needs_reference:
            return groups
        names = [g.prompt.sample_id for g in groups]
        known = self._known
        if self.worker.any(any(name not in known for name in names)):  # all ranks score together
            known = dict(zip(names, self._reference_logprobs(groups), strict=True))
            self._known |= known if is_kept else {}
        return [g.with_tokens(ref_logprobs=known[name]) for g, name in zip(groups, names, strict=True)]

    def _reference_point(self, step: int, groups: Sequence[Group[Prompt]]) -> float:
        """KTO's z0: the mean log-ratio, over all ranks, of responses to another prompt than their own, at least 0."""
        plan, family = self.worker.plan, self.worker.family
        places = {plan.train[i].sample.id: place for place, i in enumerate(plan.batch(step))}
        others = [other_response(plan.train, plan.batch(step), places[g.prompt.sample_id]) for g in groups]
        mismatched = [group_of(g.prompt, [other], family) for g, other in zip(groups, others, strict=True)]
        policy, reference = self.worker.learner.outputs(mismatched), self._reference_logprobs(mismatched)
        ratios = [float((p - r).sum()) for p, r in zip(policy, reference, strict=True)]
        if self.cfg.is_mean:
            ratios = [x / len(p) for x, p in zip(ratios, policy, strict=True)]
        total, n = self.worker.sum(sum(ratios), len(ratios))
        return max(0.0, total / n)

    def _reference_logprobs(self, groups: Sequence[Group[Prompt]]) -> list[LogProbs]:
        if self._is_own_reference:
            return self.worker.learner.reference_logprobs(groups)
        if self._frozen is None:
            from rlvid.training.frozen import FrozenPolicy

            cfg = self.worker.cfg
            self._frozen = FrozenPolicy(self.reference, self.worker.family, cfg.model, cfg.train)
        return list(self._frozen.logprobs(groups))

    def _precompute(self, file: Path) -> None:
        """Score all pairs once, spread over the ranks; rank 0 writes the file."""
        from safetensors.numpy import save_file

        scored = self.worker.by_sample(self.worker.chunks("all", SCORED_AT_A_TIME), self._reference_logprobs)
        if self.worker.rank == 0:
            part = file.with_suffix(".part")
            save_file(scored, part)
            part.replace(file)
        self.worker.sum(0)  # all ranks wait for the file
        self._frozen = None  # its memory is free while training


def prompt_of(sample: Sample) -> tuple[Any, ...]:
    """What makes two prompts the same."""
    return sample.media, sample.messages


def other_response(examples: Sequence[Example], batch: Sequence[int], place: int) -> str:
    """The chosen response of the next example of the mini-batch, cyclically, whose prompt is another than that of
    `batch[place]`; where the whole mini-batch has one prompt, of the next such example of the manifest."""
    own = prompt_of(examples[batch[place]].sample)
    manifest = range(batch[place] + 1, batch[place] + len(examples))
    candidates = itertools.chain(batch[place + 1 :], batch[:place], (i % len(examples) for i in manifest))
    return next(examples[i].responses[0] for i in candidates if prompt_of(examples[i].sample) != own)


# --- reward models ----------------------------------------------------------------------------------------------------


class RewardModel(Supervised):
    """Scores by dimension. Evaluated by their rank correlation with the held-out labels."""

    def __init__(self, rubric: Rubric):
        self.rubric = rubric

    @property
    def head(self) -> Head | None:
        return self.rubric.head

    def summarize(self, examples: Sequence[Example], scored: Sequence[Any]) -> Metrics:
        kept = [(s, e.sample.extra["labels"]) for e, s in zip(examples, scored, strict=True) if s is not None]
        metrics = rank_metrics([s for s, _ in kept], [labels for _, labels in kept], self.rubric.dims)
        return metrics | {"unparsed": float(len(scored) - len(kept))}

    def save(self, folder: Path) -> None:
        self.rubric.save(folder / RUBRIC_FOLDER)


class Regression(RewardModel):
    """A number per dimension from a head on the prompt's last token."""

    names: Mapping[str, str] = {"loss": "loss", "error": "train/error"}

    def group(self, prompt: Prompt, example: Example) -> Group[Prompt]:
        from rlvid.training.batch import Group

        labels = np.array(self.rubric.scores(example.sample.extra["labels"]), dtype=np.float32)
        return Group(prompt, prompt.cost, targets={"labels": labels})

    def batch(self, step: int, groups: list[Group[Prompt]]) -> tuple[list[Group[Prompt]], Objective, Metrics]:
        from rlvid.training import objectives

        return groups, objectives.Regression(int(self.worker.sum(len(groups))[0])), {}

    def score(self, groups: list[Group[Prompt]]) -> list[Any]:
        scores = self.worker.learner.outputs(groups)
        return [dict(zip(self.rubric.dims, own[0].tolist(), strict=True)) for own in scores]


class BradleyTerry(RewardModel):
    """One number from a head on a response's last token. Evaluated by the share of pairs in the right order."""

    names: Mapping[str, str] = {"loss": "loss", "pair/margin": "rewards/margins", "pair/accuracy": "rewards/accuracies"}

    def batch(self, step: int, groups: list[Group[Prompt]]) -> tuple[list[Group[Prompt]], Objective, Metrics]:
        from rlvid.training import objectives

        return groups, objectives.BradleyTerry(int(self.worker.sum(len(groups))[0])), {}

    def score(self, groups: list[Group[Prompt]]) -> list[Any]:
        return [bool(chosen > rejected) for chosen, rejected in self.worker.learner.outputs(groups)]

    def summarize(self, examples: Sequence[Example], scored: Sequence[Any]) -> Metrics:
        return accuracy_metrics(scored, [e.sample.problem_type for e in examples])


class ScoreText(RewardModel):
    """Scores as generated text. An answer that is not exactly in the form of scores is counted as unparsed."""

    def score(self, groups: list[Group[Prompt]]) -> list[Any]:
        from rlvid.rollout.hf_engine import PlainEngine

        worker, prompts = self.worker, [g.prompt for g in groups]
        learner, cfg = worker.learner, worker.cfg
        engine = PlainEngine(learner.policy.network, worker.family, learner.policy.most)
        scores: list[dict[str, float] | None] = []
        learner.engine.eval()
        for at in range(0, max(worker.gather(len(prompts))), ANSWERED_AT_A_TIME):
            part = prompts[at : at + ANSWERED_AT_A_TIME] or prompts[:1]  # all ranks answer together
            answers = engine.answers(part, cfg.rollout.max_tokens)
            scores += [self._parsed(worker.family.decode(answer.tolist())) for answer in answers]
        learner.engine.train()
        return scores[: len(prompts)]

    def _parsed(self, text: str) -> dict[str, float] | None:
        try:
            return self.rubric.parse(text)
        except NoScore:
            return None


REWARD_MODELS = {
    "regression": Regression,
    "bradley_terry": BradleyTerry,
    "generation": ScoreText,
    "thinking": ScoreText,
}
