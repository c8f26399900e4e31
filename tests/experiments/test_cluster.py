"""Runs on a Ray cluster of this machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cem_fast.experiments import cluster, provenance
from cem_fast.experiments.cluster import Cluster, joined, run_all
from cem_fast.experiments.grid import evaluate
from cem_fast.experiments.watch import Watch

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def machines():
    """A cluster whose head has no cores, and two workers of one core."""
    from ray.cluster_utils import Cluster as Machines

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        machines = Machines(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = [machines.add_node(num_cpus=1) for _ in range(2)]
    yield machines, workers
    ray.shutdown()
    machines.shutdown()


class LostMachine(Watch):
    """Takes one machine away once both runs are being trained."""

    def __init__(self, machines, worker):
        self.machines, self.worker = machines, worker
        self.training, self.failures = set(), []

    def stage(self, index, name, done, total):
        self.training.add(index)
        if len(self.training) == 2 and self.worker is not None:
            self.machines.remove_node(self.worker, allow_graceful=False)
            self.worker = None

    def failed(self, index, total, config, reason, *, again):
        self.failures.append((again, reason))


def test_what_a_cluster_refuses_is_an_error_of_one_line(machines, tiny_grid, tmp_path):
    (config, *_) = tiny_grid.runs()
    address = machines[0].address

    def events(cluster, folder=tmp_path / "run", config=config):
        return list(run_all([(0, config, folder)], cluster=cluster, jobs=0, device="cpu", fresh=False))

    with pytest.raises(
        ValueError, match="gpus_per_run must be at most 0, the GPUs of the cluster's largest machine, got 2"
    ):
        events(Cluster(address, gpus_per_run=2))
    (tmp_path / "file").touch()
    (*_, (kind, _, (reason,))) = events(Cluster(address), folder=tmp_path / "file" / "run")
    assert kind == "failed"
    assert "folder must be one that can be written to" in reason
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["", "local", "ray://host:10001", "host", "host:port"])
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(ValueError, match="cluster must be HOST:PORT or auto"):
        Cluster(address)


def test_an_address_without_a_cluster_is_refused_at_once():
    with pytest.raises(ConnectionError, match="no Ray cluster at '127.0.0.1:1'"), joined(Cluster("127.0.0.1:1")):
        pass


def test_runs_of_another_version_are_refused(monkeypatch):
    monkeypatch.setattr(cluster.socket, "gethostname", lambda: "far")
    assert list(cluster._work((0, None, None), ".", "digest of others", "cpu", 1, False)) == [
        ("failed", ("far has another version of cem_fast",))
    ]


def test_a_machine_without_the_folder_is_named(monkeypatch):
    monkeypatch.setattr(cluster.socket, "gethostname", lambda: "far")
    digest = provenance.source_digest()
    (event,) = cluster._work((0, None, None), "/nowhere", digest, "cpu", 1, False)
    assert event == ("broken", ("far: [Errno 2] No such file or directory: '/nowhere'",))


def test_the_run_of_a_lost_machine_is_tried_again(machines, tiny_grid, tmp_path):
    grid = replace(tiny_grid, undefended=(), noise_levels=(), attacks=("ridge",), epochs=30)
    watch = LostMachine(machines[0], machines[1].pop())
    results = evaluate(grid, tmp_path, jobs=2, cluster=Cluster(machines[0].address), watch=watch)
    assert len(results.runs) == len(grid.runs()) == 2
    assert not results.failed
    ((again, reason),) = watch.failures
    assert again
    assert "dead" in reason
    assert not ray.is_initialized()
    # everything is done: nobody asks for the cluster
    assert evaluate(grid, tmp_path, cluster=Cluster("127.0.0.1:1")).runs == results.runs
