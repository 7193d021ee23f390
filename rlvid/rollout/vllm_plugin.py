"""What rlvid adds to vLLM, through vLLM's own plugin entry point (`vllm.general_plugins` in pyproject.toml)."""

from __future__ import annotations

import importlib

from rlvid.models import torchvision_ops

WEIGHT_BACKEND = "buckets"


def register() -> None:
    """Called by vLLM at the start of each of its processes. Idempotent."""
    torchvision_ops.ensure()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if WEIGHT_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            WEIGHT_BACKEND, "rlvid.rollout.weights.bucket_engine", "BucketEngine"
        )


def keep_plain_weights() -> None:
    """CPU: linear layers compute with the weights as they are, instead of a copy packed for oneDNN.

    New weights are then one copy into the model's memory. With packed weights each update also stages, packs and
    allocates every layer, which took five times as long; a packed product is about 5 % faster for 64 to 256 rows of
    float32.
    """
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False


def keep_pixels() -> None:
    """Leave the pixels of a request with the worker as long as the request runs.

    vLLM 0.32 strips those that the prefix cache covers when a request joins. A request may start again, where the
    engine preempts it for lack of memory and its prefix is no longer in the cache: the vision tower then needs the
    pixels, and without them the engine fails with "Expected number of multimodal embeddings to match number of input
    items".
    """
    from vllm.v1.core.sched import output

    output.strip_covered_mm_data = lambda features, *_, **__: features


def register_model_class(architecture: str, module: str, name: str) -> None:
    """Register vLLM's own class for `architecture` as an object rather than by name.

    By name, vLLM inspects it in a child process, which imports torchvision before any plugin runs and so fails where
    `torchvision_ops` had to help.
    """
    from vllm import ModelRegistry

    ModelRegistry.register_model(architecture, getattr(importlib.import_module(module), name))
