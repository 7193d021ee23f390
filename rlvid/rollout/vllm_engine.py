"""vLLM in this process: requests join at any time, weights change between two steps.

The owner calls `step()` as long as there is work; this class keeps no thread. Prompts go in as engine input
(`QwenVL.engine_input`), never through `LLM.generate`, which drops the video without a warning (vLLM 0.32).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rlvid.config import RolloutConfig
from rlvid.errors import UserError
from rlvid.models import torchvision_ops
from rlvid.models.families.qwen_vl import QwenVL
from rlvid.rollout import vllm_plugin
from rlvid.training.buckets import Bucket
from rlvid.types import Prompt, Rollout, WeightSpan

# The smallest block of vLLM's CPU attention. Its default of 128 is longer than many prompts, which then are computed
# once per response: 32 prompts of 44 tokens, 8 responses each, take 0.15 s instead of 0.24.
CPU_BLOCK = 32
BAN = -100.0  # the strongest bias that vLLM takes; exp(-100) is 0 beside any sampled token in float32


@dataclass(frozen=True)
class Sampling:
    """How to answer a prompt. `temperature` 0 is greedy."""

    n: int
    temperature: float
    max_tokens: int


def set_environment(on_gpu: bool, kv_cache_gib: int) -> None:
    """Environment that vLLM reads at import; call before the first import of vLLM in a process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in process: our weights, our step loop
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not on_gpu:
        # One small op of the vision tower would be compiled at the first prompt: 4 s and more, for nothing on this
        # scale.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gib)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


class VllmEngine:
    """One engine replica.

    Raises:
        UserError: the checkpoint cannot be served.
    """

    def __init__(self, folder: Path, family: QwenVL, cfg: RolloutConfig, dtype: str, seed: int, on_gpu: bool):
        set_environment(on_gpu, cfg.kv_cache_gib)
        vllm_plugin.register()  # torchvision has to be importable before vLLM is
        from vllm import EngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.v1.engine.llm_engine import LLMEngine

        if torchvision_ops.ensure():
            vllm_plugin.register_model_class(family.architecture, family.vllm_module)
        self.family = family
        try:
            self.engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=str(folder),
                    dtype=dtype,
                    seed=seed,
                    enforce_eager=not on_gpu,
                    max_model_len=cfg.max_model_len,
                    tensor_parallel_size=cfg.tensor_parallel,
                    gpu_memory_utilization=cfg.gpu_memory_utilization,
                    limit_mm_per_prompt={"video": cfg.max_videos},
                    max_num_seqs=cfg.max_sequences,
                    max_num_batched_tokens=cfg.max_batched_tokens,
                    block_size=cfg.block_size or (None if on_gpu else CPU_BLOCK),
                    enable_prefix_caching=True,
                    # The trainer compares with the distribution that was sampled from; vLLM's default is the raw one.
                    logprobs_mode="processed_logprobs",
                    mm_processor_cache_gb=0,  # prompts arrive processed
                    weight_transfer_config=WeightTransferConfig(backend=vllm_plugin.WEIGHT_BACKEND),
                    disable_log_stats=True,
                )
            )
        except ValueError as e:
            raise UserError(f"vLLM cannot serve {folder}: {e}") from e
        self.engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
        self._prompts: dict[str, Prompt] = {}
        self._count = 0

    @property
    def is_busy(self) -> bool:
        return bool(self._prompts)

    @property
    def weight_version(self) -> int:
        """Version of the weights; -1 before the first update."""
        version = self.engine.get_weight_version()
        return -1 if version == "default" else int(version)

    def submit(self, prompt: Prompt, sampling: Sampling) -> str:
        """Queue a prompt; the returned id comes back from `step` with its rollouts."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            logprobs=0,  # of the sampled token alone
            logit_bias=dict.fromkeys(self.family.banned_tokens, BAN),
            stop_token_ids=[self.family.end_of_turn],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request_id = str(self._count)
        self._count += 1
        self.engine.add_request(request_id, self.family.engine_input(prompt), params)
        self._prompts[request_id] = prompt
        return request_id

    def first_logprobs(self, prompt: Prompt, tokens: Sequence[int], temperature: float) -> npt.NDArray[np.float32]:
        """Log-prob of each of `tokens` as the first response token. Only while nothing else is queued."""
        from vllm import SamplingParams

        if self.is_busy:
            raise RuntimeError("first_logprobs needs an idle engine")
        params = SamplingParams(
            temperature=temperature,
            max_tokens=1,
            logprob_token_ids=list(tokens),
            logit_bias=dict.fromkeys(self.family.banned_tokens, BAN),
            detokenize=False,
        )
        self.engine.add_request(f"first-{self._count}", self.family.engine_input(prompt), params)
        self._count += 1
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    first = output.outputs[0].logprobs[0]
                    return np.array([first[token].logprob for token in tokens], dtype=np.float32)
        raise RuntimeError("the engine ended a request without an answer")

    def step(self) -> list[tuple[str, list[Rollout]]]:
        """One scheduler step; the requests that ended in it."""
        ended = []
        for output in self.engine.step():
            if output.finished:
                prompt = self._prompts.pop(output.request_id)
                ended.append(
                    (
                        output.request_id,
                        [self._rollout(prompt, c) for c in sorted(output.outputs, key=lambda c: c.index)],
                    )
                )
        return ended

    def update_weights(self, version: int, buckets: Sequence[Bucket]) -> None:
        """Take new weights between two steps; caches computed with the old ones are dropped. Older ones are ignored."""
        if version <= self.weight_version:
            return
        rpc = self.engine.collective_rpc
        rpc("start_weight_update")
        for bucket in buckets:
            rpc("update_weights", kwargs={"update_info": {"bucket": bucket}})
        rpc("finish_weight_update")
        self.engine.set_weight_version(str(version))
        self.engine.reset_encoder_cache()
        self.engine.reset_prefix_cache(reset_running_requests=self.is_busy)

    def _rollout(self, prompt: Prompt, completion) -> Rollout:  # type: ignore[no-untyped-def]  # vLLM is imported late
        ids = list(completion.token_ids)
        spans = completion.weight_versions or ()
        return Rollout(
            sample_id=prompt.sample_id,
            token_ids=np.array(ids, dtype=np.int32),
            logprobs=np.array(
                [step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)], dtype=np.float32
            ),
            text=self.family.decode(ids),
            finish_reason=str(completion.finish_reason),
            versions=tuple(WeightSpan(-1 if s.version == "default" else int(s.version), s.start, s.end) for s in spans),
        )
