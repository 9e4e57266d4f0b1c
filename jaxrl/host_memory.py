"""Memory of the host, where the host is the device.

XLA on CPU takes the temporaries of a program from malloc at every call. glibc hands blocks of that size back to the
kernel when they are freed, so each call would fault all its pages in again: 10 to 15 % of an update of a 135M model.
And its pages are of 4 KB: reading weights by them, a step of decoding takes 5 to 10 % longer than by those of 2 MB.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import resource
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_MADV_HUGEPAGE = 14  # Linux's mman.h
_MOST = 64 << 30  # bytes that lie on huge pages
log = logging.getLogger(__name__)


def keep_freed_memory() -> bool:
    """Keep freed blocks in this process for its next allocation, and lay what is allocated from here on on huge pages.

    True where the C library is glibc and agreed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    wanted = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}  # -1: never
    kept = all([libc.mallopt(option, value) == 1 for option, value in wanted.items()])
    if kept and _addresses_cost_nothing():
        log.info("huge pages under what is allocated: %s", "asked for" if _ask_for_huge_pages(libc) else "refused")
    return kept


def _ask_for_huge_pages(libc: ctypes.CDLL) -> bool:
    """A large block is allocated, marked and freed without being touched. It stays with the process as addresses, and what
    comes next lies there. True where the kernel took the mark."""
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = os.sysconf("SC_PAGE_SIZE")
    size = min(os.sysconf("SC_PHYS_PAGES") * page // 4 * 3, _MOST)
    block = libc.malloc(size)
    if block is None:
        return False
    first = -(-block // page) * page
    marked = libc.madvise(first, (block + size - first) // page * page, _MADV_HUGEPAGE) == 0
    libc.free(block)
    return marked


def _addresses_cost_nothing() -> bool:
    """Not where they are limited (ulimit -v), counted as memory (strict overcommit) or written to by a malloc that tests."""
    limits = [resource.getrlimit(what)[0] for what in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    overcommit = Path("/proc/sys/vm/overcommit_memory")
    is_strict = overcommit.exists() and overcommit.read_text().strip() == "2"
    own_malloc = "MALLOC_PERTURB_" in os.environ or "malloc" in os.environ.get("LD_PRELOAD", "")
    return all(limit == resource.RLIM_INFINITY for limit in limits) and not is_strict and not own_malloc
