"""The learner's programs (tests/training/*_rank.py) on one rank and on two, run once for all tests of this folder."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.prompts import CORE
from tests.ranks import run_ranks

FAMILY = {"mixed_rank": "qwen3_vl", "nonfinite_rank": "qwen2"}  # else qwen2_vl


def family_of(program: str) -> str:
    """Of the model of a program; one that runs with several families has the family behind a dot."""
    return program.partition(".")[2] or FAMILY.get(program, "qwen2_vl")


class Results(dict[tuple[str, int], dict[str, Any]]):
    """What the programs returned on rank 0, by program and ZeRO stage; `folder` has what they wrote."""

    def __init__(self, world_size: int, folder: Path, models: dict[str, Path], programs: dict[str, tuple[int, ...]]):
        self.folder = folder
        (folder / "bin").mkdir()  # empty: the ranks find no compiler
        environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
        environment |= {"PATH": str(folder / "bin"), "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
        runs = [(name, stage) for name, stages in programs.items() for stage in stages]
        words = [str(w) for name, stage in runs for w in (name, stage, models[family_of(name)])]
        found = run_ranks("tests.training.rank", world_size, folder, *words, environment=environment)
        super().__init__(zip(runs, found, strict=True))


@pytest.fixture(scope="session")
def one_rank(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Results:
    programs = dict.fromkeys(("learner_rank", "mixed_rank", "lora_rank", "scorer_rank"), (0,))
    programs |= dict.fromkeys((f"zero3_rank.{family}" for family in CORE), (0,))
    if find_spec("bitsandbytes"):
        programs["qlora_rank"] = (0,)
    return Results(1, tmp_path_factory.mktemp("one_rank"), tiny_models, programs)


@pytest.fixture(scope="session")
def two_ranks(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Results:
    programs = dict.fromkeys(
        ("learner_rank", "mixed_rank", "nonfinite_rank"), (3, 0, 1, 2)
    )  # ZeRO-3 first: it loads shares
    programs |= dict.fromkeys(("lora_rank", "scorer_rank"), (3,))
    programs |= dict.fromkeys((f"zero3_rank.{family}" for family in CORE), (3,))
    return Results(2, tmp_path_factory.mktemp("two_ranks"), tiny_models, programs)
