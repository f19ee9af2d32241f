"""What coverage-guided fuzzing found worth keeping, and every crasher, through the same entry points without it.

``tests/data/fuzz/TARGET.zip``: a small corpus (``fuzz/pack.py``); ``tests/data/fuzz/crashes/TARGET-NAME``: an input
that once failed. ``.ci/long/fuzz`` goes on from the corpora.
"""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import s2shadow

DATA = Path(__file__).parent / "data" / "fuzz"
SOURCES = Path(__file__).parents[1] / "fuzz"
sys.path.insert(0, str(SOURCES))

from seeds import SEEDS  # noqa: E402
from targets import TARGETS  # noqa: E402


def corpus(target):
    with zipfile.ZipFile(DATA / f"{target}.zip") as archive:
        return {f"{target}.zip {name}": archive.read(name) for name in archive.namelist()}


def crashes(target):
    return {file.name: file.read_bytes() for file in sorted((DATA / "crashes").glob(f"{target}-*"))}


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(target):
    """Each input comes back, with everything that the target asserts of it."""
    inputs = corpus(target) | {f"seed {i}": seed for i, seed in enumerate(SEEDS[target]())}
    assert len(inputs) > 50
    for name, data in inputs.items():
        try:
            TARGETS[target](data)
        except BaseException as error:
            error.add_note(f"input: {name}")
            raise


@pytest.mark.parametrize("target", TARGETS)
def test_crashers(target):
    for name, data in crashes(target).items():
        try:
            TARGETS[target](data)
        except BaseException as error:
            error.add_note(f"input: {name}")
            raise


def build_engine(folder, *options):
    """``fuzz/engine.c`` without libFuzzer; skips where that cannot be."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    libdir, version = (sysconfig.get_config_var(name) for name in ("LIBDIR", "LDVERSION"))
    command = [compiler, "-O1", "-DREPLAY_ONLY", *options, str(SOURCES / "engine.c"), "-o", str(folder / "engine"),
               f"-I{sysconfig.get_path('include')}", f"-I{Path(s2shadow.__file__).parent / 'include'}",
               f"-L{libdir}", f"-Wl,-rpath,{libdir}", f"-lpython{version}"]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and "cannot find -lpython" in built.stderr:
        pytest.skip("this Python cannot be embedded: no libpython")
    assert not built.returncode, built.stderr
    return folder / "engine"


def run_programs(engine, folder):
    """Everything that is kept of engine-c -> (how many programs, the finished process)."""
    inputs = corpus("engine-c") | crashes("engine-c")
    files = [folder / f"{i:04}" for i in range(len(inputs))]
    for file, data in zip(files, inputs.values(), strict=True):
        file.write_bytes(data)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(s2shadow.__file__).parents[1]), *sys.path]),
                   "PYTHONHOME": sys.base_prefix}
    return len(files), subprocess.run([engine, *files], env=environment, capture_output=True, text=True)


def test_programs_of_the_c_api(tmp_path):
    """The programs of engine-c, each against its model of the host."""
    count, done = run_programs(build_engine(tmp_path), tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{count} programs\n"), done.stderr


@pytest.mark.parametrize("lie", ["ANOTHER_PAGE", "NO_PERMISSIONS", "NO_UNMAP"])
def test_a_model_that_lies_is_seen(tmp_path, lie):
    _, done = run_programs(build_engine(tmp_path, f"-DLIE={lie}"), tmp_path)
    assert done.returncode == -signal.SIGABRT and "the host" in done.stderr
