"""Freed memory stays with the process, and what it allocates lies on huge pages. In a process of its own: it is for good."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
STRICT = OVERCOMMIT.exists() and OVERCOMMIT.read_text().strip() == "2"
PROBE = """
import ctypes, mmap, resource, sys
from pathlib import Path
from jaxrl.host_memory import keep_freed_memory

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
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
assert keep_freed_memory()
assert resident() - before < size // 2, "what is set aside is addresses, and not memory"
block = libc.malloc(size)
libc.memset(block, 1, size)
print(*flags_at(block + size // 2))
libc.free(block)
assert resident() - before > size // 2, "it was given back"
"""


def flags(limit: int) -> list[str]:
    """Of what is allocated, in a process of at most so many bytes of addresses; -1: any number."""
    run = subprocess.run([sys.executable, "-c", PROBE, str(limit)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc: nothing is done")
def test_freed_memory_stays_and_lies_on_huge_pages_unless_addresses_are_limited():
    assert "hg" not in flags(64 << 30)
    if Path("/sys/kernel/mm/transparent_hugepage").exists() and not STRICT:
        assert "hg" in flags(-1)
