"""The ways of the weights, as far as a CPU carries them: choice and refusals, what is announced to vLLM's own
receivers, the handshake with replicas. The NCCL broadcast and the CUDA handles need a GPU and are not run here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.gpu_weight_sync import ReplicaClient, weight_backend
from rlvid.config import GrpoJobConfig
from rlvid.config.load import load_config
from rlvid.errors import UserError
from rlvid.rollout import vllm_plugin
from rlvid.training.parameters import Part, in_parts

vllm_plugin.register()  # before the first import of vLLM


def config(way: str = "auto", lora: bool = False, **placement: Any) -> GrpoJobConfig:
    rollout = {"weight_transfer": way, "replicas": placement.pop("replicas", 1)}
    model = {"tiny": {}} | ({"lora": {}} if lora else {})
    values = {"model": model, "data": {"synthetic": {}}, "rollout": rollout, "placement": placement}
    return GrpoJobConfig.model_validate(values)


@pytest.mark.parametrize(
    ("placement", "backend"),
    [
        ({"gpus": 0}, "buckets"),
        ({"gpus": 1}, "ipc"),
        ({"gpus": 0.5}, "ipc"),
        ({"gpus": 1, "replicas": 2, "trainer_workers": 2}, "ipc"),
        ({"gpus": 1, "replicas": 2}, "buckets"),  # one replica shares the trainer's GPU, one does not
        ({"gpus": 1, "colocate": False, "replicas": 3}, "nccl"),
        ({"gpus": 0.5, "colocate": False}, "buckets"),  # they may share one GPU
        ({"gpus": 1, "lora": True}, "buckets"),
    ],
)
def test_auto_takes_the_way_that_the_placement_allows(placement: dict[str, Any], backend: str) -> None:
    assert weight_backend(config(**placement)) == backend


def test_what_auto_chooses_may_be_asked_for() -> None:
    assert weight_backend(config("ipc", gpus=1)) == "ipc"
    assert weight_backend(config("nccl", gpus=1, colocate=False)) == "nccl"
    assert weight_backend(config("buckets", gpus=1)) == "buckets"


@pytest.mark.parametrize(
    ("way", "placement", "fix"),
    [
        ("nccl", {}, "needs GPUs: set placement.gpus"),
        ("ipc", {}, "needs GPUs: set placement.gpus"),
        ("nccl", {"gpus": 1}, "set placement.colocate to false"),
        ("ipc", {"gpus": 1, "colocate": False}, "set placement.colocate to true"),
        ("ipc", {"gpus": 1, "replicas": 2}, "rollout.replicas to at most placement.trainer_workers"),
        ("ipc", {"gpus": 1, "lora": True}, "model.lora trains adapters"),
    ],
)
def test_a_way_that_cannot_work_is_refused(way: str, placement: dict[str, Any], fix: str) -> None:
    with pytest.raises(ValueError, match=f"rollout.weight_transfer={way}.*{fix}"):
        config(way, **placement)


def test_nccl_on_cpu_is_a_readable_error(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: {tiny: {}}\ndata: {synthetic: {}}\nrollout: {weight_transfer: nccl}\n")
    with pytest.raises(UserError, match="weight_transfer=nccl needs GPUs"):
        load_config(GrpoJobConfig, file, [])


class Weights:
    """What `LearnerSource` asks of a learner."""

    def __init__(self) -> None:
        self.named = [("a", torch.ones(2, 3)), ("b", torch.zeros(5, dtype=torch.bfloat16))]

    def weight_metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [(name, t.dtype, tuple(t.shape)) for name, t in self.named]

    def weight_parts(self, part_bytes: int) -> Iterator[Part]:
        return in_parts(self.named, part_bytes)


def source() -> Any:
    from rlvid.rollout.weights.gpu_sender import LearnerSource

    return LearnerSource(Weights())  # type: ignore[arg-type]


def test_what_is_announced_is_what_is_sent() -> None:
    """vLLM's own sender compares both channels before it broadcasts."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    given = source()
    sent = list(NCCLTrainerWeightTransferEngine._checked_iter(given, given.metadata()))
    assert [name for name, _ in sent] == ["a", "b"]
    assert list(NCCLTrainerWeightTransferEngine._checked_iter(given, given.metadata()))  # a fresh pass each time
    assert given.largest_bytes == 24


@ray.remote
class Replica:
    """Records the steps it is asked for; the network behind them is vLLM's and needs a GPU."""

    def __init__(self, fails_at: str | None = None):
        self._fails_at, self._steps = fails_at, []  # type: ignore[var-annotated]

    def transfer(self, step: str, *arguments: Any) -> None:
        if step == self._fails_at:
            raise RuntimeError("no memory")
        self._steps.append((step, *arguments))

    def steps(self) -> list[Any]:
        return self._steps


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    yield
    ray.shutdown()


def handshake(client: ReplicaClient) -> None:
    """What `NCCLTrainerWeightTransferEngine` does on rank 0, without the broadcast."""
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

    info = NCCLWeightTransferInitInfo(master_address="h", master_port=1, rank_offset=1, world_size=5, packed=True)
    client.init_weight_transfer_engine(worker_init_payload(info))
    client.version = 3
    client.start_weight_update()
    client.update_weights(dataclasses.asdict(NCCLWeightTransferUpdateInfo(["a"], ["float32"], [[2, 3]])))
    client.finish_weight_update()


def test_every_replica_has_ranks_of_its_own(local_ray: None) -> None:
    replicas = {name: Replica.remote() for name in ("0", "1")}  # type: ignore[attr-defined]
    client = ReplicaClient(replicas, gpus_each=2, timeout_s=30)
    handshake(client)
    assert not client.failed
    for offset, replica in ((1, replicas["0"]), (3, replicas["1"])):
        (_, info), start, (_, update), finish = ray.get(replica.steps.remote())
        assert info["rank_offset"] == offset and info["world_size"] == 5 and info["packed"]
        assert (start, finish) == (("start_update",), ("finish_update", 3))
        assert update == {"names": ["a"], "dtype_names": ["float32"], "shapes": [[2, 3]]}


def test_a_replica_that_fails_is_named_and_left_alone(local_ray: None) -> None:
    replicas = {"0": Replica.remote(), "1": Replica.remote("receive_update")}  # type: ignore[attr-defined]
    dead = Replica.remote()  # type: ignore[attr-defined]
    ray.kill(dead)
    client = ReplicaClient(replicas | {"2": dead}, gpus_each=1, timeout_s=30)
    handshake(client)
    assert set(client.failed) == {"1", "2"}
    assert "no memory" in client.failed["1"] and client.failed["1"].startswith("receive_update")
    assert [step for step, *_ in ray.get(replicas["1"].steps.remote())] == ["init_transfer", "start_update"]
    assert len(ray.get(replicas["0"].steps.remote())) == 4


def test_vllm_knows_our_way_beside_its_own() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    assert {"buckets", "nccl", "ipc"} <= set(WeightTransferEngineFactory._registry)
    assert {"nccl", "ipc"} <= set(WeightTransferTrainerFactory._registry)
