"""Strict numerics, four simulated devices, and one shared compilation cache for every test."""

import gc
import os

import jax
import pytest
from absl import flags

from tests.meshes import mesh_of


def pytest_configure(config):
    """Runs before any test module is imported, and so before JAX starts its backend."""
    # grain reads absl flags; outside an absl app nobody parses them.
    flags.FLAGS.mark_as_parsed()
    # As in `klbox_jax.main`: tracing makes many objects and hardly any cycles.
    gc.set_threshold(100_000)
    # Tests compile far more than they compute. A program in one piece compiles sooner than in several, because two
    # workers keep both cores busy. `make table1` compiles as users do.
    quick = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    # The older emitters compile in two thirds of the time. jax 0.12 has none: the flag would end the process.
    if jax.__version_info__ < (0, 12):
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    cache = os.environ.get("KLBOX_TEST_CACHE", os.path.join(config.rootpath, ".cache", "jax_tests"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    config.addinivalue_line(
        "markers", "four_devices: the module's runs share four devices, as a run shares all there are"
    )


@pytest.fixture(scope="module", autouse=True)
def one_device(request):
    """Runs of the module take one of the four devices, for which XLA compiles in half the time, unless it is marked."""
    if request.node.get_closest_marker("four_devices"):
        yield
        return
    # Not at the top, for jaxtyping wraps what is imported after this file.
    from klbox_jax import distributed

    one = mesh_of(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "make_mesh", lambda: one)
        yield


@pytest.fixture(scope="module")
def module_path(tmp_path_factory, request):
    """A folder that the tests of a module share."""
    return tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])
