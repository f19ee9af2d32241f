"""The programs of examples/ that have s2shadow inside, built here and run: they check what they compute themselves."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import s2shadow

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# What is imported and cimported is what these tests see, however it was installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(s2shadow.__file__).parents[1]), *sys.path])}

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")


def run(*command, cwd, **environment):
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True,
                          env={**ENVIRONMENT, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copied(name, tmp_path):
    return Path(shutil.copytree(EXAMPLES / name, tmp_path / name, ignore=shutil.ignore_patterns("embed", "build")))


@needs_compiler
@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_c_program(tmp_path):
    shown = run("make", "-s", "-B", "run", f"PYTHON={sys.executable}", cwd=copied("embed_c", tmp_path))
    assert "1048576 faults served" in shown
    assert "every invariant holds" in shown and "tables behind callbacks" in shown


@needs_compiler
def test_cython_extension(tmp_path):
    folder = copied("cython_ext", tmp_path)
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=folder)
    assert "32768 words" in run(sys.executable, "check.py", cwd=folder)


def test_ctypes(tmp_path):
    assert "32 faults" in run(sys.executable, EXAMPLES / "ctypes_call.py", cwd=tmp_path)
