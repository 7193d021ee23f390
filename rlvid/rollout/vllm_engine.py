"""vLLM in this process: requests join at any time, weights change between two steps.

The owner calls `step()` as long as there is work; this class keeps no thread. Prompts go in as engine input
(a family's `engine_input`), never through `LLM.generate`, which drops the video without a warning (vLLM 0.32).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from rlvid.config import LoraConfig, RolloutConfig
from rlvid.errors import UserError
from rlvid.models import torchvision_ops
from rlvid.models.families.chat import ChatFamily
from rlvid.models.lora import save_adapter
from rlvid.rollout import vllm_plugin
from rlvid.rollout.engine import Sampling, shown
from rlvid.rollout.weights.buckets import Bucket
from rlvid.types import Prompt, Rollout, WeightSpan

# The smallest block of vLLM's CPU attention. Its default of 128 is longer than many prompts, which then are computed
# once per response: 32 prompts of 44 tokens, 8 responses each, take 0.15 s instead of 0.24.
CPU_BLOCK = 32
BAN = -100.0  # the strongest bias that vLLM takes; exp(-100) is 0 beside any sampled token in float32


def set_environment(on_gpu: bool, kv_cache_gib: int) -> None:
    """Environment that vLLM reads at import; call before the first import of vLLM in a process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in process: our weights, our step loop
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not on_gpu:
        # One small op of the vision tower would be compiled at the first prompt: 4 s and more for no gain.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gib)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


class VllmEngine:
    """One engine replica.

    Args:
        sleeps: on a GPU, whether `sleep` frees memory.
        lora: the checkpoint's own weights are served unchanged, and `update_weights` takes adapters.
        weight_backend: of vLLM's weight transfer. With vLLM's own ones an update comes in steps, from `init_transfer`
            to `finish_update`.

    Raises:
        UserError: the checkpoint cannot be served.
    """

    def __init__(
        self,
        folder: Path,
        family: ChatFamily,
        cfg: RolloutConfig,
        dtype: str,
        seed: int,
        on_gpu: bool,
        lora: LoraConfig | None = None,
        weight_backend: str = vllm_plugin.WEIGHT_BACKEND,
        sleeps: bool = False,
    ):
        if family.vllm_module is None:
            raise UserError(f"model.path: vLLM does not serve {family.architecture} ({folder}): give a model it serves")
        prepare_vllm(family, cfg, on_gpu)
        from vllm import EngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.v1.engine.llm_engine import LLMEngine

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
                    limit_mm_per_prompt=family.engine_limits(cfg.max_videos),
                    max_num_seqs=cfg.max_sequences,
                    max_num_batched_tokens=cfg.max_batched_tokens,
                    block_size=cfg.block_size or (None if on_gpu else CPU_BLOCK),
                    enable_prefix_caching=True,
                    # The trainer compares with the distribution that was sampled from; vLLM's default is the raw one.
                    logprobs_mode="processed_logprobs",
                    mm_processor_cache_gb=0,  # prompts arrive processed
                    weight_transfer_config=WeightTransferConfig(backend=weight_backend),
                    disable_log_stats=True,
                    enable_sleep_mode=sleeps and on_gpu,  # vLLM refuses it on CPU
                    enable_lora=lora is not None,
                    max_lora_rank=_rank_for(lora),
                )
            )
        except ValueError as e:
            raise UserError(f"vLLM cannot serve {folder}: {e}") from e
        if weight_backend == vllm_plugin.WEIGHT_BACKEND:
            self.init_transfer({})  # the others connect to the trainer later
        self.family, self._count = family, 0
        self._prompts: dict[str, Prompt] = {}
        self.is_updating = False  # between the first and the last bucket no model is complete
        self._taking: int | None = None  # the version of which some buckets have come
        self._lora, self._arrived = lora, list[Bucket]()  # adapters, which are loaded all at once
        self._adapter: Any = None  # vLLM's LoRARequest for new requests

    @property
    def is_busy(self) -> bool:
        return bool(self._prompts)

    @property
    def is_asleep(self) -> bool:
        return bool(self.engine.is_sleeping())

    @property
    def weight_version(self) -> int:
        """Version of the weights; -1 before the first update."""
        return _version(self.engine.get_weight_version())

    def weight_digest(self) -> str:
        """A hash of the weights that the engine holds, by vLLM's own checksums of its tensors."""
        (digests, *_) = self.engine.collective_rpc("compute_weight_checksums")
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

    def submit(self, prompt: Prompt, sampling: Sampling) -> str:
        """Queue a prompt; the returned id comes back from `step` with its rollouts.

        Raises:
            ValueError: vLLM refuses the prompt: it is too long, or has too many videos.
        """
        from vllm.sampling_params import RequestOutputKind

        prompt = shown(prompt, self.family, sampling)
        request = self._add(
            prompt,
            n=sampling.n,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            top_p=sampling.top_p,
            seed=sampling.request_seed(prompt.sample_id),
            logprobs=0,  # of the sampled token alone
            stop_token_ids=[self.family.end_of_turn],
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._prompts[request] = prompt
        return request

    def first_logprobs(self, prompt: Prompt, tokens: Sequence[int], temperature: float) -> npt.NDArray[np.float32]:
        """Log-prob of each of `tokens` as the first response token. Only while nothing else is queued."""
        if self.is_busy:
            raise RuntimeError("first_logprobs needs an idle engine")
        self._add(prompt, temperature=temperature, max_tokens=1, logprob_token_ids=list(tokens))
        outputs: list[Any] = []
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
        first = outputs[0].outputs[0].logprobs[0]
        return np.array([first[token].logprob for token in tokens], dtype=np.float32)

    def answers(self, prompts: Sequence[Prompt], max_tokens: int) -> list[npt.NDArray[np.int32]]:
        """Greedy token ids [R] for each prompt; the end-of-turn token is last, unless `max_tokens` came first."""
        order = [self.submit(prompt, Sampling(1, 0.0, max_tokens)) for prompt in prompts]
        ended: dict[str, list[Rollout]] = {}
        while self.is_busy:
            ended |= dict(self.step())
        return [ended[request][0].token_ids for request in order]

    def _add(self, prompt: Prompt, **parameters: Any) -> str:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        bans = dict.fromkeys(self.family.banned_tokens, BAN)
        params = SamplingParams(**parameters, logit_bias=bans, detokenize=False)
        request, self._count = str(self._count), self._count + 1
        # The prefix cache is of one version of the weights: the salt is part of its keys.
        given = {**self.family.engine_input(prompt), "cache_salt": str(self.weight_version)}
        try:
            self.engine.add_request(request, given, params, lora_request=self._adapter)
        except VLLMClientError as e:
            raise ValueError(str(e)) from e
        return request

    def step(self) -> list[tuple[str, list[Rollout]]]:
        """One scheduler step; the requests that ended in it."""
        ended = []
        for output in self.engine.step():
            if output.finished:
                prompt = self._prompts.pop(output.request_id)
                responses = sorted(output.outputs, key=lambda response: response.index)
                ended.append((output.request_id, [self._rollout(prompt, response) for response in responses]))
        return ended

    def update_weights(self, version: int, buckets: Sequence[Bucket]) -> None:
        """Take all of the new weights, or the next part of them, between two steps (the contract is in
        rlvid/rollout/weights)."""
        if version <= self.weight_version:
            return
        if self._taking not in (None, version):
            raise RuntimeError(f"weights {version} came before the last of weights {self._taking}")
        is_last = buckets[-1].is_last
        self._taking = None if is_last else version
        if self._lora:
            self._arrived += buckets
            if is_last:
                self._wake("weights")
                self._take_adapter(self._lora)
        else:
            if not self.is_updating:
                self.start_update()
            for bucket in buckets:
                self.receive_update({"bucket": bucket})
        if is_last:
            self.finish_update(version)

    def init_transfer(self, info: dict[str, Any]) -> None:
        """Connect to the trainer. `info`, here and below, is what vLLM's weight-transfer backend takes."""
        self.engine.collective_rpc("shutdown_weight_transfer_engine")  # an earlier group had other members
        self.engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})

    def sleep(self) -> None:
        """Give up weights and cache, and generate nothing until the next weights have come. Ignored while there are
        requests. vLLM's CPU engine frees no memory.
        """
        if not self.is_busy and not self.is_asleep:
            self.engine.sleep(1 if self._lora else 2)  # 1: the weights are kept on the host, adapters alone come

    def _wake(self, what: Literal["weights", "kv_cache"]) -> None:
        if self.is_asleep:
            self.engine.wake_up([what])

    def start_update(self) -> None:
        self._wake("weights")
        self.engine.collective_rpc("start_weight_update")
        self.is_updating = True

    def receive_update(self, info: dict[str, Any]) -> None:
        self.engine.collective_rpc("update_weights", kwargs={"update_info": info})

    def finish_update(self, version: int) -> None:
        """The weights are complete; what was computed with the old ones is dropped."""
        if self.is_updating:
            self.engine.collective_rpc("finish_weight_update")
            self.is_updating = False
        self._wake("kv_cache")
        self.engine.set_weight_version(str(version))
        self.engine.reset_encoder_cache()
        if not self.is_busy:  # those that run keep their keys and values; new ones cannot match them (see `_add`)
            self.engine.reset_prefix_cache()

    def _take_adapter(self, lora: LoraConfig) -> None:
        """Replace the adapters by those that arrived. vLLM reads them from a folder only."""
        from vllm.lora.request import LoRARequest

        with tempfile.TemporaryDirectory(prefix="rlvid-adapter-") as folder:
            tensors = {name: t for bucket in self._arrived for name, t in bucket.tensors()}
            save_adapter(Path(folder), tensors, lora, self.family.no_lora)
            adapter = LoRARequest("policy", 1, folder, load_inplace=True)
            if not self.engine.add_lora(adapter):
                raise RuntimeError("vLLM did not take the adapter")
        self._arrived = []
        # Requests name the adapter that is loaded: with load_inplace vLLM would read it again for each of them.
        self._adapter = LoRARequest("policy", 1, folder)

    def _rollout(self, prompt: Prompt, completion) -> Rollout:  # type: ignore[no-untyped-def]  # vLLM is imported late
        ids = list(completion.token_ids)
        logprobs = [step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)]
        return Rollout(
            sample_id=prompt.sample_id,
            token_ids=np.array(ids, dtype=np.int32),
            logprobs=np.array(logprobs, dtype=np.float32),
            text=self.family.decode(ids),
            finish_reason=str(completion.finish_reason),
            versions=tuple(WeightSpan(_version(s.version), s.start, s.end) for s in completion.weight_versions or ()),
        )


def prepare_vllm(family: ChatFamily, cfg: RolloutConfig, on_gpu: bool) -> None:
    """Set vLLM's environment, and repair and register what it lacks, before it makes an engine.

    Raises:
        UserError: a repair that the processes of `rollout.tensor_parallel` do not get.
    """
    set_environment(on_gpu, cfg.kv_cache_gib)
    vllm_plugin.register()  # torchvision has to be importable before vLLM is
    vllm_plugin.keep_pixels()
    if not on_gpu:
        vllm_plugin.keep_plain_weights()
    if torchvision_ops.ensure():
        assert family.vllm_module is not None
        name = family.vllm_class or family.architecture
        vllm_plugin.register_model_class(family.architecture, family.vllm_module, name)
    if family.adapt_engine() and cfg.tensor_parallel > 1:
        raise UserError(
            f"rollout.tensor_parallel must be 1 for {family.architecture}: vLLM's class needs a fix that its other "
            f"processes do not get"
        )


def _rank_for(lora: LoraConfig | None) -> int:
    """The least of the ranks that vLLM makes room for which holds the adapters."""
    from vllm.config.lora import MaxLoRARanks

    return min(rank for rank in get_args(MaxLoRARanks) if lora is None or rank >= lora.rank)


def _version(name: str) -> int:
    """A version by vLLM's name for it; -1 before the first update."""
    return -1 if name == "default" else int(name)
