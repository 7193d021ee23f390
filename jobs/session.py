"""What every job shares: run folder, numbers, samples, the checkpoint to start from, clips; and a clean end."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

import ray

from actors.actor_process import start_ray
from actors.clip_store import ClipStore, Encoded
from actors.roles import Team
from rlvid.config import DpoJobConfig, IsrtJobConfig, JobConfig, RewardModelJobConfig, WarmStartConfig
from rlvid.data.manifest import load_manifest
from rlvid.data.order import batch_indices
from rlvid.data.preferences import load_preferences
from rlvid.data.splits import check_disjoint
from rlvid.errors import BadClip, UserError
from rlvid.models.families import load_family
from rlvid.models.families.chat import ChatFamily
from rlvid.reporting.checkpoints import Checkpoints
from rlvid.reporting.console import Console
from rlvid.reporting.report.page import write_report
from rlvid.reporting.run_folder import RunFolder
from rlvid.reporting.tracker import Tracker
from rlvid.rewards.videoscore import NoScore, Rubric
from rlvid.synthetic.lessons import make_lessons
from rlvid.synthetic.moving_shapes import make_synthetic, pairs_of
from rlvid.types import Preference, Sample

STATE_FILE = "job.json"
WARM_START_STEP = "warm_start_step"  # in a checkpoint's state: a warm start is under way, so many steps are done


class Session:
    """One job on one run folder. Use as a context manager; leaving it stops Ray and writes the report."""

    train: list[Sample]
    held_out: list[Sample]
    pairs: list[Preference]  # of a job on preferences; `train` and `held_out` are their samples
    held_out_pairs: list[Preference]
    warm_up: list[Sample]  # of the warm start; those of `train` unless it has data of its own
    model: Path
    family: ChatFamily
    clips: ClipStore

    def __init__(self, cfg: JobConfig, job: str):
        self.cfg = cfg
        self.job = job
        self.console = Console()
        self.folder = RunFolder(cfg.run.dir)
        self.times: dict[str, float] = defaultdict(float)  # seconds per stage since `take_times`
        self.started_s = time.monotonic()
        self.interrupted = False
        self.state: dict[str, Any] = {}  # what a checkpoint keeps beside weights and optimizer
        self._saved_step = -1
        self._ahead: tuple[tuple[int, int, bool], list[Future[Encoded | None]]] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # what was opened is closed again if a later part fails
            stack.enter_context(self.console)
            stack.enter_context(self.folder.start(self.cfg, self.job))
            self._load_data()
            self._find_model()
            stack.callback(self._write_report)
            if "RAY_ADDRESS" in os.environ and not self.cfg.run.dir.is_absolute():
                self.console.message(
                    "run.dir is relative: in a submitted job it lies in Ray's copy of the working folder"
                )
            start_ray()
            stack.callback(ray.shutdown)
            n_clips = len({path for s in (*self.train, *self.held_out, *self.warm_up) for path in s.videos})
            self.clips = ClipStore(self.cfg, self.model, n_clips, self._quarantine)
            stack.callback(self.clips.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]  # the three of the context protocol

    def open_tracker(self) -> Tracker:
        """Open it after the run folder was rewound to where the run goes on."""
        tracker = Tracker(self.folder, self.cfg.run, self.cfg.model_dump(mode="json"))
        return self._stack.enter_context(tracker)

    def samples(self, start: int, count: int, is_warm_up: bool = False) -> list[Sample]:
        """Training samples at positions [start, start + count) of the endless shuffled stream."""
        rows = self.warm_up if is_warm_up else self.train
        return [rows[i] for i in batch_indices(len(rows), self.cfg.seed, start, count)]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of a step."""
        self.console.working(name)
        begin = time.monotonic()
        yield
        self.times[name] += time.monotonic() - begin

    def take_times(self) -> dict[str, float]:
        """Seconds per stage since the last call, as metrics."""
        times = {f"time/{name}": seconds for name, seconds in self.times.items()}
        self.times.clear()
        return times

    def next_batch(self, step: int, size: int, offset: int = 0, is_warm_up: bool = False) -> list[Encoded]:
        """Prompts of step `step`, which began to be encoded a step ago; those of the next begin now.

        The stream is a function of seed and position, so a resumed run goes on with the same data.
        """
        at = offset + step * size
        if self._ahead is None or self._ahead[0] != (at, size, is_warm_up):
            self._ahead = ((at, size, is_warm_up), self.clips.submit(self.samples(at, size, is_warm_up)))
        _, pending = self._ahead
        coming = self.samples(at + size, size, is_warm_up)
        self._ahead = ((at + size, size, is_warm_up), self.clips.submit(coming))
        return self.clips.collect(pending)

    def clip_metrics(self) -> dict[str, float]:
        """Clips decoded and found in the cache since the run began, resumed parts included."""
        before = self.state.get("clips", {})
        return {
            "video/decodes": before.get("decodes", 0) + self.clips.decodes,
            "video/cache_hits": before.get("cache_hits", 0) + self.clips.cache_hits,
            "video/bad": len(self.clips.bad),
        }

    def resume(self, team: Team) -> int:
        """Take up the newest complete checkpoint, if there is one; returns the first step that is still to do."""
        checkpoint = self.folder.checkpoints.newest()
        if checkpoint is None:
            self.folder.rewind(None)
            return 0
        self.state = json.loads((checkpoint.path / STATE_FILE).read_text())
        ranks, was = self.cfg.placement.trainer_workers, self.state.get("trainer_workers", 1)
        if self.cfg.train.zero_stage and ranks != was:
            raise UserError(
                f"{checkpoint.path} was written by {was} trainer ranks: ZeRO {self.cfg.train.zero_stage} cannot go "
                f"on with "
                f"{ranks}; set placement.trainer_workers={was}"
            )
        if checkpoint.step > self.cfg.train.steps:
            raise UserError(
                f"{self.folder.dir} is at step {checkpoint.step} already, train.steps={self.cfg.train.steps} lies "
                f"before it; "
                f"give another run.dir, or more steps"
            )
        team.trainer.load(checkpoint.path.resolve())
        self._saved_step = checkpoint.step
        warm_start_step = self.state.get(WARM_START_STEP)
        if warm_start_step is None:
            self.folder.rewind(checkpoint.step)
            self.console.message(f"going on after step {checkpoint.step} ({checkpoint.path})")
        else:
            self.folder.rewind(warm_start_step, phase="warm_start")
            self.console.message(f"going on after step {warm_start_step} of the warm start ({checkpoint.path})")
        return checkpoint.step

    def checkpoint(self, step: int, team: Team) -> None:
        """Write weights, optimizer and this job's state, whole or not at all."""
        with self.stage("checkpoint"), self.folder.checkpoints.writing(step, self.cfg.run.keep_checkpoints) as folder:
            team.trainer.save(folder.resolve())
            metrics = self.clip_metrics()
            clips = {"decodes": metrics["video/decodes"], "cache_hits": metrics["video/cache_hits"]}
            (folder / STATE_FILE).write_text(
                json.dumps({**self.state, "clips": clips, "trainer_workers": self.cfg.placement.trainer_workers})
            )
        self._saved_step = step
        write_report(self.folder)

    def checkpoint_if_due(self, step: int, team: Team) -> None:
        if step % self.cfg.run.checkpoint_every == 0 or self.interrupted:
            self.checkpoint(step, team)

    def checkpoint_last(self, team: Team) -> None:
        """The checkpoint of the last step, unless it is there. Comes before what may still fail, the evaluation."""
        if not self.interrupted and self._saved_step != self.cfg.train.steps:
            self.checkpoint(self.cfg.train.steps, team)

    def finish(self, team: Team, result: Mapping[str, Any]) -> dict[str, Any]:
        """Exported policy and report; or, after Ctrl-C, how to go on."""
        self.end_if_interrupted()
        team.trainer.export((self.folder.dir / "policy").resolve())
        return {**result, "steps": self.cfg.train.steps, **self.ending()}

    def ending(self) -> dict[str, Any]:
        """What every job's result ends with."""
        return {
            "seconds": round(time.monotonic() - self.started_s, 1),
            "report": str(self.folder.report_file),
        }

    def end_if_interrupted(self, checkpoints: Checkpoints | None = None) -> None:
        """After Ctrl-C: say how to go on, and end.

        Args:
            checkpoints: of what was interrupted; None: the run's own.
        """
        if not self.interrupted:
            return
        newest = (checkpoints or self.folder.checkpoints).newest()
        where = (
            f"goes on from the last checkpoint, {newest.path}" if newest else "starts again, there is no checkpoint yet"
        )
        self.console.message(f"interrupted: the same rlvid command {where}")
        raise KeyboardInterrupt

    def require_training_data(self) -> None:
        if not self.train:
            raise UserError("data.train is empty: give a manifest, or data.synthetic to make a synthetic set")

    def steps(self, start: int, stop: int) -> Iterator[int]:
        """Step numbers [start, stop). Ctrl-C ends the loop after the step under way; a second one stops at once."""
        with self.interruptible():
            for step in range(start, stop):
                yield step
                if self.interrupted:
                    return

    @contextmanager
    def interruptible(self, on_interrupt: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Ctrl-C sets `interrupted` and calls `on_interrupt`; a second one stops at once."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            self.console.message("stopping after this step; press Ctrl-C again to stop at once")
            on_interrupt()

        handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _load_data(self) -> None:
        data = self.cfg.data
        train, held_out = data.train, data.eval
        if train is None and data.synthetic is not None:
            self.console.message(f"making {data.synthetic.train} + {data.synthetic.eval} synthetic clips")
            train, made = make_synthetic(self.folder.dir / "data", data.synthetic, self.cfg.seed)
            held_out = held_out or made
            if self._has_pairs:
                train, held_out = pairs_of(train), pairs_of(made) if held_out == made else held_out
        how = data.root, data.system_prompt, data.suffix
        if self._has_pairs:
            self.pairs = load_preferences(train, *how) if train else []
            self.held_out_pairs = load_preferences(held_out, *how) if held_out else []
            self.train, self.held_out = [p.sample for p in self.pairs], [p.sample for p in self.held_out_pairs]
        else:
            self.train = self._graded(load_manifest(train, *how, self._needs_answers)) if train else []
            self.held_out = self._graded(load_manifest(held_out, *how, self._needs_answers)) if held_out else []
        warm = getattr(self.cfg, "warm_start", WarmStartConfig())
        self.warm_up, lessons = self.train, warm.data
        if warm.data is not None and warm.steps:
            self.warm_up = load_manifest(warm.data, *how)
        elif isinstance(self.cfg, IsrtJobConfig) and data.synthetic and train and warm.steps:
            lessons = make_lessons(train)
            self.warm_up = load_manifest(lessons, data.root, data.system_prompt, suffix="")  # prompts are complete
        check_disjoint(self.train, self.held_out)
        check_disjoint(self.warm_up, self.held_out)
        self.folder.record(data={str(path): _sha256(path) for path in (train, held_out, lessons) if path})

    @property
    def _has_pairs(self) -> bool:
        if isinstance(self.cfg, RewardModelJobConfig):
            return self.cfg.reward_model.kind == "bradley_terry"
        return isinstance(self.cfg, DpoJobConfig)

    @property
    def _needs_answers(self) -> bool:
        """A reward model learns labels; only where it reasons first are its answers given."""
        return not isinstance(self.cfg, RewardModelJobConfig) or self.cfg.reward_model.kind == "thinking"

    def _graded(self, samples: list[Sample]) -> list[Sample]:
        """Samples as a reward model takes them. One that has no scores is refused alone, with the reason."""
        if not isinstance(self.cfg, RewardModelJobConfig):
            return samples
        graded = []
        for sample in samples:
            try:
                graded.append(Rubric.of(self.cfg).graded(sample))
            except NoScore as e:
                self.folder.append_refused(sample.id, str(e))
                self.console.message(f"refused, left out: {sample.id}: {e}")
        return graded

    def _find_model(self) -> None:
        model = self.cfg.model
        if model.path is not None:
            self.model = model.path
        else:
            self.model = self.folder.dir / "model"
            if not self.model.exists():
                assert model.tiny is not None  # JobConfig checks it
                from rlvid.models.tiny import make_tiny

                self.console.message(f"making a tiny random {model.tiny.family}")
                texts = texts_of(self.warm_up or self.held_out, getattr(self, "pairs", ()))
                make_tiny(self.model, model.tiny, texts, self.cfg.seed)
        self.family = load_family(self.model)
        weights = sorted(self.model.glob("*.safetensors"))
        if not weights:
            raise UserError(f"model.path: {self.model} holds no *.safetensors weights")
        template = hashlib.sha256(self.family.chat_template.encode()).hexdigest()
        self.folder.record(model={p.name: _sha256(p) for p in weights}, prompt_templates={"chat": template})

    def _quarantine(self, path: str, reason: str) -> None:
        self.folder.append_bad_clip(BadClip(path, reason))
        self.console.message(f"bad clip, left out: {path}: {reason}")

    def _write_report(self) -> None:
        write_report(self.folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def texts_of(samples: Sequence[Sample], pairs: Sequence[Preference]) -> list[str]:
    """All that a tiny model's tokenizer has to know the words of."""
    texts = [text for s in samples for text in (*(m.text for m in s.messages), s.answer)]
    return texts + [text for pair in pairs for text in (pair.chosen, pair.rejected)]


def distinct(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The first `count` samples with different ids."""
    return list({s.id: s for s in samples}.values())[:count]
