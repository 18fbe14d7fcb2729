from benchmarks import pages
from klbox_jax.report import documents


def test_the_documents_have_the_numbers_of_the_results():
    assert documents.update(pages.DOCUMENTS, pages.TABLES, check=True, command="") == []


def test_every_table_is_in_a_document():
    text = "".join(document.read_text(encoding="utf-8") for document in pages.DOCUMENTS)
    assert {found["name"] for found in documents.MARKED.finditer(text)} == set(pages.TABLES)
