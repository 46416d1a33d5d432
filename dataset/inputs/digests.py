"""Digests of pictures' bytes, remembered: a start that needs those of a million pictures must not read them all."""

import os
from pathlib import Path

from utils import atomic_path, sha256

DIGESTS = "pictures.tsv"  # the file's name in a folder of stores
Seen = tuple[int, int, str]  # size in bytes, time of the last change in ns, digest


class PictureDigests:
    """SHA-256 by path, kept in a file with the size and the time of the last change of each picture.

    A picture that changes gets another time, and is read again. One process after the other may write the file; what
    one of them has not seen is read again, too.
    """

    def __init__(self, file: Path) -> None:
        """`file`: a line per picture, written by `save`; lines that cannot be read count as missing."""
        self.file, self.new = file, 0
        self.known: dict[str, Seen] = {}
        if file.is_file():
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                size, changed, digest, path = [*line.split("\t", 3), "", "", ""][:4]
                if size.isdecimal() and changed.isdecimal() and len(digest) == 64:
                    self.known[path] = int(size), int(changed), digest

    def of(self, picture: Path) -> str:
        """The digest of a picture's bytes."""
        path, found = str(picture), os.stat(picture)
        size, changed, digest = self.known.get(path, (0, 0, ""))
        if digest and (size, changed) == (found.st_size, found.st_mtime_ns):
            return digest
        digest = sha256(picture)
        self.known[path] = found.st_size, found.st_mtime_ns, digest
        self.new += 1
        return digest

    def save(self) -> None:
        """Write what was read anew, if anything was."""
        if not self.new:
            return
        lines = (f"{size}\t{changed}\t{digest}\t{path}\n" for path, (size, changed, digest) in self.known.items())
        with atomic_path(self.file, durable=False) as part:
            part.write_text("".join(lines), encoding="utf-8")
        self.new = 0
