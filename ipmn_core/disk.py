"""A file is whole or absent, whoever is killed and whenever, and whatever the disk holds."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; at the end flush it to the disk and rename it to `path`.

    Readers never see a partial file. Raises OSError naming `path`, and leaves the old file, if the disk is
    full or the folder cannot be written.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield tmp
        with open(tmp, "rb") as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch raises the second, and does not say why
        reason = getattr(error, "strerror", None) or f"no room on the disk? {error}"
        remedy = "make room, or choose another folder (`outputs`)"
        raise OSError(f"{path} cannot be written ({reason}); {remedy}") from error
    finally:
        tmp.unlink(missing_ok=True)


def write(path: Path, how: Callable[[Path], Any]) -> Path:
    """`path`, after `how` wrote to a temporary name beside it, which was flushed to the disk and moved there.

    Raises OSError naming `path`, and leaves what lay there, if the disk is full or the folder cannot be
    written.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        how(tmp)
        with open(tmp, "rb") as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch raises the second, and does not say why
        reason = getattr(error, "strerror", None) or f"no room on the disk? {error}"
        remedy = "make room, or choose another folder (`outputs`)"
        raise OSError(f"{path} cannot be written ({reason}); {remedy}") from error
    finally:
        tmp.unlink(missing_ok=True)
    return path


def sweep(folder: Path) -> None:
    """Removes what processes that were killed left half written in and below `folder`."""
    for path in list(folder.rglob("*.partial")):
        number = re.search(r"\.(\d+)\.partial$", path.name)
        if number and not _alive(int(number[1])):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(number: int) -> bool:
    """Whether a process of this number runs on this machine."""
    if os.name != "posix":  # elsewhere asking may end it
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
