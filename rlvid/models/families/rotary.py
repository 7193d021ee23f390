"""Rotary positions on three axes (time, height, width), counted as vLLM 0.32 counts them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rlvid.types import Span


def rotary_positions(
    n_tokens: int,
    spans: Sequence[Span],
    grid_thw: npt.NDArray[np.int64],
    merge_size: int,
    time_steps: Sequence[float] | None = None,
) -> npt.NDArray[np.int32]:
    """Return the positions [3, n_tokens] of a prompt as vLLM and transformers 4 count them.

    Text after a video continues at the largest position so far + 1. transformers 5.19 continues at max(height, width)
    of the video instead and ignores its time axis; the two differ if merged T > max(H, W).

    Args:
        spans: runs of placeholders, in the order of the prompt.
        grid_thw: [len(spans), 3] patches of each run.
        time_steps: [len(spans)] positions between one temporal patch and the next; their product with the patch's
            index is rounded down. Default 1.
    """
    positions = np.empty((3, n_tokens), dtype=np.int32)
    done, following = 0, 0
    steps = time_steps if time_steps is not None else [1.0] * len(spans)
    for span, (t, h, w), step in zip(spans, grid_thw, steps, strict=True):
        n_text = span.offset - done
        positions[:, done : span.offset] = following + np.arange(n_text)
        following += n_text
        axes = np.indices((t, h // merge_size, w // merge_size)).reshape(3, -1)
        if axes.shape[1] != span.length:
            raise ValueError(f"placeholder run of {span.length} tokens for a grid of {axes.shape[1]}")
        axes[0] = (axes[0] * step).astype(np.int64)
        done = span.offset + span.length
        positions[:, span.offset : done] = following + axes
        following += int(axes.max()) + 1
    positions[:, done:] = following + np.arange(n_tokens - done)
    return positions
