"""Streams the prompts of many samples through Ray Data, encoded ahead by a pool of Ray actors.

The only file of rlvid that imports Ray. A clip that cannot be read is a row with its reason: nothing is raised, nothing
replaced, nothing left out. Resuming needs no state, because the caller gives the order.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Sequence
from typing import Any

import ray.data

from rlvid.data.encoding import Outcome, SampleEncoder, Source
from rlvid.errors import UserError
from rlvid.types import Prompt, Sample
from rlvid.video.clip_reader import ends_hung_process

PROMPTS_PER_TASK = 64  # a task costs Ray 50 ms, and a run's tasks are all listed before its first one starts
PROMPT_BLOCK_BYTES = 8 * 2**20  # a task passes on what it has once it is this large
LEAST_AHEAD_BYTES = 256 * 2**20  # of prompts that wait for the consumer; Ray Data would fill half of the object store


def prompt_stream(
    samples: ray.ObjectRef[list[Sample]], order: Sequence[int], source: Source, encoders: int, cpus_each: float
) -> ray.data.Dataset:
    """The prompts of `samples[i] for i in order`, encoded by a pool of Ray actors; `open_prompt` opens a row.

    Actors rather than tasks: a consumer slower than the encoders makes them pause, and Ray ends an idle task worker
    after a second; starting it again (5 s of CPU for its imports) then cost more than the encoding.
    """
    rows_per_block = min(PROMPTS_PER_TASK, -(-len(order) // encoders))
    n_blocks = -(-len(order) // rows_per_block)
    dataset = ray.data.from_items(list(order), override_num_blocks=n_blocks)  # from_numpy would ask for a whole CPU
    settings = {"samples": samples, "source": source}
    pool = ray.data.ActorPoolStrategy(size=min(encoders, n_blocks))
    dataset = dataset.map(_RowEncoder, fn_constructor_kwargs=settings, compute=pool, num_cpus=cpus_each)
    ahead = max(LEAST_AHEAD_BYTES, int(ray.cluster_resources().get("object_store_memory", 0)) // 16)
    dataset.context.execution_options.preserve_order = True
    dataset.context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=ahead)
    dataset.context.target_max_block_size = PROMPT_BLOCK_BYTES
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset


def open_prompt(row: dict[str, Any]) -> tuple[int, Prompt | None, Outcome]:
    """Place in `samples`, prompt and outcome; without a prompt the outcome says what is set aside.

    Raises:
        UserError: the frame cache cannot be written.
        RuntimeError: an error that is no fault of the clip.
    """
    if row["user_error"]:
        raise UserError(row["user_error"])
    if row["crash"]:
        raise RuntimeError(f"encoding a sample failed in a way that is no fault of its videos:\n{row['crash']}")
    prompt, outcome = pickle.loads(row["prompt"])  # written by `_RowEncoder`
    return row["index"], prompt, outcome


class _RowEncoder:
    """Runs in a Ray actor. A call never raises, or Ray would drop the whole block."""

    def __init__(self, samples: ray.ObjectRef[list[Sample]], source: Source):
        self._samples = ray.get(samples)
        self._encoder = SampleEncoder(source)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        index = int(row["item"])
        result = {"index": index, "prompt": b"", "user_error": "", "crash": ""}
        try:
            sample = self._samples[index]
            with ends_hung_process(sample.media, self._encoder.source.video.timeout_s):
                result["prompt"] = pickle.dumps(self._encoder.encode(sample), protocol=5)
        except UserError as error:
            result["user_error"] = str(error)
        except Exception:
            result["crash"] = traceback.format_exc()
        return result
