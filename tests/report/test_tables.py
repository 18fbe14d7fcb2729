import pytest

from klbox_jax.report import paper
from klbox_jax.report.paper import PAPER_TABLE1
from klbox_jax.report.tables import PaperNumbers, markdown_table, paper_table_markdown, table1_markdown


def row(name, ap, ap90, **more):
    settings = {"loss": "kl", "suppression": "hard", "voting": "none", "steps": 100, "seed": 0}
    metrics = dict.fromkeys(("AP50", "AP60", "AP70", "AP75", "AP80"), 40.0)
    return {"name": name, **settings, "AP": ap, **metrics, "AP90": ap90, "seconds": 12.4, **more}


def test_aligned_source():
    assert (
        markdown_table(["name", "AP", "kind"], [["a|b", "9.5", "x"], ["c", "10.25", "long"]])
        == "| name |    AP | kind |\n"
        "| ---- | ----: | ---: |\n"
        "| a\\|b |   9.5 |    x |\n"
        "| c    | 10.25 | long |"
    )
    assert markdown_table(["n", "kind"], [["a", "x"]], text_columns=["kind"]) == (
        "| n   | kind |\n| --- | ---- |\n| a   | x    |"
    )
    assert markdown_table(["n"], []) == "| n   |\n| --- |"


def test_rows_must_fit():
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        markdown_table(["a", "b"], [["1"]])


def test_table1_text():
    rows = [
        row("baseline", 20.0, 5.0, loss="smooth_l1", versions={"jax": "1.2"}),
        row("kl", 21.26, None, versions={"jax": "1.2"}),
        row("kl_voting", 19.98, 7.5, voting="variance", versions={"jax": "1.2"}),
        row("kl_voting_soft_nms", 22.0, 8.0, suppression="soft_gaussian", versions={"jax": "1.3"}),
    ]
    text = table1_markdown(rows, meta={"data": "scenes", "preset": "mini"})
    assert text == (
        """\
- data: scenes
- preset: mini

Average precision in per cent:

| name               | loss      | suppression   | voting   |   AP | AP50 | AP60 | AP70 | AP75 | AP80 | AP90 \
| steps | seed | seconds |
| ------------------ | --------- | ------------- | -------- | ---: | ---: | ---: | ---: | ---: | ---: | ---: \
| ----: | ---: | ------: |
| baseline           | smooth_l1 | hard          | none     | 20.0 | 40.0 | 40.0 | 40.0 | 40.0 | 40.0 |  5.0 \
|   100 |    0 |      12 |
| kl                 | kl        | hard          | none     | 21.3 | 40.0 | 40.0 | 40.0 | 40.0 | 40.0 |    - \
|   100 |    0 |      12 |
| kl_voting          | kl        | hard          | variance | 20.0 | 40.0 | 40.0 | 40.0 | 40.0 | 40.0 |  7.5 \
|   100 |    0 |      12 |
| kl_voting_soft_nms | kl        | soft_gaussian | none     | 22.0 | 40.0 | 40.0 | 40.0 | 40.0 | 40.0 |  8.0 \
|   100 |    0 |      12 |

Gain over the baseline in points, with the paper's gain:

| name               |   AP | AP50 | AP60 | AP70 | AP75 | AP80 | AP90 | paper's AP | paper's gain in AP |
| ------------------ | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---------: | -----------------: |
| baseline           | +0.0 | +0.0 | +0.0 | +0.0 | +0.0 | +0.0 | +0.0 |       23.6 |               +0.0 |
| kl                 | +1.3 | +0.0 | +0.0 | +0.0 | +0.0 | +0.0 |    - |      26.4* |              +2.8* |
| kl_voting          | +0.0 | +0.0 | +0.0 | +0.0 | +0.0 | +0.0 | +2.5 |    (27.8)? |            (+4.2)? |
| kl_voting_soft_nms | +2.0 | +0.0 | +0.0 | +0.0 | +0.0 | +0.0 | +3.0 |       29.1 |               +5.5 |

The paper's numbers are VGG-16 Faster R-CNN on COCO. Their levels are not comparable with ours, only the \
signs and the order of the gains.

`*` second-hand: quoted in another public report, not read in the paper.

`( )?` unverified: from memory, not checked against a text; do not cite it as the paper's.

Versions of baseline, kl, kl_voting: jax 1.2.

Versions of kl_voting_soft_nms: jax 1.3.
"""
    )


def test_only_checked_numbers_stand_as_the_papers():
    rows = [row(name, 10.0, 1.0) for name in PAPER_TABLE1]
    text = table1_markdown(rows, meta={})
    for ap, mark in PAPER_TABLE1.values():
        assert (f"({ap})?" in text) == (mark == "unverified")
    checked = {name: ap for name, (ap, mark) in PAPER_TABLE1.items() if mark != "unverified"}
    assert checked == {"baseline": 23.6, "kl": 26.4, "kl_voting_soft_nms": 29.1}


def test_table1_without_a_baseline_or_a_known_name():
    text = table1_markdown([{"name": "mine", "AP": 3.0}], meta={})
    assert "| mine | -    | -           | -      | 3.0 |" in text
    assert "paper's numbers are" not in text
    assert "+0.0" not in text


def test_names_are_unique():
    with pytest.raises(ValueError, match="unique"):
        table1_markdown([row("kl", 1.0, 1.0), row("kl", 2.0, 2.0)], meta={})


def test_heads_have_baselines_of_their_own():
    rows = [
        row("c4/baseline", 20.0, 5.0),
        row("c4/kl", 21.0, 7.0),
        row("fpn/baseline", 30.0, 8.0),
        row("fpn/kl", 30.5, None),
    ]
    cells = {
        "c4/baseline": {"AP": (36.5, "derived")},
        "c4/kl": {"AP": (38.0, "second-hand"), "AP90": (12.0, "unverified")},
        "fpn/kl": {"AP": (38.5, "read")},
        "vgg/kl": {"AP50": (50.0, "unverified")},
    }
    text = paper_table_markdown(
        rows,
        PaperNumbers(
            cells=cells, setting="something", comparable=True, headlines=("AP", "AP90"), print_all=True
        ),
        meta={},
        metrics=("AP", "AP90"),
    )
    # A gain is as sure as the less sure of its numbers; without a baseline there is none.
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["c4/kl", "+1.0", "+2.0", "38.0*", "+1.5~", "(12.0)?", "-"] in lines
    assert ["fpn/kl", "+0.5", "-", "38.5", "-", "-", "-"] in lines
    assert ["c4/kl", "38.0*", "(12.0)?", "-"] in lines
    assert ["vgg/kl", "-", "-", "(50.0)?"] in lines
    assert "The paper's numbers are something.\n" in text
    assert "not comparable" not in text
    assert all(f"{mark} " in text for mark in ("`*`", "`~`", "`( )?`"))


def test_what_stands_as_the_papers_was_read():
    read = {
        (number, name, metric): value
        for number in (2, 3, 5, 6)
        for name, cells in getattr(paper, f"PAPER_TABLE{number}").items()
        for metric, (value, mark) in cells.items()
        if mark == "read"
    }
    sizes = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    assert read == {
        (2, "kl_voting_soft_nms", "AP"): 40.4,
        (3, "2mlp/kl", "AP"): 38.5,
        (6, "vgg16/kl_voting_soft_nms", "AP_voc"): 71.6,
        **dict(zip([(5, "kl", m) for m in sizes], (38.5, 57.8, 41.2, 20.9, 41.2, 51.5), strict=True)),
        **dict(
            zip(
                [(5, "kl_voting_soft_nms", m) for m in sizes],
                (39.2, 57.6, 42.5, 21.2, 41.7, 52.6),
                strict=True,
            )
        ),
    }
    assert {mark for _, mark in paper.PAPER_TABLE4.values()} == {"unverified"}
