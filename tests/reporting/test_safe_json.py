from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlvid.reporting import safe_json


def test_every_text_is_strict_json_on_one_line() -> None:
    value = {
        "nan": float("nan"),
        "inf": [float("-inf"), np.float32("nan")],
        "scalars": (np.int64(3), torch.tensor(0.5), True, None),
        "path": Path("a/b"),
        3: "line\nend \u2028 \ud800 </script>",
    }
    text = safe_json.dumps(value)
    assert "\n" not in text and text.isascii()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse) == {
        "nan": None,
        "inf": [None, None],
        "scalars": [3, 0.5, True, None],
        "path": "a/b",
        "3": "line\nend \u2028 \ud800 </script>",
    }


def test_what_has_no_json_is_an_error() -> None:
    with pytest.raises(TypeError, match="no JSON for bytes"):
        safe_json.dumps({"a": b"x"})
