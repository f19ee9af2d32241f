"""How long Ctrl-C takes: python bench/interrupts.py [TRIES].

Batches: from the signal to ``KeyboardInterrupt`` in the caller. Commands: from the signal, at a random moment of the
work, to the end of the process, with the report and the JSON of what was done; that JSON is checked.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import s2shadow as s2
from s2shadow._floor import chase
from s2shadow.capture import shipped

ROOT = Path(s2.__file__).parents[1]
HOST = 1 << 40


def batches():
    """Name and call of each batch, over captured tables; all of them take seconds."""
    mem = s2.GuestMemory()
    capture = mem.load_tables(shipped())
    guest = capture.vms[0]
    cfg = guest.config()
    vm = s2.NestedVM(mem)
    vm.host.populate = s2.Linear(HOST)
    vcpu = vm.vcpus[0]
    vcpu.load(guest.vttbr, guest.vtcr, hcr=guest.hcr)
    own = s2.leaves(mem, cfg)["ipa"]
    many = np.tile(own, 200)
    ops = np.zeros(20_000_000, s2.TLBI_OP_DTYPE)
    ops["insn"], ops["xt"] = 0xD50C_8020, np.arange(len(ops)) >> 4

    def refault():
        while True:
            vcpu.fault_many(own)
            vm.unmap(0, 1 << 47)
    return {"fault_many, all hits": lambda: vcpu.fault_many(many), "fault_many and unmap in turn": refault,
            "translate_many": lambda: vcpu.translate_many(many), "walk_many": lambda: s2.walk_many(mem, cfg, many),
            "tlbi_many": lambda: vm.tlbi_many(ops), "pointer chase over 1 GiB": lambda: chase(1 << 30)}, vm


def delay_of(call, after):
    """Milliseconds from the signal to the exception."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    due = time.perf_counter() + after
    signal.setitimer(signal.ITIMER_REAL, after)
    try:
        call()
        time.sleep(60)
    except KeyboardInterrupt:
        return (time.perf_counter() - due) * 1e3
    raise RuntimeError("no signal came")


COMMANDS = {
    "storm": ["storm", "--events", "10000000"],
    "storm, blow-away": ["storm", "--teardown", "blow-away", "--seconds", "1000"],
    "storm, 4 x 262,144 pages": ["storm", "--synthetic", "--pages", "262144", "--events", "10000000"],
    "replay of a pipe": ["replay", "-"],
    "sweep": ["sweep", "SPEC", "-o", "OUTPUT"],
}
SPEC = "contexts = 1\npages = 4096\nseconds = 0.2\nevents = 1000\nseed = [" + ", ".join(map(str, range(200))) + "]\n"


def line(at):
    return (f"       CPU 0/KVM-100     [000] ..... {at // 10**6:5}.{at % 10**6:06}: kvm_guest_fault: "
            f"ipa 0x{0x40000000 + at % 4096 * 4096:x}, hsr 0x92000007, hxfar 0x0, pc 0x00000000001000\n")


def end_of(words, after, folder):
    """Milliseconds from SIGINT, ``after`` seconds from the start, to its end: passed, and of CPU time."""
    out = folder / "out.json"
    argv = [{"SPEC": str(folder / "spec.toml"), "OUTPUT": str(folder / "out.csv")}.get(word, word) for word in words]
    with subprocess.Popen([sys.executable, "-m", "s2shadow", *argv, "--json", str(out)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, stdin=subprocess.PIPE, start_new_session=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        if words[-1] == "-":
            process.stdin.write("".join(map(line, range(10**6, 10**6 + 60_000))).encode())
            process.stdin.flush()
        time.sleep(after)
        began, used = time.perf_counter(), cpu_of(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        err = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        took = (time.perf_counter() - began) * 1e3
        process.returncode = os.waitstatus_to_exitcode(status)
    assert (process.returncode, err) == (130, b""), (words, process.returncode, err)
    assert json.loads(out.read_text())["interrupted"] is True
    out.unlink()
    return took, (usage.ru_utime + usage.ru_stime - used) * 1e3


def cpu_of(pid):
    """Seconds of CPU time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def show(name, times, what=""):
    print(f"{name:32} {len(times):4} times   median {np.median(times):6.1f} ms   longest {max(times):6.1f} ms{what}",
          flush=True)


def main():
    tries = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    rng = random.Random(1)
    calls, vm = batches()
    for name, call in calls.items():
        show(name, [delay_of(call, rng.uniform(0.01, 0.3)) for _ in range(tries)])
        vm.check()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "spec.toml").write_text(SPEC)
        for name, words in COMMANDS.items():
            ends = [end_of(words, rng.uniform(2, 5), Path(folder)) for _ in range(max(tries // 4, 3))]
            passed, used = zip(*ends, strict=True)
            show(name, passed, f", of CPU time {np.median(used):.0f} and {max(used):.0f} ms")


if __name__ == "__main__":
    main()
