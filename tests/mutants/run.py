"""Make the mistakes of mutants.toml one at a time, and look for the test that notices: run.py CLONE OUT [NAME…].

CLONE is a clean clone that is built in place, and whose environment runs this. First the tests that the list names
must pass there. Then each mistake is made, built (only what depends on it) and tried with the tests that the list names
for it; in the end, what none of those noticed with all others. OUT keeps ``results.jsonl``, so that a run that was
interrupted goes on, and ``RESULTS.md``. A result counts for as long as the engine, the mistake and the file of the
test that noticed are the same. The exit code is 1 if a mistake went unnoticed, 2 if the list is stale, does not build,
or names tests that fail anyway.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mutantlist

SLOW = ["tests/test_bench_tools.py", "tests/test_cli_dump.py", "tests/test_docs.py", "tests/test_embed_examples.py",
        "tests/test_htmlreport.py", "tests/test_interrupts.py", "tests/test_mutations.py", "tests/test_oracle.py",
        "tests/test_storm.py", "tests/test_sweep.py", "tests/test_sweep_dask.py", "tests/test_toy_timing.py",
        "tests/test_whole_files.py"]  # fmt: skip
NOT_ABOUT_THIS = ["tests/test_mutant_list.py"]  # of course it notices
BUILD_LIMIT, SUITE_LIMIT = 1800, 3600  # seconds
MEMORY_LIMIT = 4 << 30
VERDICT = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?\.py(?:::.+?)?)(?: - .*)?$", re.MULTILINE)
WHY = re.compile(r"^E +([\w.]+)", re.MULTILINE)
UNDER_WAY = re.compile(r"^(tests/\S+::.+?) $")


class Broken(Exception):
    """What makes a run mean nothing."""


def memory_of(process):
    """Bytes that a process holds; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def run(command, folder, limit, log):
    """The exit code of a command, or why it had to be ended; what it says goes to ``log``."""
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   start_new_session=True)
        try:
            left = limit
            while process.poll() is None:
                if left < 0:
                    return f"hang, ended after {limit:.0f} s"
                if memory_of(process) > MEMORY_LIMIT:
                    return f"grows without end, ended at {MEMORY_LIMIT >> 30} GiB"
                time.sleep(0.1)
                left -= 0.1                 # by turns, not by the clock: the machine may sleep, or have stopped us
            return process.returncode
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def how_it_failed(said):
    """In a word or two, from what pytest says of the first failure."""
    kind = match[1].rpartition(".")[2] if (match := WHY.search(said)) else "failure"
    return {"assert": "assertion", "AssertionError": "assertion", "Failed": "assertion",
            "InvariantError": "`vm.check()`"}.get(kind, kind)  # fmt: skip


def in_git(clone, what):
    """The hash of HEAD, or of a file or folder of it (``HEAD:name``)."""
    return subprocess.check_output(["git", "rev-parse", what], cwd=clone, text=True).strip()


def fingerprint(clone, mutant):
    """Of all that a mistake's effect depends on, but for the tests."""
    parts = (in_git(clone, "HEAD:s2shadow"), in_git(clone, "HEAD:setup.py"), mutant.file, mutant.find, mutant.replace)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def counts(clone, row, mutant, commit):
    """Whether a result of an earlier run still does."""
    if row["of"] != fingerprint(clone, mutant):
        return False
    if not row["test"]:
        return row["commit"] == commit
    file = row["test"].partition("::")[0]
    return (clone / file).exists() and row["test_file"] == in_git(clone, f"HEAD:{file}")


class Trial:
    """A clone, built, and the state to come back to after each mistake."""

    def __init__(self, clone, out):
        self.clone, self.out = clone, out
        self.log = out / "log"
        self.build("unmutated")
        self.kept = out / "kept"
        shutil.rmtree(self.kept, ignore_errors=True)
        self.times = {}
        for path in self.products():
            copy = self.kept / path.relative_to(clone)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
            self.times[path] = path.stat().st_mtime_ns

    def products(self):
        """What a build makes: it goes by their times."""
        yield from (self.clone / "s2shadow").rglob("*.so")
        yield from (path for path in (self.clone / "build").rglob("*") if path.is_file())

    def build(self, name):
        code = run([sys.executable, "setup.py", "build_ext", "--inplace"], self.clone, BUILD_LIMIT, self.log)
        if code:
            raise Broken(f"{name} does not build:\n" + self.log.read_text()[-3000:])

    def restore(self, file, text, times):
        (self.clone / file).write_text(text)
        os.utime(self.clone / file, ns=times)
        for path in list(self.products()):
            if path not in self.times:
                path.unlink()
            elif path.stat().st_mtime_ns != self.times[path]:
                shutil.copy2(self.kept / path.relative_to(self.clone), path)

    def pytest(self, tests, limit):
        """None if all pass; else the test that did not, and how."""
        shutil.rmtree(self.clone / ".hypothesis", ignore_errors=True)   # nothing is learnt from the last mistake
        code = run([sys.executable, "-m", "pytest", "-x", "-v", "--no-header", "--tb=short", "-p", "no:cacheprovider",
                    "--hypothesis-seed=0", *tests], self.clone, limit, self.log)
        said = self.log.read_text(errors="replace")
        if code == 0:
            return None
        if isinstance(code, str) or code < 0:
            at = [match[1] for line in said.splitlines() if (match := UNDER_WAY.match(line.partition("Fatal ")[0]))]
            how = code if isinstance(code, str) else f"crash ({signal.Signals(-code).name})"
            return (at[-1] if at else "collection"), how
        failed = VERDICT.findall(said)
        if not failed:
            raise Broken(f"pytest ended with {code}:\n" + said[-3000:])
        return failed[0], how_it_failed(said)

    def files(self):
        return sorted(path.relative_to(self.clone).as_posix() for path in (self.clone / "tests").glob("test_*.py"))

    def others(self, mutant):
        """All test files that a mistake's own are not, the slow ones last."""
        rest = [file for file in self.files() if file not in [*mutant.tests, *NOT_ABOUT_THIS]]
        return sorted(rest, key=lambda file: file in SLOW)

    def attempt(self, mutant, tests, limit):
        """The test that notices a mistake, and how; None if none does."""
        path = self.clone / mutant.file
        text, stat = path.read_text(), path.stat()
        mutated = mutant.mutated(self.clone)
        try:
            path.write_text(mutated)
            self.build(mutant.name)
            return self.pytest(tests, limit)
        finally:
            self.restore(mutant.file, text, (stat.st_atime_ns, stat.st_mtime_ns))


def table(mutants, results):
    """RESULTS.md."""
    rows = [results[mutant.name] for mutant in mutants if mutant.name in results]
    commits = sorted({row["commit"][:7] for row in rows})
    lines = ["# Mistakes made on purpose, and what noticed them", "",
             f"Written by `.ci/long/mutants` on {' and '.join(commits)}: {sum(bool(row['test']) for row in rows)} of "
             f"{len(mutants)} mistakes were noticed" + (f", {len(mutants) - len(rows)} were not tried."
                                                        if len(rows) < len(mutants) else "."),
             "The mistakes themselves are in mutants.toml. *: by a test of another file than the list names.", "",
             "| mistake | breaks | noticed by | how |", "|---|---|---|---|"]  # fmt: skip
    for mutant in mutants:
        if row := results.get(mutant.name):
            test = (row["test"] or "").removeprefix("tests/").replace("|", "\\|")
            by = f"`{test}`{'' if row['where'] == 'named' else ' *'}" if test else "**nothing**"
            lines.append(f"| {mutant.name} | {mutant.rule} | {by} | {row['how'] or ''} |")
    return "\n".join(lines) + "\n"


def main(clone, out, names):
    clone, out = Path(clone).resolve(), Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    commit = in_git(clone, "HEAD")
    mutants = mutantlist.load(clone / "tests" / "mutants" / "mutants.toml")
    by_name = {mutant.name: mutant for mutant in mutants}
    if unknown := set(names) - set(by_name):
        raise Broken(f"not in the list: {', '.join(sorted(unknown))}")
    for mutant in mutants:
        mutant.mutated(clone)                               # all of the list fits, before anything takes long
    journal = out / "results.jsonl"
    known = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    results = {row["name"]: row for row in known
               if row["name"] in by_name and counts(clone, row, by_name[row["name"]], commit)}
    # what many modules see takes longest to build
    todo = sorted((by_name[name] for name in names or by_name if name not in results),
                  key=lambda mutant: mutant.file.endswith(".pxd"))
    if todo:
        trial = Trial(clone, out)
        seconds = {}
        for test in sorted({test for mutant in todo for test in mutant.tests}):
            began = time.monotonic()
            if failed := trial.pytest([test], SUITE_LIMIT):
                raise Broken(f"without a mistake {failed[0]} fails: {failed[1]}\n" + trial.log.read_text()[-3000:])
            seconds[test] = time.monotonic() - began
            print(f"passes without a mistake: {test}, {seconds[test]:.0f} s", flush=True)
        left = []
        for where, round_ in (("named", todo), ("all", left)):
            for n, mutant in enumerate(round_, 1):
                began = time.monotonic()
                if where == "named":
                    found = trial.attempt(mutant, mutant.tests, 60 + 5 * sum(seconds[test] for test in mutant.tests))
                else:
                    found = trial.attempt(mutant, trial.others(mutant), SUITE_LIMIT)
                test, how = found or (None, None)
                shown = f"{test}: {how}" if test else "not noticed"
                print(f"{n}/{len(round_)} {mutant.name}: {shown} ({time.monotonic() - began:.0f} s)", flush=True)
                if not test and where == "named":
                    left.append(mutant)             # when the others are through, by all other tests
                    continue
                results[mutant.name] = {
                    "name": mutant.name, "of": fingerprint(clone, mutant), "commit": commit, "test": test, "how": how,
                    "where": where, "test_file": in_git(clone, f"HEAD:{test.partition('::')[0]}") if test else None,
                }  # fmt: skip
                with open(journal, "a") as file:
                    file.write(json.dumps(results[mutant.name]) + "\n")
    (out / "RESULTS.md").write_text(table(mutants, results))
    missed = [name for name in names or by_name if not results[name]["test"]]
    print(f"{len(names or by_name) - len(missed)} of {len(names or by_name)} mistakes were noticed", *missed, sep="\n")
    return 1 if missed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # what was started is ended, the sources are restored
    try:
        sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
    except (Broken, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
