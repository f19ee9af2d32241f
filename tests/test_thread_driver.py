"""Native threads through the C API, with no interpreter beside them (``threads/driver.c``): a second of each policy.

.ci/run has it under ThreadSanitizer, .ci/long/threads at length.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import s2shadow
from seed import SEED

THREADS = Path(__file__).resolve().parent / "threads"
# What is imported is what these tests see, however it was installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(s2shadow.__file__).parents[1]), *sys.path])}

pytestmark = pytest.mark.skipif(not (shutil.which("cc") and shutil.which("make")), reason="no C compiler, or no make")


def make(folder, *words):
    command = ["make", "-s", *words, f"PYTHON={sys.executable}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    """Runs the driver with options, and gives what it prints."""
    folder = shutil.copytree(THREADS, tmp_path_factory.mktemp("driver") / "threads",
                             ignore=shutil.ignore_patterns("driver"))
    built = make(folder, "driver")
    if "cannot find -lpython" in built.stderr:
        pytest.skip("this Python cannot be embedded: no libpython")
    assert not built.returncode, built.stderr

    def run(*options, ok=True):
        done = make(folder, "run", "ARGS=" + " ".join(["--seconds", "1", "--seed", str(SEED), *options]))
        assert (done.returncode == 0) is ok, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("teardown", ["reverse-map", "interval-map", "blow-away", "blow-away-lean"])
def test_all_at_once(drive, teardown):
    assert "live translations as a fresh VM has them" in drive("--teardown", teardown)


def test_all_refill_at_once(drive):
    assert "live translations as a fresh VM has them" in drive("--jobs", "refill")


def test_wrong_usage_is_an_error(drive):
    drive("--teardown", "none", ok=False)
