"""The command line up to the point where jax is imported: help, errors in one line, and where the config is from."""

import pathlib
import subprocess
import sys

import pytest
from absl import logging

from klbox_jax.command import program
from klbox_jax.command.arguments import MODES
from klbox_jax.config.family import explanations
from tests.programs import ROOT, run_python


@pytest.fixture(autouse=True)
def _verbosity():
    """The program of a report turns the log off."""
    logger = logging.get_absl_logger()
    before, level = logging.get_verbosity(), logger.level
    yield
    logging.set_verbosity(before)
    logger.setLevel(level)


@pytest.fixture
def klbox(capsys):
    """Runs the program in this process; returns its status, output and errors."""

    def run(*arguments):
        status = program.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def error_of(klbox, tmp_path, monkeypatch):
    """Runs the program in an empty folder, where it has to fail and to write nothing; returns the error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, status):
        found, output, errors = klbox(*arguments)
        assert found == status, errors
        assert output == ""
        *_, last = errors.splitlines()
        assert last.startswith("error: ")
        assert not list(tmp_path.iterdir())
        return last.removeprefix("error: ")

    return run


def test_the_help_lists_modes_and_every_field(klbox):
    status, text, errors = klbox("--help")
    assert (status, errors) == (0, "")
    assert all(f"\n  klbox {mode} " in text for mode in MODES)
    groups = {name for name in explanations() for other in explanations() if other.startswith(f"{name}.")}
    for name, line in explanations().items():
        if name not in groups and "mask_pooler" not in name:
            assert f"--config.{name} " in text
            assert line.split()[0] in text
    assert klbox()[1] == klbox("help")[1] == text


@pytest.mark.parametrize("mode", MODES)
def test_the_help_of_a_mode_lists_its_arguments(klbox, mode):
    status, text, errors = klbox(mode, "--help")
    assert (status, errors) == (0, "")
    assert text.startswith(f"usage: klbox {mode} ")
    for flag in {
        "train": ["--no_eval", "--config.train.num_steps"],
        "eval": ["--name=NAME", "--data=FOLDER"],
    }.get(mode, []):
        assert f"  {flag} " in text
    assert "usage: klbox" in klbox(mode, "x", "--no_such", "--help")[1]


def test_the_help_and_errors_import_no_library():
    code = """
        import sys
        from klbox_jax.command.program import main
        main(["--help"])
        main(["train", "--help"])
        main(["eval", "nowhere"])
        main(["train", "x"])
        print(sorted({"jax", "numpy", "absl", "ml_collections", "flax"} & set(sys.modules)), file=sys.stderr)
        """
    _, errors = run_python("-c", code)
    assert errors.splitlines()[-1] == "[]"


def test_the_first_word_comes_before_jax(tmp_path):
    """The first line is printed before jax is imported, of which the import is made to fail."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise KeyboardInterrupt\n")
    code = """
        import sys
        from klbox_jax.command.program import main
        sys.exit(main(["predict", sys.argv[1], "photos"]))
        """
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import textwrap; exec(textwrap.dedent('''" + code + "'''))",
            "checkpoints/scenes_kl",
        ],
        cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stderr.splitlines() == ["klbox predict: reading checkpoints/scenes_kl", "stopped by SIGINT"]
    assert found.returncode == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "klbox trian: there is no such mode; the closest is train"),
        (["zzz"], "klbox zzz: there is no such mode; choose one of train, eval"),
        (["train"], "WORKDIR is missing; write klbox train WORKDIR"),
        (["train", "x"], "x has no run to continue; for a first training name a config: --config=NAME"),
        (
            ["train", "x", "--config=scene"],
            "--config=scene: there is no config of this name; the closest is scenes",
        ),
        (
            ["train", "x", "--config=scenes", "--config.optimizer.lr=1"],
            "no field optimizer.lr; the closest is",
        ),
        (["train", "x", "--config=scenes", "--allow_config_chang"], "the closest is --allow_config_change"),
        (["train", "x", "y", "--config=scenes"], "klbox train takes one WORKDIR, but 'y' is given too"),
        (["train", "x", "--num_processes=two"], "argument --num_processes: invalid int value: 'two'"),
        (["predict"], "WORKDIR is missing; write klbox predict WORKDIR"),
        (["report"], "WORKDIR is missing; write klbox report WORKDIR"),
        (["report", "x", "--config.seed=1"], "--config.seed: klbox report reads no field of a config here"),
        (["check"], "FOLDER is missing; write klbox check FOLDER"),
        (["check", "a", "b"], "klbox check takes one FOLDER, but 2 are given"),
        (["configs", "a", "b"], "klbox configs takes one NAME, but 2 are given"),
        (["configs", "scens:loss=kl"], "the closest is scenes"),
    ],
)
def test_an_error_of_the_command_line_is_one_line(error_of, arguments, message):
    assert message in error_of(*arguments, status=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ([mode, "x"], "x is not the folder of a run: it has no config.json; train first")
            for mode in ("eval", "calibrate", "predict", "export")
        ),
        (
            ["train", "gs://bucket/a", "--config=scenes"],
            "WORKDIR = 'gs://bucket/a' is not a path of this machine",
        ),
        (["eval", "s3://bucket/a"], "s3: cannot be read or written; give a local path"),
        (
            ["train", "x", "--config=faster_rcnn_mobilenet_v2_fpn", "--config.data.root=gs://b/c"],
            "config.data.root = 'gs://b/c' is not a path of this machine",
        ),
        (["report", "x"], "x is not a folder"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(error_of, arguments, message):
    assert message in error_of(*arguments, status=1)


def test_a_workdir_that_is_a_file(klbox, tmp_path):
    (tmp_path / "x").write_text("")
    status, _, errors = klbox("train", tmp_path / "x", "--config=scenes")
    assert status == 1
    assert errors == f"error: {tmp_path / 'x'} is a file, not a folder; choose another --workdir\n"


def test_the_home_folder(klbox, monkeypatch):
    monkeypatch.setenv("HOME", "/home/nobody_at_all")
    assert "/home/nobody_at_all/kl is not the folder of a run" in klbox("eval", "~/kl")[2]


def test_configs_are_listed(klbox):
    status, text, _ = klbox("configs")
    assert status == 0
    assert "\n  scenes " in text
    status, text, _ = klbox("configs", "scenes:loss=smooth_l1", "--config.seed=4")
    lines = text.splitlines()
    assert status == 0
    assert any(
        line.startswith("model.box_loss = 'smooth_l1'   ") and "loss of the box edges" in line
        for line in lines
    )
    assert any(line.startswith("seed = 4   ") for line in lines)
    assert pathlib.Path("checkpoints/scenes_kl/config.json").exists()
    assert "train.num_epochs = 6.25" in klbox("configs", "checkpoints/scenes_kl/config.json")[1]


@pytest.fixture
def seen(monkeypatch):
    """Stops every mode before it imports jax; collects the mode and its config."""
    found = []
    monkeypatch.setattr(program, "_start", lambda mode, text, given=None: found.append((mode, text)))
    return found


@pytest.fixture
def config_of(monkeypatch, seen):
    """Runs the command line up to the first work; returns the config."""
    from klbox_jax import modes

    class StopError(Exception):
        pass

    def stop(config, workdir, **_):
        raise StopError(config)

    monkeypatch.setattr(modes, "make_job", stop)

    def run(*arguments, of=program.main):
        with pytest.raises(StopError) as caught:
            of([str(argument) for argument in arguments])
        return caught.value.args[0]

    return run


def test_a_workdir_is_enough(config_of, seen):
    """The shipped folder is of an older version; its config.json is the config, and fields change it."""
    config = config_of(
        "eval", "checkpoints/scenes_kl", "--config.postprocess.suppression=hard", "--name=hard"
    )
    assert seen == [("eval", "reading checkpoints/scenes_kl")]
    assert config.postprocess.suppression == "hard"
    assert config.train.num_epochs == 6.25
    assert config.export.batch_size == 1
    config = config_of("predict", "checkpoints/scenes_kl", "a.jpg", "--output=~/out")
    assert config.predict.output.endswith("/out")
    assert not config.predict.output.startswith("~")


def test_main_and_klbox_read_alike(config_of):
    arguments = ["--workdir=checkpoints/scenes_kl", "--config.seed=3"]
    one = config_of("eval", *arguments)
    other = config_of(*arguments, "--mode=eval", of=program.main_of_modes)
    assert one.to_dict() == other.to_dict()
    third = config_of(
        "--mode=train", "--workdir=x", "--config=configs/scenes.py:loss=kl", of=program.main_of_modes
    )
    assert third.data.hold_out == 0.0


OWN = "--config=faster_rcnn_mobilenet_v2_fpn"


@pytest.mark.parametrize(
    ("arguments", "share"),
    [
        ([OWN, "--config.data.root=pond"], 0.1),
        ([f"{OWN}:data=voc"], 0.1),
        ([OWN, "--config.data.hold_out=0"], 0.0),
        ([OWN, "--config.data.hold_out=0.2"], 0.2),
        ([OWN, "--config.data.calibration_split=test"], 0.0),
        ([OWN, "--no_calibrate"], 0.0),
        ([f"{OWN}:loss=smooth_l1"], 0.0),
        (["--config=scenes"], 0.0),
        # The papers' sets are trained on whole.
        (["--config=faster_rcnn_resnet50_fpn"], 0.0),
        (["--config=faster_rcnn_vgg16:data=voc"], 0.0),
        (["--config=faster_rcnn_resnet50_fpn", "--config.data.train_split=train"], 0.1),
    ],
)
def test_own_data_keep_a_tenth_out(config_of, capsys, arguments, share):
    config = config_of("train", "x", *arguments)
    assert config.data.hold_out == share
    said = "a tenth of the training images is kept out to calibrate sigma on" in capsys.readouterr().err
    assert said == (share == 0.1)


@pytest.mark.parametrize(
    ("arguments", "ramp"),
    [
        ([OWN], 0.75),
        ([OWN, "--no_calibrate"], 0.75),
        ([OWN, "--config.model.box_loss_settings.ramp_steps=9"], 9),
        ([OWN, "--config.data.train_split=train2017"], 684),
        ([f"{OWN}:loss=smooth_l1"], 684),
        # A config without a ramp has none on own data either.
        (["--config=faster_rcnn_resnet50_fpn", "--config.data.train_split=train"], 0),
    ],
)
def test_the_ramp_of_own_data_is_a_share(config_of, capsys, arguments, ramp):
    found = config_of("train", "x", *arguments).model.box_loss_settings.ramp_steps
    assert (found, type(found)) == (ramp, type(ramp))
    assert ("in three quarters of the training" in capsys.readouterr().err) == (ramp == 0.75)


def test_a_traceback_on_request(klbox, monkeypatch):
    monkeypatch.setenv("KLBOX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="is not the folder of a run"):
        klbox("eval", "nowhere")


def test_an_experiment_lists_its_flags():
    output, errors = run_python("-m", "experiments.table1", "--help")
    assert output.startswith("Table 1 of He et al. 2019")
    assert all(f"--{flag}: " in output for flag in ("preset", "workdir", "seeds", "noise_scale"))
    assert "--[no]dry_run: " in output
    assert "alsologtostderr" not in output
    assert "Traceback" not in errors


def test_a_check_of_no_folder_is_one_line(tmp_path):
    code = "import sys; from klbox_jax.command.program import main; sys.exit(main(['check', 'nowhere']))"
    _, errors = run_python("-c", code, status=2)
    assert errors.splitlines() == ["klbox check: reading nowhere", "error: --root=nowhere is not a folder"]
