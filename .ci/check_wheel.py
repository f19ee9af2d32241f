"""The tag and the shared objects of a repaired wheel: python check_wheel.py WHEEL, with pyelftools (auditwheel has it)."""

import io
import re
import sys
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

# glibc versions that have a manylinux policy; a wheel takes the lowest one that its symbols permit
POLICIES = (17, 24, 26, 27, 28, 31, 34, 35, 36, 37, 38, 39, 40, 41)
NEWEST = 34                 # built on Debian 12 or older, runs there and on RHEL 9; newer than that is a mistake
LARGEST, ALL = 2 << 20, 8 << 20     # bytes of one shared object, and of all

wheel = Path(sys.argv[1])
wrong = []
sizes, needed, wants = {}, set(), {}
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        if not name.endswith(".so"):
            continue
        elf = ELFFile(io.BytesIO(archive.read(name)))
        sizes[name] = archive.getinfo(name).file_size
        left = [s.name for s in elf.iter_sections() if s.name == ".symtab" or s.name.startswith(".debug")]
        if left:
            wrong.append(f"{name} is not stripped: {left}")
        needed |= {tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
        for _, versions in elf.get_section_by_name(".gnu.version_r").iter_versions():
            for version in versions:
                if match := re.fullmatch(r"GLIBC_2\.(\d+)(?:\.\d+)?", version.name):
                    wants.setdefault(int(match[1]), []).append(name)
    grafted = [name for name in archive.namelist() if ".libs/" in name]

if grafted:
    wrong.append(f"libraries were copied into the wheel: {grafted}")
if foreign := {lib for lib in needed if not lib.startswith(("libc.so.", "libstdc++.so.", "libm.so.", "libgcc_s.so.",
                                                            "libpthread.so.", "ld-linux"))}:
    wrong.append(f"libraries that not every Linux has: {sorted(foreign)}")
if max(sizes.values()) > LARGEST or sum(sizes.values()) > ALL:
    wrong.append(f"shared objects grew: {max(sizes.values())} bytes the largest, {sum(sizes.values())} all")

newest = max(wants)
lowest = next(policy for policy in POLICIES if policy >= newest)
tags = sorted(int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", wheel.name))
if not tags or tags[0] != lowest:
    wrong.append(f"{wheel.name}: glibc symbols permit manylinux_2_{lowest}")
if lowest > NEWEST:
    wrong.append(f"manylinux_2_{lowest}, newer than 2_{NEWEST}: GLIBC_2.{newest} in {wants[newest]}")

print(f"{wheel.name}: {len(sizes)} shared objects, {sum(sizes.values()) / 1024:.0f} KiB, "
      f"the largest {max(sizes.values()) / 1024:.0f} KiB; newest symbol GLIBC_2.{newest}")
for text in wrong:
    print(f"wrong: {text}")
sys.exit(bool(wrong))
