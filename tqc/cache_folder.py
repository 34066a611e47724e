"""The folder for what tqc keeps between runs: compiled kernels and converted models."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_folder() -> Path:
    """$TQC_CACHE_DIR, else $XDG_CACHE_HOME/tqc, else ~/.cache/tqc; a variable that is empty counts as unset.

    Raises:
        OSError: if nobody's home can be found.
    """
    if own := os.environ.get("TQC_CACHE_DIR"):
        folder = Path(own)
    elif xdg := os.environ.get("XDG_CACHE_HOME"):
        folder = Path(xdg) / "tqc"
    else:
        folder = Path("~/.cache/tqc")
    try:
        return folder.expanduser()
    except RuntimeError:
        raise OSError(f"the cache folder {folder} is in no home that can be found; set TQC_CACHE_DIR") from None


def folder_for_code() -> Path:
    """The cache folder, fit to load code from, made with mode 0700 if it is not there.

    Raises:
        OSError: if it cannot be made, belongs to another user or others may write to it; the message is one line.
    """
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise OSError(f"cannot use the cache folder {folder}: {error.strerror}; set TQC_CACHE_DIR") from None
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise OSError(f"the cache folder {folder} belongs to another user; set TQC_CACHE_DIR to one of your own")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"others may write to the cache folder {folder}; run chmod go-w on it or set TQC_CACHE_DIR")
    return folder
