"""A generator replica: vLLM, or transformers where vLLM does not serve the model, in a thread of its own.

The thread runs its callers' commands between two steps of the engine: requests join and weights change at any time. An
engine that fails ends its process: the fleet starts another one, with the right weights.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import ray
from ray import ObjectRef

from actors.actor_process import enter_process, set_threads
from actors.gpu_weight_sync import weight_backend
from actors.pump import Pump
from rlvid.config import JobConfig
from rlvid.rollout.engine import Refused, Sampling
from rlvid.rollout.weights.buckets import Bucket
from rlvid.rollout.weights.shared_memory import SharedBucket
from rlvid.types import Prompt, Rollout

if TYPE_CHECKING:
    from rlvid.rollout.hf_engine import HfEngine
    from rlvid.rollout.vllm_engine import VllmEngine

    Engine: TypeAlias = VllmEngine | HfEngine

logger = logging.getLogger(__name__)
T = TypeVar("T")
CONCURRENCY_GROUPS = {"weights": 1, "ping": 1}  # neither waits for requests
EXIT_AFTER_S = 1.0  # Ray sends the cause to the fleet meanwhile
TransferStep = Literal["init_transfer", "start_update", "receive_update", "finish_update"]  # methods of VllmEngine
SentBucket: TypeAlias = ObjectRef[Bucket] | SharedBucket  # in the object store, or in memory shared with the trainer
SentWeights = Sequence[tuple[SentBucket, str | ObjectRef[str] | None]]  # buckets, and digests where they are checked


class EngineFailed(Exception):
    """The engine raised an error, which the message has; its process ends."""


class Generator:
    """`generate` may run several times at once, with `update_weights` and `ping` in between (`max_concurrency`).

    Buckets are taken one at a time, in the order of the calls (`CONCURRENCY_GROUPS`).
    """

    def __init__(self, log_file: Path, threads: int | None):
        self._threads = threads
        enter_process(log_file, threads)
        self._engine: Engine | None = None
        self._waiting: dict[str, Future[list[Rollout] | Refused]] = {}
        self._version = -1  # of the engine's weights
        self._pump = Pump("engine", self._step, lambda: self._has_no_step, self._exit)
        self._pump.start()

    def start(self, folder: Path, cfg: JobConfig, seed: int) -> str:
        """Build the engine. Returns the node that it runs on."""

        def build() -> Engine:
            from rlvid.models.families import load_family

            set_threads(self._threads)
            family, on_gpu = load_family(folder), cfg.placement.gpus > 0
            arguments = (folder, family, cfg.rollout, cfg.model.dtype, seed, on_gpu, cfg.model.lora)
            if family.vllm_module is None:
                from rlvid.rollout.hf_engine import HfEngine

                return HfEngine(*arguments)
            from rlvid.rollout.vllm_engine import VllmEngine

            return VllmEngine(*arguments, weight_backend(cfg), cfg.engines_sleep)

        self._engine = self._pump.run_in_thread(build)
        return str(ray.get_runtime_context().get_node_id())

    def generate(self, prompts: Sequence[ObjectRef[Prompt]], sampling: Sampling) -> list[list[Rollout] | Refused]:
        """The responses to each prompt; a prompt that the engine refuses does not take the others along."""
        loaded: list[Prompt] = ray.get(list(prompts))
        futures = [self._pump.future() for _ in loaded]

        def submit(engine: Engine) -> None:
            for prompt, future in zip(loaded, futures, strict=True):
                try:
                    self._waiting[engine.submit(prompt, sampling)] = future
                except ValueError as e:
                    future.set_result(Refused(str(e)))

        self._call(submit)
        return [future.result() for future in futures]

    @ray.method(concurrency_group="weights")
    def update_weights(self, version: int, sent: SentWeights) -> int:
        """Take buckets of the weights, in their order, after comparing checksums where they are given.

        Nothing is generated between the first and the last bucket of a version. Returns the version held afterwards.
        """
        buckets = [where.open() if isinstance(where, SharedBucket) else ray.get(where) for where, _ in sent]
        for bucket, (_, digest) in zip(buckets, sent, strict=True):
            expected = ray.get(digest) if isinstance(digest, ObjectRef) else digest
            if expected is not None and bucket.digest() != expected:
                raise RuntimeError(f"weights {version}: a bucket arrived with another checksum than it was sent with")

        def take(engine: Engine) -> int:
            engine.update_weights(version, buckets)
            self._version = engine.weight_version
            return self._version

        return self._call(take)

    def sleep(self) -> None:
        """See `VllmEngine.sleep`; the next weights wake the engine."""
        self._call(lambda engine: engine.sleep())

    @ray.method(concurrency_group="weights")
    def transfer(self, step: TransferStep, *arguments: Any) -> None:
        """A step of a transfer from GPU to GPU (`actors/gpu_weight_sync.py`)."""

        def run(engine: Engine) -> None:
            getattr(engine, step)(*arguments)
            self._version = engine.weight_version

        self._call(run)

    def first_logprobs(
        self, prompts: Sequence[ObjectRef[Prompt]], tokens: Sequence[int], temperature: float
    ) -> list[npt.NDArray[np.float32]]:
        """Log-probs [tokens] of `tokens` as first response token to each prompt (parity check)."""
        loaded: list[Prompt] = ray.get(list(prompts))
        return self._call(lambda engine: [engine.first_logprobs(prompt, tokens, temperature) for prompt in loaded])

    def weight_digest(self) -> str:
        """A hash of the weights that the engine holds."""
        return self._call(lambda engine: engine.weight_digest())

    @ray.method(concurrency_group="ping")
    def ping(self) -> int:
        """The weight version held. Answers while the engine computes: the first video compiles kernels for a minute."""
        return self._version

    def _call(self, command: Callable[[Engine], T]) -> T:
        """The result of `command(engine)`, which runs between two steps."""
        assert self._engine is not None
        return self._pump.run_in_thread(partial(command, self._engine))

    @property
    def _has_no_step(self) -> bool:
        """Nothing to generate, or no model to do it: asleep, or between the first and the last bucket of an update."""
        engine = self._engine
        return engine is None or not engine.is_busy or engine.is_updating or engine.is_asleep

    def _step(self) -> None:
        if self._engine is None or self._has_no_step:
            return
        try:
            for request, rollouts in self._engine.step():
                self._waiting.pop(request).set_result(rollouts)
        except Exception as e:
            raise EngineFailed(f"{type(e).__name__}: {e}") from e

    def _exit(self, error: BaseException) -> None:
        logger.error("the engine failed; this replica ends", exc_info=error)
        logging.shutdown()
        time.sleep(EXIT_AFTER_S)
        os._exit(1)
