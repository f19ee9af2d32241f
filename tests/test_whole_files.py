"""Files are written whole or not at all: no room, no permission, killed in the middle."""

import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import s2shadow
from s2shadow.events import EVENT_DTYPE
from s2shadow.report import write_folder
from s2shadow.trace import save_events
from test_mutations import NESTED, PLAIN, TINY_SPEC, host_trace

ROOT = Path(s2shadow.__file__).parents[1]
TINY = ("--synthetic", "--pages", "64", "--contexts", "1", "--events", "20", "--seconds", "0.01")
REPLAY = ("replay", "@/trace.txt", "--teardown", "reverse-map,blow-away")
# every option that names a file to write
OUTPUTS = {
    "walk json": ("walk", PLAIN, *(hex(page << 12) for page in range(40)), "--json", "@/out.json"),
    "walk csv": ("walk", PLAIN, *(hex(page << 12) for page in range(40)), "--csv", "@/out.csv"),
    "tlbi json": ("tlbi", "RIPAS2E1IS", "--json", "@/out.json"),
    "tlbi csv": ("tlbi", "RIPAS2E1IS", "--csv", "@/out.csv"),
    "dump json": ("dump", PLAIN, "--json", "@/out.json"),
    "dump csv": ("dump", PLAIN, "--csv", "@/out.csv"),
    "diff json": ("diff", PLAIN, NESTED, "--json", "@/out.json"),
    "diff csv": ("diff", PLAIN, NESTED, "--csv", "@/out.csv"),
    "storm json": ("storm", *TINY, "--json", "@/out.json"),
    "storm csv": ("storm", *TINY, "--csv", "@/out.csv"),
    "storm plot": ("storm", *TINY, "--plot", "@/out.svg"),
    "replay json": (*REPLAY, "--json", "@/out.json"),
    "replay csv": (*REPLAY, "--csv", "@/out.csv"),
    "replay plot": (*REPLAY, "--plot", "@/out.png"),
    "replay report": (*REPLAY, "--report", "@/out.html"),
    "sweep output": ("sweep", "@/spec.toml", "-o", "@/out.csv"),
    "sweep parquet": ("sweep", "@/spec.toml", "-o", "@/out.parquet"),
    "sweep json": ("sweep", "@/spec.toml", "-o", "@/kept.csv", "--json", "@/out.json"),
    "sweep csv": ("sweep", "@/spec.toml", "-o", "@/kept.csv", "--csv", "@/out.csv"),
    "sweep plot": ("sweep", "@/spec.toml", "-o", "@/kept.csv", "--plot", "@/out.pdf"),
}
NEEDS = {"plot": "matplotlib", "parquet": "polars"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Inputs of the commands, a finished sweep among them, whose points need not be run again."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "trace.txt").write_bytes(host_trace())
    (folder / "spec.toml").write_bytes(TINY_SPEC)
    subprocess.run([sys.executable, "-m", "s2shadow", "sweep", "spec.toml", "-o", "kept.csv"], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def folder(tmp_path, inputs):
    for name, content in inputs.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def command(name, folder):
    """The arguments, and the file that they name."""
    needed = NEEDS.get(name.partition(" ")[2])
    if needed is not None:
        pytest.importorskip(needed)
    argv = [str(argument).replace("@", str(folder)) for argument in OUTPUTS[name]]
    file = next(Path(argument) for argument in argv if "/out." in argument)
    if name.startswith("sweep ") and OUTPUTS[name][3].startswith("@/out"):
        (folder / "kept.csv.journal").rename(f"{file}.journal")
    return argv, file


@contextlib.contextmanager
def room_for(size):
    """No file of this process may grow beyond ``size``: as on a disk that fills up in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", OUTPUTS)
def test_no_room(run, folder, name):
    """The old file stays as it was, beside it nothing is left, and one line says why."""
    argv, file = command(name, folder)
    if name.startswith("sweep "):
        run(*argv)
        assert file.stat().st_size > 100
    file.write_bytes(b"old")
    before = sorted(folder.iterdir())
    with room_for(100):
        code, _, err = run(*argv)
    first = next(Path(argument) for argument in argv if Path(argument).name in (file.name, "kept.csv"))
    assert code == 2 and err == f"s2shadow: cannot write {first}: file too large\n"
    assert file.read_bytes() == b"old" and sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name", OUTPUTS)
def test_no_such_place(run, folder, name):
    """Said before any work is done, also where not even root may write."""
    argv, file = command(name, folder)
    for place in (f"/proc/{file.name}", f"{folder}/nowhere/{file.name}", f"{folder}/trace.txt/{file.name}"):
        code, out, err = run(*(place if argument == str(file) else argument for argument in argv))
        assert (code, out) == (2, "") and err.startswith(f"s2shadow: cannot write {place}: ") and err.count("\n") == 1


@pytest.mark.parametrize("name", [name for name in OUTPUTS if name.endswith((" json", " csv"))])
def test_full_device(run, folder, name):
    argv, file = command(name, folder)
    argv = ["/dev/full" if argument == str(file) else argument for argument in argv]
    code, _, err = run(*argv)
    assert (code, err) == (2, "s2shadow: cannot write /dev/full: no space left on device\n")


@pytest.mark.parametrize("option", [(), ("--engine",)])
def test_folder_of_a_dump(run, tmp_path, option):
    """``dump -o`` makes all of its files or no folder."""
    argv = ("dump", NESTED, *option, "-o", tmp_path / "out")
    with room_for(100):
        code, out, err = run(*argv)
    assert (code, out, err) == (2, "", f"s2shadow: cannot write {tmp_path}/out: file too large\n")
    assert list(tmp_path.iterdir()) == []
    assert run(*argv)[0] == 0
    code, out, err = run(*argv)
    assert code == 2 and "it exists and is not an empty folder" in err


def test_events(tmp_path):
    import numpy as np

    file = tmp_path / "events.npz"
    file.write_bytes(b"old")
    rows = np.frombuffer(random.Random(1).randbytes(100 * EVENT_DTYPE.itemsize), EVENT_DTYPE)
    with room_for(100), pytest.raises(OSError):
        save_events(file, rows)
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_journal_without_room(run, folder):
    """A point that cannot be stored ends the sweep; what was stored before stays, and the next run goes on from it."""
    argv = ("sweep", folder / "spec.toml", "-o", folder / "new.csv")
    with room_for(100):
        code, _, err = run(*argv)
    assert code == 2 and "file too large" in err and err.count("\n") == 1
    assert not (folder / "new.csv").exists()
    assert run(*argv)[0] == 0 and len((folder / "new.csv").read_text().splitlines()) == 5


WRITER = """
import sys
from s2shadow.report import write_json
print("ready", flush=True)
for i in range(1_000_000):
    write_json({"all": [i] * 100_000}, sys.argv[1])
"""


def test_killed_in_the_middle(tmp_path):
    """Whenever a writer is killed, the file is one of those that it wrote, to the last byte."""
    file = tmp_path / "out.json"
    rng = random.Random(4)
    found = 0
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.0, 0.25))
            process.kill()
        if file.exists():
            values = json.loads(file.read_bytes())["all"]
            assert len(values) == 100_000 and len(set(values)) == 1
            found += 1
    assert found


def test_interrupted_folder(tmp_path, monkeypatch):
    """Ctrl-C while the files of a folder are written leaves none of them."""
    real = Path.write_text
    written = []

    def stop(self, *args, **options):
        written.append(self)
        if len(written) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **options)
    monkeypatch.setattr(Path, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        write_folder(str(tmp_path / "out"), {"a": "1", "b": "2", "nested/c": "3", "d": "4"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (("sweep", "@/spec.toml", "-o", "@/kept.csv", "--json", "@/spec.toml"), "--json"),
        (("sweep", "@/spec.toml", "-o", "@/kept.csv", "--json", "@/link.toml"), "--json"),
        (("sweep", "@/spec.toml", "-o", "@/kept.csv", "--json", "@/hard.toml"), "--json"),
        (("sweep", "@/spec.toml", "-o", "@/kept.csv", "--csv", "@/kept.csv.journal"), "--csv"),
        (("sweep", "@/spec.csv", "-o", "@/spec.csv"), "--output"),
        ((*REPLAY, "--json", "@/trace.txt"), "--json"),
        (("replay", "@/trace.html", "--report", "@/trace.html"), "--report"),
        (("walk", "@/capture", "0x1000", "--json", "@/capture/registers.json"), "--json"),
        (("dump", "@/capture", "--csv", "@/capture/tables.npz"), "--csv"),
        (("diff", "@/capture", "@/a.json", "--json", "@/a.json"), "--json"),
        (("storm", "--capture", "@/capture", "--json", "@/capture/tables.npz"), "--json"),
    ],
)
def test_no_input_is_overwritten(run, folder, argv, option):
    """Nor under another name."""
    shutil.copytree(PLAIN, folder / "capture")
    (folder / "link.toml").symlink_to("spec.toml")
    os.link(folder / "spec.toml", folder / "hard.toml")
    shutil.copy(folder / "spec.toml", folder / "spec.csv")
    shutil.copy(folder / "trace.txt", folder / "trace.html")
    (folder / "a.json").write_text(run("dump", PLAIN, "--json")[1])
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    argv = [str(argument).replace("@", str(folder)) for argument in argv]
    code, out, err = run(*argv)
    file = argv[-1]
    assert (code, out, err) == (2, "", f"s2shadow: {option} {file} would take the place of what is read\n")
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_results_beside_what_they_are_of(run, folder):
    """A capture's folder may hold results too, and they may be made anew."""
    shutil.copytree(PLAIN, folder / "capture")
    for _ in range(2):
        assert run("dump", folder / "capture", "--json", folder / "capture" / "dump.json")[0] == 0


@pytest.mark.parametrize(
    "argv",
    [
        ("storm", *TINY, "--json", "@/a", "--csv", "@/a"),
        ("storm", *TINY, "--json", "@/a.svg", "--plot", "@/link.svg"),
        (*REPLAY, "--csv", "@/a.html", "--report", "@/a.html"),
        ("sweep", "@/spec.toml", "-o", "@/a.csv", "--csv", "@/a.csv"),
        ("dump", PLAIN, "--json", "@/a", "--csv", "@/../{}/a"),
    ],
)
def test_two_outputs_are_two_files(refused, folder, argv):
    pytest.importorskip("matplotlib")
    (folder / "link.svg").symlink_to("a.svg")
    argv = [str(argument).replace("@", str(folder)).format(folder.name) for argument in argv]
    refused("must be different files", *argv)
    assert not any(folder.glob("a*"))


def test_links_in_a_circle(refused, folder):
    """Said before any work is done."""
    (folder / "one").symlink_to("two")
    (folder / "two").symlink_to("one")
    refused(f"cannot write {folder}/one: too many levels of symbolic links", "dump", PLAIN, "--json", folder / "one")


def test_a_journal_that_is_no_file(refused, folder):
    (folder / "a.csv.journal").mkdir()
    refused(f"cannot write {folder}/a.csv.journal: is a directory", "sweep", folder / "spec.toml", "-o",
            folder / "a.csv")
    (folder / "b.csv.journal").symlink_to("/dev/zero")
    refused("b.csv.journal: not a file", "sweep", folder / "spec.toml", "-o", folder / "b.csv")
