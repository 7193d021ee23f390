"""Ends a process whose decoder hangs: native code takes no exceptions and no signals handled in Python."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ends_process_after(seconds: float) -> Iterator[None]:
    """End this process, with all threads' stacks on stderr, unless the block is left in time.

    For worker processes that something else starts again, one block at a time. A reader's own `video.timeout_s` comes
    first, and the frame cache remembers what a dead process was reading.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
