"""Fixtures of the suites, and the table that every run of them ends with: ns per operation, floor, ratio, limit."""

import tomllib
from pathlib import Path

import pytest

from beds import FULL, Report
from report import judged

LIMITS = tomllib.loads((Path(__file__).parent / "budgets.toml").read_text())["times"]


@pytest.fixture
def report(benchmark):
    return Report(benchmark)


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    ran = [bench for bench in getattr(session, "benchmarks", []) if "ns_per_operation" in bench.extra_info]
    if not ran:
        return
    width = max(len(bench.name) for bench in ran) + 2
    terminalreporter.section("ns per operation, floor in this run" + ("" if FULL else " (small sizes)"))
    terminalreporter.write_line(f"{'':{width}}{'ns/op':>12}{'floor':>12}{'ratio':>9}  limit")
    for bench in ran:
        info = bench.extra_info
        floor = f"{info['floor_ns']:12,.1f}{info['times_floor']:9,.2f}" if "floor_ns" in info else f"{'-':>12}{'-':>9}"
        limit = limit_text(LIMITS.get(bench.name), info)
        terminalreporter.write_line(f"{bench.name:{width}}{info['ns_per_operation']:12,.1f}{floor}  {limit}")


def limit_text(limit, info):
    """A figure's limit, and whether it is kept where that can be said: not at small sizes."""
    if limit is None:
        return ""
    text, kept = judged(limit, info)
    return text if kept or not FULL else f"{text}: NOT REACHED"
