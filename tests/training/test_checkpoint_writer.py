from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlvid.training.checkpoint_writer import BackgroundWriter


def test_a_file_has_the_values_of_the_moment_of_saving(tmp_path: Path) -> None:
    weights = torch.arange(6.0)
    state = {"module": {"a": weights[2:4], "step": 3}, "list": [weights], "pair": (weights, "text")}
    writer = BackgroundWriter()
    writer.save(state, str(tmp_path / "state.pt"))
    weights.zero_()  # the next step
    writer.wait()
    assert writer.is_done
    found = writer.load(str(tmp_path / "state.pt"))
    assert found["module"]["a"].tolist() == [2.0, 3.0] and found["module"]["step"] == 3
    assert found["list"][0].tolist() == found["pair"][0].tolist() == list(range(6)) and found["pair"][1] == "text"
    assert found["module"]["a"].untyped_storage().nbytes() == 8  # not the storage behind the view


def test_an_error_of_the_thread_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    writer = BackgroundWriter()
    writer.save({"a": 1}, str(tmp_path / "nowhere" / "state.pt"))
    with pytest.raises(FileNotFoundError):
        writer.wait()
    writer.wait()  # it is said once
