"""The judge: one interface to the policy itself, another local model, or an OpenAI-compatible server.

Answers are cached by content as they come, so that nothing is asked twice, also by a resumed run. A question without a
valid answer gives an invalid verdict, never a default; too many of them end the run.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

from actors.clip_store import ClipStore
from actors.generator_fleet import GeneratorFleet
from actors.roles import Roles
from rlvid.config import JudgeConfig
from rlvid.errors import UserError
from rlvid.files import RowFile, remembered_sha256
from rlvid.rewards.judge_prompts import Answer, PairVerdict, Template, pair_prompts, pair_verdict
from rlvid.rewards.part import NoReward
from rlvid.rollout.engine import Refused, Sampling
from rlvid.types import Encoded, Sample

Keep: TypeAlias = Callable[[Sequence[tuple[Encoded, Answer]]], None]
T = TypeVar("T")
UNREADABLE = "a clip cannot be read"


class Backend(Protocol):
    """Answers prompts."""

    @property
    def id(self) -> str:
        """Of the model that answers: answers are cached by it."""

    def ask(self, prompts: Sequence[Encoded], keep: Keep) -> None:
        """Give `keep` one answer to each prompt, some or all at a time, in any order.

        An answer may be invalid. Raises UserError where asking further is of no use; answers that came before are kept.
        """


@dataclass(frozen=True)
class Comparison:
    """Two responses to one sample, and the description of its video that the judge is shown, if any."""

    sample: Sample
    responses: tuple[str, str]
    context: str | None = None


@dataclass(frozen=True)
class Judged:
    """A verdict, by whom, under which prompt, and the words that it was read from."""

    verdict: PairVerdict
    judge: str
    prompt_hash: str
    answers: tuple[str | None, ...]


class Judge:
    """Asks a backend, reads its answers, counts the verdicts.

    Args:
        cache: answers of earlier questions, by a hash of judge, prompt, videos and texts.
        max_invalid_fraction: largest share of unparsed and failed verdicts.
        key: of its config, for messages.
    """

    def __init__(
        self, backend: Backend, clips: ClipStore, cache: RowFile, max_invalid_fraction: float, key: str = "isrt.judge"
    ):
        self._backend, self._clips, self._cache, self._key = backend, clips, cache, key
        self._max_invalid_fraction = max_invalid_fraction
        self.counters: Counter[str] = Counter()  # verdicts by state; answers "asked" and "cached"

    @property
    def id(self) -> str:
        return self._backend.id

    def compare(self, comparisons: Sequence[Comparison]) -> list[Judged]:
        """Which response is better, asked in both orders.

        Raises:
            UserError: too many verdicts are invalid, these and all earlier ones; or the backend cannot answer.
        """
        asked = [(t, p) for c in comparisons for t, ps in [pair_prompts(c.sample, c.responses, c.context)] for p in ps]
        answers = self._answers(asked)
        judged = []
        for i in range(0, len(asked), 2):
            both = answers[i : i + 2]
            judged.append(Judged(pair_verdict(*both), self.id, asked[i][0].hash, tuple(a.text for a in both)))
        self.counters.update(j.verdict.state for j in judged)
        self._check_invalid(next((j.verdict.reason for j in judged if not j.verdict.is_valid), ""))
        return judged

    def rate(self, prompts: Sequence[tuple[Template, Sample]], parse: Callable[[str], T | None]) -> list[T | NoReward]:
        """One rating for each prompt, or why there is none.

        Raises:
            UserError: as `compare`.
        """
        ratings: list[T | NoReward] = []
        for answer in self._answers(prompts):
            value = None if answer.text is None else parse(answer.text)
            unread = answer.failure if answer.text is None else f"no single rating in {answer.text!r:.200}"
            ratings.append(NoReward(unread) if value is None else value)
            self.counters["consistent" if value is not None else "failed" if answer.text is None else "unparsed"] += 1
        self._check_invalid(next((str(r) for r in ratings if isinstance(r, NoReward)), ""))
        return ratings

    def _check_invalid(self, reason: str) -> None:
        valid = sum(self.counters[state] for state in ("consistent", "inconsistent"))
        invalid = self.counters["unparsed"] + self.counters["failed"]
        if invalid > self._max_invalid_fraction * (valid + invalid):
            raise UserError(
                f"{invalid} of {valid + invalid} verdicts of judge {self.id} are invalid ({self.counters['unparsed']} "
                f"unparsed, {self.counters['failed']} failed), more than {self._key}.max_invalid_fraction="
                f"{self._max_invalid_fraction:g} allows. The first of these: {reason}. Fix the judge or name another "
                f"one in {self._key}; the same command then resumes here"
            )

    def _answers(self, asked: Sequence[tuple[Template, Sample]]) -> list[Answer]:
        encoded = {e.sample.id: e for e in self._clips.encode([sample for _, sample in asked])}
        keys = {
            sample.id: content_key(self.id, template.hash, encoded[sample.id].clip_ids, sample.question)
            for template, sample in asked
            if sample.id in encoded
        }
        new = {key: encoded[name] for name, key in keys.items() if key not in self._cache}
        self.counters["cached"] += len(asked) - len(new)
        self.counters["asked"] += len(new)
        found: dict[str, Answer] = {}

        def keep(answered: Sequence[tuple[Encoded, Answer]]) -> None:
            by_key = {keys[prompt.sample.id]: answer for prompt, answer in answered}
            found.update(by_key)
            rows = [{"key": k, "judge": self.id, "answer": a.text} for k, a in by_key.items() if a.text is not None]
            if rows:
                self._cache.append(rows)

        if new:
            self._backend.ask(list(new.values()), keep)

        def answer(sample: Sample) -> Answer:
            if (key := keys.get(sample.id)) is None:
                return Answer(None, UNREADABLE)
            return found.get(key) or Answer(self._cache[key]["answer"])

        return [answer(sample) for _, sample in asked]


def content_key(judge: str, prompt_hash: str, clip_ids: Sequence[str], text: str) -> str:
    return hashlib.sha256(json.dumps([judge, prompt_hash, list(clip_ids), text]).encode()).hexdigest()


class FleetBackend:
    """A model behind generators of this run.

    Args:
        clips: encodes for this model; None if the prompts are encoded for it already.
        is_training: with each version of its weights it is another judge.
    """

    def __init__(
        self,
        name: str,
        fleet: GeneratorFleet,
        cfg: JudgeConfig,
        seed: int,
        clips: ClipStore | None = None,
        is_training: bool = False,
    ):
        self._name, self._fleet, self._clips, self._is_training = name, fleet, clips, is_training
        self._sampling = Sampling(1, cfg.temperature, cfg.max_tokens, seed=seed)

    @property
    def id(self) -> str:
        return f"{self._name}, weights {self._fleet.version}" if self._is_training else self._name

    def ask(self, prompts: Sequence[Encoded], keep: Keep) -> None:
        own = prompts if self._clips is None else self._clips.encode([p.sample for p in prompts])
        groups = self._fleet.generate(own, self._sampling)
        texts = {p.sample.id: g[0].text for p, g in zip(own, groups, strict=True) if not isinstance(g, Refused)}
        unreadable = Answer(None, UNREADABLE)
        keep([(p, Answer(texts[p.sample.id]) if p.sample.id in texts else unreadable) for p in prompts])


def checkpoint_id(folder: Path, memory: Path) -> str:
    """A name for the weights in `folder`, by their content (`remembered_sha256`)."""
    hashes = [remembered_sha256(memory.expanduser(), path) for path in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


@contextmanager
def open_judge(
    judge: JudgeConfig, roles: Roles, clips: ClipStore, cache: RowFile, seed: int, model: Path | None = None
) -> Iterator[Judge]:
    """The judge that a config names. A local model gets generators of its own, stopped at the end.

    Args:
        roles: of the job; a local judge's engines are like its own.
        clips: of the policy.
        model: the checkpoint that the fleet of `roles` serves, unless it serves weights in training.
    """
    place, limit = roles.placement, (judge.max_invalid_fraction, judge.key)
    cfg, memory = place.cfg, place.cfg.data.cache_dir
    if judge.backend == "endpoint":
        from actors.judge_endpoint import EndpointBackend, probe_endpoint

        probe_endpoint(judge, place.on_event)
        yield Judge(EndpointBackend(judge, seed, clips.strips, place.on_event), clips, cache, *limit)
        return
    if judge.backend == "policy":
        process = uuid.uuid4().hex[:8]  # versions of another process may be other weights
        name = f"policy {process if model is None else checkpoint_id(model, memory)}"
        backend = FleetBackend(name, roles.fleet, judge, seed, is_training=model is None)
        yield Judge(backend, clips, cache, *limit)
        return
    assert judge.path is not None  # JudgeConfig checks it
    own_cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": judge.path, "lora": None})})
    with Roles(judge.path, own_cfg, ("generator",), place.logs / "judge", place.on_event) as own:
        own_clips = ClipStore(own_cfg, judge.path, clips.n_clips, lambda what, reason: None, clips.n_samples)
        try:
            own.wait_ready()
            own.fleet.serve_checkpoint()
            name = f"local {checkpoint_id(judge.path, memory)}"
            yield Judge(FleetBackend(name, own.fleet, judge, seed, own_clips), clips, cache, *limit)
        finally:
            own_clips.close()
