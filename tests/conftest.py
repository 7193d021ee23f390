"""Shared inputs: a small synthetic set and a tiny model, made once per test run."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait would slow the other runs


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: Any, settings: Any) -> bool:
    """Ends the run where a test hangs. Of what a signal handler raises, `ray.get` lets KeyboardInterrupt alone out;
    the exception of pytest-timeout it swallows, and the test would hang on.
    """

    def stop(*_: object) -> None:
        with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{item.nodeid} ran longer than {settings.timeout:g} s", file=sys.stderr, flush=True)
        raise KeyboardInterrupt

    def cancel() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    item.cancel_timeout = cancel
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, settings.timeout)
    return True


ENGINES = {"local_ray", "one_rank", "two_ranks", "both"}  # fixtures that start one
RANKS = {"one_rank", "two_ranks"}  # for the whole session; made once if all tests that use them run in one process


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if ENGINES & set(item.fixturenames):
            item.add_marker("engine")
        # what runs in one process: a file, or all that need the ranks; tests of families share nothing
        group = "ranks" if RANKS & set(item.fixturenames) else item.path.stem
        item.add_marker(pytest.mark.xdist_group(item.name if item.get_closest_marker("families") else group))
    # What takes minutes begins first: the ranks, which are one group, then whole runs.
    items.sort(key=lambda item: (not RANKS & set(item.fixturenames), "tests/jobs/" not in item.nodeid))


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.jsonl (20 clips) and eval.jsonl (10 clips)."""
    from rlvid.config import SyntheticConfig
    from rlvid.synthetic.moving_shapes import make_synthetic

    folder = tmp_path_factory.mktemp("synthetic")
    make_synthetic(folder, SyntheticConfig(train=20, eval=10), seed=3)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, synthetic: Path) -> dict[str, Path]:
    """Folders of random models, by family, that know the synthetic questions' words. Made when asked for."""
    from rlvid.config import TinyModelConfig
    from rlvid.models.tiny import make_tiny

    rows = [json.loads(line) for line in (synthetic / "train.jsonl").read_text().splitlines()]
    texts = [f"{r['question']} {r['answer']}" for r in rows]

    class Folders(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            self[family] = folder = tmp_path_factory.mktemp("model") / "tiny"
            make_tiny(folder, TinyModelConfig(family=family), texts, seed=0)
            return folder

    return Folders()


@pytest.fixture(scope="session")
def tiny_model(tiny_models: dict[str, Path]) -> Path:
    """Folder of a random Qwen2-VL."""
    return tiny_models["qwen2_vl"]


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random BERT."""
    import torch

    from rlvid.models import torchvision_ops

    torchvision_ops.ensure()  # before transformers
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "square", "moves", "left"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), initializer_range=0.5, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_clips() -> Path:
    folder = Path(__file__).parents[1] / ".." / "shared" / "data" / "clips"
    if not folder.is_dir():
        pytest.skip("the real clips (../shared/data/clips) are not on this machine")
    return folder.resolve()
