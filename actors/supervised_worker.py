"""Supervised training: Ray Train workers, each around a `Learner` and a task, fed by Ray Data.

Ray Train starts the workers, restarts them from the newest checkpoint after a failure, and with a range of workers uses
as many as the cluster has room for. What a step trains on is a function of seed and step alone (`Plan.batch`). What is
trained, and how it is evaluated, is the task's (actors/supervised_tasks.py).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from actors.actor_process import enter_process
from actors.supervised_plan import Plan
from actors.supervised_tasks import Example
from rlvid.algorithms.schedule import lr_multiplier
from rlvid.data.encoding import Source
from rlvid.data.ray_stream import open_prompt, prompt_stream
from rlvid.errors import SampleUnusable, UserError
from rlvid.files import replace_folder, write_atomic
from rlvid.reporting.checkpoints import STATE_FILE, Unfinished, exports_after
from rlvid.types import Prompt

if TYPE_CHECKING:
    from rlvid.training.batch import Group

DRIVER_TIMEOUT_S = 60.0  # for the driver to write the events before a checkpoint
KEPT_BYTES = 2**30  # of held-out prompts that a worker keeps between evaluations


# --- in the actor that runs Ray Train ---------------------------------------------------------------------------------


def make_trainer(plan: Plan, run: Any) -> TorchTrainer:
    """Ray Train's part: starts and restarts the workers."""
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


class Shards(DataConfig):
    """The prompts of each worker, from the step on where training resumes."""

    def __init__(self, plan: Plan):
        super().__init__()
        self._plan = plan

    def configure(self, datasets: dict[str, Any], world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        plan, (name,) = self._plan, datasets
        newest = plan.checkpoints.newest()
        source, place = Source.of(plan.cfg, plan.model), plan.cfg.placement
        encoders = -(-place.encoders // world_size) if name == "train" else 1
        encode_cpus = 0.0 if plan.cfg.is_elastic else place.encode_cpus  # elastic workers may take every CPU there is
        examples = plan.examples(name)
        samples = ray.put([example.sample for example in examples])
        shards = []
        for rank in range(world_size):
            order = list(range(rank, len(examples), world_size))
            if name == "train":
                order = [i for _, i in plan.shares(rank, world_size, newest.step if newest else 0)]
            stream = prompt_stream(samples, order, source, encoders, encode_cpus).iterator() if order else None
            shards.append({name: stream})
        return shards


# --- in the workers ---------------------------------------------------------------------------------------------------


def work(config: dict[str, Any]) -> None:
    """One worker, from the newest checkpoint to the exported model."""
    run, context = config["run"], ray.train.get_context()
    try:
        Worker(config["plan"], run).work()
    except UserError as e:  # another try would not fix it: the driver ends the run
        ray.get(run.put.remote(("user error", str(e))))
        if context.get_world_size() > 1:
            raise  # the others wait in a collective
    except Exception as e:
        ray.get(run.fail.remote(context.get_world_rank(), f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}"))
        raise


class Best:
    """The best evaluation so far, by `evaluate.best`. A file beside the exported model says which it is, so that a
    restart compares with it."""

    def __init__(self, plan: Plan):
        self._cfg, self._file = plan.cfg.evaluate, plan.out.with_name(f"{plan.out.name}.best.json")
        self.found: dict[str, Any] = {}  # its step, value and metric, once there is one
        if plan.out.exists() and plan.checkpoints.newest() is not None and self._file.exists():
            kept = json.loads(self._file.read_text())
            self.found = kept if kept["metric"] == self._cfg.best else {}

    def is_beaten(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation is better.

        Raises:
            UserError: it does not measure `evaluate.best`.
        """
        name = self._cfg.best
        if name is None:
            return False
        if name not in metrics:
            raise UserError(f"evaluate.best={name}: this job's evaluation measures {', '.join(sorted(metrics))}")
        value, sign = metrics[name], -1 if name == "loss" else 1
        # a rank correlation of constant columns is NaN
        return math.isfinite(value) and (not self.found or sign * value > sign * self.found["value"])

    def replace(self, step: int, metrics: Mapping[str, float], is_written: bool) -> None:
        self.found = {"step": step, "value": metrics[str(self._cfg.best)], "metric": self._cfg.best}
        if is_written:
            write_atomic(self._file, json.dumps(self.found))

    def is_stale(self, step: int) -> bool:
        """Whether `evaluate.patience` is over."""
        if not (self._cfg.patience and self.found):
            return False
        return bool(step - self.found["step"] >= self._cfg.patience * self._cfg.every)


class Worker:
    """One rank of a supervised training.

    Attributes:
        learner, family, cfg, plan, rank, world: for the task, as are the methods below "for the task".
    """

    def __init__(self, plan: Plan, run: Any):
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.plan, self.cfg, self.task, self._run = plan, plan.cfg, plan.task, run
        self.report("stage", "loading the model")
        enter_process(plan.folder / "logs" / f"trainer-{self.rank}.log", self.cfg.placement.threads)
        if not self.cfg.placement.gpus:
            os.environ["DS_ACCELERATOR"] = "cpu"
        from rlvid.models.families import load_family
        from rlvid.training.learner import Learner

        self.family = load_family(plan.model)
        self.learner = Learner(plan.model, self.family, self.cfg.model, self.cfg.train, self.task.head)
        self._unfinished: Unfinished | None = None
        self._kept: list[list[Group[Prompt]]] = []  # the held-out groups, if they are small enough
        self._best: Best = self.gather(Best(plan) if self.rank == 0 else None)[0]

    def work(self) -> None:
        newest = self.plan.checkpoints.newest()
        if newest is not None:
            self.learner.load(newest.path)
        start = newest.step if newest else 0
        self.task.start(self)
        if self.any(self.report("started", {"world": self.world, "step": start})):
            return
        self._evaluate(start)  # if the run was stopped between the checkpoint and it
        self.report("stage", "training")
        rows = self._rows("train")
        shares = self.plan.shares(self.rank, self.world, start)
        for step, share in itertools.groupby(shares, key=lambda item: item[0]):
            metrics = self._train(step, itertools.islice(rows, len(list(share))))
            done = step + 1
            is_stopping = self.any(self.report("step", {"step": done, **metrics}))
            is_last = done == self.cfg.train.steps
            self._end_checkpoint(is_waiting=False)
            if done % self.cfg.run.checkpoint_every == 0 or is_last or is_stopping:
                self._begin_checkpoint(done)
                if is_last or is_stopping or not self.cfg.run.checkpoint_in_background:
                    self._end_checkpoint()
            if is_stopping and not is_last:
                return
            if not is_last and not self.cfg.evaluate.best and exports_after(done, self.cfg.run):
                self._export()
            self._evaluate(done)
            if self._best.is_stale(done):
                self.report("note", f"stopped early: no evaluation since step {self._best.found['step']} is better")
                break
        self._end_checkpoint()
        if not self._best.found:
            self._export()

    def _train(self, step: int, rows: Iterator[dict[str, Any]]) -> dict[str, float]:
        """One optimizer step on this rank's share; none where a rank has no readable clip."""
        train, begin_s = self.cfg.train, time.monotonic()
        groups = self._groups(rows, self.plan.train)
        read_s = time.monotonic()
        if self.any(not groups):
            return {"is_left_out": 1.0}
        groups, objective, metrics = self.task.batch(step, groups)
        lr = train.lr * lr_multiplier(step, train.steps, train.warmup_steps, train.schedule)
        stats = self.learner.step(groups, objective, lr)
        names = {**self.task.names, "grad_norm": "train/grad_norm", "lr": "train/lr", "skipped": "train/skipped"}
        times = {"time/encode": read_s - begin_s, "time/step": time.monotonic() - begin_s}
        return metrics | {name: stats[key] for key, name in names.items()} | times

    def _evaluate(self, step: int) -> None:
        if not self.plan.is_evaluated_after(step):
            return
        begin_s = time.monotonic()
        self.report("stage", "evaluating")
        scored = self.by_sample(self._held_out(), self.task.score)
        examples = [e for e in self.plan.held_out if e.sample.id in scored]
        if examples:
            metrics = self.task.summarize(examples, [scored[e.sample.id] for e in examples])
            if self._best.is_beaten(metrics):  # all ranks have the same metrics
                self._export()
                self._best.replace(step, metrics, is_written=self.rank == 0)
            if self._best.found:
                metrics |= {"best": self._best.found["value"], "best_step": self._best.found["step"]}
            named = {f"eval/{name}": value for name, value in metrics.items()}
            self.report("evaluation", {"step": step, **named, "time/evaluation": time.monotonic() - begin_s})
        else:
            self.report("note", "no evaluation: no held-out sample has readable clips")
        self.report("stage", "training")

    # --- data

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        shard = ray.train.get_dataset_shard(name)
        return iter(shard.iter_rows()) if shard is not None else iter(())

    def _groups(self, rows: Iterator[dict[str, Any]], examples: Sequence[Example]) -> list[Group[Prompt]]:
        """Groups of the rows; those that cannot be used are reported and left out."""
        groups, decodes, hits = [], 0, 0
        for row in rows:
            index, prompt, outcome = open_prompt(row)
            decodes, hits = decodes + outcome.decodes, hits + outcome.cache_hits
            if prompt is None:
                assert outcome.bad is not None  # it says why there is no prompt
                self._run.put.remote(("set aside", (*outcome.bad, outcome.is_prompt_bad)))
                continue
            try:
                groups.append(self.task.group(prompt, examples[index]))
            except SampleUnusable as e:
                self._run.put.remote(("set aside", (examples[index].sample.id, str(e), True)))
        self._run.put.remote(("clips", (decodes, hits)))
        return groups

    def _held_out(self) -> Iterator[list[Group[Prompt]]]:
        """The parts of the held-out examples; kept for the next evaluation if they are small."""
        if self._kept:
            yield from self._kept
            return
        kept: list[list[Group[Prompt]]] = []
        n_bytes = 0
        for groups in self.chunks("held_out", self.cfg.evaluate.batch_size):
            n_bytes += sum(g.prompt.patches.nbytes for g in groups)
            if n_bytes <= KEPT_BYTES:
                kept.append(groups)
            yield groups
        self._kept = [] if self.any(n_bytes > KEPT_BYTES) else kept

    # --- for the task

    def chunks(self, name: str, size: int) -> Iterator[list[Group[Prompt]]]:
        """The groups of a data set in parts of up to `size` on each rank. All ranks get equally many parts, of at least
        one group: one without readable clips gets a group of another rank."""
        rows, examples = self._rows(name), self.plan.examples(name)
        largest_share = -(-len(examples) // self.world)
        for _ in range(0, largest_share, size):
            groups = self._groups(itertools.islice(rows, size), examples)
            if self.any(not groups):
                gathered = self.gather(groups[:1])  # by all ranks, those with groups too
                groups = groups or next((others for others in gathered if others), [])
            if groups:
                yield groups

    def by_sample(
        self, parts: Iterable[list[Group[Prompt]]], score: Callable[[list[Group[Prompt]]], Sequence[Any]]
    ) -> dict[str, Any]:
        """What `score` returns for each group, by the id of its sample, of all ranks. They call this together."""
        own: dict[str, Any] = {}
        for groups in parts:
            own |= {g.prompt.sample_id: value for g, value in zip(groups, score(groups), strict=True)}
        return {name: value for of_rank in self.gather(own) for name, value in of_rank.items()}

    def sum(self, *values: float) -> list[float]:
        """Sums over all ranks, which call this together."""
        import torch
        import torch.distributed as dist

        total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.learner.device)
        dist.all_reduce(total)
        return [float(v) for v in total]

    def any(self, value: bool) -> bool:
        """Whether it is true on any rank. All ranks call this together."""
        return self.sum(value)[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, which call this together."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def report(self, kind: str, content: Any) -> bool:
        """Rank 0 reports to the driver; returns whether the driver wants to stop (on rank 0)."""
        return self.rank == 0 and bool(ray.get(self._run.put.remote((kind, content))))

    # --- checkpoints

    def _begin_checkpoint(self, step: int) -> None:
        """All ranks write into one folder; rank 0 opens and closes it."""
        self._end_checkpoint()
        with ExitStack() as stack:
            opened, state = None, {}
            if self.rank == 0:
                state = {**self._settled_state(), "trainer_workers": self.world}
                opened = stack.enter_context(self.plan.checkpoints.writing(step, self.cfg.run.keep_checkpoints))
            folder = self.gather(opened)[0]
            self.learner.begin_save(folder)
            self._unfinished = Unfinished(step, folder, state, stack.pop_all())

    def _end_checkpoint(self, is_waiting: bool = True) -> None:
        """Complete the checkpoint that is being written, if there is one.

        Args:
            is_waiting: off, only if all of it is on the disk.
        """
        unfinished = self._unfinished
        if unfinished is None or (not is_waiting and self.any(not self.learner.is_saved)):
            return
        self._unfinished = None
        with unfinished.files:
            self.learner.end_save()
            if self.rank == 0:
                (unfinished.folder / STATE_FILE).write_text(json.dumps(unfinished.state))
        self.sum(0)  # no rank continues before the checkpoint is complete
        self.report("checkpoint", unfinished.step)

    def _settled_state(self) -> Mapping[str, Any]:
        """The job's state once the driver has handled the events so far: a run that is killed after the checkpoint
        resumes from it, so its metrics must have the steps before."""
        deadline_s = time.monotonic() + DRIVER_TIMEOUT_S
        while (state := ray.get(self._run.settled_state.remote())) is None:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the driver has not written the metrics within {DRIVER_TIMEOUT_S:g} s")
            time.sleep(0.02)
        return dict(state)

    def _export(self) -> None:
        part = self.plan.out.with_name(self.plan.out.name + ".part")
        self.learner.export(part, self.plan.model)
        if self.rank == 0:
            self.task.save(part)
            replace_folder(part, self.plan.out)
