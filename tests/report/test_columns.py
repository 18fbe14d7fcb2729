from klbox_jax.report import columns


def test_numbers_of_records_and_of_records_in_them():
    record = {"AP": 1.25, "seed": 3, "LRP": {"oLRP": 60.04}, "PDQ": None, "none": None}
    cell = {
        "AP": columns.number("AP", ".2f"),
        "seed": columns.number("seed", "d"),
        "oLRP": columns.number("LRP/oLRP", ".1f", "oLRP"),
        "PDQ": columns.number("PDQ/PDQ"),
        "missing": columns.number("AR"),
        "none": columns.number("none"),
    }
    found = {name: column.cell(record) for name, column in cell.items()}
    assert found == {"AP": "1.25", "seed": "3", "oLRP": "60.0", "PDQ": "-", "missing": "-", "none": "-"}
    assert [column.heading for column in cell.values()] == ["AP", "seed", "oLRP", "PDQ/PDQ", "AR", "none"]


def test_several_columns_at_once():
    named = columns.numbers(".0f", {"a": "first", "b": "second"})
    assert [(one.heading, one.cell({"a": 1.0, "b": 2.0})) for one in named] == [
        ("first", "1"),
        ("second", "2"),
    ]
    assert [one.heading for one in columns.numbers(".0f", ("a", "b"))] == ["a", "b"]


def test_a_table_of_records():
    kind = columns.Column("kind", lambda record: record["kind"].upper(), is_text=True)
    table = columns.table(
        [columns.text("name"), columns.number("AP"), kind], [{"name": "a", "AP": 1.0, "kind": "x"}]
    )
    assert table == "| name |  AP | kind |\n| ---- | --: | ---- |\n| a    | 1.0 | X    |"


def test_texts():
    assert columns.interval_text((-0.5, 1.0)) == "-0.50 to +1.00"
    assert columns.interval_text((0.25, 0.5), ".3g") == "0.25 to 0.5"
    assert columns.interval_text(None) == "-"
    assert columns.listing({"data": "scenes", "seed": 0}) == "- data: scenes\n- seed: 0"
    assert columns.page("one", "", "two") == "one\n\ntwo\n"
