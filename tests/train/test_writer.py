import errno
import io
import json
import logging
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter, masked_crc32c

from klbox_jax.errors import WorkdirError
from klbox_jax.train import writer as writer_module
from klbox_jax.train.workdir import Workdir
from klbox_jax.train.writer import MetricWriter, Progress, last_value, read_metrics
from tests.programs import run_python


def events_of(workdir):
    """Reads the event files record by record: length, its checksum, the event, its checksum."""
    events = []
    for path in sorted(workdir.tensorboard.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            body = data[12 : 12 + length]
            assert int.from_bytes(data[12 + length : 16 + length], "little") == masked_crc32c(body)
            events.append(event_pb2.Event.FromString(body))
            data = data[16 + length :]
    return events


def record_steps(workdir):
    return [record["step"] for record in read_metrics(workdir.metrics)]


def test_records_are_on_disk_when_write_returns(tmp_path):
    workdir = Workdir(tmp_path / "run")
    with MetricWriter(workdir, tensorboard=False) as writer:
        values = {
            "train/a": 1.5,
            "b": np.int64(3),
            "c": jnp.float32(0.25),
            "d": jnp.bfloat16(2),
            "e": np.ones((1,)),
        }
        writer.write(10, values)
        (line,) = workdir.metrics.read_text().splitlines()
    record = json.loads(line)
    assert 1.6e9 < record.pop("time") < 1e10
    assert record == {"step": 10, "train/a": 1.5, "b": 3, "c": 0.25, "d": 2.0, "e": 1.0}
    assert not workdir.tensorboard.exists()


def test_nonfinite_numbers_stay_valid_json_and_are_named(tmp_path):
    workdir = Workdir(tmp_path)
    with MetricWriter(workdir, tensorboard=False) as writer:
        writer.write(1, {"a": math.nan, "b": jnp.inf, "c": np.float32("-inf"), "d": 1.0})

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads(workdir.metrics.read_text(), parse_constant=refuse)
    assert [record[name] for name in "abcd"] == [None, None, None, 1.0]
    assert record["nonfinite"] == {"a": "nan", "b": "inf", "c": "-inf"}


@pytest.mark.parametrize(
    "numbers", [{"step": 1.0}, {"nonfinite": 1.0}, {"a": np.ones(2)}, {"a": "x"}, {"a": None}]
)
def test_what_is_not_a_metric_is_refused(tmp_path, numbers):
    with (
        MetricWriter(Workdir(tmp_path), tensorboard=False) as writer,
        pytest.raises(ValueError, match=r"cannot be called|must be one number"),
    ):
        writer.write(1, numbers)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_the_last_value_of_a_metric(tmp_path):
    workdir = Workdir(tmp_path)
    assert last_value(workdir, "a") == 0
    with MetricWriter(workdir, tensorboard=False) as writer:
        for step, numbers in enumerate([{"a": 1.0}, {"a": 2.5}, {"b": 3}], start=1):
            writer.write(step, numbers)
    assert (last_value(workdir, "a"), last_value(workdir, "b"), last_value(workdir, "c")) == (2.5, 3, 0)


def write_steps(workdir, steps, **options):
    with MetricWriter(workdir, tensorboard=False, **options) as writer:
        for step in steps:
            writer.write(step, {"loss": step})


def test_resuming_cuts_what_comes_again(tmp_path):
    workdir = Workdir(tmp_path)
    write_steps(workdir, [10, 20, 30, 40], resume_step=0)
    write_steps(workdir, [30, 40, 50], resume_step=20)
    assert record_steps(workdir) == [10, 20, 30, 40, 50]
    write_steps(workdir, [10], resume_step=0)
    assert record_steps(workdir) == [10]
    write_steps(workdir, [5, 20])
    assert record_steps(workdir) == [10, 5, 20]


@pytest.mark.parametrize("resume_step", [None, 20])
@pytest.mark.parametrize("tail", ['{"step": 20, "loss": 1', '{"step"', "\x00\x00", '{"step": 20, "loss": 1}'])
def test_a_half_written_last_line_is_tolerated(tmp_path, caplog, resume_step, tail):
    workdir = Workdir(tmp_path)
    write_steps(workdir, [10])
    with workdir.metrics.open("a") as file:
        file.write(tail)
    with caplog.at_level(logging.WARNING, "absl"):
        write_steps(workdir, [30], resume_step=resume_step)
    steps = record_steps(workdir)
    if resume_step is None:
        assert [step for step in steps if step != 20] == [10, 30]
    else:
        assert steps == [10, 30]
        assert "incomplete line" in caplog.text
        assert all(line.startswith('{"step": ') for line in workdir.metrics.read_text().splitlines())


def test_scalars_and_images_reach_tensorboard(tmp_path):
    workdir = Workdir(tmp_path)
    with MetricWriter(workdir) as writer:
        writer.write(7, {"train/loss": 0.5})
        writer.write_images(7, {"eval/boxes": np.zeros((4, 6, 3), np.uint8)})
    values = {value.tag: (event.step, value) for event in events_of(workdir) for value in event.summary.value}
    assert values["train/loss"][0] == 7
    assert values["train/loss"][1].simple_value == 0.5
    assert (values["eval/boxes"][1].image.height, values["eval/boxes"][1].image.width) == (4, 6)
    with MetricWriter(workdir, resume_step=7) as writer:
        writer.write(8, {"train/loss": 0.25})
    starts = [e.step for e in events_of(workdir) if e.session_log.status == event_pb2.SessionLog.START]
    assert starts == [8]  # TensorBoard hides what was recorded from step 8 on before the resumption


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_reported_in_one_sentence_by_every_method(tmp_path, monkeypatch):
    """TensorBoard's file included, whose library would wait for a dead thread forever."""
    workdir = Workdir(tmp_path)
    writer = MetricWriter(workdir)
    for _ in range(12):
        writer.write(1, {"a": 1.0})
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(
        WorkdirError, match=rf"^{workdir.tensorboard} cannot be written: No space left on device; fr"
    ):
        writer.write(2, {"a": 1.0})
    close = RecordWriter.close

    def close_and_fail(self):
        close(self)
        full()

    monkeypatch.setattr(RecordWriter, "close", close_and_fail)
    with pytest.raises(WorkdirError, match=r"tensorboard cannot be written"):
        writer.close()
    monkeypatch.setattr(pathlib.Path, "open", full)
    with pytest.raises(WorkdirError, match=rf"^{workdir.metrics} cannot be written: No space left"):
        MetricWriter(workdir, tensorboard=False)


def test_two_files_of_one_second_do_not_replace_each_other(tmp_path):
    workdir = Workdir(tmp_path)
    for step in range(3):
        with MetricWriter(workdir) as writer:
            writer.write(step, {"a": 1.0})
    assert len(list(workdir.tensorboard.iterdir())) == 3
    assert [event.step for event in events_of(workdir) if event.summary.value] == [0, 1, 2]


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "is_writer", lambda: False)
    with MetricWriter(Workdir(tmp_path)) as writer:
        writer.write(1, {"a": 1.0})
        writer.write_images(1, {"a": np.zeros((4, 6, 3), np.uint8)})
    assert list(tmp_path.iterdir()) == []
    stream = io.StringIO()
    with Progress(2, stream=stream) as progress:
        progress.update(2)
    assert stream.getvalue() == ""


@pytest.fixture
def clock(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(writer_module.time, "monotonic", lambda: clock[0])
    return clock


def test_progress_in_a_log_is_a_line_now_and_then(clock):
    stream = io.StringIO()
    with Progress(
        1000, initial=100, description="train", seconds_between_lines=30, stream=stream
    ) as progress:
        for step in range(101, 201):
            progress.update(step, loss=jnp.float32(step / 8))
            clock[0] += 1
    # A line for the first step, every thirtieth second after it, and the last one.
    # ETA after step 131: 869 steps at 1 a second are 14 min 29 s.
    assert stream.getvalue().splitlines() == [
        "train   10.1%  101/1000  loss 12.62",
        "train   13.1%  131/1000  1 steps/s  ETA 0:14:29  loss 16.38",
        "train   16.1%  161/1000  1 steps/s  ETA 0:13:59  loss 20.12",
        "train   19.1%  191/1000  1 steps/s  ETA 0:13:29  loss 23.88",
        "train   20.0%  200/1000  0.9 steps/s  ETA 0:14:49  loss 25",
    ]


def test_progress_on_a_terminal_is_a_bar(clock):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(10, initial=5, description="train", stream=stream) as progress:
        for step in range(6, 11):
            clock[0] += 1
            progress.update(step, loss=0.5)
    last = stream.getvalue().split("\r")[-1]
    assert "train: 100%" in last
    assert "10/10" in last
    assert "loss=0.5" in last


def test_progress_without_steps_ends_quietly():
    stream = io.StringIO()
    Progress(0, stream=stream).close()
    assert stream.getvalue() == ""


def test_importing_the_training_files_imports_no_tensorflow():
    code = """
        import sys
        from klbox_jax import distributed
        from klbox_jax.train import checkpoints, state, workdir, writer
        print({name.split(".")[0] for name in sys.modules} & {"tensorflow", "torch", "tensorboardX"})
    """
    assert run_python("-c", code)[0] == "set()\n"


def test_the_time_of_compilers_is_left_out_of_the_rate(monkeypatch):
    """60 steps in 90 seconds, of which the compiler took 30."""
    now = [0.0]
    monkeypatch.setattr("klbox_jax.train.writer.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(160, stream=stream) as progress:
        progress.update(0)
        now[0] = 90.0
        progress.leave_out(30.0)
        progress.update(60)
        now[0] = 190.0
        progress.update(160)
    assert stream.getvalue().splitlines() == [
        "  0.0%  0/160",
        " 37.5%  60/160  1 steps/s  ETA 0:01:40",
        "100.0%  160/160  1 steps/s  ETA 0:00:00",
    ]
