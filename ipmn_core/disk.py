"""Atomic file writes, so that readers never see a partial file; checksums."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; at the end flush it to the disk and rename it to `path`.

    Raises OSError naming `path`, and keeps the old file, if the disk is full or the folder cannot be written.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield tmp
        with open(tmp, "rb") as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError without the reason
        reason = getattr(error, "strerror", None) or f"is the disk full? {error}"
        remedy = "free disk space, or choose another folder (`outputs`)"
        raise OSError(f"{path} cannot be written ({reason}); {remedy}") from error
    finally:
        tmp.unlink(missing_ok=True)


def digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
