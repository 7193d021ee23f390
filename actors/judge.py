"""The judge: one interface, whoever answers. The policy itself, another local model, or an OpenAI-compatible server.

Answers are cached by content, so that nothing is asked twice, by an interrupted run neither. A judge that fails gives
an invalid verdict, never a default; too many of them end the run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from actors.clip_store import ClipStore, Encoded
from actors.generator_fleet import GeneratorFleet
from actors.roles import Roles
from rlvid.config import IsrtJobConfig, JudgeConfig
from rlvid.errors import UserError
from rlvid.files import RowFile
from rlvid.rewards.judge_prompts import (
    TIMED_OUT,
    Answer,
    PairVerdict,
    Template,
    pair_prompts,
    pair_verdict,
)
from rlvid.rollout.vllm_engine import Sampling
from rlvid.types import Sample

FIRST_PAUSE_S = 0.5  # before the second try; doubled each time
LONGEST_PAUSE_S = 30.0
TRIED_AGAIN = frozenset({408, 409, 425, 429})  # and all from 500 on: the server may mend itself
MAX_ANSWER_BYTES = 2**20
UNREADABLE = "a clip cannot be read"


class Backend(Protocol):
    """Who answers."""

    id: str

    def ask(self, prompts: Sequence[Encoded]) -> list[Answer]:
        """One answer to each prompt, in the order given. A prompt that cannot be answered is no exception."""


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
    """Asks a backend, reads its answers, counts what became of them.

    Args:
        cache: answers of earlier questions, by a hash of judge, prompt, videos and texts.
        max_invalid_fraction: largest share of unparsed and failed verdicts.
    """

    def __init__(self, backend: Backend, clips: ClipStore, cache: RowFile, max_invalid_fraction: float):
        self._backend, self._clips, self._cache = backend, clips, cache
        self._max_invalid_fraction = max_invalid_fraction
        self.counters: Counter[str] = Counter()  # verdicts by state; answers "asked" and "cached"

    @property
    def id(self) -> str:
        return self._backend.id

    def compare(self, comparisons: Sequence[Comparison]) -> list[Judged]:
        """Which response is better, asked in both orders.

        Raises:
            UserError: too many verdicts are invalid, these and all before.
        """
        asked = [(t, p) for c in comparisons for t, ps in [pair_prompts(c.sample, c.responses, c.context)] for p in ps]
        answers = self._answers(asked)
        judged = []
        for i in range(0, len(asked), 2):
            both = answers[i : i + 2]
            judged.append(Judged(pair_verdict(*both), self.id, asked[i][0].hash, tuple(a.text for a in both)))
        return self._counted(judged)

    def _counted(self, judged: list[Judged]) -> list[Judged]:
        self.counters.update(j.verdict.state for j in judged)
        valid = sum(self.counters[state] for state in ("consistent", "inconsistent"))
        invalid = self.counters["unparsed"] + self.counters["failed"]
        if invalid > self._max_invalid_fraction * (valid + invalid):
            reason = next(j.verdict.reason for j in judged if not j.verdict.is_valid)
            raise UserError(
                f"{invalid} of {valid + invalid} verdicts of judge {self.id} are invalid ({self.counters['unparsed']} "
                f"unparsed, {self.counters['failed']} failed), more than max_invalid_fraction="
                f"{self._max_invalid_fraction:g} allows. The first one: {reason}. Mend the judge or take another; the "
                f"same command then goes on"
            )
        return judged

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
        found = dict(zip(new, self._backend.ask(list(new.values())), strict=True)) if new else {}
        self._cache.append(
            [{"key": k, "judge": self.id, "answer": a.text} for k, a in found.items() if a.text is not None]
        )

        def answer(sample: Sample) -> Answer:
            if sample.id not in keys:
                return Answer(None, UNREADABLE)
            key = keys[sample.id]
            return found[key] if key in found else Answer(self._cache[key]["answer"])

        return [answer(sample) for _, sample in asked]


def content_key(judge: str, prompt_hash: str, clip_ids: Sequence[str], text: str) -> str:
    return hashlib.sha256(json.dumps([judge, prompt_hash, list(clip_ids), text]).encode()).hexdigest()


class FleetBackend:
    """A model behind generators of this run.

    Args:
        clips: encodes for this model; None where the prompts are encoded for it already.
    """

    def __init__(self, id: str, fleet: GeneratorFleet, cfg: JudgeConfig, seed: int, clips: ClipStore | None = None):
        self.id = id
        self._fleet, self._clips = fleet, clips
        self._sampling = Sampling(1, cfg.temperature, cfg.max_tokens, seed=seed)

    def ask(self, prompts: Sequence[Encoded]) -> list[Answer]:
        own = prompts if self._clips is None else self._clips.encode([p.sample for p in prompts])
        groups = self._fleet.generate(own, self._sampling)
        texts = {p.sample.id: rollouts[0].text for p, rollouts in zip(own, groups, strict=True)}
        return [Answer(texts[p.sample.id]) if p.sample.id in texts else Answer(None, UNREADABLE) for p in prompts]


class EndpointBackend:
    """An OpenAI-compatible server, asked by several threads. Each question has a deadline for all its tries. Where as
    many in a row as are asked at once had none in time, the server is taken to be down: the rest is not asked.

    Args:
        frames: JPEG files of each sample by its id, asked for with `send_frames`.
    """

    def __init__(self, cfg: JudgeConfig, seed: int, frames: Callable[[Sequence[Sample]], Mapping[str, list[bytes]]]):
        import httpx

        self.id = f"{cfg.model} at {cfg.url}" + (" with frames" if cfg.send_frames else "")
        self._cfg, self._frames = cfg, frames
        self._sampling = Sampling(1, cfg.temperature, cfg.max_tokens, seed=seed)
        key = os.environ.get(cfg.api_key_env)
        self._client = httpx.Client(headers={"Authorization": f"Bearer {key}"} if key else {}, follow_redirects=False)
        self._lock = Lock()
        self._n_unanswered = 0  # in a row

    def ask(self, prompts: Sequence[Encoded]) -> list[Answer]:
        samples = [p.sample for p in prompts]
        frames = self._frames(samples) if self._cfg.send_frames else {}
        self._n_unanswered = 0
        with ThreadPoolExecutor(self._cfg.concurrency, thread_name_prefix="judge") as pool:
            return list(pool.map(lambda s: self._ask(s, frames.get(s.id, [])), samples))

    def _ask(self, sample: Sample, frames: Sequence[bytes]) -> Answer:
        """Tries again with longer and longer pauses, as long as it makes sense and the deadline allows."""
        if self._n_unanswered >= self._cfg.concurrency:
            return Answer(None, f"not asked, {self._cfg.url} did not answer {self._n_unanswered} questions before it")
        deadline_s = time.monotonic() + self._cfg.deadline_s
        pause_s = FIRST_PAUSE_S
        while True:
            answer, is_final = self._try(sample, frames, deadline_s)
            if is_final or time.monotonic() + pause_s >= deadline_s:
                with self._lock:
                    self._n_unanswered = 0 if is_final else self._n_unanswered + 1
                return answer
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _try(self, sample: Sample, frames: Sequence[bytes], deadline_s: float) -> tuple[Answer, bool]:
        """One request: its answer, and whether another try would be of no use."""
        import httpx

        cfg = self._cfg
        end_s = min(deadline_s, time.monotonic() + cfg.timeout_s)
        try:
            with self._client.stream(
                "POST",
                f"{(cfg.url or '').rstrip('/')}/chat/completions",
                json=self._body(sample, frames),
                timeout=max(0.001, end_s - time.monotonic()),
            ) as response:
                content = b""
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > end_s:
                        return Answer(None, f"{TIMED_OUT} {cfg.timeout_s:g} s"), False
                    if len(content) > MAX_ANSWER_BYTES:
                        return Answer(None, f"an answer of more than {MAX_ANSWER_BYTES} bytes"), False
            if response.status_code != 200:
                is_final = response.status_code < 500 and response.status_code not in TRIED_AGAIN
                return Answer(None, f"HTTP {response.status_code}: {content[:200].decode(errors='replace')}"), is_final
            text = json.loads(content)["choices"][0]["message"]["content"]
        except httpx.TimeoutException:
            return Answer(None, f"{TIMED_OUT} {cfg.timeout_s:g} s"), False
        except httpx.HTTPError as e:
            return Answer(None, f"{type(e).__name__}: {e}"), False
        except (ValueError, LookupError, TypeError):
            return Answer(None, "the server's answer has no choices[0].message.content"), False
        return (Answer(text), True) if isinstance(text, str) else (Answer(None, "an answer without text"), False)

    def _body(self, sample: Sample, frames: Sequence[bytes]) -> dict[str, Any]:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"}}
            for jpeg in frames
        ]
        body = {
            "model": self._cfg.model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": sample.question}]}],
            "temperature": self._cfg.temperature,
            "max_tokens": self._cfg.max_tokens,
        }
        if not content:  # servers of text models may not know the list form
            body["messages"] = [{"role": "user", "content": sample.question}]
        return body | ({"seed": self._sampling.request_seed(sample.id)} if self._cfg.temperature else {})


def checkpoint_id(folder: Path) -> str:
    """A name for the weights in `folder`, by their content."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@contextmanager
def open_judge(
    cfg: IsrtJobConfig, model: Path, fleet: GeneratorFleet, clips: ClipStore, cache: RowFile, logs: Path, seed: int
) -> Iterator[Judge]:
    """The judge that `isrt.judge` names. A local model gets generators of its own, stopped at the end.

    Args:
        model: the policy's checkpoint, which `fleet` serves.
        clips: of the policy.
    """
    judge = cfg.isrt.judge
    if judge.backend == "endpoint":
        yield Judge(EndpointBackend(judge, seed, clips.strips), clips, cache, judge.max_invalid_fraction)
        return
    if judge.backend == "policy":
        backend = FleetBackend(f"policy {checkpoint_id(model)}", fleet, judge, seed)
        yield Judge(backend, clips, cache, judge.max_invalid_fraction)
        return
    assert judge.path is not None  # JudgeConfig checks it
    own_cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": judge.path, "lora": None})})
    with Roles(judge.path, own_cfg, ("generator",), logs / "judge", cfg.seed) as roles:
        own_clips = ClipStore(own_cfg, judge.path, clips.n_clips, lambda path, reason: None)
        try:
            roles.wait_ready()
            roles.fleet.serve_checkpoint()
            backend = FleetBackend(f"local {checkpoint_id(judge.path)}", roles.fleet, judge, seed, own_clips)
            yield Judge(backend, clips, cache, judge.max_invalid_fraction)
        finally:
            own_clips.close()
