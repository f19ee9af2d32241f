"""Paths, and the settings and fixtures that every test shares."""

import os
import signal
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
# helpers that assert: let a failure say what differs
pytest.register_assert_rewrite("hostile", "lockstep", "mutate", "oracle", "rig", "twostages", "vectors")

from seed import SEED  # noqa: E402 (of a module that all tests share: this one is imported under another name)

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", deadline=None, max_examples=100, suppress_health_check=SLOW)
settings.register_profile("long", deadline=None, max_examples=5000, suppress_health_check=SLOW)
settings.register_profile("brief", deadline=None, max_examples=20, suppress_health_check=SLOW)
# that something fails is all one wants to know
settings.register_profile("any-failure", deadline=None, max_examples=100, suppress_health_check=SLOW,
                          phases=[Phase.explicit, Phase.reuse, Phase.generate])
settings.load_profile(os.environ.get("S2SHADOW_PROFILE") or
                      ("long" if os.environ.get("S2SHADOW_LONG") == "1" else "default"))

NOTES = pytest.StashKey[list[str]]()


def pytest_configure(config):
    config.stash[NOTES] = []
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # a shell's background job ignores it, and so would every program that a test starts in order to interrupt it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header():
    return f"random tables: S2SHADOW_SEED={SEED}"


def pytest_terminal_summary(terminalreporter, config):
    """The seed again at the end, where -q and CI logs show it, with what the tests that used it have to say."""
    for note in config.stash[NOTES]:
        terminalreporter.write_line(f"S2SHADOW_SEED={SEED}: {note}")


@pytest.fixture
def rng(request):
    """Random numbers of this test's own, other ones in each run; S2SHADOW_SEED repeats a run."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(scope="session")
def notes(request):
    """Lines to print, with the seed, when all is done."""
    return request.config.stash[NOTES]


@pytest.fixture
def run(capsys):
    """``main`` in this process -> (exit code, stdout, stderr)."""
    def call(*argv):
        from s2shadow.cli import main

        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return code, out, err
    return call


@pytest.fixture
def refused(run):
    """The call must fail with exit code 2 and exactly one line on stderr that holds ``message``."""
    def call(message, *argv):
        code, out, err = run(*argv)
        assert (code, out) == (2, "")
        assert err.startswith("s2shadow: ") and err.count("\n") == 1, err
        assert message in err, err
    return call
