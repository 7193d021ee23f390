"""The cluster files parse, fit Ray's schema, ask for a token, and name the Ray that is pinned."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


def pinned(package: str) -> str:
    match = re.search(rf"^{package}==(\S+)$", (ROOT / "requirements" / "gpu.lock").read_text(encoding="utf-8"), re.M)
    assert match
    return match[1]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8")))


def test_aws_file_fits_the_autoscalers_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    [config] = documents("aws.yaml")
    config = prepare_config(config)
    validate_config(config)
    workers = config["available_node_types"]["gpu"]
    assert 0 == workers["min_workers"] < workers["max_workers"] <= config["max_workers"]
    config["available_node_types"]["gpu"]["min_worker"] = 1
    with pytest.raises(Exception, match="min_worker"):
        validate_config(config)


def test_aws_nodes_ask_for_the_token_and_have_it() -> None:
    [config] = documents("aws.yaml")
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


def test_kuberay_manifest_has_the_pinned_ray_the_token_and_elastic_workers() -> None:
    cluster, claim = documents("kuberay.yaml")
    spec = cluster["spec"]
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    groups = spec["workerGroupSpecs"]
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups)
    for template in [spec["headGroupSpec"]["template"], *(group["template"] for group in groups)]:
        pod = template["spec"]
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        for container in pod["containers"]:
            assert container["resources"]["limits"] == container["resources"]["requests"], "Ray counts the limits"
            assert {mount["name"] for mount in container["volumeMounts"]} <= {
                volume["name"] for volume in pod["volumes"]
            }


def test_image_starts_from_the_pinned_ray() -> None:
    base = re.search(r"^FROM rayproject/ray:(\S+)-py311$", (CLUSTER / "Dockerfile").read_text(encoding="utf-8"), re.M)
    assert base and base[1] == pinned("ray")


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_lock_holds_what_pyproject_pins(extra: str) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lock = set((ROOT / "requirements" / f"{extra}.lock").read_text(encoding="utf-8").splitlines())
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras[extra]]:
        exact = re.fullmatch(r"([\w-]+)(?:\[.*\])?==([\w.]+)(?:;.*)?", requirement)
        if exact:
            assert f"{exact[1]}=={exact[2]}" in lock, "run `make lock`"
