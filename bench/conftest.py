"""Fixtures of the suites."""

import pytest

from beds import Report


@pytest.fixture
def report(benchmark):
    return Report(benchmark)
