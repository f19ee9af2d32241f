"""Whole storms, by the code of ``s2shadow storm``; its own figures go into extra_info."""

import pytest

from s2shadow.storm import StormConfig, run


def storm(benchmark, policy, **config):
    config = StormConfig(teardown=(policy,), seconds=0.5, **config)
    result = benchmark.pedantic(run, args=(config,), rounds=1, iterations=1)
    row = result["policies"][policy]
    benchmark.extra_info.update({key: row[key] for key in row if key.endswith(("_per_event", "_ns", "_per_entry"))})
    benchmark.extra_info["events"] = row["events"]
    # a fault's floor: guest leaf, host leaf, shadow slot and head are loads that wait for each other
    load = result["floor"]["ns_per_load"]
    benchmark.extra_info.update({
        "operations": row["events"],
        "ns_per_operation": row["total_ns_per_event"],
        "floor_ns": 4 * load * (1 + row["refaults_per_event"]),
        "times_floor": row["total_ns_per_event"] / (4 * load * (1 + row["refaults_per_event"])),
    })  # fmt: skip


@pytest.mark.benchmark(group="storm on the shipped capture, 4 contexts")
def bench_storm_capture_reverse_map(benchmark):
    storm(benchmark, "reverse-map", events=2000)


@pytest.mark.benchmark(group="storm on the shipped capture, 4 contexts")
def bench_storm_capture_interval_map(benchmark):
    storm(benchmark, "interval-map", events=2000)


@pytest.mark.benchmark(group="storm on the shipped capture, 4 contexts")
def bench_storm_capture_blow_away(benchmark):
    storm(benchmark, "blow-away", events=2000)


@pytest.mark.benchmark(group="storm on the shipped capture, 4 contexts")
def bench_storm_capture_blow_away_lean(benchmark):
    storm(benchmark, "blow-away-lean", events=2000)


@pytest.mark.benchmark(group="storm, generated, 8 contexts of 65,536 pages")
def bench_storm_synthetic_reverse_map(benchmark):
    storm(benchmark, "reverse-map", synthetic=True, contexts=8, pages=65536, events=2000)


@pytest.mark.benchmark(group="storm, generated, 8 contexts of 65,536 pages")
def bench_storm_synthetic_interval_map(benchmark):
    storm(benchmark, "interval-map", synthetic=True, contexts=8, pages=65536, events=2000)


@pytest.mark.benchmark(group="storm, generated, 8 contexts of 65,536 leaves, each page twice")
def bench_storm_aliases_reverse_map(benchmark):
    storm(benchmark, "reverse-map", synthetic=True, contexts=8, pages=32768, aliases=2, events=2000)


@pytest.mark.benchmark(group="storm, generated, 8 contexts of 65,536 leaves, each page twice")
def bench_storm_aliases_interval_map(benchmark):
    storm(benchmark, "interval-map", synthetic=True, contexts=8, pages=32768, aliases=2, events=2000)
