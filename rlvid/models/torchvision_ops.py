"""Makes `import torchvision` work on machines where its compiled operators do not load.

transformers' video processors import torchvision. The import fails at `torchvision::nms` if the compiled extension was
built for another torch (a CUDA wheel with a CPU torch, for example). rlvid calls no detection operator, so it is enough
to define their schemas. Call `ensure()` before the first import of transformers or vLLM.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

_libraries: list[torch.library.Library] = []  # definitions are removed when their Library is deleted


def ensure() -> bool:
    """Define the two operator schemas where torchvision's extension cannot be loaded. Idempotent.

    Returns:
        True if they had to be defined: child processes then have to call this too before they import torchvision.
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
        pass  # the extension is for another torch: define the schemas below
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return True
