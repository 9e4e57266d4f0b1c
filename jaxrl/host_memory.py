"""Memory of the host, where the host is the device.

XLA on CPU takes the temporaries of a program from malloc at every call. glibc hands blocks of that size back to the
kernel when they are freed, so each call would fault all its pages in again: 10 to 15 % of an update of a 135M model.
And its pages are of 4 KB: reading weights by them, a step of decoding takes 5 to 10 % longer than by those of 2 MB.
"""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_MADV_HUGEPAGE = 14  # Linux's mman.h
_HUGE = 2 << 20  # bytes of such a page on x86-64, and of most on arm64


def keep_freed_memory() -> bool:
    """Keep freed blocks in this process for its next allocation. True where the C library is glibc and agreed."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}  # -1: never
    return all([mallopt(option, value) == 1 for option, value in wanted.items()])


def use_huge_pages() -> bool:
    """Ask for pages of 2 MB under all that is allocated from here on. True where the kernel will give them.

    After `keep_freed_memory`: a block as large as three quarters of the host's memory is allocated, marked and freed
    without being touched. It stays with the process as addresses, which cost nothing, and what comes next lies there.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "madvise"):
        return False
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 * 3
    block = libc.malloc(size)
    if block is None:  # where the process may not have so many addresses
        return False
    first = -(-block // _HUGE) * _HUGE
    marked = libc.madvise(first, (block + size - first) // _HUGE * _HUGE, _MADV_HUGEPAGE) == 0
    libc.free(block)
    return marked
