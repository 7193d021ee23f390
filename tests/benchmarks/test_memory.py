from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from multiprocessing import shared_memory

import pytest

from benchmarks.memory import MARK, Memory, _store_files

MIB = 2**20
HOLD = """
import sys
held = bytearray(b'x' * (64 * 2**20))
print('ready', flush=True)
sys.stdin.read()
"""


@pytest.fixture
def mark() -> Iterator[str]:
    """Two processes with this mark, the one started by the other, which each hold 64 MiB."""
    mark = uuid.uuid4().hex
    parent = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {HOLD!r}])\n{HOLD}"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", parent], env=os.environ | {MARK: mark}, stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
        yield mark
        process.communicate()


def test_processes_with_the_mark_are_counted_with_their_children_and_no_others(mark: str) -> None:
    assert 128 * MIB < sum(Memory(mark).now().values()) < 180 * MIB
    assert sum(Memory("another").now().values()) == 0
    assert sum(Memory("another", also=os.getpid()).now().values()) > 10 * MIB


def test_peak_is_that_of_the_time_it_was_open(mark: str) -> None:
    with Memory(mark, every_s=0.01) as memory:
        while memory.samples < 3:
            pass
    assert 128 * MIB < memory.peak == sum(memory.parts.values())


def test_shared_memory_files_count_with_what_is_allocated() -> None:
    memory = shared_memory.SharedMemory(create=True, size=8 * MIB)
    try:
        inode = os.stat(f"/dev/shm/{memory.name}").st_ino
        memory.buf[: 2 * MIB] = b"x" * (2 * MIB)
        sizes = {i: size for (_, i), size in _store_files(str(os.getpid())).items()}
        assert 2 * MIB <= sizes[inode] < 3 * MIB
    finally:
        memory.close()
        memory.unlink()
