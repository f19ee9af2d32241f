"""Instructions per operation, counted by callgrind and held against ``bench/budgets.toml``.

    python bench/instructions.py                    # count everything, compare; exit status 1 if a budget is exceeded
    python bench/instructions.py --only walk fault  # cases whose name contains one of these
    python bench/instructions.py --profile NAME     # of one case, instructions by function (--lines: by line)
    python bench/instructions.py --json FILE        # the figures, for bench.report
    python bench/instructions.py --lower            # write what is reached into the budgets, where it is less

One process runs under valgrind. Each operation is run n times and 2n times by a loop in C (``s2shadow._floor``); the
difference, divided by n, is what one costs: Python, set-up and the call around the loop cancel. What counts are
instructions in user space, those of the C library included. Figures repeat to well within 1 %.

The budgets hold for the compiler that they name; modules built by another are counted, and held against nothing. Goals
are shown, and what does not reach them is marked; only budgets decide the exit status. Without valgrind (or its
headers, or a C compiler for its client requests) nothing is counted: one line on stderr says so, exit status 77.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
BUDGETS = HERE / "budgets.toml"
NOT_COUNTED = 77
REPEATS_TO = 1.01           # two counts of the same code differ by less than this factor
REQUESTS = r"""
#include <time.h>
#include <valgrind/callgrind.h>
int on_valgrind(void) { return RUNNING_ON_VALGRIND; }
void count_begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void count_end(const char *label) { CALLGRIND_DUMP_STATS_AT(label); CALLGRIND_STOP_INSTRUMENTATION; }

/* Each look at the clock is 0.1 ms after the last: a batch comes up for signals by the clock, and how often must depend
   neither on how busy the machine is nor on how slow valgrind makes it. */
int clock_gettime(clockid_t clock, struct timespec *now)
{
    static long long looks;
    long long ns = 1000000000000LL + 100000 * ++looks;
    (void)clock;
    now->tv_sec = ns / 1000000000;
    now->tv_nsec = ns % 1000000000;
    return 0;
}
"""


class CannotCount(Exception):
    """valgrind, its headers or a C compiler is missing."""


# --- inside valgrind ---------------------------------------------------------------------------------------------


class Meter:
    """Counts what a call executes. The counts themselves are in callgrind's dumps, one for each label."""

    def __init__(self, requests):
        self.requests = ctypes.CDLL(requests)
        if not self.requests.on_valgrind():
            raise CannotCount("not under valgrind")
        self.sizes = {}

    def count(self, label, run, expected):
        self.requests.count_begin()
        result = run()
        self.requests.count_end(label.encode())
        if result != expected:
            raise RuntimeError(f"{label}: {result} where {expected} was expected")

    def measure(self, name, prepare, n):
        """``prepare(n)`` makes, uncounted, a call of ``n`` operations and says what it must return."""
        self.sizes[name] = n, 2 * n
        for size in self.sizes[name]:
            self.count(f"{name}@{size}", *prepare(size))


def inside(requests, output, names):
    """Run the cases under valgrind; write which sizes were counted, and the figures that are no counts."""
    from cases import CASES, FIGURES

    gc.disable()            # a collection would fall into one count and not into another
    meter = Meter(requests)
    counted = [name for name in names if name in CASES]
    # the first case twice: what the interpreter does once falls to the figure that is not kept
    for name, label in [(name, "warm-up") for name in counted[:1]] + [(name, name) for name in counted]:
        CASES[name](lambda prepare, n, label=label: meter.measure(label, prepare, n))
    figures = {name: FIGURES[name]() for name in names if name in FIGURES}
    Path(output).write_text(json.dumps({"sizes": meter.sizes, "figures": figures}))


# --- outside -----------------------------------------------------------------------------------------------------


def build_requests(folder):
    source, library = folder / "requests.c", folder / "requests.so"
    source.write_text(REQUESTS)
    if shutil.which("valgrind") is None:
        raise CannotCount("valgrind is not installed (Debian: apt-get install valgrind)")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CannotCount("no C compiler for valgrind's client requests")
    made = subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True)
    if made.returncode:
        raise CannotCount(f"valgrind's headers do not compile: {made.stderr.strip().splitlines()[0]}")
    return library


def count(names, folder):
    """Run the cases under callgrind -> ({name: instructions per operation}, {label: dump file})."""
    library, output = build_requests(folder), folder / "sizes.json"
    valgrind = ["valgrind", "--tool=callgrind", "--quiet", "--instr-atstart=no", f"--callgrind-out-file={folder}/dump"]
    inner = [sys.executable, __file__, "--inside", library, output, *names]
    paths = [str(HERE), str(HERE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONHASHSEED": "0",
        "LD_BIND_NOW": "1",             # no symbol is looked up while counting
        "LD_PRELOAD": str(library),     # its clock
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run([*valgrind, *map(str, inner)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("the run under valgrind failed:\n" + done.stderr.strip())
    dumps = read_dumps(folder)
    measured = json.loads(output.read_text())
    figures = {
        name: per_operation(dumps[f"{name}@{n}"][0], dumps[f"{name}@{more}"][0], n, more)
        for name, (n, more) in measured["sizes"].items()
    }
    return figures | measured["figures"], {label: path for label, (_, path) in dumps.items()}


def per_operation(few, many, n, more):
    """What one operation costs when ``n`` cost ``few`` and ``more`` cost ``many``, with anything fixed around them."""
    return (many - few) / (more - n)


def read_dumps(folder):
    """{label: (instructions, file)} of callgrind's dumps."""
    dumps = {}
    for path in folder.glob("dump.*"):
        text = path.read_text(errors="replace")
        label = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)", text, re.MULTILINE)
        if label and total:
            dumps[label[1].strip()] = int(total[1]), path
    return dumps


def compiler_of(module):
    """What compiled a module, as its .comment section says."""
    found = re.search(rb"(GCC: [^\0]+|clang version [^\0]+)", Path(module).read_bytes())
    return found[1].decode() if found else "unknown"


# --- budgets -----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One figure and what it is held against; None: nothing."""

    name: str
    measured: float
    most: float | None
    goal: float | None

    @property
    def holds(self):
        """The budget, to what figures repeat to."""
        return self.most is None or self.measured <= max(self.most * REPEATS_TO, self.most + 0.5)

    @property
    def reached(self):
        """The goal, to the instruction."""
        return self.goal is None or self.measured <= self.goal


def compare(figures, entries, same_compiler):
    """A ``Row`` for each budget whose figure was taken."""
    return [
        Row(name, value(name, figures, entry), entry.get("most") if same_compiler else None, entry.get("goal"))
        for name, entry in entries.items()
        if name in figures
    ]


def value(name, figures, entry):
    """A figure as its budget means it: ``beyond`` another, shared out ``per_leaf``."""
    return (figures[name] - figures[entry["beyond"]] if "beyond" in entry else figures[name]) / entry.get("per_leaf", 1)


def lowered(text, rows):
    """The text of budgets.toml with ``most`` down to what was measured, where that is less or where there is none."""
    for row in rows:
        most = round(max(row.measured, 0.0), 1)
        if row.most is not None and row.most <= most:
            continue
        line = re.search(rf"^{row.name} = \{{(.*?)\}}", text, re.MULTILINE)
        fields = [field.strip() for field in line[1].split(",") if field.strip()]
        kept = [f"most = {most}", *(field for field in fields if not field.startswith("most"))]
        text = text.replace(line[0], f"{row.name} = {{ {', '.join(kept)} }}")
    return text


def choose(entries, only):
    """The cases whose names contain one of ``only``, and those that they are compared with."""
    wanted = {name for name in entries if any(part in name for part in only)}
    wanted |= {entries[name]["beyond"] for name in wanted if "beyond" in entries[name]}
    return [name for name in entries if name in wanted]


def show(rows):
    print(f"{'instructions per operation':34} {'measured':>10} {'budget':>10} {'goal':>8}")
    for row in rows:
        most, goal = ("-" if limit is None else f"{limit:,}" for limit in (row.most, row.goal))
        verdict = "  EXCEEDED" if not row.holds else "" if row.reached else "  goal not reached"
        print(f"{row.name:34} {row.measured:10,.1f} {most:>10} {goal:>8}{verdict}")


def profile(name, dumps, lines):
    """callgrind_annotate of the longer run: divide by its number of operations, the figure after the @."""
    longer = max(int(label.split("@")[1]) for label in dumps if label.split("@")[0] == name)
    print(f"{name}@{longer}", flush=True)
    sources = f"--include={HERE.parent / 'build' / 'cython'}"
    options = ["--auto=yes" if lines else "--auto=no", "--threshold=99.5", sources]
    return subprocess.run(["callgrind_annotate", *options, dumps[f"{name}@{longer}"]]).returncode


def main(argv=None):
    parser = argparse.ArgumentParser(description="Instructions per operation, held against bench/budgets.toml.")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="cases named like one of these")
    parser.add_argument("--profile", metavar="NAME", help="of one case, instructions by function")
    parser.add_argument("--lines", action="store_true", help="with --profile: by line, of modules built with -g")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--lower", action="store_true", help="lower the budgets to what was measured")
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside:
        inside(*options.inside[:2], options.inside[2:])
        return 0
    budgets = tomllib.loads(BUDGETS.read_text())
    entries = budgets["instructions"]
    names = [options.profile] if options.profile else choose(entries, options.only)
    if not names or names[0] not in entries:
        print(f"instructions: no such case; there are: {', '.join(entries)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="s2shadow-instructions-") as folder:
        try:
            figures, dumps = count(names, Path(folder))
        except CannotCount as why:
            print(f"instructions: not counted: {why}", file=sys.stderr)
            return NOT_COUNTED
        if options.profile:
            return profile(options.profile, dumps, options.lines)
    compiler = compiler_of(module_file())
    same = compiler == budgets["built"]["compiler"]
    rows = compare(figures, entries, same)
    if not same:
        print(f"instructions: built by {compiler}, the budgets are of {budgets['built']['compiler']}: "
              "held against nothing", file=sys.stderr)  # fmt: skip
    show(rows)
    if options.lower and same:
        BUDGETS.write_text(lowered(BUDGETS.read_text(), rows))
    if options.json:
        found = {"compiler": compiler, **{key: budgets["built"][key] for key in ("flags", "valgrind")}}
        rounded = {row.name: round(row.measured, 2) for row in rows}
        options.json.write_text(json.dumps({"built": found, "figures": rounded}, indent=1) + "\n")
    return 0 if all(row.holds for row in rows) else 1


def module_file():
    """The module whose compiler is asked: of the sources beside bench/ if it is built there, else the installed one."""
    beside = list((HERE.parent / "s2shadow").glob("fault.*.so"))
    return beside[0] if beside else find_spec("s2shadow.fault").origin


if __name__ == "__main__":
    sys.exit(main())
