"""Streams clips of many samples through Ray Data: to fill the frame cache, and for supervised epochs.

The only file of rlvid that imports Ray. Rows that travel are small references, a few to a block; frames stay in the
frame cache of the machine that read them, or come along if they are wanted. A clip that cannot be read is a row with
its reason: nothing is raised, nothing replaced, nothing left out.

Resuming needs no state but (seed, epoch, offset), because the order of an epoch is a function of seed and epoch.
"""

from __future__ import annotations

import pickle
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray.data

from rlvid.config import VideoConfig
from rlvid.data.encoding import Outcome, SampleEncoder, Source
from rlvid.data.order import batch_indices
from rlvid.errors import BadClip, UserError
from rlvid.types import Prompt, Sample
from rlvid.video.cache import FrameCache
from rlvid.video.clip_reader import ClipReader, ends_hung_process

READER_TIMEOUT_S = 10.0  # for a thread of Ray Data to see that its stream was closed
MAX_LOST_BLOCKS = 4  # blocks that Ray loses (a lost machine) before the stream stops
ROWS_PER_BLOCK = 16
ROWS_PER_BLOCK_WITH_FRAMES = 4  # about 40 MB; 4 a block kept 256 MB of shared memory in use, 16 a block 806 MB
PROMPTS_PER_TASK = 64  # a task costs Ray 50 ms, and a run's tasks are all listed before its first one starts
PROMPT_BLOCK_BYTES = 32 * 2**20  # a task hands on what it has when it comes to this


@dataclass(frozen=True)
class StreamRow:
    """What became of one sample."""

    offset: int  # within the epoch; the next row to read is offset + 1
    sample: Sample
    clip_ids: tuple[str, ...]  # one per video; empty if one of them is bad
    frames: tuple[npt.NDArray[np.uint8], ...] | None  # [T, H, W, 3] each, read-only; None unless asked for
    n_cached: int  # videos that were in the frame cache already
    n_decoded: int  # videos that had to be decoded
    error: BadClip | None


class ClipStream:
    """The clips of `samples`, read in parallel by Ray tasks, an epoch at a time.

    Args:
        samples: In manifest order.
        reader: Sampling, size and frame cache; tasks make their own from it. With several machines the cache folder is
            either shared or each machine's own.
        seed: Of the run; with the epoch it decides the order.
        with_frames: Send the frames along, for consumers on machines that do not see the cache folder.
        rows_per_block: Samples a task reads.
        cpus_per_task: CPUs reserved per task.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        reader: ClipReader,
        seed: int,
        *,
        with_frames: bool = False,
        rows_per_block: int | None = None,
        cpus_per_task: float = 1.0,
    ):
        self._samples = samples
        self._seed = seed
        self._with_frames = with_frames
        self._rows_per_block = rows_per_block or (ROWS_PER_BLOCK_WITH_FRAMES if with_frames else ROWS_PER_BLOCK)
        self._cpus_per_task = cpus_per_task
        self._task_args = {
            "video_json": reader.video.model_dump_json(),
            "multiple": reader.multiple,
            "cache_dir": str(reader.cache.dir),
            "cache_bytes": reader.cache.limit_bytes,
            "with_frames": with_frames,
        }

    def epoch(self, epoch: int, offset: int = 0) -> Iterator[StreamRow]:
        """The samples of one epoch in its order, from the `offset`-th on.

        Reading goes on in the background, a bounded number of blocks ahead; closing the iterator ends it.

        Raises:
            UserError: A task cannot write the frame cache.
            RuntimeError: A task met an error that is no fault of the clip.
            ray.exceptions.RayError: Ray lost more than `MAX_LOST_BLOCKS` blocks.
        """
        n = len(self._samples)
        order = batch_indices(n, self._seed, epoch * n + offset, n - offset)
        if not order:
            return
        references = [
            {"offset": offset + i, "media": pickle.dumps(self._samples[s].media)} for i, s in enumerate(order)
        ]
        rows = _fill_gaps(self._run(references), references)
        try:
            for row, sample_index in zip(rows, order, strict=True):
                yield self._finish(row, self._samples[sample_index])
        finally:
            rows.close()
            _join_readers()

    def _run(self, references: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        n_blocks = -(-len(references) // self._rows_per_block)
        dataset = ray.data.from_items(references, override_num_blocks=n_blocks)
        dataset = dataset.map(_read_row, fn_kwargs=self._task_args, num_cpus=self._cpus_per_task)
        context = dataset.context  # the dataset's own copy
        # Without it blocks come as they get ready, and an offset would mean nothing.
        context.execution_options.preserve_order = True
        context.max_errored_blocks = MAX_LOST_BLOCKS
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        rows: Iterable[dict[str, Any]] = dataset.iter_rows()
        return rows

    def _finish(self, row: dict[str, Any], sample: Sample) -> StreamRow:
        if row["user_error"]:
            raise UserError(row["user_error"])
        if row["crash"]:
            raise RuntimeError(
                f"sample {sample.id!r}: reading its videos failed in a way that is no fault of theirs:\n{row['crash']}"
            )
        return StreamRow(
            offset=row["offset"],
            sample=sample,
            clip_ids=tuple(row["clip_ids"]),
            frames=_unpack(row["pixels"], row["shapes"]) if self._with_frames else None,
            n_cached=row["n_cached"],
            n_decoded=row["n_decoded"],
            error=BadClip(row["bad_path"], row["bad_reason"]) if row["bad_reason"] else None,
        )


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
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = PROMPT_BLOCK_BYTES
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset


def open_prompt(row: dict[str, Any]) -> tuple[int, Prompt | None, Outcome]:
    """Place in `samples`, prompt and outcome; without a prompt the outcome names the bad clip.

    Raises:
        UserError: the prompt does not fit, or the frame cache cannot be written.
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


@lru_cache(maxsize=4)
def _clip_reader(video_json: str, multiple: int, cache_dir: str, cache_bytes: int) -> ClipReader:
    """One reader per worker process."""
    return ClipReader(VideoConfig.model_validate_json(video_json), multiple, FrameCache(Path(cache_dir), cache_bytes))


def _read_row(
    row: dict[str, Any], video_json: str, multiple: int, cache_dir: str, cache_bytes: int, with_frames: bool
) -> dict[str, Any]:
    """Runs in a Ray worker: read all videos of one sample. Never raises, or Ray would drop the whole block."""
    result = _empty_row(row["offset"])
    try:
        reader = _clip_reader(video_json, multiple, cache_dir, cache_bytes)
        clips = []
        for medium in pickle.loads(row["media"]):  # written by `ClipStream`
            with ends_hung_process([medium], reader.video.timeout_s):
                clip, was_cached = reader.read(medium)
            clips.append(clip)
            result["n_cached"] += was_cached
            result["n_decoded"] += not was_cached
        result["clip_ids"] = [clip.clip_id for clip in clips]
        if with_frames and clips:
            # Laid end to end: Arrow stores and maps one-dimensional arrays of any length without pickling them.
            result["pixels"] = np.concatenate([clip.frames.reshape(-1) for clip in clips])
            result["shapes"] = [list(clip.frames.shape) for clip in clips]
    except BadClip as error:
        result["bad_path"], result["bad_reason"] = medium.name, error.reason
    except UserError as error:
        result["user_error"] = str(error)
    except Exception:
        result["crash"] = traceback.format_exc()
    return result


def _empty_row(offset: int) -> dict[str, Any]:
    return {
        "offset": offset,
        "clip_ids": [],
        "pixels": np.zeros(0, dtype=np.uint8),
        "shapes": [],
        "n_cached": 0,
        "n_decoded": 0,
        "bad_path": "",
        "bad_reason": "",
        "user_error": "",
        "crash": "",
    }


def _unpack(pixels: npt.NDArray[np.uint8], shapes: list[list[int]]) -> tuple[npt.NDArray[np.uint8], ...]:
    """Views of the arrays that were laid end to end."""
    ends = np.cumsum([np.prod(shape) for shape in shapes], dtype=np.int64)
    return tuple(
        pixels[end - int(np.prod(shape)) : end].reshape(shape) for end, shape in zip(ends, shapes, strict=True)
    )


def _join_readers() -> None:
    """Wait for the threads in which Ray Data reads ahead: they look every 0.1 s whether their stream was closed. One
    that lets go of its blocks after Ray was shut down ends the process, with exit code 1."""
    for thread in threading.enumerate():
        if thread.name == "iter_threaded":
            thread.join(READER_TIMEOUT_S)


def _fill_gaps(
    rows: Iterable[dict[str, Any]], references: Sequence[dict[str, Any]]
) -> Generator[dict[str, Any], None, None]:
    """One row per reference, in their order: rows of blocks that Ray lost come back as bad."""
    expected = iter(references)
    for row in rows:
        for reference in expected:
            if reference["offset"] == row["offset"]:
                break
            yield _lost_row(reference)
        else:
            raise RuntimeError(f"row {row['offset']} came out of order")
        yield row
    for reference in expected:
        yield _lost_row(reference)


def _lost_row(reference: dict[str, Any]) -> dict[str, Any]:
    row = _empty_row(reference["offset"])
    row["bad_path"] = next((medium.name for medium in pickle.loads(reference["media"])), "")
    row["bad_reason"] = "Ray lost the block that held it"
    return row
