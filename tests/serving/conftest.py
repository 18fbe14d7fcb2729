import pytest

from tests.serving.thin_run import write_photographs


@pytest.fixture(scope="module")
def photographs(module_path):
    """A folder of images, and the upright pixels of those that can be read, by file name."""
    folder = module_path / "photographs"
    return folder, write_photographs(folder)
