from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from multiprocessing import shared_memory

import pytest

from benchmarks.memory import RUN_VARIABLE, Memory, _store_files

MIB = 2**20
HOLD = """
import sys
held = bytearray(b'x' * (64 * 2**20))
print('ready', flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run_id() -> Iterator[str]:
    """Run two processes with this run id, one started by the other, each with 64 MiB."""
    run_id = uuid.uuid4().hex
    parent = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {HOLD!r}])\n{HOLD}"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", parent], env=os.environ | {RUN_VARIABLE: run_id}, stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
        yield run_id
        process.communicate()


def test_processes_of_the_run_are_counted_with_their_children_and_no_others(run_id: str) -> None:
    assert 128 * MIB < sum(Memory(run_id).now().values()) < 180 * MIB
    assert sum(Memory("another").now().values()) == 0
    assert sum(Memory("another", also=os.getpid()).now().values()) > 10 * MIB


def test_peak_is_the_largest_sum_while_the_context_is_open(run_id: str) -> None:
    with Memory(run_id, every_s=0.01) as memory:
        while memory.samples < 3:
            pass
    assert 128 * MIB < memory.peak == sum(memory.parts.values())


def test_only_allocated_bytes_of_shared_memory_files_are_counted() -> None:
    memory = shared_memory.SharedMemory(create=True, size=8 * MIB)
    try:
        inode = os.stat(f"/dev/shm/{memory.name}").st_ino
        memory.buf[: 2 * MIB] = b"x" * (2 * MIB)
        sizes = {i: size for (_, i), size in _store_files(str(os.getpid())).items()}
        assert 2 * MIB <= sizes[inode] < 3 * MIB
    finally:
        memory.close()
        memory.unlink()
