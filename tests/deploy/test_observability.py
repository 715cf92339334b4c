"""deploy/observability: by Prometheus' own tools, and by Prometheus on a run that is under way.

Grafana is in no registry that tests may install from: its dashboard is checked for what it asks of
a dashboard's JSON, and each of its queries is put to Prometheus.
"""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from shards import PackConfig, pack
from tests.support.command import TINY, pretrain_arguments
from tests.support.made_runs import make_folders
from tests.support.ports import free_ports, two_free_ports

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "observability"
needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus"
)


def promtool(*arguments: str, stdin: str = "") -> str:
    found = subprocess.run(
        ["promtool", *arguments],
        cwd=FOLDER,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def alerts() -> list[dict[str, Any]]:
    read = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    return [rule for group in read["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    return read


@needs_prometheus
def test_prometheus_takes_the_configuration_with_its_rules() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "--lint-fatal", "alerts.yml")


POD = {
    "namespace": "vision",
    "pod_name": "moco-pretrain-1",
    "pod_node_name": "node-7",
    "pod_phase": "Running",
    "pod_container_port_name": "metrics-0",
    "pod_label_app_kubernetes_io_part_of": "moco-scale",
    "pod_label_batch_kubernetes_io_job_name": "moco-pretrain",
}
"""Of what Kubernetes says of a port of a pod."""


@needs_prometheus
def test_of_a_clusters_pods_the_ranks_of_running_ones_are_scraped(tmp_path: Path) -> None:
    others = (
        {"pod_container_port_name": "rendezvous"},
        {"pod_phase": "Succeeded"},
        {"pod_phase": "Pending"},
        {"pod_label_app_kubernetes_io_part_of": "nginx"},
    )
    config = yaml.safe_load((FOLDER / "prometheus-kubernetes.yml").read_text())
    (job,) = config["scrape_configs"]
    # Debian's build knows no kubernetes_sd_configs, so what that finds is written down here.
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    job["static_configs"] = [
        {
            "targets": [f"10.0.0.{number}:8090"],
            "labels": {f"__meta_kubernetes_{name}": value for name, value in pod.items()},
        }
        for number, pod in enumerate(({**POD, **change} for change in ({}, *others)), start=1)
    ]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({**config, "rule_files": []}))

    said = promtool(
        "check", "service-discovery", "--timeout=3s", f"{tmp_path}/prometheus.yml", "moco-scale"
    )

    found = [one["labels"] for one in json.loads(said) if one["labels"]]
    assert [{name: one[name] for name in ("instance", "run", "pod", "node")} for one in found] == [
        {
            "instance": "10.0.0.1:8090",
            "run": "vision/moco-pretrain",
            "pod": "moco-pretrain-1",
            "node": "node-7",
        }
    ]


@needs_prometheus
def test_each_alert_fires_and_no_other() -> None:
    promtool("test", "rules", "alerts_test.yml")

    tried = (FOLDER / "alerts_test.yml").read_text()
    assert [one["alert"] for one in alerts() if one["alert"] not in tried] == []


def test_each_alert_says_what_is_wrong_and_where_to_read_on() -> None:
    book = ROOT / "deploy" / "README.md"
    headings = re.findall(r"^#+ (.*)$", book.read_text(), flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}

    for alert in alerts():
        said = alert["annotations"]
        page, _, anchor = said["runbook_url"].partition("#")

        assert said["summary"]
        assert said["description"]
        assert page.endswith("/deploy/README.md")
        assert anchor in anchors, alert["alert"]


def test_the_dashboard_has_what_grafana_asks_for() -> None:
    board = json.loads((FOLDER / "dashboard.json").read_text())
    variables = {one["name"]: one for one in board["templating"]["list"]}
    source = {"type": "prometheus", "uid": "${datasource}"}
    drawn = [one for one in board["panels"] if one["type"] != "row"]
    places = [one["gridPos"] for one in board["panels"]]

    assert board["schemaVersion"] >= 36  # the first whose data sources are objects
    assert board["title"]
    assert re.fullmatch(r"[\w-]{1,40}", board["uid"])
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == (
        "datasource",
        "prometheus",
    )
    assert variables["run"]["datasource"] == source
    assert len({one["id"] for one in board["panels"]}) == len(board["panels"])
    for panel in drawn:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == source
        names = [one["refId"] for one in panel["targets"]]
        assert len(set(names)) == len(names) > 0
        assert all(one["datasource"] == source for one in panel["targets"])
    assert all(one["x"] >= 0 and one["x"] + one["w"] <= 24 for one in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


@dataclass(frozen=True)
class Watched:
    """A run of two ranks, and a Prometheus that scrapes them every second."""

    url: str
    ports: tuple[int, int]
    training: "subprocess.Popen[bytes]"
    log: Path
    """What it has printed."""

    def ask(self, what: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{what}?{query}", timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    pack(
        str(make_folders(folder / "bucket", each=20)),
        str(folder / "set"),
        PackConfig(workers=1, max_shard_samples=16),
    )
    preset = folder / "tiny.toml"
    preset.write_text(TINY)
    ports = two_free_ports()
    train = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    train += ["-m", "moco_scale"]
    train += pretrain_arguments(
        preset, str(folder / "set"), str(folder / "run"),
        "--optim.epochs", "100000", "--run.checkpoint-every", "20", "--data.loader", "cpu",
        "--run.knn-labels", "folder", "--run.knn-images", "32",
        "--run.metrics-port", str(ports[0]), "--run.metrics-address", "127.0.0.1",
    )  # fmt: skip
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / "alerts.yml")]
    (job,) = config["scrape_configs"]
    job["static_configs"][0]["targets"] = [f"127.0.0.1:{port}" for port in ports]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (own,) = free_ports(1)
    scrape = ["prometheus", f"--config.file={folder}/prometheus.yml"]
    scrape += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{own}"]
    processes, log = [], folder / "training.log"
    try:
        for command, to in ((train, log), (scrape, folder / "prometheus.log")):
            with to.open("wb") as out:
                processes.append(subprocess.Popen(command, stdout=out, stderr=out))
        yield Watched(f"http://127.0.0.1:{own}", ports, processes[0], log)
    finally:
        for process in processes:
            process.terminate()  # so that torchrun ends its ranks
        for process in processes:
            process.wait(timeout=60)


def wait_until_scraped(watched: Watched, *, timeout_s: float) -> None:
    """Until rank 0 has told of a kNN score, the last thing it comes to, often enough for rates."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert watched.training.poll() is None, watched.log.read_text()
        try:
            if watched.query("count_over_time(moco_scale_knn_accuracy_ratio[1m]) > 5"):
                return
        except OSError:  # it does not listen yet
            pass
        time.sleep(0.5)
    raise AssertionError(f"nothing after {timeout_s:.0f} s: {watched.ask('targets')}")


@needs_prometheus
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_query_and_every_alert_finds_its_figures_in_a_run(watched: Watched) -> None:
    wait_until_scraped(watched, timeout_s=300)
    asked = [
        target["expr"].replace("$__rate_interval", "30s").replace("$run", ".*")
        for panel in panels()
        for target in panel.get("targets", ())
    ]
    # `bool` turns a comparison, which leaves out what is false, into 0 and 1. Of a run of seconds
    # there is nothing on the minute, which subqueries look at; and it is not gone (`unless`).
    asked += [
        re.sub(r":\dm\]", ":1s]", re.sub(r" (==|>|<) ", r" \1 bool ", expression))
        for expression in (one["expr"].partition(" unless ")[0] for one in alerts())
    ]

    without = [one for one in asked if not watched.query(one)]
    rules = [one for group in watched.ask("rules")["groups"] for one in group["rules"]]
    runs = watched.ask("label/run/values", **{"match[]": "moco_scale_build_info"})

    print(f"\n{len(asked)} queries, without data: {without or 'none'}")
    assert without == []
    assert len(rules) == len(alerts())
    assert {one["health"] for one in rules} == {"ok"}
    assert runs == ["run-1"]
    for port in watched.ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            promtool("check", "metrics", stdin=answer.read().decode())
