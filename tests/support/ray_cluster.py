"""A Ray cluster of several nodes on this machine: some can be lost, or it grows by itself."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def ray_cluster(nodes: int) -> Iterator[Any]:
    """A head without CPUs and `nodes` nodes of one CPU: `cluster.address`, `cluster.worker_nodes`.

    Nodes inherit this process's environment as it is now.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_health_check_initial_delay_ms", "0")
        patch.setenv("RAY_health_check_period_ms", "500")
        patch.setenv("RAY_health_check_failure_threshold", "4")
        root = str(Path(__file__).parents[2])
        patch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
        from ray.cluster_utils import Cluster  # an optional extra, slow to import

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        try:
            for _ in range(nodes):
                cluster.add_node(num_cpus=1)
            yield cluster
        finally:
            cluster.shutdown()


@contextlib.contextmanager
def growing_ray_cluster(
    node_types: Mapping[str, Any], *, max_workers: int, idle_timeout_minutes: float
) -> Iterator[str]:
    """A head without CPUs, and Ray's own autoscaler, whose cloud is this machine; its address.

    Not Ray's AutoscalingCluster, which begins by stopping every Ray on the machine.

    Args:
        node_types: as `available_node_types` of a cluster file.
    """
    from ray.util import get_node_ip_address  # an optional extra, slow to import

    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    address = f"{get_node_ip_address()}:{port}"  # Ray's name for this machine: not localhost
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    config = {
        "cluster_name": "growing",
        "max_workers": max_workers,
        "idle_timeout_minutes": idle_timeout_minutes,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",  # "fake_multinode" is the same, and needs a file that no wheel has
            "module": f"{_FAKE_CLOUD}.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": _FAKE_HEAD,
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {**node_types, "ray.head.default": head},
        # Other clouds' files fill these in.
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts_sync_continuously": False,
        "initialization_commands": [],
        **{f"{when}setup_commands": [] for when in ("", "head_", "worker_")},
        **{f"{when}_start_ray_commands": [] for when in ("head", "worker")},
    }
    mark = f"OF_THIS_TEST={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # socket paths are short
        file = Path(folder, "cluster.json")
        file.write_text(json.dumps(config))
        environment = {
            **os.environ,
            name: value,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": _FAKE_HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _FAKE_HEAD,
        }
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", f"--port={port}",
            "--num-cpus=0", "--include-dashboard=false",
            f"--autoscaling-config={file}", f"--temp-dir={folder}", "--disable-usage-stats",
        ]  # fmt: skip
        try:
            subprocess.run(
                command, env=environment, check=True, timeout=120,
                stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            yield address
        finally:
            _kill_marked(mark.encode())


_FAKE_CLOUD = "ray.autoscaler._private.fake_multi_node.node_provider"
_FAKE_HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"


def _kill_marked(mark: bytes) -> None:
    """End all processes that have inherited this variable, also those begun meanwhile."""
    while True:
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in environment.read_bytes().split(b"\0"):
                    found.append(int(environment.parent.name))
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
