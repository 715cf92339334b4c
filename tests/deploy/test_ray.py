"""Packing on a Ray cluster that comes and goes, and the file that starts one on AWS."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.validate
import pytest
import yaml

from demo.local_s3 import LocalS3
from shards.store import open_store
from tests.integration.conftest import photo
from tests.support.command import MOCO_SCALE, moco_scale
from tests.support.faulty_proxy import Fault, FaultyProxy
from tests.support.ray_cluster import growing_ray_cluster, ray_cluster
from tests.support.s3_environment import only_s3

pytestmark = [pytest.mark.s3, pytest.mark.timeout(600)]

RAY_COMMAND = str(Path(sys.executable).parent / "ray")
RAY = Path(__file__).parents[2] / "deploy/ray"
NUM_IMAGES = 240
SETTINGS = ("--max-shard-samples", "4", "--seed", "5")
PATIENCE_S = 240.0


# The file for AWS.


@pytest.fixture(scope="module")
def aws() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((RAY / "aws.yaml").read_text())
    return found


def test_ray_takes_the_file_for_aws(aws: dict[str, Any]) -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")  # what 'ray up' does first

    config = util.prepare_config(aws)
    util.validate_config(config)

    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert config["max_workers"] == 32
    for when in ("", "head_", "worker_"):
        assert not config[f"{when}setup_commands"], "the image has all that is needed"


def test_ec2_would_take_what_the_nodes_are(aws: dict[str, Any]) -> None:
    ec2 = boto3.client("ec2", region_name=aws["provider"]["region"])
    call = ec2.meta.service_model.operation_model("RunInstances").input_shape

    for name, node in aws["available_node_types"].items():
        asked = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        report = botocore.validate.ParamValidator().validate(asked, call)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"

    worker = aws["available_node_types"]["spot_worker"]["node_config"]
    known = call.members["InstanceMarketOptions"].members["MarketType"].enum
    assert worker["InstanceMarketOptions"]["MarketType"] in known


def test_the_head_may_launch_and_end_workers_of_its_cluster_only(aws: dict[str, Any]) -> None:
    provider = pytest.importorskip("ray.autoscaler._private.aws.node_provider")
    code = Path(provider.__file__).read_text()
    policy = json.loads((RAY / "head-policy.json").read_text())
    actions: set[str] = set()
    for statement in policy["Statement"]:
        one = statement["Action"]
        actions |= {one} if isinstance(one, str) else set(one)

    # What Ray's code calls, by boto3's names; nothing is stopped, so nothing is started again.
    called = {
        "ec2:RunInstances": "create_instances(",
        "ec2:CreateTags": "create_tags(",
        "ec2:TerminateInstances": "terminate_instances",
        "ec2:DescribeInstances": "instances.filter(",
        "ec2:DescribeInstanceTypes": "describe_instance_types(",
        "ec2:DescribeImages": "describe_images(",
    }
    assert actions == {*called, "iam:PassRole"}
    assert all(call in code for call in called.values())
    assert aws["provider"]["cache_stopped_nodes"] is False
    assert aws["cluster_name"] in json.dumps(policy)
    packer = aws["available_node_types"]["spot_worker"]["node_config"]["IamInstanceProfile"]
    assert f"role/{packer['Name']}" in json.dumps(policy)


def test_the_commands_of_the_file_are_known(aws: dict[str, Any]) -> None:
    flags = subprocess.run(
        [RAY_COMMAND, "start", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    commands = aws["head_start_ray_commands"] + aws["worker_start_ray_commands"]

    for flag in re.findall(r"(--[a-z-]+)", " ".join(commands)):
        assert flag in flags, flag
    packs = re.search(r'ray exec \S+ "\S+/moco-scale (.+)"', (RAY / "aws.yaml").read_text())
    assert packs is not None
    refused = moco_scale(*packs[1].replace("s3://", "/nonexistent/").split())
    assert refused.returncode == 1, "right usage: it fails because there is no such folder"
    assert "/nonexistent/RAW_BUCKET" in refused.stderr


# Nodes that are lost, and nodes that come.


@pytest.fixture(scope="module")
def expected() -> Iterator[dict[str, bytes]]:
    """A raw bucket at s3://raw-photos, and the set that packing it on this machine gives."""
    with LocalS3() as server, pytest.MonkeyPatch.context() as patch:
        only_s3(patch, server.environment)
        raw = open_store(server.make_bucket("raw-photos"))
        server.make_bucket("packed")
        for number in range(NUM_IMAGES):
            raw.put(f"{number:03}.jpg", photo(seed=number))
        done = moco_scale("pack", "s3://raw-photos", "s3://packed/whole", *SETTINGS)
        assert done.returncode == 0, done.stderr
        yield contents("s3://packed/whole")


def contents(url: str) -> dict[str, bytes]:
    store = open_store(url)
    paths = [path for page in store.list() for path in page.column("path").to_pylist()]
    return {path: bytes(store.read(path)) for path in sorted(paths)}


class Packer:
    """`moco-scale pack --engine ray` under way."""

    def __init__(self, url: str, address: str) -> None:
        self.url = url
        command = [*MOCO_SCALE, "pack", "s3://raw-photos", url, *SETTINGS, "--engine", "ray"]
        self.process = subprocess.Popen(
            [*command, "--ray-address", address],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> "Packer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def committed(self) -> int:
        return sum(len(page) for page in open_store(self.url).list("_commit"))

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)  # between two looks

    def finish(self) -> str:
        out, error = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, error
        return out + error


@pytest.mark.slow
def test_a_cluster_whose_spot_nodes_are_all_taken_and_replaced_packs_the_same_set(
    expected: dict[str, bytes],
) -> None:
    pytest.importorskip("ray")
    with ray_cluster(nodes=2) as cluster, Packer("s3://packed/spot", cluster.address) as packer:
        first, second = cluster.worker_nodes.copy()
        packer.wait_for(lambda: packer.committed() >= 2)
        cluster.remove_node(first, allow_graceful=False)
        packer.wait_for(lambda: packer.committed() >= 6)
        cluster.remove_node(second, allow_graceful=False)
        at_loss = packer.committed()
        cluster.add_node(num_cpus=2)
        printed = packer.finish()

    print(f"{at_loss} shards were committed when no node was left\n{printed}")
    assert at_loss < NUM_IMAGES // 4
    assert contents("s3://packed/spot") == expected


@pytest.mark.slow
def test_a_cluster_grows_from_nothing_with_the_work_and_shrinks_after_it(
    expected: dict[str, bytes], aws: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    limits = {"min_workers": aws["available_node_types"]["spot_worker"]["min_workers"]}
    worker = {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 2, **limits}
    server = os.environ["AWS_ENDPOINT_URL"]
    # However fast one node is, there is work until another has come.
    last = Fault("status", r"/growing/_commit/000059", method="PUT")
    with FaultyProxy(server, [last]) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        grow_and_shrink(ray, {"spot_worker": worker}, proxy)

    assert contents("s3://packed/growing") == expected


def grow_and_shrink(ray: Any, node_types: dict[str, Any], proxy: FaultyProxy) -> None:
    """From no node to two while a set is packed, and to none again."""
    with growing_ray_cluster(node_types, max_workers=2, idle_timeout_minutes=0.05) as address:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        try:
            seen = set()

            def has(nodes: int) -> bool:
                alive = sum(n["Alive"] and n["Resources"].get("CPU", 0) > 0 for n in ray.nodes())
                seen.add(alive)
                return alive == nodes

            assert has(0)
            with Packer("s3://packed/growing", address) as packer:
                packer.wait_for(lambda: has(2))
                proxy.faults = []
                packer.finish()
            deadline = time.monotonic() + PATIENCE_S
            while not has(0):
                assert time.monotonic() < deadline, "idle nodes stayed"
                time.sleep(0.2)  # between two looks
        finally:
            ray.shutdown()

    print(f"nodes that were seen: {sorted(seen)}")
