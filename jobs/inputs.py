"""What a run reads: its manifests, the model it starts from, and prompts in their order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.clip_store import ClipStore
from actors.gpu_weight_sync import weight_backend
from actors.placement import describe
from jobs.run import Run
from jobs.specs import JOBS, JobSpec, ManifestKind, Rows
from rlvid.config import DataConfig, JobConfig
from rlvid.data.manifest import count_media, load_manifest
from rlvid.data.mixing import balanced, mixed, shares_of
from rlvid.data.order import Strata, batch_indices
from rlvid.data.splits import check_disjoint
from rlvid.errors import BadClip, UserError
from rlvid.files import remembered_sha256
from rlvid.models.families import load_family
from rlvid.models.families.chat import ChatFamily
from rlvid.reporting.console import Console
from rlvid.rewards.part import check_samples
from rlvid.rewards.rules import check_rewards, make_parts
from rlvid.synthetic.moving_shapes import make_synthetic
from rlvid.types import Encoded, Preference, Sample

SHOWN = 10  # refused rows


@contextmanager
def open_job(cfg: JobConfig, job: str) -> Iterator[tuple[Run, Inputs]]:
    """The run folder and the inputs of a job. Ray starts last: mistakes in manifests and models are found before."""
    spec = JOBS[job]
    if spec.scored(cfg):
        check_rewards(cfg.rewards)
    with Run(cfg, job) as run:
        inputs = Inputs(cfg, spec, run)
        run.keep(inputs)
        with run.cluster(), inputs.reading():
            yield run, inputs


def describe_inputs(cfg: JobConfig, spec: JobSpec) -> list[str]:
    """Check manifests and model without making or starting anything, for `--dry-run`.

    Raises:
        UserError: what the job itself would find before it starts.
    """
    lines = describe(cfg, spec.roles(cfg)).splitlines()
    kind, splits = spec.load(cfg), {"data.train": "train", "data.eval": "eval"}
    rows = {key: loaded for key, split in splits.items() if (loaded := read_split(kind, cfg.data, split)).samples}
    for key, loaded in rows.items():
        refused = f", {len(loaded.refused)} refused" if loaded.refused else ""
        lines.append(f"{key}: {count_media(loaded.samples)}{refused}")
    if spec.scored(cfg):
        check_rewards(cfg.rewards)
    check_manifests(cfg, spec, *(rows.get(key, Rows()).samples for key in splits))
    if cfg.model.path is not None:
        lines.append(f"model.path: {check_model(cfg.model.path).architecture}")
    return lines


def paths_of(data: DataConfig, split: str) -> list[Path]:
    """The manifests of a split, "train" or "eval": one, those of a mix, or none."""
    return [path for source in data.sources.values() if (path := getattr(source, split))]


def read_split(kind: ManifestKind, data: DataConfig, split: str) -> Rows:
    """The rows of all manifests of a split, with their weights."""
    found = Rows()
    for name, source in data.sources.items():
        if (path := getattr(source, split)) is None:
            continue
        rows = kind.read(path, source)
        samples, pairs = rows.samples, rows.pairs
        if name:
            samples = mixed(samples, name, data.mix[name].weight)
            pairs = _with_samples(pairs, samples)
        refused = [(f"{name}/{row}" if name else row, reason) for row, reason in rows.refused]
        found = Rows([*found.samples, *samples], [*found.pairs, *pairs], [*found.refused, *refused])
    if data.balance and split == "train" and found.samples:
        samples = balanced(found.samples, data.balance)
        found = Rows(samples, _with_samples(found.pairs, samples), found.refused)
    return found


def _with_samples(pairs: Sequence[Preference], samples: Sequence[Sample]) -> list[Preference]:
    """The pairs, if there are any, with their samples in another form."""
    return [replace(pair, sample=sample) for pair, sample in zip(pairs, samples, strict=bool(pairs))]


def check_model(folder: Path) -> ChatFamily:
    """The family of a checkpoint.

    Raises:
        UserError: it is none that rlvid knows, or has no weights.
    """
    family = load_family(folder)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"model.path: {folder} holds no *.safetensors weights")
    return family


def check_manifests(cfg: JobConfig, spec: JobSpec, train: Sequence[Sample], held_out: Sequence[Sample]) -> None:
    """
    Raises:
        UserError: a sample is in both manifests, has more videos, or images, than the engines are told to expect, or
            cannot be scored by the rewards where the job has it scored.
    """
    check_disjoint(train, held_out)
    manifests = {"data.train": train, "data.eval": held_out}
    for key, samples in manifests.items() if "generator" in spec.roles(cfg) else ():
        for sample in samples:
            for kind, n in Counter(medium.kind for medium in sample.media).items():
                if n > (most := cfg.rollout.max_videos):
                    raise UserError(
                        f"{key}: sample {sample.id!r} has {n} {kind}s, but rollout.max_videos={most}: set it to {n} or "
                        f"more"
                    )
    for key in spec.scored(cfg):
        check_samples(make_parts(cfg.rewards), manifests[key], key, needs_accuracy=key == "data.eval")


def make_data(cfg: JobConfig, spec: JobSpec, folder: Path, console: Console) -> tuple[Path, Path]:
    """Make the synthetic set in `folder`; returns the job's manifests of training and held-out samples."""
    synthetic = cfg.data.synthetic
    assert synthetic is not None
    console.message(f"making {synthetic.train} + {synthetic.eval} synthetic clips")
    train, held_out = map(spec.load(cfg).of_synthetic, make_synthetic(folder, synthetic, cfg.seed))
    return train, held_out


def make_model(
    cfg: JobConfig, folder: Path, samples: Sequence[Sample], pairs: Sequence[Preference], console: Console
) -> None:
    """Make the tiny random model in `folder`, unless it is there; its tokenizer is trained on the texts."""
    tiny = cfg.model.tiny
    assert tiny is not None  # JobConfig checks it
    if not folder.exists():
        from rlvid.models.tiny import make_tiny

        console.message(f"making a tiny random {tiny.family}")
        texts = [text for s in samples for text in (*(m.text for m in s.messages), s.answer)]
        texts += [text for pair in pairs for text in (pair.chosen, pair.rejected)]
        make_tiny(folder, tiny, texts, cfg.seed)


class PromptStream:
    """Prompts of an endless shuffled stream of samples, encoded one batch ahead.

    `position` is the data cursor: the number of samples taken so far. The order is a function of seed and position, so
    a resumed run sees the samples that the interrupted one would have seen. `used` is the position that checkpoints
    keep: it is smaller while samples are taken ahead of their use.

    Samples of one problem type with one answer are spread evenly over an epoch. A batch that has more "left" than
    "right" by chance teaches to say "left" whatever is seen, and that noise hides what the clips teach
    (docs/performance.md).
    """

    def __init__(self, samples: Sequence[Sample], seed: int, clips: ClipStore):
        self.position = self.used = 0
        self._strata = Strata.of([(sample.problem_type, sample.answer) for sample in samples])
        self._samples, self._seed, self._clips = samples, seed, clips
        self._shares = shares_of(samples)
        self._ahead: tuple[int, list[Future[Encoded | None]]] | None = None  # position after it, what is encoded

    def take(self, count: int, is_ahead: bool = False) -> list[Encoded]:
        """Prompts of the next `count` samples; those that cannot be used are left out.

        Args:
            is_ahead: the caller sets `used` later.
        """
        self.position += count
        if not is_ahead:
            self.used = self.position
        if self._ahead is None or self._ahead[0] != self.position:
            self._ahead = (self.position, self._submit(self.position - count, count))
        pending = self._ahead[1]
        self._ahead = (self.position + count, self._submit(self.position, count))
        return self._clips.collect(pending)

    def rewind(self, position: int) -> None:
        """Continue from there."""
        self.position = self.used = position

    def _submit(self, start: int, count: int) -> list[Future[Encoded | None]]:
        indices = batch_indices(len(self._samples), self._seed, start, count, self._strata, shares=self._shares)
        copies = Counter[int]()  # of a sample that is drawn several times: each needs a seed, so an id, of its own
        samples = []
        for i in indices:
            sample, copies[i] = self._samples[i], copies[i] + 1
            samples.append(sample if copies[i] == 1 else replace(sample, id=f"{sample.id} ({copies[i]})"))
        return self._clips.submit(samples)


class Inputs:
    """Samples, model and prompts of one run.

    Attributes:
        train, held_out: samples of the two manifests; `pairs` and `held_out_pairs` where those are preferences.
        warm_up: samples of the warm start: those of `train` unless it has its own.
        model, family: the checkpoint that the run starts from.
        clips: reads and encodes; inside `reading()`.
        prompts, warm_up_prompts: streams over `train` and `warm_up`; one stream where these are the same.
    """

    clips: ClipStore
    prompts: PromptStream
    warm_up_prompts: PromptStream

    def __init__(self, cfg: JobConfig, spec: JobSpec, run: Run):
        self.cfg, self._run = cfg, run
        self._clips_before = {"decodes": 0, "cache_hits": 0}  # in the parts of the run before it was resumed
        kind, data = spec.load(cfg), cfg.data
        if cfg.model.path is not None:  # before clips are made
            check_model(cfg.model.path)
        if data.train is None and data.synthetic is not None:
            train, made = make_data(cfg, spec, run.folder.dir / "data", run.console)
            data = data.model_copy(update={"train": train, "eval": data.eval or made})
        rows, held_out_rows = (read_split(kind, data, split) for split in ("train", "eval"))
        self.train, self.pairs = list(rows.samples), list(rows.pairs)
        self.held_out, self.held_out_pairs = list(held_out_rows.samples), list(held_out_rows.pairs)
        if refused := [*rows.refused, *held_out_rows.refused]:
            run.folder.record_refused(refused)
            for name, reason in refused[:SHOWN]:
                run.console.message(f"refused, left out: {name}: {reason}")
            if len(refused) > SHOWN:
                run.console.message(f"refused, left out: {len(refused)} rows in all, see {run.folder.refused_file}")
        lessons = self._load_warm_up(spec, data.train)
        check_disjoint(self.warm_up, self.held_out)
        check_manifests(cfg, spec, self.train, self.held_out)
        paths = [*paths_of(data, "train"), *paths_of(data, "eval"), *([lessons] if lessons else [])]
        run.folder.record(data=self._hashes({str(path): path for path in paths}))
        if self.train:
            run.console.message(f"data.train: {count_media(self.train)}")
        self._load_model()
        if "generator" in spec.roles(cfg) and self.family.vllm_module is None:
            self._check_plain_engine()
        if self.family.is_recurrent and "trainer" in spec.roles(cfg):
            run.console.message(
                f"{self.family.architecture} is recurrent: each response is trained with a prompt of its own, and "
                f"train.shared_prefix has no effect"
            )

    def require_training_data(self) -> None:
        """
        Raises:
            UserError: there are no training samples.
        """
        if self.train:
            return
        if (self._run.folder.dir / "refused.jsonl").exists():
            paths = ", ".join(map(str, paths_of(self.cfg.data, "train")))
            raise UserError(f"no row of {paths} can be trained on; see {self._run.folder.refused_file}")
        raise UserError("data.train is empty: give a manifest, or data.synthetic to make a synthetic set")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Clips can be read inside; needs Ray."""
        n_clips = len({medium for s in (*self.train, *self.held_out, *self.warm_up) for medium in s.media})
        n_samples = len({s.id for s in (*self.train, *self.held_out, *self.warm_up)})
        self.clips = ClipStore(self.cfg, self.model, n_clips, self._set_aside, n_samples)
        self.prompts = PromptStream(self.train, self.cfg.seed, self.clips)
        is_shared = self.warm_up is self.train
        self.warm_up_prompts = self.prompts if is_shared else PromptStream(self.warm_up, self.cfg.seed, self.clips)
        try:
            yield
        finally:
            self.clips.close()

    def clip_metrics(self) -> dict[str, float]:
        """Clips decoded and found in the cache since the run began, resumed parts included."""
        before = self._clips_before
        return {
            "video/decodes": before["decodes"] + self.clips.decodes,
            "video/cache_hits": before["cache_hits"] + self.clips.cache_hits,
            "video/bad": len(self.clips.bad) + len(self.clips.unusable),
        }

    def state(self) -> dict[str, Any]:
        """Data cursors and clip counts, for a checkpoint."""
        metrics = self.clip_metrics()
        return {
            "position": self.prompts.used,
            "warm_up_position": self.warm_up_prompts.used,
            "clips": {name: metrics[f"video/{name}"] for name in self._clips_before},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.prompts.rewind(state["position"])
        self.warm_up_prompts.rewind(state["warm_up_position"])
        self._clips_before = {name: n - getattr(self.clips, name) for name, n in state["clips"].items()}

    def _load_warm_up(self, spec: JobSpec, train: Path | None) -> Path | None:
        """Load `warm_up`; returns its own manifest, where it has one."""
        self.warm_up = self.train
        data, warm = self.cfg.data, spec.warm_start(self.cfg)
        if warm is None or not warm.steps:
            return None
        if warm.data is not None:
            self.warm_up = load_manifest(warm.data, data.root, data.system_prompt, data.suffix)
            return warm.data
        if spec.lessons is None or data.synthetic is None or train is None:
            return None
        lessons = spec.lessons(train)
        self.warm_up = load_manifest(lessons, data.root, data.system_prompt, suffix="")  # its prompts are complete
        return lessons

    def _load_model(self) -> None:
        run, path = self._run, self.cfg.model.path
        if path is not None:
            self.model = path
        else:
            self.model = run.folder.dir / "model"
            make_model(self.cfg, self.model, self.warm_up or self.held_out, self.pairs, run.console)
        self.family: ChatFamily = load_family(self.model)
        for sample in (*self.train, *self.held_out, *self.warm_up):
            self.family.check_media(sample)
        weights = sorted(self.model.glob("*.safetensors"))
        template = hashlib.sha256(self.family.chat_template.encode()).hexdigest()
        hashes = self._hashes({path.name: path for path in weights})
        run.folder.record(model=hashes, prompt_templates={"chat": template})

    def _hashes(self, paths: Mapping[str, Path]) -> dict[str, str]:
        return {name: remembered_sha256(self.cfg.data.cache_dir, path) for name, path in paths.items()}

    def _check_plain_engine(self) -> None:
        cfg, name = self.cfg, self.family.architecture
        if cfg.rollout.tensor_parallel > 1 or weight_backend(cfg) != "buckets":
            raise UserError(
                f"vLLM does not serve {name}, so transformers generates, on one GPU and without vLLM's ways of sending "
                f"weights: set rollout.weight_transfer to buckets and rollout.tensor_parallel to 1"
            )
        self._run.console.message(
            f"vLLM does not serve {name}: transformers generates, slowly. If that takes longer than "
            f"deadlines.generate_s={cfg.deadlines.generate_s:g} for a batch, raise it"
        )

    def _set_aside(self, what: str, reason: str) -> None:
        self._run.folder.append_bad_clip(BadClip(what, reason))
        self._run.console.message(f"left out: {what}: {reason}")


def distinct(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The first `count` samples with different ids."""
    return list({s.id: s for s in samples}.values())[:count]
