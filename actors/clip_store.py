"""The driver's source of prompts: each clip read once, each sample encoded once, by a bounded pool of encoders.

The driver gets references and small rows; pixels stay in the object store and in the frame cache.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rlvid.config import JobConfig
from rlvid.data.encoding import Outcome, SampleEncoder, Source
from rlvid.errors import UserError
from rlvid.rollout.engine import Refused
from rlvid.types import Encoded, Prompt, Rollout, Sample
from rlvid.video.clip_reader import hashing_limit_s
from rlvid.video.frame_variants import Variant

logger = logging.getLogger(__name__)
TRIES = 2
ENCODER_START_S = 60.0  # the first call waits for its process
UNUSABLE = "samples have a prompt that is too long or that the engine refuses"
INLINE_BYTES = 100 * 1024  # results up to this size come to the caller within Ray's message, not in the object store


class Encoder(SampleEncoder):
    """One encoding process.

    An actor rather than tasks: Ray ends idle task workers after a second wherever actors fill its worker limit, and
    starting them again cost more than the decoding.
    """

    @ray.method(num_returns=2)
    def encode(self, sample: Sample, variant: Variant = "as_is") -> tuple[Prompt | None, Outcome]:
        return super().encode(sample, variant)


class ClipStore:
    """Encodes samples ahead of their use, counts decodes, and quarantines clips that cannot be read.

    Args:
        n_clips, n_samples: distinct clips, and samples, of the run's manifests; `data.max_bad_fraction` is a share of
            each.
        on_bad: called with (what, reason) once for each bad clip, and each sample whose prompt cannot be used.
    """

    def __init__(
        self, cfg: JobConfig, model: Path, n_clips: int, on_bad: Callable[[str, str], None], n_samples: int = 0
    ):
        self.decodes = 0
        self.cache_hits = 0
        self.bad: dict[str, str] = {}  # path -> reason
        self.unusable: dict[str, str] = {}  # id of a sample whose prompt is too long or is refused -> reason
        self.n_clips, self.n_samples = n_clips, n_samples
        self._max_bad_fraction = cfg.data.max_bad_fraction
        self._on_bad = on_bad
        self._timeout_s = cfg.video.timeout_s + ENCODER_START_S
        source = Source.of(cfg, model)
        # Made here too: a size or cache folder that does not work is an error of the run, not of its first clip.
        source.reader()
        options = {"num_cpus": cfg.placement.encode_cpus, "scheduling_strategy": "SPREAD"}
        self._new_encoder = lambda: ray.remote(Encoder).options(**options).remote(source)
        self._encoders: list[ActorHandle[Any]] = []  # all that were started
        self._is_closing = False
        # One thread waits for one encoder: this bounds the work in progress and gives each clip a deadline of its own.
        self._pool = ThreadPoolExecutor(cfg.placement.encoders, thread_name_prefix="encode")
        self._own = threading.local()  # `encoder` of each thread, once it has had a call

    def submit(self, samples: Sequence[Sample], variant: Variant = "as_is") -> list[Future[Encoded | None]]:
        """Start encoding; returns at once. At most `placement.encoders` run at a time."""
        return [self._pool.submit(self._encode, sample, variant) for sample in samples]

    def collect(self, pending: Sequence[Future[Encoded | None]]) -> list[Encoded]:
        """Wait for what was submitted; samples with a bad clip or a prompt that is too long are left out, never
        replaced.

        Raises:
            UserError: too many are left out.
        """
        encoded = [future.result() for future in pending]
        self.check_bad_fraction()
        return [e for e in encoded if e is not None]

    def check_bad_fraction(self) -> None:
        """
        Raises:
            UserError: too many clips are bad, or too many prompts cannot be used.
        """
        found = ((self.bad, self.n_clips, "clips cannot be read"), (self.unusable, self.n_samples, UNUSABLE))
        for bad, n, what in found:
            if len(bad) > self._max_bad_fraction * n:
                named = "\n".join(f"  {name}: {reason}" for name, reason in list(bad.items())[:5])
                raise UserError(
                    f"{len(bad)} of {n} {what}, more than data.max_bad_fraction={self._max_bad_fraction:g} allows "
                    f"(all are listed in bad_clips.jsonl):\n{named}"
                )

    def answered(
        self, prompts: Sequence[Encoded], groups: Sequence[list[Rollout] | Refused]
    ) -> tuple[list[Encoded], list[list[Rollout]]]:
        """The prompts that the engines answered, and their answers. A sample whose prompt was refused is set aside.

        Raises:
            UserError: too many are.
        """
        kept = []
        for prompt, group in zip(prompts, groups, strict=True):
            if isinstance(group, Refused):
                self.set_aside(prompt.sample.id, f"the engine refused its prompt: {group.reason}", is_prompt=True)
            else:
                kept.append((prompt, group))
        self.check_bad_fraction()
        return [prompt for prompt, _ in kept], [group for _, group in kept]

    def count(self, decodes: int, cache_hits: int) -> None:
        """Count clips that another reader has read, such as a worker of Ray Train."""
        self.decodes += decodes
        self.cache_hits += cache_hits

    def encode(self, samples: Sequence[Sample], variant: Variant = "as_is") -> list[Encoded]:
        return self.collect(self.submit(samples, variant))

    def strips(self, samples: Sequence[Sample]) -> dict[str, list[bytes]]:
        """JPEG frames of each sample, by its id."""

        def strip(sample: Sample) -> list[bytes]:
            try:
                with self._encoder() as encoder:
                    return list(ray.get(encoder.strip.remote(sample), timeout=self._timeout_s))
            except (GetTimeoutError, RayError) as e:  # a report without a picture ends no run
                logger.warning("no frames of sample %s for the report: %s", sample.id, e)
                return []

        return dict(zip((s.id for s in samples), self._pool.map(strip, samples), strict=True))

    def close(self) -> None:
        """Stop the work in progress. A thread that returned from Ray after its shutdown would end the process."""
        self._is_closing = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for encoder in list(self._encoders):
            ray.kill(encoder)
        self._pool.shutdown(wait=True)

    @contextmanager
    def _encoder(self) -> Iterator[ActorHandle[Any]]:
        """This thread's encoder for one call; one that is dead or hangs is stopped, the next call starts another."""
        if getattr(self._own, "encoder", None) is None:
            self._own.encoder = self._new_encoder()
            self._encoders.append(self._own.encoder)
        try:
            yield self._own.encoder
        except (GetTimeoutError, RayActorError):
            ray.kill(self._own.encoder)  # native code cannot be interrupted
            self._own.encoder = None
            raise

    def set_aside(self, name: str, reason: str, is_prompt: bool = False) -> None:
        """Quarantine a clip by its path, or a sample by its id; `on_bad` is called once."""
        if (self.unusable if is_prompt else self.bad).setdefault(name, reason) is reason:
            self._on_bad(f"sample {name!r}" if is_prompt else name, reason)

    def _encode(self, sample: Sample, variant: Variant) -> Encoded | None:
        """One call, in a thread of the pool; when its process hangs or crashes it is tried again on a new one."""
        # With several videos it is not known which one was being read: the sample is set aside, not the videos.
        name = " + ".join(medium.name for medium in sample.media)
        if name in self.bad or any(medium.name in self.bad for medium in sample.media):
            return None
        reason = ""
        for _ in range(TRIES):
            try:
                with self._encoder() as encoder:
                    prompt, row = encoder.encode.remote(sample, variant)
                    outcome: Outcome = ray.get(row, timeout=self._timeout_s + hashing_limit_s(sample.media))
                break
            except GetTimeoutError:
                reason = f"not read within {self._timeout_s:g} s"
            except RayActorError:
                reason = "the process that read it crashed"
            except RayTaskError as e:
                raise e.as_instanceof_cause() from None
            if self._is_closing:
                return None  # stopped by `close`, not by the clip
        else:
            outcome = Outcome(bad=(name, reason))
        self.count(outcome.decodes, outcome.cache_hits)
        if outcome.bad:
            self.set_aside(*outcome.bad, outcome.is_prompt_bad)
            return None
        if outcome.patch_bytes < INLINE_BYTES:
            # Ray would copy a result this small into the message of every call that takes it: pixels would pass through
            # the driver once per consumer. Put once, all consumers read the same copy.
            prompt = ray.put(ray.get(prompt))
        return Encoded(sample, prompt, outcome.n_tokens, outcome.cost, outcome.clip_ids)
