"""webdataset tars in memory, with the offset of every member; equal samples give equal bytes."""

from __future__ import annotations

import io
import tarfile


class TarWriter:
    """Collects members; no time stamps or owners, so that the result depends on nothing else."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, name: str, data: bytes) -> tuple[int, int]:
        """Append a member; returns (offset of its first byte, size)."""
        header = tarfile.TarInfo(name)
        header.size = len(data)
        header.mode = 0o644
        self._tar.addfile(header, io.BytesIO(data))
        # addfile has padded the content to whole blocks of 512 bytes.
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return self._buffer.tell() - padded, len(data)

    def close(self) -> bytes:
        """The finished archive."""
        self._tar.close()
        return self._buffer.getvalue()
