import json
import re

import pytest
from absl.testing import flagsaver

from experiments import results, stored_results
from klbox_jax.report import documents

LINK = re.compile(r"\]\(([^)#:]+?)(?:#[^)]*)?\)")


def test_the_documents_have_the_numbers_of_the_results():
    with flagsaver.flagsaver(check=True):
        results.main(["results"])


def test_every_table_is_in_a_document():
    text = "".join(document.read_text(encoding="utf-8") for document in results.DOCUMENTS)
    assert {found["name"] for found in documents.MARKED.finditer(text)} == set(results.TABLES)


def test_every_result_is_linked_and_every_link_leads_to_one():
    docs = stored_results.RESULTS.parent
    links = {link for page in docs.glob("*.md") for link in LINK.findall(page.read_text(encoding="utf-8"))}
    linked = {docs / link for link in links if link.startswith("results/")}
    assert linked == set(stored_results.RESULTS.iterdir())


def test_a_document_is_filled_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "TABLES", {"one": lambda: "| a |\n| - |"})
    document = tmp_path / "page.md"
    text = "Before.\n\n<!-- table: one -->\nold\n<!-- /table -->\n\nAfter.\n"
    document.write_text(text)
    monkeypatch.setattr(results, "DOCUMENTS", (document,))
    with (
        flagsaver.flagsaver(check=True),
        pytest.raises(
            ValueError, match=r"page\.md has other tables than docs/results.*python -m experiments"
        ),
    ):
        results.main(["results"])
    assert document.read_text() == text
    results.main(["results"])
    assert document.read_text() == text.replace("old", "| a |\n| - |")
    with flagsaver.flagsaver(check=True):
        results.main(["results"])


def test_an_unknown_table_is_named():
    with pytest.raises(ValueError, match=r"no table is named 'Table 9'; the names are .*'Table 2'"):
        documents.fill("<!-- table: Table 9 -->\n<!-- /table -->\n", results.TABLES)


def test_a_workdir_is_stored_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stored_results, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "DOCUMENTS", ())
    (tmp_path / "table1_pond").mkdir()
    (tmp_path / "table1_pond" / "table.json").write_text(json.dumps({"rows": [], "data": "pond/valid"}))
    with flagsaver.flagsaver(store=str(tmp_path / "table1_pond")):
        results.main(["results"])
    assert capsys.readouterr().out == f"{tmp_path / 'table1_pond.json'}\n"
    assert json.loads((tmp_path / "table1_pond.json").read_text())["data"] == "pond/valid"
