import json

import pytest
from absl.testing import flagsaver

from experiments import beyond, methods, runs
from klbox_jax.evaluation import eval_step as evaluate
from klbox_jax.losses.box_loss import BOX_LOSSES
from klbox_jax.postprocess.settings import SUPPRESSION_METHODS, VOTING_METHODS
from klbox_jax.train import loop
from tests.thin import scenes_config

COLUMNS = (
    *("name", "loss", "suppression", "voting", "AP", "AP50", "AP75", "AP90"),
    *("NLL", "coverage_1sigma", "post_ms", "seed", "steps", "seconds"),
)


def test_every_loss_and_every_method_has_a_row():
    assert set(methods.NETWORKS) == set(BOX_LOSSES) - {"kl_piecewise"} | {"iou_net"}
    assert set(methods.REPEATED) <= set(methods.NETWORKS)
    of_kl = methods.rows_of("kl")
    # Ours is a matter of experiments/beyond.py, which chooses it.
    assert {row.voting for row in of_kl} == set(VOTING_METHODS) - {"variance_score"}
    assert any(fields["voting"] == "variance_score" for fields in beyond.SETTINGS.values())
    used = {row.suppression for network in methods.NETWORKS for row in methods.rows_of(network)}
    assert used == set(SUPPRESSION_METHODS)
    names = [row.name for network in methods.NETWORKS for row in methods.rows_of(network)]
    assert len(set(names)) == len(names)


def test_networks_differ_in_loss_and_head_alone():
    plain = {}
    for network in methods.NETWORKS:
        config = runs.load_config(runs.SCENES_CONFIG, *methods.arg_and_fields(network, 3)).to_dict()
        assert config["seed"] == 3
        assert config["train"]["num_epochs"] == methods.NUM_EPOCHS["mini"]
        del config["model"]["box_loss"], config["postprocess"]["voting"]
        assert config["model"]["iou_head"].pop("enabled") == (network == "iou_net")
        plain[network] = config
    assert all(config == plain["kl"] for config in plain.values())


def test_photographs_need_their_files_and_know_no_label_noise():
    with flagsaver.flagsaver(preset="aquarium"):
        with pytest.raises(ValueError, match="--preset=aquarium needs --data_root=FOLDER and --init_weights"):
            methods.arg_and_fields("kl", 0)
        with flagsaver.flagsaver(data_root="pond", init_weights="w.pth"):
            _, fields = methods.arg_and_fields("lasernet_kl", 0)
    assert fields["data.root"] == "pond"
    assert fields["model.box_loss_settings.label_noise"] == "size"


def test_the_papers_setting_is_refused():
    with (
        flagsaver.flagsaver(preset="full"),
        pytest.raises(ValueError, match="methods has no preset full; choose mini or aquarium"),
    ):
        methods.main(["methods"])


def test_an_unknown_network_is_refused():
    with (
        flagsaver.flagsaver(networks=["kl", "l3"]),
        pytest.raises(ValueError, match="--networks=l3 is unknown"),
    ):
        methods.main(["methods"])


def test_a_dry_run_prints_a_command_for_each_training(tmp_path, capsys):
    with flagsaver.flagsaver(workdir=str(tmp_path / "table"), dry_run=True, seed=3, seeds=2):
        methods.main(["methods"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(methods.NETWORKS) + len(methods.REPEATED)
    assert "--config.seed=3 " in lines[0]
    assert "--config=configs/scenes.py:loss=smooth_l1,iou_head=True --config.seed=4" in lines[-1]
    assert not (tmp_path / "table").exists()


@pytest.fixture(scope="module")
def thin_table(tmp_path_factory):
    """The whole program for three networks of six steps; the second seed for two of them."""
    folder = tmp_path_factory.mktemp("methods")

    def load_config(path, arg, fields):
        assert path == runs.SCENES_CONFIG
        fields = {key: value for key, value in fields.items() if key != "train.num_epochs"}
        return scenes_config(arg, **(fields | {"data.root": str(folder / "scenes")}))

    def rows_of(network, every=methods.rows_of):
        # Each compiles a program of its own: the KL network shows two of them, the tests of detect all.
        return every(network)[:2] if network != "iou_net" else (every(network)[0], *every(network)[2:4])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "load_config", load_config)
        patch.setattr(methods, "rows_of", rows_of)
        with flagsaver.flagsaver(workdir=str(folder / "table"), networks=["smooth_l1", "kl", "iou_net"]):
            methods.main(["methods"])
            yield folder / "table"


def test_the_table(thin_table):
    table = json.loads((thin_table / "table.json").read_text())
    assert len(table["rows"]) == 7
    for row in table["rows"]:
        assert set(COLUMNS) <= set(row)
        assert row["post_ms"] > 0
        assert row["steps"] == 6
    text = (thin_table / "table.md").read_text()
    for column in COLUMNS:
        assert f" {column} " in text
    assert "iou_net-iou_guided-none-refined" in text
    assert "kl over smooth_l1, best rows" in text
    assert "+ refinement" in text


def test_what_is_finished_is_skipped(thin_table, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(loop, "train_batches", never)
    monkeypatch.setattr(evaluate, "eval_step", never)
    monkeypatch.setattr(methods, "detect_batch", never)
    before = json.loads((thin_table / "table.json").read_text())
    (thin_table / "table.json").unlink()
    methods.main(["methods"])
    assert json.loads((thin_table / "table.json").read_text()) == before


def fake(name, loss, seed, ap90, ap=50.0):
    return {"name": name, "loss": loss, "seed": seed, "AP": ap, "AP90": ap90}


def test_differences_are_paired_by_seed():
    rows = [
        fake("smooth_l1-hard-none", "smooth_l1", 0, 5.0, ap=40.0),
        fake("smooth_l1-soft_gaussian-none", "smooth_l1", 0, 6.0, ap=41.0),
        fake("kl-hard-none", "kl", 0, 9.0),
        fake("smooth_l1-hard-none", "smooth_l1", 1, 7.0),
        fake("kl-hard-none", "kl", 1, 8.0),
    ]
    # The best row of smooth-L1 and seed 0 is the second: 9 - 6 = 3; seed 1: 8 - 7 = 1. Mean 2 with a
    # standard error of 1, and the t of one degree of freedom is 12.71.
    (claim,) = methods.claims(rows, [0, 1]).items()
    assert methods.claim_cells(*claim) == [
        "kl over smooth_l1, best rows",
        "+3.00  +1.00",
        "+2.00",
        "-10.71 to +14.71",
        "yes",
    ]
