"""The manifests of deploy/k8s: valid, in agreement with each other and with the command line."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import kubeflow_trainer_api.models as kubeflow
import kubernetes_validate
import pytest
import yaml
from torch.distributed.run import parse_args

from moco_scale.config import TrainConfig, load_config
from tests.support.command import moco_scale
from tests.support.kubernetes import DEPLOY, Object, build, environment, only, script

FOLDERS = sorted(
    str(found.parent.relative_to(DEPLOY))
    for found in DEPLOY.rglob("kustomization.yaml")
    if found.parent.name != "common"
)
PRETRAINING = {"base": 8, "overlays/8x8": 8, "overlays/cpu-3": 1}
"""Ranks that a pod of each folder runs, where a GPU's is one."""
VERSIONS = ("1.33", "1.37")
"""The oldest Kubernetes where all of it is out of beta, and the newest that the schemas know."""
OTHERS = {"TrainJob", "TrainingRuntime", "RayJob"}


def pod_templates(one: Object) -> list[Object]:
    """The pods that an object describes."""
    if one["kind"] == "Job":
        return [one["spec"]["template"]]
    if one["kind"] == "TrainingRuntime":
        return [
            job["template"]["spec"]["template"]
            for job in one["spec"]["template"]["spec"]["replicatedJobs"]
        ]
    if one["kind"] == "RayJob":
        cluster = one["spec"]["rayClusterSpec"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        return [group["template"] for group in groups]
    return []


def validate(one: Object, version: str) -> None:
    kubernetes_validate.validate(one, version, strict=True)


def run_as_pod(folder: str, tmp_path: Path, **variables: str) -> list[str]:
    """The arguments that a folder's container hands to its program."""
    (pod,) = [pod for one in build(folder) for pod in pod_templates(one)]
    (container,) = pod["spec"]["containers"]
    facts = {"metadata.labels['batch.kubernetes.io/job-name']": "moco-pretrain"}
    given = environment(
        pod,
        container,
        sources={("ConfigMap", "moco-scale"): only(build(folder), "ConfigMap")["data"]},
        facts={**facts, "status.podIP": "10.0.0.7"},
    )
    for program in ("python", "moco-scale"):
        (tmp_path / program).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / program).chmod(0o755)
    shell = [*container["command"], *container["args"]]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        shell, capture_output=True, text=True, timeout=30, env={**path, **given, **variables}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_core_objects_are_valid(folder: str, version: str) -> None:
    objects = build(folder)

    assert objects
    for one in objects:
        if one["kind"] not in OTHERS:
            validate(one, version)


def test_a_misspelt_field_is_found() -> None:
    job = only(build("base"), "Job")
    job["spec"]["backoffLimitPerIndexes"] = job["spec"].pop("backoffLimitPerIndex")

    with pytest.raises(kubernetes_validate.ValidationError, match="backoffLimitPerIndexes"):
        validate(job, VERSIONS[0])


@pytest.mark.parametrize("kind", ["TrainJob", "TrainingRuntime"])
def test_objects_of_kubeflow_are_what_its_models_know(kind: str) -> None:
    one = only(build("kubeflow"), kind)

    # The models drop what they do not know.
    model = getattr(kubeflow, f"TrainerV1alpha1{kind}")
    assert model.from_dict(one).to_dict() == one


def test_the_job_of_the_runtime_is_a_valid_job() -> None:
    runtime = only(build("kubeflow"), "TrainingRuntime")
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]

    for version in VERSIONS:
        validate(
            {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": "x"},
                "spec": job["template"]["spec"],
            },
            version,
        )


def test_the_ray_job_has_only_fields_of_its_kind_and_valid_pods() -> None:
    # No package holds KubeRay's schema. The fields are those that the manifest uses, of
    # ray-operator/apis/ray/v1/{rayjob,raycluster}_types.go in KubeRay 1.7.
    spec = only(build("kuberay"), "RayJob")["spec"]
    cluster = spec["rayClusterSpec"]
    (worker,) = cluster["workerGroupSpecs"]

    assert set(spec) <= {
        *("submissionMode", "entrypoint", "backoffLimit", "shutdownAfterJobFinishes"),
        *("ttlSecondsAfterFinished", "rayClusterSpec"),
    }
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    assert set(cluster) <= {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    assert set(cluster["headGroupSpec"]) <= {"rayStartParams", "template"}
    assert set(worker) == {
        *("groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    }
    for template in pod_templates(only(build("kuberay"), "RayJob")):
        for version in VERSIONS:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
            validate({**pod, "spec": template["spec"]}, version)


def test_the_ray_version_is_the_one_of_the_image() -> None:
    constraints = (DEPLOY.parents[1] / "constraints.txt").read_text()

    version = only(build("kuberay"), "RayJob")["spec"]["rayClusterSpec"]["rayVersion"]

    assert f"\nray=={version}\n" in constraints


@pytest.mark.parametrize("folder", PRETRAINING)
def test_counts_agree(folder: str) -> None:
    objects = build(folder)
    job = only(objects, "Job")["spec"]
    (container,) = job["template"]["spec"]["containers"]
    values = {one["name"]: one.get("value") for one in container["env"]}
    resources = container["resources"]

    nodes = job["completions"]
    assert job["parallelism"] == nodes
    assert values["NODES"] == str(nodes)
    assert only(objects, "PodDisruptionBudget")["spec"]["minAvailable"] == nodes - 1
    gpus = resources["requests"].get("nvidia.com/gpu", "0")
    assert resources["limits"].get("nvidia.com/gpu", "0") == gpus
    assert values["PROCESSES"] == ("gpu" if int(gpus) else str(PRETRAINING[folder]))
    assert int(gpus) in (0, PRETRAINING[folder])


@pytest.mark.parametrize("folder", PRETRAINING)
def test_names_and_ports_of_the_rendezvous_agree(folder: str, tmp_path: Path) -> None:
    objects = build(folder)
    job, service = only(objects, "Job"), only(objects, "Service")
    pod, name = job["spec"]["template"], service["metadata"]["name"]
    (port,) = service["spec"]["ports"]
    (container,) = pod["spec"]["containers"]

    launch = parse_launch(folder, tmp_path, index="0")
    endpoint = launch.rdzv_endpoint
    first = int(
        launch.training_script_args[launch.training_script_args.index("--run.metrics-port") + 1]
    )

    assert endpoint == f"{job['metadata']['name']}-0.{name}:{port['port']}"
    assert pod["spec"]["subdomain"] == name
    assert container["ports"] == [
        {"name": port["name"], "containerPort": port["port"]},
        *(
            {"name": f"metrics-{local_rank}", "containerPort": first + local_rank}
            for local_rank in range(PRETRAINING[folder])
        ),
    ]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    labels = pod["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= labels
    budget = only(objects, "PodDisruptionBudget")
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels


def parse_launch(folder: str, tmp_path: Path, *, index: str) -> Any:
    """torchrun's own reading of a folder's command."""
    arguments = run_as_pod(folder, tmp_path, JOB_COMPLETION_INDEX=index)
    assert arguments[:2] == ["-m", "moco_scale.launch"]
    return parse_args(arguments[2:])


@pytest.mark.parametrize("folder", PRETRAINING)
def test_torchrun_and_pretrain_take_the_flags_and_the_world_is_allowed(
    folder: str, tmp_path: Path
) -> None:
    first = parse_launch(folder, tmp_path, index="0")
    second = parse_launch(folder, tmp_path, index="1")

    nodes = only(build(folder), "Job")["spec"]["completions"]
    assert first.nnodes == str(nodes)
    assert "is_host=1," in first.rdzv_conf
    assert "is_host=0," in second.rdzv_conf
    assert first.training_script == "moco_scale"
    assert first.training_script_args[0] == "pretrain"
    allowed_settings(first.training_script_args[1:], world_size=nodes * PRETRAINING[folder])


def allowed_settings(arguments: list[str], *, world_size: int) -> TrainConfig:
    config = load_config(arguments)
    config.validate(world_size=world_size)
    assert config.run.url.startswith("s3://")
    return config


def test_the_runtime_of_kubeflow_gives_torchrun_what_the_operator_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = only(build("kubeflow"), "TrainJob")["spec"]["trainer"]["numNodes"]
    told = {  # pkg/runtime/framework/plugins/torch/torch.go of Kubeflow Trainer 2.3
        "PET_NNODES": str(nodes),
        "PET_NPROC_PER_NODE": "auto",
        "PET_NODE_RANK": "3",
        "PET_MASTER_ADDR": "moco-pretrain-node-0-0.moco-pretrain",
        "PET_MASTER_PORT": "29500",
    }
    arguments = run_as_pod("kubeflow", tmp_path, **told)
    for name, value in told.items():
        monkeypatch.setenv(name, value)

    launch = parse_args(arguments[2:])

    assert launch.nnodes == str(nodes)
    assert launch.nproc_per_node == "auto"
    assert launch.rdzv_endpoint == "moco-pretrain-node-0-0.moco-pretrain:29500"
    assert launch.rdzv_conf.startswith("is_host=0,")
    allowed_settings(launch.training_script_args[1:], world_size=8 * nodes)


@pytest.mark.parametrize("folder", [name for name in FOLDERS if name in (*PRETRAINING, "kubeflow")])
def test_a_pod_has_longer_to_end_than_its_processes(folder: str) -> None:
    (pod,) = [pod for one in build(folder) for pod in pod_templates(one)]
    (container,) = pod["spec"]["containers"]
    found = re.search(r"--shutdown-timeout=(\d+)", script(container))

    assert found is not None
    assert pod["spec"]["terminationGracePeriodSeconds"] >= int(found[1]) + 30


def test_pack_takes_the_flags_and_as_many_workers_as_the_pod_has_cores(tmp_path: Path) -> None:
    arguments = run_as_pod("pack", tmp_path)
    ray = only(build("kuberay"), "RayJob")["spec"]["entrypoint"]
    usage = moco_scale("pack", "--help").stdout

    assert arguments[0] == "pack"
    assert arguments[arguments.index("--workers") + 1] == "16"
    flags = {word for word in [*arguments, *ray.split()] if word.startswith("--")}
    assert {"--workers", "--engine"} <= flags
    for flag in flags:
        assert re.search(rf"{flag}\s", usage), flag


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods_have_no_more_rights_than_they_need(folder: str) -> None:
    # Kubernetes' Pod Security Standard 'restricted', and a root file system that is read-only.
    objects = build(folder)
    pods = [pod["spec"] for one in objects for pod in pod_templates(one)]
    accounts = {one["metadata"]["name"] for one in objects if one["kind"] == "ServiceAccount"}

    assert pods
    assert not [one for one in objects if "Role" in one["kind"]]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["serviceAccountName"] in accounts
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods_say_what_they_need_and_where_they_write(folder: str) -> None:
    for pod in [pod["spec"] for one in build(folder) for pod in pod_templates(one)]:
        (container,) = pod["containers"]
        requests, limits = (container["resources"][key] for key in ("requests", "limits"))
        mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
        volumes = {one["name"]: one["emptyDir"] for one in pod["volumes"]}

        assert container["image"] == "moco-scale:0.1.0"
        assert {"cpu", "memory", "ephemeral-storage"} <= set(requests)
        assert limits["memory"] == requests["memory"]
        assert set(mounts) == set(volumes)
        assert "/tmp" in mounts.values()
        assert all("sizeLimit" in volume for volume in volumes.values())
        assert all(
            (volumes[name].get("medium") == "Memory") == (path == "/dev/shm")
            for name, path in mounts.items()
        )


def test_no_file_holds_a_secret() -> None:
    for path in DEPLOY.rglob("*.yaml"):
        for one in yaml.safe_load_all(path.read_text()):
            assert one.get("kind") != "Secret", path
    named = {
        source["secretRef"]["name"]
        for folder in FOLDERS
        for one in build(folder)
        for pod in pod_templates(one)
        for source in pod["spec"]["containers"][0]["envFrom"]
        if "secretRef" in source
    }
    assert named == {"moco-pack-store", "moco-pretrain-store"}
