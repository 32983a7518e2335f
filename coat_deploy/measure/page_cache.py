"""Files dropped from the page cache, so that a cold start is one."""

import os
from pathlib import Path


def evict(file: Path) -> bool:
    """Drop a file, with the siblings that hold its data, from the page cache; tell whether so.

    `file` may be a folder: all files in it. Siblings share the stem: `net.onnx`,
    `net.onnx.data`; `net.xml`, `net.bin`. False where the system cannot, or keeps the pages.
    """
    files = file.iterdir() if file.is_dir() else file.parent.glob(f"{file.stem}*")
    # Every file is evicted, also after one that could not be.
    return all([_evict_one(path) for path in files if path.is_file()])


def _evict_one(path: Path) -> bool:
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        with path.open("rb") as stream:
            number, size = stream.fileno(), path.stat().st_size
            os.fsync(number)  # unwritten pages cannot be dropped
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
            # The last byte, if it comes without waiting, was still in memory. The last, since
            # asking reads ahead from there.
            return not size or not os.preadv(number, [bytearray(1)], size - 1, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
