"""Sweeps on a Dask cluster: workers that are killed, points that kill them, clusters that cannot be used."""

import os
import re
import signal
from collections import Counter
from itertools import product

import pytest

from s2shadow import sweepworkers
from s2shadow.cli import main
from s2shadow.sweep import SweepError, dask_executor, load_spec, run_sweep
from sweepwork import TINY, Deadly, read_csv

distributed = pytest.importorskip("distributed", reason="distributed (the extra dask) is not installed")


def two_workers(folder):
    """Two worker processes, each with one thread, as `dask worker` starts them."""
    return distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0",
                                    local_directory=str(folder), silence_logs=60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with two_workers(tmp_path_factory.mktemp("dask")) as cluster:
        yield cluster


@pytest.fixture
def mortal_cluster(tmp_path):
    """For one test: Dask does not always start a new worker for one that was killed early."""
    with two_workers(tmp_path / "dask") as cluster:
        yield cluster


@pytest.fixture
def spec(tmp_path):
    """Write a spec of tiny storms and load it."""
    def write(text):
        (tmp_path / "spec.toml").write_text(TINY + text)
        return load_spec(tmp_path / "spec.toml")
    return write


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.csv"


def test_dask_sweep_with_a_worker_killed_halfway(mortal_cluster, spec, output):
    found = spec(f"contexts = [1, 2]\npages = [8, 16, 32, 64, 128]\nseed = {list(range(12))}\n"
                 "teardown = ['reverse-map', 'blow-away']")
    killed = []

    def kill_halfway(done, total, failed):
        if done == total // 2:
            (address, nanny), *_ = ((nanny.worker_address, nanny) for nanny in mortal_cluster.workers.values())
            killed.append((nanny.pid, len(mortal_cluster.scheduler.workers[address].processing)))
            os.kill(nanny.pid, signal.SIGKILL)
    with dask_executor(mortal_cluster.scheduler_address) as (executor, workers):
        assert workers == 2
        result = run_sweep(found, executor, output, kill_halfway, workers=workers, in_flight=64)
    assert len(killed) == 1 and killed[0][1] > 0            # it had points
    assert (result.points, result.finished, result.failed, result.interrupted) == (120, 120, 0, False)
    seen = Counter((int(row["contexts"]), int(row["pages"]), int(row["seed"]), row["policy"])
                   for row in read_csv(output))
    wanted = product([1, 2], [8, 16, 32, 64, 128], range(12), ["reverse-map", "blow-away"])
    assert seen == Counter(wanted)
    assert all(row["error"] is None and row["entries_removed"] > 0 for row in result.rows)


def test_dask_point_that_kills_its_workers(mortal_cluster, spec, output, monkeypatch):
    """Dask gives a task up after some deaths; so does the sweep after some of that."""
    monkeypatch.setattr(mortal_cluster.scheduler, "allowed_failures", 0)
    found = spec("pages = 8\nseed = [1, 2, 3]\nteardown = 'reverse-map'")
    with dask_executor(mortal_cluster.scheduler_address) as (executor, workers):
        result = run_sweep(found, Deadly(executor, {2}), output, retries=1, workers=workers, in_flight=1)
    assert [row["error"] for row in result.rows] == [None, "the worker died, 2 times", None]


def test_dask_from_the_command_line(cluster, spec, output, capsys):
    spec("pages = [8, 16]")
    code = main(["sweep", str(output.parent / "spec.toml"), "-o", str(output),
                 "--executor", f"dask:{cluster.scheduler_address}"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "") and "2 workers on" in out and len(read_csv(output)) == 6


def test_dask_workers_of_another_version(cluster, monkeypatch):
    ours = sweepworkers.own_version()
    monkeypatch.setattr(sweepworkers, "own_version", lambda: "0.0.7")
    with pytest.raises(SweepError, match=f"Dask worker tcp.* has s2shadow {re.escape(ours)}; this is 0.0.7"), \
            dask_executor(cluster.scheduler_address):
        pass


def test_dask_cluster_without_workers():
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0", silence_logs=60) as empty, \
            pytest.raises(SweepError, match="has no workers"), dask_executor(empty.scheduler_address, timeout=0.2):
        pass


def test_dask_scheduler_that_goes_away(cluster, spec, output):
    """What was finished is kept, and the sweep ends rather than wait for ever."""
    class Lost:
        status = "running"

        def __init__(self, client):
            self.client = client

        def get_executor(self, pure):
            return self.client.get_executor(pure=pure)

    found = spec("pages = 8\nseed = [1, 2, 3]")
    with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
        lost = Lost(client)

        def lose(done, total, failed):
            if done == 1:
                lost.status = "closed"
        with pytest.raises(SweepError, match="lost the Dask scheduler at tcp://h:1; 1 of 3 points are in"):
            run_sweep(found, sweepworkers.DaskExecutor(lost, "tcp://h:1"), output, lose, in_flight=1)
    assert [row["seed"] for row in read_csv(output)] == ["1"] * 3


@pytest.mark.parametrize("address, message", [
    ("nowhere", "a Dask address has a port"),
    ("missing.json", "cannot use missing.json as Dask's scheduler file: No such file"),
])
def test_dask_addresses(address, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SweepError, match=message), dask_executor(address):
        pass
