"""Lets transformers import torchvision on machines where its compiled operators do not load.

transformers' video processors need `import torchvision`, which fails at `torchvision::nms` when its extension was built
for another torch (the registry's wheel beside a CPU torch). No detection operator is ever called here, so naming the
schemas is enough. Call `ensure()` before the first import of transformers or vLLM.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

_libraries: list[torch.library.Library] = []  # a Library's definitions live as long as the object


def ensure() -> bool:
    """Define the two operator schemas where torchvision's extension cannot be loaded. Idempotent.

    Returns:
        Whether they had to be defined: then a child process that does not call this cannot import torchvision.
    """
    if _libraries:
        return True
    if "torchvision" in sys.modules or (spec := importlib.util.find_spec("torchvision")) is None:
        return False
    extensions = list(Path(spec.origin or "").parent.glob("_C*.so"))
    try:
        for extension in extensions:
            torch.ops.load_library(str(extension))
        if extensions:
            return False
    except (OSError, RuntimeError):
        pass  # the extension is for another torch: go on without its operators
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return True
