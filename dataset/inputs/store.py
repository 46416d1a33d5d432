"""Groups of tensors on disk, one file each, under names that say what they were computed from."""

import os
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from utils import atomic_path

SUFFIX = ".tensors"


class TensorStore:
    """A folder of small named groups of tensors, each with a checksum that is looked at where it is read.

    Files appear whole or not at all, so several processes may write at the same time. They are not synced to the disk
    one by one: a file that a power cut damaged fails its checksum and is computed again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of this name; None when they are missing or damaged, and then they are missing from here on."""
        try:
            data = self.path(name).read_bytes()
        except FileNotFoundError:
            return None
        whole = len(data) > 4 and struct.unpack("<I", data[:4])[0] == zlib.crc32(data[4:])
        if whole:
            return load(data[4:])
        self.path(name).unlink(missing_ok=True)  # so that a start, which opens no file, finds it missing
        return None

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store these tensors."""
        data = save({key: tensor.contiguous() for key, tensor in tensors.items()})
        with atomic_path(self.path(name), durable=False, size=len(data) + 4) as part:
            part.write_bytes(struct.pack("<I", zlib.crc32(data)) + data)

    def names(self) -> set[str]:
        """All names that are there, damaged ones included: from the folders' listings, without opening a file."""
        found = set()
        with suppress(FileNotFoundError), os.scandir(self.folder) as folders:
            for folder in folders:
                if folder.is_dir():
                    found.update(e.removesuffix(SUFFIX) for e in os.listdir(folder.path) if e.endswith(SUFFIX))
        return found

    def path(self, name: str) -> Path:
        """The file of this name."""
        return self.folder / name[:2] / f"{name}{SUFFIX}"
