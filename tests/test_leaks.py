"""A few thousand lifetimes of engines and memories leave nothing behind; 10^5 of them: ``.ci/long/leaks``.

``.ci/lifetimes`` has those through the C API alone, with LeakSanitizer.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lifetimes import KINDS, LEAKS
from sanitizer import SANITIZED
from seed import SEED

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")

EVERYWHERE = ("files", "threads", "objects of ")
SEEN_AS = {
    "python object": "objects of builtins.list",
    "python block": "python blocks",
    "array": "python blocks",
    "engine": "objects of s2shadow.engine._Engine",
    "malloc": "heap",
    "mmap": "maps",
    "file": "files",
    "thread": "threads",
    "C engine": "address space",
}


def lifetimes(count, *kinds):
    """(exit code, what is said to leak as {(kind, what)}, all of the output) of a process of its own."""
    done = subprocess.run([sys.executable, Path(__file__).with_name("lifetimes.py"), str(count), *kinds],
                          capture_output=True, text=True, env=os.environ | {"S2SHADOW_SEED": str(SEED)})
    leaks = set(re.findall(r"^LEAK: (.*): [\d,]+ (.*) or more in every", done.stdout, re.M))
    return done.returncode, leaks, done.stdout + done.stderr


def test_lifetimes(notes):
    code, leaks, output = lifetimes(2000)
    assert code == 0 and not leaks and f"{len(KINDS)} kinds" in output, output
    notes.append("lifetimes")


def test_leaks_are_seen():
    """One of each thing that can leak, in each lifetime."""
    assert SEEN_AS.keys() == LEAKS.keys()
    code, leaks, output = lifetimes(1, *LEAKS)
    assert code == 1, output
    for kind, what in SEEN_AS.items():
        # under ASan only Python's objects, files and threads are counted
        assert (kind, what) in leaks or SANITIZED and not what.startswith(EVERYWHERE), (kind, output)
