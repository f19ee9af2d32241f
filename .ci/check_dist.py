"""What the sdist and the wheel in a folder hold, and what they must not: python3 check_dist.py FOLDER [WHEEL]."""

import re
import sys
import tarfile
import zipfile
from pathlib import Path

folder = Path(sys.argv[1])
(sdist,) = folder.glob("*.tar.gz")
(wheel,) = map(Path, sys.argv[2:3]) if len(sys.argv) > 2 else folder.glob("*.whl")
with tarfile.open(sdist) as archive:
    # the first component is the release's own folder
    source = {name.partition("/")[2] for name in archive.getnames()}
with zipfile.ZipFile(wheel) as archive:
    sizes = {info.filename: info.compress_size for info in archive.infolist()}
    metadata = archive.read(next(n for n in sizes if n.endswith(".dist-info/METADATA"))).decode()

wrong = []


def expect(condition, text):
    if not condition:
        wrong.append(text)


def having(names, *endings):
    return sorted(name for name in names if name.endswith(endings))


made = sorted(set(having(source, ".c", ".so", ".pyc")) - {"examples/embed_c/main.c", "tests/threads/driver.c"})
expect(not made, f"sdist holds generated files: {made}")
expect({"setup.py", "LICENSE", "README.md", "pyproject.toml"} <= source, "sdist lacks a file of the top folder")
expect(any(name.startswith("tests/test_") for name in source), "sdist lacks the tests")

modules = {Path(name).stem for name in having(source, ".pyx") if name.startswith("s2shadow/")}
built = {Path(name).name.partition(".")[0] for name in having(sizes, ".so")}
expect(modules == built, f"modules in the sdist {sorted(modules)}, in the wheel {sorted(built)}")
stubs = {Path(name).stem for name in having(sizes, ".pyi")}
expect(modules <= stubs, f"compiled modules without a stub: {sorted(modules - stubs)}")
expect(not having(sizes, ".pyx", ".c", ".pyc"), f"wheel holds sources: {having(sizes, '.pyx', '.c', '.pyc')}")
foreign = sorted(name for name in sizes if not name.startswith(("s2shadow/", "s2shadow-")))
expect(not foreign, f"wheel holds foreign files: {foreign[:5]}")
expect("s2shadow/py.typed" in sizes, "wheel lacks py.typed")
expect({"s2shadow/include/s2shadow/s2shadow.h", "s2shadow/__init__.pxd"} <= set(sizes),
       "wheel lacks what C and Cython need")
expect(having(sizes, "/licenses/LICENSE"), "wheel lacks the licence")
data = sum(size for name, size in sizes.items() if name.startswith("s2shadow/data/"))
expect(data > 0, "wheel lacks the shipped capture")
expect(data <= 2 << 20, f"shipped capture takes {data} bytes of the wheel, over 2 MiB")
expect("License-Expression: MIT" in metadata, "metadata lacks the licence expression")
# what an embedder compiles against: headers, and .pxd for cimport
public = {name for name in having(source, ".h", ".pxd", ".pc") if name.startswith("s2shadow/")}
expect(public <= set(sizes), f"wheel lacks {sorted(public - set(sizes))[:5]}")
expect(not any("/tests/" in name or Path(name).name.startswith("test_") for name in sizes), "wheel holds tests")
version = re.search(r"^Version: (.+)$", metadata, re.MULTILINE)[1]
for archive_name in (sdist.name, wheel.name):
    expect(archive_name.startswith(f"s2shadow-{version}"), f"{archive_name}: the metadata says {version}")

print(f"{sdist.name}: {len(source)} entries; {wheel.name}: {len(sizes)} entries, {sum(sizes.values()) / 1024:.0f} KiB, "
      f"capture {data / 1024:.0f} KiB")
for text in wrong:
    print(f"wrong: {text}")
sys.exit(bool(wrong))
