"""Corpora as the tests keep them, one archive per target.

python fuzz/pack.py pack FOLDER FILE    the smallest files of a (merged) corpus, up to ``MOST`` bytes
python fuzz/pack.py unpack FILE FOLDER
"""

import sys
import zipfile
from pathlib import Path

MOST = 36_000


def pack(folder: Path, file: Path) -> None:
    inputs = sorted((path.read_bytes() for path in folder.iterdir()), key=lambda data: (len(data), data))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for i, data in enumerate(inputs):
            if archive.fp is None or archive.fp.tell() > MOST:
                break
            archive.writestr(zipfile.ZipInfo(f"{i:04}"), data, zipfile.ZIP_DEFLATED)


def unpack(file: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            (folder / f"kept-{name}").write_bytes(archive.read(name))


if __name__ == "__main__":
    {"pack": pack, "unpack": unpack}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
