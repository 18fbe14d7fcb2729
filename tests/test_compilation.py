import ctypes
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.compilation import CountedJit, give_back_freed_memory, use_compilation_cache


def test_traces_are_counted_by_shape_and_type():
    double = CountedJit(lambda x: 2 * x)
    assert double.num_traces == 0
    for _ in range(2):
        np.testing.assert_array_equal(double(jnp.ones(3)), [2, 2, 2])
    assert double.num_traces == 1
    double(jnp.ones(4))
    double(jnp.ones(4, jnp.int32))
    assert double.num_traces == 3


def test_a_function_that_is_lowered_first_is_traced_once():
    add = CountedJit(lambda x, y: x + y, donate_argnums=0)
    shape = jax.ShapeDtypeStruct((5,), jnp.float32)
    add.lower(shape, shape).compile()
    assert add.num_traces == 1
    np.testing.assert_array_equal(add(jnp.ones(5), jnp.ones(5)), np.full(5, 2))
    assert add.num_traces == 1


def test_a_compilation_cache_of_the_user_stays(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "klbox_jax" / "compiled")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def resident_bytes():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^VmRSS:\s*(\d+) kB$", status, re.MULTILINE).group(1))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_freed_memory_leaves_the_process():
    # 200 MB in small pieces, and every hundredth of them stays: glibc cannot lower the end of its heap.
    pieces = [bytearray(1000) for _ in range(200_000)]
    kept = pieces[::100]
    del pieces
    before = resident_bytes()
    give_back_freed_memory()
    assert resident_bytes() < before - 100e6
    assert len(kept) == 2000
