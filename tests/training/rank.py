"""One rank of a test of the learner, run as a program.

`python -m tests.training.rank RANK WORLD_SIZE FOLDER PROGRAM STAGE MODEL ...` calls `run` of each
tests/training/PROGRAM.py, one after another in the same processes, and prints the results of rank 0 as a JSON list.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def main(rank: int, world_size: int, folder: Path, *programs: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    results = []
    for name, stage, model in zip(programs[::3], programs[1::3], programs[2::3], strict=True):
        print(f"{name} under ZeRO {stage}", file=sys.stderr, flush=True)
        program = importlib.import_module(f"tests.training.{name.partition('.')[0]}")
        (folder / name).mkdir(exist_ok=True)
        results.append(program.run(rank, world_size, int(stage), Path(model), folder / name))
        dist.barrier()
    if rank == 0:
        print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
