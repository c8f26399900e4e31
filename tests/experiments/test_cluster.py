"""Runs on a Ray cluster of this machine."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import replace

import pytest

from cem_fast.cli import main as cli
from cem_fast.config import RunConfig
from cem_fast.experiments import cluster
from cem_fast.experiments.cluster import Cluster, joined, run_all
from cem_fast.experiments.grid import evaluate
from cem_fast.experiments.watch import Watch

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def machines():
    """A cluster whose head has no cores, and two workers of one core."""
    from ray.cluster_utils import Cluster as Machines

    # of its own, because Ray keeps the address of the latest cluster there; short, because sockets lie in it
    place = tempfile.mkdtemp(prefix="ray-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", place)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        machines = Machines(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        workers = [machines.add_node(num_cpus=1) for _ in range(2)]
        yield machines, workers
        ray.shutdown()
        machines.shutdown()
    while os.path.exists(place):  # its last processes still write their logs
        shutil.rmtree(place, ignore_errors=True)


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


def test_what_a_cluster_refuses_is_an_error_of_one_line(machines, tiny_grid, tmp_path, monkeypatch):
    (config, *_) = tiny_grid.runs()
    address = machines[0].address

    def events(folder, *, gpus=0, device="cpu", config=config):
        at = Cluster(address, gpus_per_run=gpus)
        return list(run_all([(0, config, folder)], cluster=at, jobs=0, device=device, fresh=False))

    with pytest.raises(
        ValueError, match="gpus_per_run must fit a machine of the cluster that has cores for runs, got 2"
    ):
        events(tmp_path / "run", gpus=2, device="cuda")
    (tmp_path / "file").touch()
    (*_, (kind, _, (reason,))) = events(tmp_path / "file" / ".." / "file")
    assert kind == "failed"
    assert "folder must be" in reason
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]  # no mark is left
    # of a run that cannot be read on the other side
    (event,) = events(tmp_path / "run", config=Unreadable())
    assert event[0] == "failed"
    assert re.fullmatch(r"\w+Error: .*unreadable", event[2][0])
    assert not ray.is_initialized()
    with joined(Cluster(address)), pytest.raises(ValueError, match=f"cluster must be {address}, to which this process"):
        list(run_all([(0, config, tmp_path / "run")], cluster=Cluster("host:1"), jobs=0, device="cpu", fresh=False))
    monkeypatch.setenv("RAY_ADDRESS", "ray://host:10001")
    with (
        pytest.raises(ValueError, match=r"cluster must be HOST:PORT or auto, got 'ray://host:10001'"),
        joined(Cluster("auto")),
    ):
        pass


def unreadable():
    raise RuntimeError("unreadable")


class Unreadable:
    def __reduce__(self):
        return unreadable, ()


@pytest.mark.parametrize(
    "machines, gpus, jobs, cores",
    [
        ([{"CPU": 2}, {"CPU": 1, "GPU": 1}], 1, 1, 1),
        ([{"CPU": 2}, {"CPU": 1, "GPU": 1}], 0, 1, 2),
        ([{"CPU": 8, "GPU": 2}], 0.5, 4, 2),
        ([{"CPU": 8, "GPU": 2}], 2, 4, 1),
        ([{"CPU": 3}, {"CPU": 5}], 0, 2, 3),
        ([{"CPU": 3}, {"CPU": 5}], 0, 3, 2),
        ([{"CPU": 3}, {"CPU": 5}], 0, 0, 1),
        ([{"CPU": 3}, {"CPU": 5}], 0, 99, 1),
        ([{"CPU": 4}, {"GPU": 4}], 1, 1, 0),
        ([{}], 0, 0, 0),
        ([], 0, 0, 0),
    ],
)
def test_cores_of_a_run(machines, gpus, jobs, cores):
    assert cluster.cores_of_run(machines, gpus, jobs) == cores


@pytest.mark.parametrize("gpus, device", [(0, "cuda"), (1, "cpu"), (1, "cuda:1"), (0, "mps")])
def test_a_device_that_does_not_fit_the_gpus_is_refused(gpus, device):
    with pytest.raises(ValueError, match=r"(gpus_per_run|device) must be "):
        list(run_all([], cluster=Cluster("auto", gpus_per_run=gpus), jobs=0, device=device, fresh=False))


@pytest.mark.parametrize("address", ["", "local", "ray://host:10001", "host", "host:port"])
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(ValueError, match="cluster must be HOST:PORT or auto"):
        Cluster(address)


def test_an_address_without_a_cluster_is_refused_at_once():
    with pytest.raises(ConnectionError, match="no Ray cluster at '127.0.0.1:1'"), joined(Cluster("127.0.0.1:1")):
        pass


def test_a_machine_that_differs_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(cluster.socket, "gethostname", lambda: "far")
    monkeypatch.setattr(cluster, "becomes_visible", lambda path: path.exists())
    task, versions = (0, None, tmp_path / "run"), cluster._versions()
    others = versions | {"torch": "1.0", "source": "0"}
    (event,) = cluster._work(task, ".", others, 1, "mark", "cpu", False)
    assert event == ("broken", ("far differs from this machine in the version of torch, source",))
    (event,) = cluster._work(task, ".", versions, 1, "mark", "cpu", False)
    assert event == ("broken", (f"far does not share the folder {tmp_path}",))


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


@pytest.mark.long
def test_a_cluster_without_machines_is_given_up(machines, tiny_grid, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    (config, *_) = tiny_grid.runs()
    tasks = [(0, replace(config, epochs=300), tmp_path / "run")]

    def lose_all(kind):
        while kind == "stage" and machines[1]:
            machines[0].remove_node(machines[1].pop(), allow_graceful=False)

    events = run_all(tasks, cluster=Cluster(machines[0].address), jobs=1, device="cpu", fresh=False)
    with pytest.raises(ConnectionError, match="the cluster has lost all machines that fit a run"):
        [lose_all(kind) for kind, *_ in events]


def test_a_search_asks_for_its_cluster_before_anything_is_trained(tiny_images, tmp_path):
    tune = pytest.importorskip("cem_fast.tune")
    config = RunConfig(data=str(tiny_images), image_size=16, epochs=1)
    with pytest.raises(ConnectionError, match="no Ray cluster at '127.0.0.1:1'"):
        tune.tune(config, tmp_path / "tune", tune.Targets(), trials=1, cluster=Cluster("127.0.0.1:1"))
    assert not (tmp_path / "tune").exists()


@pytest.mark.parametrize("command", ["evaluate", "tune"])
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gpus-per-run", "1"], "gpus_per_run must be left out without cluster, got 1"),
        (["--cluster", "host"], "cluster must be HOST:PORT or auto, got 'host'"),
        (["--cluster", "auto", "--gpus-per-run", "1"], "gpus_per_run must be 0 on the device cpu, got 1"),
        (["--cluster", "auto", "--device", "cuda:1"], "device must be cpu or cuda on a cluster"),
        (["--cluster", "auto", "--device", "cuda", "--gpus-per-run", "-1"], "gpus_per_run must be at least 0"),
    ],
)
def test_flags_that_do_not_fit_are_named(command, flags, message, tiny_images, tmp_path, capfd):
    assert cli.main([command, "--data", str(tiny_images), "--folder", str(tmp_path / "runs"), *flags]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()
