"""DeepSpeed's CPU communication operator, compiled under a lock that dies with its owner.

torch guards a compiled extension by a file that whoever loads it makes and removes again. A process that is killed in
between leaves the file, and everyone after it waits for ever, without a word. Here the kernel's own lock decides who
loads, in a folder that only rlvid uses, so a file of torch's that is found there is a dead process's.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from pathlib import Path

logger = logging.getLogger(__name__)


def comm_op_folder() -> Path:
    """Where the operator is kept: beside torch's other extensions, one folder for each torch."""
    import torch
    from torch.utils import cpp_extension

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", cpp_extension.get_default_build_root()))
    return root / "rlvid" / f"py{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}"


def load_comm_op() -> None:
    """Compile the operator where this has not been done yet, and load it; DeepSpeed then finds it loaded.

    Does nothing with a GPU, whose collectives are NCCL's.
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return  # DeepSpeed does without it
    folder = comm_op_folder()
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    with (folder / "flock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob("*/lock"):
            logger.warning("%s was left by a process that was killed; removed", left)
            left.unlink()
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        try:
            builder.load(verbose=False)
        finally:
            if before is None:
                del os.environ["TORCH_EXTENSIONS_DIR"]
            else:
                os.environ["TORCH_EXTENSIONS_DIR"] = before
