from experiments import hypotheses, seeds


def difference(metric, by_seed, images):
    return seeds.Difference("full", "baseline", metric, by_seed, images)


def test_a_hypothesis_holds_if_both_intervals_agree():
    # Two seeds: Student's t is 12.7, so that a mean of two that are 0.02 apart is known to 0.13.
    rises = difference("AP80", (2.0, 2.02), (1.0, 3.0))
    assert hypotheses.holds(rises, hypotheses.RISES) == "yes"
    assert hypotheses.holds(rises, hypotheses.BARELY_MOVES) == "no"
    assert hypotheses.holds(difference("AP50", (0.4, 0.6), (0.1, 0.9)), hypotheses.BARELY_MOVES) == "unsure"
    assert hypotheses.holds(difference("AP50", (0.5, 0.51), (-0.9, 0.9)), hypotheses.BARELY_MOVES) == "yes"
    assert hypotheses.holds(difference("AP90", (0.5, 0.51), (-0.1, 0.9)), hypotheses.RISES) == "unsure"
    assert hypotheses.holds(difference("AP90", (-0.5,), (-0.9, 0.1)), hypotheses.RISES) == "no"


def test_agreement_is_paired_by_seed():
    assert hypotheses.agreement([0.4, 0.5], [0.2, 0.3]) == ["0.450", "+0.200", "+0.200 to +0.200"]
    # 0.1 and 0.3: mean 0.2, standard error 0.1, and 12.706 of them to either side.
    assert hypotheses.agreement([0.3, 0.6], [0.2, 0.3]) == ["0.450", "+0.200", "-1.071 to +1.471"]
    assert hypotheses.agreement([0.3], [0.2]) == ["0.300", "+0.100", "-"]
    assert hypotheses.agreement([None, 0.1], [0.2, 0.3]) == ["-", "-", "-"]


def test_the_tables():
    found = [
        difference("AP50", (0.4, 0.6), (0.1, 0.9)),
        difference("AP60", (9.0, 9.0), (8.0, 9.5)),
        difference("AP80", (2.0, 2.02), (1.0, 3.0)),
        difference("AP90", (1.0, 1.0), (0.5, 1.5)),
    ]
    text = hypotheses.markdown(found, {"baseline": [0.2, 0.3], "full": [0.4, 0.5]}, base="baseline")
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "Hypotheses about full over baseline" in text
    assert lines["AP50 barely moves, by 1 at most"].split("|")[2].strip() == "+0.50"
    assert [lines[f"{metric} rises"].split("|")[-2].strip() for metric in ("AP80", "AP90")] == ["yes", "yes"]
    assert "AP60" not in text
    assert lines["full"].split("|")[2].strip() == "0.450"
    assert lines["baseline"].split("|")[3].strip() == "+0.000"
