"""Training on preference pairs: Ray Train workers, each around a `Learner`, fed by Ray Data.

Ray Train starts the workers, starts them anew from the newest checkpoint after a failure, and with a range of workers
uses as many as the cluster has room for. What a step trains on is a function of seed and step alone: rank r of n takes
every n-th pair of the step's batch, so neither a restart nor another number of workers changes the batches.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.numpy import load_file, save_file

from actors.actor_process import enter_process
from actors.supervised_plan import Event, PreferencePlan, Shards, TrainingRun
from rlvid.algorithms.schedule import lr_multiplier
from rlvid.data.ray_stream import open_prompt
from rlvid.errors import UserError
from rlvid.training.batch import Group
from rlvid.types import Preference, Prompt

if TYPE_CHECKING:
    from rlvid.models.families.chat import ChatFamily
    from rlvid.training.learner import Learner

STATE_FILE = "workers.json"
POLL_S = 0.05  # between two looks of the driver at what came
SILENCE_S = 60.0  # without news until the driver says so; steps that take long make it more patient
DRIVER_TIMEOUT_S = 60.0  # to write down what it was told
Scores = dict[str, npt.NDArray[np.float32]]  # pair id -> reference log-probs [chosen tokens, rejected tokens]
KEPT_BYTES = 2**30  # of held-out prompts that a worker keeps between evaluations


class PreferenceTraining:
    """The driver's side of one training. `events` yields what happens, until the end."""

    def __init__(self, plan: PreferencePlan):
        self._plan = plan
        # Ray Train looks for checkpoints where it runs: on the machine of the run folder.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(num_cpus=0, concurrency_groups={"fit": 1}, scheduling_strategy=here)(TrainingRun)
        self._run = actor.remote()

    def stop(self) -> None:
        """Ask the workers to end after the step under way, with a checkpoint."""
        self._run.stop.remote()

    def events(self) -> Iterator[Event]:
        """
        Raises:
            UserError: of a worker.
            Exception: that of a worker, after more failures than `train.max_failures`; its cause is Ray Train's account
                of all workers.
        """
        try:
            end = self._run.fit.remote(self._plan, self._run)
            heard_s, patience_s = time.monotonic(), SILENCE_S
            is_over = False
            while not is_over:
                is_over = bool(ray.wait([end], timeout=POLL_S)[0])
                events = ray.get(self._run.take.remote())
                silent_s = time.monotonic() - heard_s
                if events:
                    heard_s, patience_s = time.monotonic(), max(SILENCE_S, 3 * silent_s)
                elif silent_s > patience_s:
                    patience_s *= 2
                    yield "note", self._silence(silent_s)
                for kind, content in events:
                    if kind == "user error":
                        raise UserError(content)
                    yield kind, content
            error, cause = ray.get(end)
            if error is not None:
                raise error from cause
        finally:
            ray.kill(self._run)

    def _silence(self, seconds: float) -> str:
        return (
            f"nothing from the workers for {seconds:.0f} s; they may wait for room: placement.trainer_cpus for each, "
            f"placement.encode_cpus for each encoder. See `ray status` and {self._plan.folder / 'logs'}"
        )


# --- in the actor that runs Ray Train ---------------------------------------------------------------------------------


def make_trainer(plan: PreferencePlan, run: Any) -> TorchTrainer:
    """Ray Train's part: starts the workers, and starts them anew."""
    cfg = plan.cfg
    least, most = cfg.placement.trainer_workers, cfg.train.max_workers
    names = ["train", *(["held_out"] if plan.held_out else []), "all"]
    gpus = {"GPU": cfg.placement.gpus} if cfg.placement.gpus else {}
    return TorchTrainer(
        work,
        train_loop_config={"plan": plan, "run": run},
        scaling_config=ScalingConfig(
            num_workers=(least, most) if most and cfg.is_elastic else least,
            use_gpu=cfg.placement.gpus > 0,
            resources_per_worker={"CPU": cfg.placement.trainer_cpus} | gpus,
            elastic_resize_monitor_interval_s=cfg.train.resize_interval_s,
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=str(plan.folder),
            failure_config=FailureConfig(max_failures=cfg.train.max_failures),
        ),
        torch_config=TorchConfig(backend="nccl" if cfg.placement.gpus else "gloo"),
        datasets=dict.fromkeys(names, lambda: None),  # `Shards` makes them
        dataset_config=Shards(plan),
    )


# --- in the workers ---------------------------------------------------------------------------------------------------


def work(config: dict[str, Any]) -> None:
    """One worker, from the newest checkpoint to the exported policy."""
    plan, run = config["plan"], config["run"]
    try:
        Worker(plan, run).run()
    except UserError as e:  # no failure that another try would mend: the driver ends the run
        ray.get(run.put.remote(("user error", str(e))))
        if ray.train.get_context().get_world_size() > 1:
            raise  # the others wait in a collective


class Worker:
    """One rank of a preference training."""

    def __init__(self, plan: PreferencePlan, run: Any):
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.plan, self.cfg, self._run = plan, plan.cfg, run
        enter_process(plan.folder / "logs" / f"trainer-{self.rank}.log", self.cfg.placement.threads)
        if not self.cfg.placement.gpus:
            os.environ["DS_ACCELERATOR"] = "cpu"
        from rlvid.models.families import load_family
        from rlvid.training.learner import Learner

        self.family: ChatFamily = load_family(plan.model)
        self.learner: Learner = Learner(plan.model, self.family, self.cfg.model, self.cfg.train)
        self._held_out: list[Group[Prompt]] = []  # with their reference log-probs, once they have been scored
        self._stored: Scores | None = None
        self._frozen: Any = None

    def run(self) -> None:
        start = self._resume()
        self._make_reference()
        self._tell("started", {"world": self.world, "step": start})
        rows = self._rows("train")
        if start == 0:
            self._evaluate(0)
        step, is_stopping = start, False
        for step, pairs in self._steps(start):
            begin = time.monotonic()
            stats = self._train(step, self._groups(itertools.islice(rows, len(pairs)), self.plan.pairs))
            stats |= {"time/step": time.monotonic() - begin}
            is_stopping = self._agree(self._tell("step", {"step": step + 1, **stats}))
            done = step + 1
            if done % self.cfg.evaluate.every == 0 and done < self.cfg.train.steps:
                self._evaluate(done)
            if done % self.cfg.run.checkpoint_every == 0 or done == self.cfg.train.steps or is_stopping:
                self._checkpoint(done)
            if is_stopping:
                return
        self._evaluate(self.cfg.train.steps)
        self._export()

    def _steps(self, start: int) -> Iterator[tuple[int, list[int]]]:
        for step, items in itertools.groupby(self.plan.items(self.rank, self.world, start), key=lambda item: item[0]):
            yield step, [pair for _, pair in items]

    def _train(self, step: int, groups: list[Group[Prompt]]) -> dict[str, float]:
        """One optimizer step on this rank's share; nothing where a rank has no pair with readable clips."""
        from rlvid.training.objectives import Preferred

        cfg = self.cfg
        tokens = sum(len(g.responses[0]) for g in groups)
        n_pairs, n_tokens, empty = self._sum(len(groups), tokens, not groups)
        lr = cfg.train.lr * lr_multiplier(step, cfg.train.steps, cfg.train.warmup_steps, cfg.train.schedule)
        if empty:
            return {"train/pairs": n_pairs, "is_left_out": 1.0}
        groups = self._with_reference(groups)
        kl = self._reference_point(groups) if cfg.dpo.loss == "kto" else 0.0
        groups = [g.with_tokens(weights=_chosen_mask(g) / n_tokens) for g in groups]
        stats = self.learner.step(groups, Preferred(cfg.dpo, int(n_pairs), kl), lr)
        names = {
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
            "grad_norm": "train/grad_norm",
            "lr": "train/lr",
        }
        metrics = {name: stats[key] for key, name in names.items()} | {"train/pairs": n_pairs}
        return metrics | ({"preference/kl": kl} if cfg.dpo.loss == "kto" else {})

    def _evaluate(self, step: int) -> None:
        """Implicit-reward accuracy on the held-out pairs: the share whose chosen response has the larger reward."""
        if not self.plan.held_out:
            return
        import torch

        from rlvid.training.objectives import Preferred

        begin = time.monotonic()
        groups = self._held_out
        if not groups:
            groups = self._groups(self._rows("held_out"), self.plan.held_out)
            if not self._sum(not groups)[0]:
                groups = self._with_reference(groups)
        n, empty = self._sum(len(groups), not groups)
        if empty:
            self._tell("note", "no evaluation: a worker has no held-out pair with readable clips")
            return
        if self._sum(sum(g.prompt.patches.nbytes for g in groups) > KEPT_BYTES)[0] == 0:
            self._held_out = groups
        objective = Preferred(self.cfg.dpo, int(n))
        sums = [0.0, 0.0, 0.0]
        for group, own in zip(groups, self.learner.logprobs(groups), strict=True):
            _, stats = objective(torch.from_numpy(own), [group.with_tokens(weights=np.zeros_like(own))])
            for i, name in enumerate(("pair/accuracy", "pair/margin", "pair/loss")):
                sums[i] += float(stats[name])
        correct, margin, loss = self._sum(*sums)
        metrics = {"eval/accuracy": correct / n, "eval/margin": margin / n, "eval/loss": loss / n, "eval/n": n}
        self._tell("evaluation", {"step": step, **metrics, "time/evaluation": time.monotonic() - begin})

    # --- data

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        shard = ray.train.get_dataset_shard(name)
        return iter(shard.iter_rows()) if shard is not None else iter(())

    def _groups(self, rows: Iterator[dict[str, Any]], pairs: Sequence[Preference]) -> list[Group[Prompt]]:
        """Pairs as groups of two responses; those with a bad clip are reported and left out."""
        groups = []
        decodes = hits = 0
        for row in rows:
            index, prompt, outcome = open_prompt(row)
            decodes, hits = decodes + outcome.decodes, hits + outcome.cache_hits
            if prompt is None:
                self._run.put.remote(("bad clip", outcome.bad))
            else:
                groups.append(pair_group(prompt, pairs[index], self.family))
        self._run.put.remote(("clips", (decodes, hits)))
        return groups

    # --- reference

    def _make_reference(self) -> None:
        dpo = self.cfg.dpo
        if not dpo.needs_reference:
            return
        if dpo.reference == "precomputed":
            file = self.plan.folder / "reference.safetensors"
            if not file.exists():
                self._precompute(file)
            self._stored = load_file(file)
        elif not self._is_own_reference:
            self._frozen = self._load_frozen()

    @property
    def _is_own_reference(self) -> bool:
        """Adapters beside the reference's own weights: switched off, they leave the reference."""
        return self.cfg.model.lora is not None and self.plan.reference == self.plan.model

    def _load_frozen(self) -> Any:
        from rlvid.models.loading import load_model
        from rlvid.training.packing import PackedPolicy

        network = load_model(self.plan.reference, self.cfg.model.dtype)
        return PackedPolicy(network, self.family).eval().to(self.learner.device)

    def _precompute(self, file: Path) -> None:
        """Score all pairs once, spread over the ranks; rank 0 writes what they found."""
        import torch.distributed as dist

        pairs = (*self.plan.pairs, *self.plan.held_out)
        frozen = self._load_frozen()
        own: Scores = {}
        rows = self._rows("all")
        while chunk := list(itertools.islice(rows, 64)):
            groups = self._groups(iter(chunk), pairs)  # none where all their clips are bad
            for group, scores in zip(groups, self._score(frozen, groups) if groups else [], strict=True):
                own[group.prompt.sample_id] = scores
        parts: list[Scores] = [{}] * self.world
        dist.all_gather_object(parts, own)
        if self.rank == 0:
            part = file.with_suffix(".part")
            save_file({name: scores for scored in parts for name, scores in scored.items()}, part)
            part.replace(file)
        dist.barrier()

    def _score(self, policy: Any, groups: Sequence[Group[Prompt]]) -> list[npt.NDArray[np.float32]]:
        import torch

        from rlvid.training.micro_batches import score

        with torch.no_grad():
            return score(lambda row: policy(row.to(self.learner.device))[0], groups, self.cfg.train.micro_batch_tokens)

    def _reference_logprobs(self, groups: Sequence[Group[Prompt]]) -> list[npt.NDArray[np.float32]]:
        if self._frozen is not None:
            return self._score(self._frozen, groups)
        return self.learner.reference_logprobs(groups)

    def _with_reference(self, groups: list[Group[Prompt]]) -> list[Group[Prompt]]:
        """The groups with their reference log-probs."""
        if not self.cfg.dpo.needs_reference:
            return groups
        if self._stored is not None:
            scores = [self._stored[g.prompt.sample_id] for g in groups]
        else:
            scores = self._reference_logprobs(groups)
        return [g.with_tokens(ref_logprobs=s) for g, s in zip(groups, scores, strict=True)]

    def _reference_point(self, groups: Sequence[Group[Prompt]]) -> float:
        """KTO's z0: the mean log-ratio of responses to other prompts than their own, at least 0."""
        mismatched = []
        for group, other in zip(groups, [*groups[1:], groups[0]], strict=True):
            response = other.responses[0]
            mismatched.append(_group(group.prompt, (response,)))
        policy = self.learner.logprobs(mismatched)
        if self._stored is not None and self._frozen is None and not self._is_own_reference:
            self._frozen = self._load_frozen()  # what was stored are the pairs' own responses
        reference = self._reference_logprobs(mismatched)
        ratios = [float((p - r).sum()) for p, r in zip(policy, reference, strict=True)]
        if self.cfg.dpo.is_mean:
            ratios = [x / len(p) for x, p in zip(ratios, policy, strict=True)]
        total, n = self._sum(sum(ratios), len(ratios))
        return max(0.0, total / n)

    # --- checkpoints

    def _resume(self) -> int:
        newest = self.plan.checkpoints.newest()
        if newest is None:
            return 0
        state = json.loads((newest.path / STATE_FILE).read_text())
        if self.cfg.train.zero_stage and state["world"] != self.world:
            raise UserError(
                f"{newest.path} was written by {state['world']} workers: ZeRO {self.cfg.train.zero_stage} cannot go "
                f"on with {self.world}; set placement.trainer_workers={state['world']}"
            )
        if newest.step > self.cfg.train.steps:
            raise UserError(
                f"{self.plan.folder} is at step {newest.step} already, train.steps={self.cfg.train.steps} lies before "
                f"it; give another run.dir, or more steps"
            )
        self.learner.load(newest.path)
        return newest.step

    def _checkpoint(self, step: int) -> None:
        """All ranks write into one folder, rank 0 opens and closes it."""
        import torch.distributed as dist

        begin = time.monotonic()
        if self.rank == 0:  # a run that is killed now goes on from here: the steps before must stand in its metrics
            while not ray.get(self._run.is_done.remote()) and time.monotonic() < begin + DRIVER_TIMEOUT_S:
                time.sleep(0.02)
        writing = self.plan.checkpoints.writing(step, self.cfg.run.keep_checkpoints)
        folder = [str(writing.__enter__()) if self.rank == 0 else ""]
        dist.broadcast_object_list(folder, src=0)
        self.learner.save(Path(folder[0]))
        dist.barrier()
        if self.rank == 0:
            (Path(folder[0]) / STATE_FILE).write_text(json.dumps({"world": self.world}))
            writing.__exit__(None, None, None)
        dist.barrier()
        self._tell("checkpoint", {"step": step, "seconds": time.monotonic() - begin})

    def _export(self) -> None:
        part = self.plan.out.with_name(self.plan.out.name + ".part")
        self.learner.export(part, self.plan.model)
        if self.rank == 0:
            shutil.rmtree(self.plan.out, ignore_errors=True)  # of a run that was killed before its metrics were written
            part.rename(self.plan.out)

    # --- words between ranks and to the driver

    def _tell(self, kind: str, content: Any) -> bool:
        """Rank 0 tells the driver; returns whether the driver wants to stop (on rank 0)."""
        return self.rank == 0 and bool(ray.get(self._run.put.remote((kind, content))))

    def _agree(self, is_stopping: bool) -> bool:
        return bool(self._sum(is_stopping)[0])

    def _sum(self, *values: float) -> list[float]:
        import torch
        import torch.distributed as dist

        total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.learner.device)
        dist.all_reduce(total)
        return [float(v) for v in total]


def pair_group(prompt: Prompt, pair: Preference, family: ChatFamily) -> Group[Prompt]:
    """A pair as a group of two responses that share their prompt's forward and are never parted."""
    return _group(prompt, (family.encode_answer(pair.chosen), family.encode_answer(pair.rejected)))


def _group(prompt: Prompt, responses: tuple[npt.NDArray[np.int32], ...]) -> Group[Prompt]:
    return Group(prompt, prompt.cost, responses, unit_size=len(responses))


def _chosen_mask(group: Group[Prompt]) -> npt.NDArray[np.float32]:
    lengths = [len(ids) for ids in group.responses]
    return np.repeat(np.array([1.0, 0.0], dtype=np.float32), lengths)
