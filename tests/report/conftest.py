import pytest

from klbox_jax.report.__main__ import write_report
from tests.report.page_runs import Page, write_data, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    write_data(root / "sea")
    write_run(root / "a&b", root / "sea")
    write_run(root / "plain", root / "sea", ap=42.5, with_stds=False)
    write_report([str(root / "a&b")], root / "one.html", num_images=3)
    write_report([str(root / "a&b"), str(root / "plain")], root / "two.html")
    return root


@pytest.fixture(scope="module")
def one(folder):
    return Page((folder / "one.html").read_text())


@pytest.fixture(scope="module")
def two(folder):
    return Page((folder / "two.html").read_text())
