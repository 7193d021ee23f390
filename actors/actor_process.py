"""What every actor process does first, and how the driver starts Ray."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

import ray

from rlvid.errors import UserError

# Copies from 1 MiB on go past the cache. What is copied in such pieces, weights above all, is read by another process,
# and a virtual machine that shows the host's whole L3 (480 MiB was seen) makes glibc keep all of it: a weight update of
# 200 MB then took 1.4 times as long.
STREAMING_COPIES = "glibc.cpu.x86_non_temporal_threshold=0x100000"


def start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names (a submitted job), else start one for this run alone.

    Raises:
        UserError: no cluster answers there, or none can be started.
    """
    if ray.is_initialized():
        return
    # Ray's own default would also join a cluster that somebody else left running on this machine.
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":  # the workers inherit what is set here
        os.environ.setdefault("GLIBC_TUNABLES", STREAMING_COPIES)
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process less; there is no other machine
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")  # its 60 s are short under load
    try:
        host, colon, port = address.rpartition(":")
        if colon and port.isdigit() and "/" not in host:  # Ray itself tries a dead address for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as e:
        where = "Ray does not start here" if address == "local" else f"no Ray cluster answers at RAY_ADDRESS={address}"
        raise UserError(f"{where}: {str(e).splitlines()[0]}") from e


def enter_process(log_file: Path, threads: int | None) -> None:
    """Send this process's output to the run's log file and set its number of torch threads."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    set_threads(threads)


def set_threads(threads: int | None) -> None:
    """Torch threads of the calling thread: OpenMP keeps the number per thread, and Ray starts workers with one."""
    import torch

    torch.set_num_threads(threads or os.cpu_count() or 1)
