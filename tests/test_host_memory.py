"""Freed memory stays with the process, and what it allocates lies on huge pages. In a process of its own: it is for good."""

import platform
import subprocess
import sys

import pytest

PROBE = """
import ctypes, mmap
from pathlib import Path
from jaxrl.host_memory import keep_freed_memory, use_huge_pages

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

def flags_at(address):
    there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            first, last = (int(x, 16) for x in words[0].split("-"))
            there = first <= address < last
        elif there and words[0] == "VmFlags:":
            return words[1:]

libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
size, before = 64 << 20, resident()
offered = Path("/sys/kernel/mm/transparent_hugepage").exists()
assert keep_freed_memory() and use_huge_pages() == offered
assert resident() - before < size // 2, "what is set aside is addresses, and not memory"
block = libc.malloc(size)
libc.memset(block, 1, size)
assert ("hg" in flags_at(block + size // 2)) == offered, flags_at(block + size // 2)
libc.free(block)
assert resident() - before > size // 2, "it was given back"
again = libc.malloc(size)
assert again == block
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc: nothing is done")
def test_freed_memory_stays_and_lies_on_huge_pages():
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
