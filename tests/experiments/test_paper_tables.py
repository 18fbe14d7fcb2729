import dataclasses
import json
import shlex

import pytest
from absl.testing import flagsaver

from configs.scenes import TINY
from experiments import networks, paper_tables, runs
from experiments.mask_scenes import get_config
from klbox_jax.evaluation import eval_step as evaluate
from klbox_jax.models.build import build_model
from klbox_jax.report.tables import METRICS
from klbox_jax.train import loop
from tests.thin import scenes_config

TABLES = paper_tables.TABLES
FILES = {"data_root": "photographs", "init_weights": "w.pkl", "init_weights_vgg_cnn_m_1024": "m.pkl"}
ROWS = {
    "2": ("baseline", "box_voting", "soft_nms", "iou_net", "kl", "kl_voting", "kl_voting_soft_nms"),
    "3": ("baseline", "kl"),
    "5": ("baseline", "soft_nms", "iou_net", "kl", "kl_voting", "kl_voting_soft_nms"),
    "6": ("baseline", "soft_nms", "kl", "kl_voting", "kl_voting_soft_nms"),
}


def names_of(table, preset):
    return [
        f"{head}/{row.name}" if head else row.name
        for (head, _), of_network in table.networks(preset).items()
        for row in of_network
    ]


def run(name):
    """Runs the program for a table."""
    with flagsaver.flagsaver(table=name):
        paper_tables.main(["paper_tables"])


@pytest.mark.parametrize("name", TABLES)
def test_the_rows_are_those_of_the_paper(name):
    table = TABLES[name]
    assert tuple(row.name for row in table.rows) == ROWS[name]
    heads = table.heads["full"]
    # The networks come in the order of the rows.
    assert names_of(table, "full") == [f"{h}/{row}" if h else row for h in heads for row in ROWS[name]]
    assert set(table.paper) <= set(names_of(table, "full"))
    assert table.heads.keys() == {"mini", "full"}


def test_a_name_has_one_meaning():
    by_name = {}
    for table in TABLES.values():
        for row in table.rows:
            assert by_name.setdefault(row.name, row) == row
    assert runs.IOU_NET.settings == {"refine_steps": 5}


@pytest.mark.parametrize("family", networks.FAMILIES)
def test_the_networks_of_a_family_differ_in_loss_and_head_alone(family):
    preset = "mini" if family in ("one_level", "pyramid", "mask") else "full"
    plain = {}
    with flagsaver.flagsaver(preset=preset, seed=3, **(FILES if preset == "full" else {})):
        for loss in ("smooth_l1", "kl", "iou_net"):
            network = networks.Network(family, loss)
            config = network.config().to_dict()
            assert config["seed"] == 3
            assert config["model"].pop("box_loss") == ("kl" if loss == "kl" else "smooth_l1")
            assert config["model"]["iou_head"].pop("enabled") == (loss == "iou_net")
            del config["postprocess"]["voting"]
            plain[loss] = config
            assert f"/{networks.FAMILIES[family].prefix}{loss} " in f"{network.workdir} "
    assert plain["smooth_l1"] == plain["kl"] == plain["iou_net"]
    if preset == "full":
        weights = "m.pkl" if family == "vgg_cnn_m_1024_voc" else "w.pkl"
        assert plain["kl"]["model"]["init_weights"] == weights
        assert plain["kl"]["data"]["root"] == "photographs"
        assert plain["kl"]["data"]["name"] == ("voc" if family.endswith("voc") else "coco")
    names = [f.prefix for f in networks.FAMILIES.values()]
    assert len(set(names)) == len(names)


def test_networks_may_lie_where_another_experiment_put_them():
    with flagsaver.flagsaver(networks_dir="runs/methods_mini/seed0", num_epochs=3.0):
        network = networks.Network("one_level", "iou_net")
        assert str(network.workdir) == "runs/methods_mini/seed0/iou_net"
        lent = runs.load_config(
            runs.SCENES_CONFIG, "loss=smooth_l1,iou_head=True", {"seed": 0, "train.num_epochs": 3.0}
        )
        assert network.config().to_dict() == lent.to_dict()


def test_the_scenes_with_masks():
    config = get_config("loss=kl")
    model = build_model(config.model, num_classes=6)
    assert model.roi_heads.mask_head is not None
    assert model.roi_heads.mask_head.pooler.levels == model.roi_heads.box_pooler.levels == (3, 4, 5)
    assert config.data.mask_size == 28


@pytest.mark.parametrize("preset", ["mini", "full"])
@pytest.mark.parametrize("name", TABLES)
def test_a_dry_run_prints_commands_data_and_estimates(name, preset, tmp_path, capsys):
    # Nothing is needed for it, and nothing is written.
    with flagsaver.flagsaver(preset=preset, dry_run=True, workdir=str(tmp_path / "table")):
        run(name)
        wanted = TABLES[name].networks(preset)
    text = capsys.readouterr().out
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("  python")]
    assert len(commands) == len(wanted)
    for command, (_, network) in zip(commands, wanted, strict=True):
        assert command[:3] == ["python", "-m", "klbox_jax.main"]
        assert f"--config={networks.FAMILIES[network.family].config}:{network.arg}" in command
        assert f"--workdir=runs/{preset}_networks/{network.name}" in command
    assert text.startswith("data: ")
    assert text.count(" steps of ") == len(wanted)
    assert text.count("estimate ") == len(wanted) + 1
    assert "Estimates assume" in text
    assert ("DATA_ROOT" in text) == (preset == "full")
    assert not (tmp_path / "table").exists()


def test_the_estimate_by_hand(capsys):
    with flagsaver.flagsaver(preset="full", dry_run=True):
        run("5")
    # 180,000 steps of 16 images at 9.5 images a second.
    assert "180000 steps of 16 images, estimate 84.21 device hours" in capsys.readouterr().out


def test_a_table_has_to_be_named():
    with pytest.raises(ValueError, match="name a table of the paper: --table=2, 3, 4, 5 or 6"):
        paper_tables.main(["paper_tables"])


def test_what_is_missing_is_named():
    with flagsaver.flagsaver(preset="full"):
        with pytest.raises(ValueError, match="--preset=full needs --data_root=FOLDER and --init_weights"):
            run("2")
        with (
            flagsaver.flagsaver(data_root="voc", init_weights="w.pkl"),
            pytest.raises(ValueError, match="needs --init_weights_vgg_cnn_m_1024=FILE"),
        ):
            run("6")
    with (
        flagsaver.flagsaver(preset="aquarium"),
        pytest.raises(ValueError, match="table3 has no preset aquarium; choose mini or full"),
    ):
        run("3")


@pytest.mark.parametrize("preset", ["mini", "full"])
@pytest.mark.parametrize("name", TABLES)
def test_the_files_of_a_table(name, preset, tmp_path, monkeypatch):
    done = []

    def train_and_evaluate(network, of_network, *, voc):
        done.append(network.name)
        assert voc == (name == "6")
        fake = {"data": "some/set", "data_fingerprint": None, "seed": 0, "steps": 9, "seconds": 1.0}
        return [
            row.labels() | dict.fromkeys((*METRICS, "AP_voc"), 30.0 + len(done)) | fake for row in of_network
        ]

    monkeypatch.setattr(networks, "train_and_evaluate", train_and_evaluate)
    with flagsaver.flagsaver(preset=preset, workdir=str(tmp_path)):
        run(name)
    table = json.loads((tmp_path / "table.json").read_text())
    text = (tmp_path / "table.md").read_text()
    module = TABLES[name]
    assert [row["name"] for row in table["rows"]] == names_of(module, preset)
    assert len(set(done)) == len(done)
    assert all(f"| {row_name} " in text for row_name in (*names_of(module, preset), *module.paper))
    assert ("not comparable" in text) == (preset == "mini")
    assert (f"in miniature: {module.mini}" in text) == (preset == "mini")


@pytest.fixture(scope="module")
def thin_table(tmp_path_factory):
    """The whole of a small table with masks: one training, one row."""
    folder = tmp_path_factory.mktemp("masks")
    table = dataclasses.replace(TABLES["3"], heads={"mini": {"head": "mask"}}, rows=(runs.KL,), voc=True)

    def load_config(path, arg, fields):
        assert path == "experiments/mask_scenes.py"
        config = scenes_config(arg, **(fields | {"data.root": str(folder / "scenes")}))
        full = get_config(arg)
        with config.unlocked():
            config.data.mask_size = full.data.mask_size
            config.model.mask_head = full.model.mask_head
            config.model.mask_head.update(features=8, num_convs=1)
        assert set(TINY) & {"model.mask_head", "data.mask_size"} == set()
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "load_config", load_config)
        flags = {"workdir": str(folder / "table"), "networks_dir": str(folder / "networks")}
        with flagsaver.flagsaver(**flags):
            paper_tables.run_table(table)
            yield folder, table


def test_masks_and_voc_are_evaluated_too(thin_table):
    folder, _ = thin_table
    (row,) = json.loads((folder / "table" / "table.json").read_text())["rows"]
    assert row["name"] == "head/kl"
    for key in ("AP", "AP_voc", "mask_AP", "mask_AP50", "mask_AP75", "mask_AP90"):
        assert 0 <= row[key] <= 100
    assert row["steps"] == 6
    results = json.loads((folder / "networks/mask_kl/eval/6/kl/detections.json").read_text())
    assert all("segmentation" in entry for entry in results)


def test_what_is_finished_is_skipped(thin_table, monkeypatch):
    folder, table = thin_table

    def never(*args, **kwargs):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(loop, "train_batches", never)
    monkeypatch.setattr(evaluate, "eval_step", never)
    monkeypatch.setattr(networks, "evaluate_voc", never)
    before = json.loads((folder / "table" / "table.json").read_text())
    (folder / "table" / "table.json").unlink()
    paper_tables.run_table(table)
    assert json.loads((folder / "table" / "table.json").read_text()) == before
