"""A file's fingerprint: what it holds, whatever its name."""

import hashlib
from pathlib import Path

_PIECE, _PIECES = 1 << 20, 64  # bytes, and how many such pieces are read at most


def file_fingerprint(path: Path, kind: str = "") -> str:
    """Computes 16 hexadecimal digits of what a file holds, and its size.

    Of a file of more than 64 MiB they are of as much of it, evenly spread.

    Args:
        path: The file.
        kind: What its bytes are taken for: the same bytes of another kind are another file.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{kind} {size}".encode())
    pieces = min(_PIECES, -(-size // _PIECE))
    with path.open("rb") as file:
        for i in range(pieces):
            file.seek(i * (size - _PIECE) // max(1, pieces - 1) if size > _PIECE else 0)
            digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]
