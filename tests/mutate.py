"""Damaged input: seeded mutations of files and arguments, and what counts as an answer to them.

A ``Target`` is one kind of input: the files of a small, sound example, which of them are damaged and how, and the
commands that read them. ``answer`` runs one command and says what is wrong with how it ended, if anything: only its
result, a difference, or one line on stderr and exit code 2 is an answer, and what it wrote is whole or not there.
"""

import contextlib
import csv
import faulthandler
import gzip
import io
import json
import lzma
import re
import shutil
import signal
import sys
import traceback
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

CPU_LIMIT = 30          # seconds of this process's time: what takes longer hangs
ODD_NUMBERS = ("0", "-1", "1", "7", "63", "64", "255", "256", "4095", "4096", "65535", "65536", "2147483647",
               "2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "18446744073709551615",
               "18446744073709551616", "1e308", "1e999", "-0.0", "0x", "0xffffffffffffffff", "0x10000000000000000",
               "0xfffffffffffff000", "0x0000fffffffff000", "9" * 5000, "1_0", "٣", "nan", "inf", "")
ODD_TEXTS = ("", " ", "\x00", "-", "--", "/", ".", "%s", "{}", "\ud800", "é", "\u202e", "a" * 300, "null", "true",
             "0x", "[]", "\\", '"', "'", "\n", "\r\n", ",", "=", "grid")
ODD_VALUES = (None, True, False, 0, -1, 1, 2**31, 2**52, 2**63, 2**64 - 1, 2**64, 2**200, 1.5, -0.0, 1e308,
              float("nan"), float("inf"), "", "x", "0x", "-1", "0xffffffffffffffff", "0x40000000", "é", "\ud800", "\n",
              [], {}, [[]], [None], [1, 2], {"": 1}, {"vm": 0}, "9" * 5000)
TOKEN = re.compile(rb"0x[0-9a-fA-F]+|[0-9]+(?:\.[0-9]+)?|[A-Za-z_]\w*|[^\w\s]")


# --- mutations: (data, rng) -> data ------------------------------------------------------------------------------


def mutate_bytes(data, rng):
    """Cut short, flipped bits, spans overwritten, removed, repeated or moved."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + int(2 ** rng.uniform(0, 12)))
        what = rng.randrange(8)
        if what == 0:
            del data[at:]
        elif what in (1, 2) and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 3:
            data[at:to] = rng.randbytes(to - at)
        elif what == 4:
            del data[at:to]
        elif what == 5:
            data[at:at] = data[at:to]
        elif what == 6:
            data[at:at] = rng.choice((b"\x00", b"\xff", b"\n", b"\r", b" ", b",", b"\xef\xbb\xbf", b"\x1f\x8b", b"#"))
        elif what == 7 and at < len(data):
            data[at] = rng.choice((0, 0x7F, 0x80, 0xFF))
    return bytes(data)


def mutate_text(data, rng):
    """A word or number replaced by an odd one, a line removed, repeated, moved or joined to the next."""
    what = rng.randrange(6)
    if what < 3:
        tokens = list(TOKEN.finditer(data))
        for token in sorted(rng.sample(tokens, min(len(tokens), rng.choice((1, 1, 2, 5)))),
                            key=lambda token: -token.start()):
            odd = rng.choice(ODD_NUMBERS) if token[0][:1].isdigit() else rng.choice((*ODD_TEXTS, *ODD_NUMBERS))
            data = data[:token.start()] + odd.encode("utf-8", "surrogatepass") + data[token.end():]
        return data
    lines = data.split(b"\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    if what == 3:
        del lines[at]
    elif what == 4:
        lines.insert(other, lines[at])
    elif len(lines) > 1:
        at = min(at, len(lines) - 2)
        lines[at:at + 2] = [lines[at] + lines[at + 1]]
    return b"\n".join(lines)


def mutate_json(data, rng):
    """A value replaced by an odd one, removed, repeated, or put in the place of another."""
    root = [json.loads(data)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = list(places_in(root))
        holder, key = rng.choice(places)
        what = rng.randrange(5)
        if what == 0 and holder is not root:
            del holder[key]
        elif what == 1:
            other, other_key = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[other_key]))
        elif what == 2 and isinstance(holder, list) and holder is not root:
            holder.insert(rng.randrange(len(holder) + 1), json.loads(json.dumps(holder[key])))
        else:
            holder[key] = json.loads(json.dumps(rng.choice(ODD_VALUES)))    # a copy: it must not come to hold itself
    return json.dumps(root[0]).encode()


def places_in(holder):
    for key, value in list(enumerate(holder) if isinstance(holder, list) else holder.items()):
        yield holder, key
        if isinstance(value, (list, dict)):
            yield from places_in(value)


def mutate_journal(data, rng):
    """One record of a journal, mostly without its checksum: as another version may have written it."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines) - 1)
    lines[at] = mutate_json(lines[at], rng)
    if rng.randrange(8):
        lines[at] = re.sub(rb', "crc32": "\w+"', b"", lines[at])
    return b"\n".join(lines)


def mutate_archive(data, rng):
    """The arrays of an .npz, packed again so that its checksums are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = rng.randrange(len(members))
    name, content = members[at]
    what = rng.randrange(8)
    if what == 0:
        del members[at]
    elif what == 1:
        members[at] = (rng.choice(("/", "..", "addresses.npy", "pages.npy", "events.npy", "x")), content)
    elif what == 2:         # the header: type and shape
        members[at] = (name, mutate_bytes(content[:128], rng) + content[128:])
    elif what == 3:
        members[at] = (name, mutate_text(content[:128], rng) + content[128:])
    elif what == 4:
        members[at] = (name, mutate_bytes(content, rng))
    else:
        members[at] = (name, mutate_words(content, rng))
    packed = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(packed, "w") as archive:
        warnings.simplefilter("ignore")         # of names twice
        for name, content in members:
            archive.writestr(name, content)
    return packed.getvalue()


def mutate_words(content, rng):
    """64-bit words: descriptors and addresses with other bits, or those of others. Most are zero: others are chosen."""
    content = bytearray(content)
    used = [at for at in range(128, len(content) - 7, 8) if any(content[at:at + 8])] or [max(len(content) - 8, 0)]
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        at = rng.choice(used)
        word = int.from_bytes(content[at:at + 8], "little")
        what = rng.randrange(5)
        if what == 0:
            word ^= 1 << rng.randrange(64)
        elif what == 1:
            word = int.from_bytes(rng.randbytes(8), "little")
        elif what == 2:
            other = rng.choice(used)
            word = int.from_bytes(content[other:other + 8], "little")
        elif what == 3:
            word = word ^ 2 if rng.randrange(2) else word & ~3 | rng.randrange(4)
        else:
            word = (word & ~0xFFFF_FFFF_F000) | rng.randrange(1 << 36) << 12
        content[at:at + 8] = word.to_bytes(8, "little")
    return bytes(content)


def within(unpack, pack, mutate):
    """``mutate`` of what is packed."""
    return lambda data, rng: pack(mutate(unpack(data), rng))


gzipped_text = within(gzip.decompress, lambda data: gzip.compress(data, 1), mutate_text)
xz_text = within(lzma.decompress, lambda data: lzma.compress(data, preset=0), mutate_text)


def mutate_arguments(argv, rng):
    """One or two arguments replaced, repeated, dropped or damaged."""
    argv = list(argv)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(1, len(argv))
        what = rng.randrange(6)
        if what == 0 and len(argv) > 2:
            del argv[at]
        elif what == 1:
            argv.insert(at, argv[at])
        elif what == 2:
            argv[at] = rng.choice(ODD_NUMBERS)
        elif what == 3:
            argv[at] = rng.choice(ODD_TEXTS)
        elif what == 4:
            argv[at] = mutate_text(argv[at].encode("utf-8", "surrogatepass") or b"x y", rng).decode(
                "utf-8", "surrogateescape")
        else:
            argv[at] = mutate_bytes(argv[at].encode("utf-8", "surrogatepass"), rng).decode("utf-8", "surrogateescape")
    return argv


# --- targets -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """``files``: {name: content}; ``damage``: {name: its mutations}; ``commands``: argument lists, ``@`` the folder.

    Where ``damage`` is empty the arguments are damaged themselves.
    """

    files: dict
    commands: tuple
    damage: dict = field(default_factory=dict)

    def write(self, folder):
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def damaged(self, folder, rng):
        """Damage the files in ``folder`` -> (argument list, name of the damaged file or None)."""
        command = rng.choice(self.commands)
        argv = [argument.replace("@", str(folder)) for argument in command]
        if not self.damage:
            return mutate_arguments(argv, rng), None
        named = [name for name in self.damage if f"@/{name}" in command]
        name = rng.choice(named or list(self.damage))
        mutate = rng.choice(self.damage[name])
        (folder / name).write_bytes(mutate(self.files[name], rng))
        return argv, name


class TooLong(BaseException):
    """Not an Exception: nothing on the way may take it for a damaged file."""


@contextlib.contextmanager
def limited():
    def stop(*_):
        raise TooLong
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_LIMIT)
    # a loop that Python cannot stop; what stands for stderr under pytest may be no file
    faulthandler.dump_traceback_later(20 * CPU_LIMIT, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def answer(argv, outputs):
    """Run ``main(argv)`` -> (exit code, what is wrong with the answer, or None). ``outputs``: where it may write."""
    from s2shadow.cli import main

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors)     # as Python's own are
                for errors in ("strict", "backslashreplace"))
    try:
        with limited(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("error")
            code = main(argv)
    except TooLong:
        return None, f"no answer in {CPU_LIMIT} s:\n{traceback.format_exc()}"
    except SystemExit as error:         # --help
        code = error.code
    except BaseException:
        return None, traceback.format_exc()
    out, err = (stream.detach().getvalue().decode() for stream in (flushed(out), flushed(err)))
    return code, wrong_end(code, out, err) or wrong_files(code, outputs)


def flushed(stream):
    stream.flush()
    return stream


def wrong_end(code, out, err):
    if code in (0, 1):
        return f"exit code {code}, and on stderr {err!r}" if err else None
    if code != 2:
        return f"exit code {code}"
    if not err.startswith("s2shadow: ") or err.count("\n") != 1 or len(err) < 15:
        return f"not one line on stderr: {err!r}"
    return f"exit code 2, but on stdout {out[:200]!r}" if out else None


def wrong_files(code, outputs):
    """Nothing of a command that failed; else whole files."""
    files = [file for file in outputs.rglob("*") if file.is_file()]
    for file in files:
        if code == 2:
            return f"exit code 2, but {file.name} is there"
        if file.name.startswith("."):
            return f"{file.name} was left behind"
        try:
            check_file(file)
        except Exception:
            return f"{file.name} is not whole:\n{traceback.format_exc()}"
    return None


def check_file(file):
    data = file.read_bytes()
    if file.suffix == ".json":
        json.loads(data)
    elif file.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(data.decode())))
        assert len({len(row) for row in rows}) == 1, "rows of different lengths"
    elif file.suffix == ".html":
        assert data.rstrip().endswith(b"</html>")
    elif file.parent.name != "nested":
        assert data, "empty"


def clear(folder):
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir()
