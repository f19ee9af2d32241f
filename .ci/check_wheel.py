"""The tag and the shared objects of a repaired wheel: python check_wheel.py WHEEL, in an environment with auditwheel.

The tag is worked out here again, from the symbols and from auditwheel's table of what each policy permits.
"""

import importlib.resources
import io
import json
import re
import sys
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

NEWEST = 34                         # what is built on Debian 12 or older runs there and on RHEL 9: else it is a mistake
LARGEST, ALL = 2 << 20, 8 << 20     # bytes of one shared object, and of all

wheel = Path(sys.argv[1])
wrong = []
sizes, libraries, symbols = {}, set(), {}
with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    for name in names:
        if not name.endswith(".so"):
            continue
        elf = ELFFile(io.BytesIO(archive.read(name)))
        sizes[name] = archive.getinfo(name).file_size
        left = [s.name for s in elf.iter_sections() if s.name == ".symtab" or s.name.startswith(".debug")]
        if left:
            wrong.append(f"{name} is not stripped: {left}")
        libraries |= {tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
        for _, versions in elf.get_section_by_name(".gnu.version_r").iter_versions():
            for version in versions:
                symbols.setdefault(tuple(version.name.split("_", 1)), set()).add(name)

if grafted := [name for name in names if ".libs/" in name]:
    wrong.append(f"libraries were copied into the wheel: {grafted}")
everywhere = re.compile(r"(libc|libstdc\+\+|libm|libgcc_s|libpthread|ld-linux[\w-]*)\.so\.\d+")
if foreign := [library for library in libraries if not everywhere.fullmatch(library)]:
    wrong.append(f"libraries that not every Linux has: {foreign}")
if max(sizes.values()) > LARGEST or sum(sizes.values()) > ALL:
    wrong.append(f"shared objects grew: {max(sizes.values())} bytes the largest, {sum(sizes.values())} all")

tags = re.search(r"-((?:manylinux\w+\.?)+)\.whl$", wheel.name)
machine = tags[1].rpartition("_2_")[2].partition("_")[2] if tags else None
lowest = None
for policy in json.loads(importlib.resources.files("auditwheel.policy").joinpath("manylinux-policy.json").read_text()):
    found = re.fullmatch(r"manylinux_2_(\d+)", policy["name"])
    permitted = policy["symbol_versions"].get(machine, {})
    if found and all(version in permitted.get(library, ()) for library, version in symbols):
        lowest = min(int(found[1]), lowest or 1000)
if lowest is None:
    wrong.append(f"{wheel.name}: no manylinux policy permits its symbols, {sorted(symbols)}")
elif not re.search(rf"manylinux_2_{lowest}_{machine}\b", tags[1]):
    wrong.append(f"{wheel.name}: its symbols permit manylinux_2_{lowest}")
elif lowest > NEWEST:
    wrong.append(f"manylinux_2_{lowest}, newer than 2_{NEWEST}: {sorted(symbols)}")

print(f"{wheel.name}: {len(sizes)} shared objects, {sum(sizes.values()) / 1024:.0f} KiB, the largest "
      f"{max(sizes.values()) / 1024:.0f} KiB; {', '.join(sorted(libraries))}")
for text in wrong:
    print(f"wrong: {text}")
sys.exit(bool(wrong))
