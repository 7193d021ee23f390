"""What every actor process does first, and how the driver starts Ray."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import ray

from rlvid.errors import UserError

# Copies from 1 MiB on go past the cache. What is copied in such pieces, weights above all, is read by another process,
# and a virtual machine that shows the host's whole L3 (480 MiB was seen) makes glibc keep all of it: a weight update of
# 200 MB then took 1.4 times as long.
STREAMING_COPIES = "glibc.cpu.x86_non_temporal_threshold=0x100000"


def start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names (a submitted job), else start one for this run alone, in two tries.

    From then on SIGTERM interrupts as Ctrl-C does; Ray's own handler prints a stack dump.

    Raises:
        UserError: no cluster answers there, or Ray has no place for its token.
        RuntimeError: Ray does not start here.
    """
    if ray.is_initialized():
        return
    # Ray's own default would also join a cluster that somebody else left running on this machine.
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":  # the workers inherit what is set here
        os.environ.setdefault("GLIBC_TUNABLES", STREAMING_COPIES)
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process less; there is no other machine
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # with its 2 s a run ends 3 s later
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")  # its 60 s are short under load
    for is_last in (address != "local", True):
        try:
            _init(address)
            break
        except Exception as e:  # of a start under load Ray raises Exception itself
            ray.shutdown()
            why = next(iter(str(e).splitlines()), type(e).__name__)
            if address != "local":
                raise UserError(
                    f"no Ray cluster answers at RAY_ADDRESS={address}: {why}. A cluster with tokens needs "
                    f"RAY_AUTH_MODE=token here (now: {os.environ.get('RAY_AUTH_MODE', 'not set')}) and its token in "
                    f"RAY_AUTH_TOKEN or ~/.ray/auth_token"
                ) from e
            if isinstance(e, OSError) or "home directory" in why:
                raise UserError(
                    f"Ray does not start here: {why}. It keeps the cluster's token in $HOME/.ray: set HOME to a folder "
                    f"that can be written, or RAY_AUTH_TOKEN to a long random text"
                ) from e
            if is_last:
                raise RuntimeError(
                    f"Ray did not start in two tries: {why} (is the machine short of memory or processors? Ray's logs: "
                    f"/tmp/ray/session_latest/logs)"
                ) from e
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _init(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:  # Ray itself tries a dead address for minutes
        socket.create_connection((host, int(port)), timeout=10).close()
    ray.init(
        address=address,
        include_dashboard=False if address == "local" else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


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
