import pytest
from absl.testing import flagsaver

from experiments import results


def test_the_documents_say_what_the_numbers_say():
    with flagsaver.flagsaver(check=True):
        results.main(["results"])


def test_every_table_stands_in_a_document():
    text = "".join(document.read_text(encoding="utf-8") for document in results.DOCUMENTS)
    assert {found["name"] for found in results.MARKED.finditer(text)} == set(results.TABLES)


def test_a_document_is_filled_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "TABLES", {"one": lambda: "| a |\n| - |"})
    document = tmp_path / "page.md"
    text = "Before.\n\n<!-- table: one -->\nold\n<!-- /table -->\n\nAfter.\n"
    document.write_text(text)
    monkeypatch.setattr(results, "DOCUMENTS", (document,))
    with (
        flagsaver.flagsaver(check=True),
        pytest.raises(ValueError, match=r"page\.md is not what docs/results says; run python -m experiments"),
    ):
        results.main(["results"])
    assert document.read_text() == text
    results.main(["results"])
    assert document.read_text() == text.replace("old", "| a |\n| - |")
    with flagsaver.flagsaver(check=True):
        results.main(["results"])


def test_a_table_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no table is named 'Table 9'; there are .*'Table 2'"):
        results.fill("<!-- table: Table 9 -->\n<!-- /table -->\n")
