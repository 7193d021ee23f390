"""Models whose weights do not change, each in an actor of its own: the reference and reward models.

The reference is a copy of the policy. A reward model (`rewards: [{kind: model}]`) is of kind Bradley-Terry:
VideoScore's kinds judge generated videos against their prompts, and a policy that answers in text makes no video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.actor_process import enter_process
from actors.generator import SentWeights
from actors.placement import Placement, Slot
from actors.trainer import GroupRef, fetch
from rlvid.config import JobConfig
from rlvid.rewards.part import Group, NoReward, Values


class Reference:
    """Log-probs of responses under the policy's weights of one moment."""

    def __init__(self, log_file: Path, threads: int | None):
        enter_process(log_file, threads)

    def start(self, folder: Path, cfg: JobConfig, on_gpu: bool) -> None:
        from rlvid.models.families import load_family
        from rlvid.models.loading import load_model
        from rlvid.training.packing import PackedPolicy

        network = load_model(folder, cfg.model.dtype)
        self._policy = PackedPolicy(network, load_family(folder)).eval()
        self._policy.to("cuda" if on_gpu else "cpu")
        self._budget = cfg.train.micro_batch_tokens

    def load_weights(self, sent: SentWeights) -> None:
        """Take the policy's present weights (the end of the warm start)."""
        self._copy(pair for bucket in ray.get([ref for ref, _ in sent]) for pair in bucket.tensors())

    def save(self, file: Path) -> None:
        from safetensors.torch import save_file

        save_file({name: p.detach().contiguous() for name, p in self._policy.network.named_parameters()}, file)

    def load(self, file: Path) -> None:
        from safetensors.torch import load_file

        self._copy(load_file(file).items())

    def logprobs(self, groups: Sequence[GroupRef]) -> list[npt.NDArray[np.float32]]:
        """One array [sum R] per group."""
        from rlvid.training.micro_batches import score

        return score(self._policy, fetch(groups), self._budget)

    def _copy(self, tensors: Any) -> None:
        parameters = dict(self._policy.network.named_parameters())
        for name, tensor in tensors:
            parameters[name].data.copy_(tensor)


class RewardModel:
    """Scores of responses. Clips come through the run's frame cache, with the frames that the model was trained on."""

    def __init__(self, log_file: Path, threads: int | None):
        enter_process(log_file, threads)

    def start(self, folder: Path, cfg: JobConfig, on_gpu: bool) -> None:
        from rlvid.data.encoding import SampleEncoder, Source
        from rlvid.rewards.reward_model import HeadModel

        self._model = HeadModel(folder, on_gpu)
        cache = cfg.data.cache_dir.expanduser().resolve(), int(cfg.data.cache_gib * 2**30)
        self._encoder = SampleEncoder(Source(folder, self._model.rubric.video, *cache, 2**31))

    def score(self, groups: Sequence[Group]) -> list[Values]:
        """One value per response; the reason where a sample's clips cannot be read."""
        values: list[Values] = []
        for group in groups:
            prompt, outcome = self._encoder.encode(group.sample)
            if prompt is None:
                values.append([NoReward(": ".join(outcome.bad or ()))] * len(group.responses))
                continue
            (scored,) = self._model([prompt], [[r.text for r in group.responses]])
            values.append([s.scores["reward"] if s.scores else NoReward(s.reason) for s in scored])
        return values


def start_frozen(
    model: type[Reference | RewardModel], folder: Path, cfg: JobConfig, slot: Slot, placement: Placement, logs: Path
) -> tuple[ActorHandle[Any], Callable[[], object]]:
    """Start the actor in the background.

    Returns:
        Its handle, and a function that waits until it is ready and raises what it raised.
    """
    actor = (
        ray.remote(model).options(**placement.options(slot)).remote(logs / f"{slot.name}.log", cfg.placement.threads)
    )
    return actor, partial(ray.get, actor.start.remote(folder.resolve(), cfg, slot.gpus > 0))


def ask_reward_model(actor: ActorHandle[Any], timeout_s: float, groups: Sequence[Group]) -> list[Values]:
    """As `RewardModel.score`; where the call fails or takes too long, the reason for every response."""
    try:
        values: list[Values] = ray.get(actor.score.remote(groups), timeout=timeout_s)
    except RayError as e:
        return [[NoReward(f"reward model: {type(e).__name__}")] * len(group.responses) for group in groups]
    return values
