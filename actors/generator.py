"""A generator replica: vLLM in this process, its step loop in a thread of its own."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import ray
from ray import ObjectRef

from actors.actor_process import enter_process, set_threads
from actors.gpu_weight_sync import weight_backend
from rlvid.config import JobConfig
from rlvid.rollout.weights.buckets import Bucket
from rlvid.rollout.weights.shared_memory import SharedBucket
from rlvid.types import Prompt, Rollout

if TYPE_CHECKING:
    from rlvid.rollout.vllm_engine import Sampling, VllmEngine

logger = logging.getLogger(__name__)
CONCURRENCY_GROUPS = {"weights": 1, "ping": 1}  # neither waits for requests
EXIT_AFTER_S = 1.0  # Ray sends the cause to the fleet meanwhile
TransferStep = Literal["init_transfer", "start_update", "receive_update", "finish_update"]  # methods of VllmEngine
SentBucket: TypeAlias = ObjectRef[Bucket] | SharedBucket  # in the object store, or in memory shared with the trainer
SentWeights = Sequence[tuple[SentBucket, str | ObjectRef[str] | None]]  # buckets, and digests where they are checked


class EngineFailed(Exception):
    """The engine raised an error, which the message has; its process ends."""


class EngineLoop(threading.Thread):
    """Owns the engine. Between two steps it runs its callers' commands: requests join and weights change at any time.

    An engine that fails ends its process: the fleet starts another one, with the right weights.
    """

    def __init__(self, build: Callable[[], VllmEngine]):
        super().__init__(name="engine", daemon=True)
        self._build = build
        self._commands: queue.SimpleQueue[tuple[Callable[[VllmEngine], Any], Future[Any]]] = queue.SimpleQueue()
        self._waiting: dict[str, Future[list[Rollout]]] = {}
        self.built: Future[None] = Future()

    def call(self, command: Callable[[VllmEngine], Any]) -> Any:
        """Run `command(engine)` between two steps and return its result, or raise what it raised."""
        future: Future[Any] = Future()
        self._commands.put((command, future))
        return future.result()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Rollout]]:
        futures: list[Future[list[Rollout]]] = [Future() for _ in prompts]

        def submit(engine: VllmEngine) -> None:
            for prompt, future in zip(prompts, futures, strict=True):
                self._waiting[engine.submit(prompt, sampling)] = future

        self.call(submit)
        return [future.result() for future in futures]

    def run(self) -> None:
        try:
            engine = self._build()
        except BaseException as e:
            self.built.set_exception(e)
            return
        self.built.set_result(None)
        try:
            while True:
                self._run_commands(engine)
                for request, rollouts in engine.step():
                    self._waiting.pop(request).set_result(rollouts)
        except BaseException as e:
            logger.exception("the engine failed; this replica ends")
            for future in self._waiting.values():
                future.set_exception(EngineFailed(f"{type(e).__name__}: {e}"))
            logging.shutdown()
            time.sleep(EXIT_AFTER_S)
            os._exit(1)

    def _run_commands(self, engine: VllmEngine) -> None:
        """Run the commands that came; wait for one while there is nothing to generate."""
        while not self._commands.empty() or not engine.is_busy or engine.is_updating:
            command, future = self._commands.get()
            try:
                future.set_result(command(engine))
            except Exception as e:
                future.set_exception(e)
            del command, future  # kept while the loop waits, they would keep buckets in the object store


class Generator:
    """`generate` may run several times at once, with `update_weights` and `ping` in between (`max_concurrency`).

    Buckets are taken one at a time, in the order of the calls (`CONCURRENCY_GROUPS`).
    """

    def __init__(self, log_file: Path, threads: int | None):
        self._threads = threads
        enter_process(log_file, threads)

    def start(self, folder: Path, cfg: JobConfig, on_gpu: bool, seed: int) -> str:
        """Build the engine. Returns the node that it runs on."""

        def build() -> VllmEngine:
            from rlvid.models.families import load_family
            from rlvid.rollout.vllm_engine import VllmEngine

            set_threads(self._threads)
            backend = weight_backend(cfg)
            return VllmEngine(
                folder, load_family(folder), cfg.rollout, cfg.model.dtype, seed, on_gpu, cfg.model.lora, backend
            )

        self._loop = EngineLoop(build)
        self._loop.start()
        self._loop.built.result()
        return str(ray.get_runtime_context().get_node_id())

    def generate(self, prompts: Sequence[ObjectRef[Prompt]], sampling: Sampling) -> list[list[Rollout]]:
        return self._loop.generate(ray.get(list(prompts)), sampling)

    @ray.method(concurrency_group="weights")
    def update_weights(self, version: int, sent: SentWeights) -> int:
        """Take buckets of the weights, in their order; where they come with checksums, compare them first. Nothing is
        generated between the first and the last bucket of a version. Returns the version held afterwards."""
        buckets = [where.open() if isinstance(where, SharedBucket) else ray.get(where) for where, _ in sent]
        for bucket, (_, digest) in zip(buckets, sent, strict=True):
            expected = ray.get(digest) if isinstance(digest, ObjectRef) else digest
            if expected is not None and bucket.digest() != expected:
                raise RuntimeError(f"weights {version}: a bucket arrived with another checksum than it was sent with")

        def take(engine: VllmEngine) -> int:
            engine.update_weights(version, buckets)
            return engine.weight_version

        return int(self._loop.call(take))

    @ray.method(concurrency_group="weights")
    def transfer(self, step: TransferStep, *arguments: Any) -> None:
        """A step of a transfer from GPU to GPU (`actors/gpu_weight_sync.py`)."""
        self._loop.call(lambda engine: getattr(engine, step)(*arguments))

    def first_logprobs(
        self, prompts: Sequence[ObjectRef[Prompt]], tokens: Sequence[int], temperature: float
    ) -> list[npt.NDArray[np.float32]]:
        """Log-probs [tokens] of `tokens` as first response token to each prompt (parity check)."""
        loaded: list[Prompt] = ray.get(list(prompts))
        values: list[npt.NDArray[np.float32]] = self._loop.call(
            lambda engine: [engine.first_logprobs(prompt, tokens, temperature) for prompt in loaded]
        )
        return values

    @ray.method(concurrency_group="ping")
    def ping(self) -> int:
        """The weight version held; answers only while the engine loop runs."""
        return int(self._loop.call(lambda engine: engine.weight_version))
