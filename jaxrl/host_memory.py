"""Memory of the host, where the host is the device.

XLA on CPU takes the temporaries of a program from malloc at every call. glibc hands blocks of that size back to the
kernel when they are freed, so each call would fault all its pages in again: 10 to 15 % of an update of a 135M model.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Keep freed blocks in this process for its next allocation. True where the C library is glibc and agreed."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_ARENA_MAX: 1}
    return all([mallopt(option, value) == 1 for option, value in wanted.items()])
