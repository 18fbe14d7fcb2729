import ctypes
import pathlib
import re

import pytest

from klbox_jax.train.loop import give_back_freed_memory


def resident_bytes():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^VmRSS:\s*(\d+) kB$", status, re.MULTILINE).group(1))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_freed_memory_leaves_the_process():
    # 200 MB in small pieces, of which every hundredth stays: glibc cannot lower the end of its heap.
    pieces = [bytearray(1000) for _ in range(200_000)]
    kept = pieces[::100]
    del pieces
    before = resident_bytes()
    give_back_freed_memory()
    assert resident_bytes() < before - 100e6
    assert len(kept) == 2000
