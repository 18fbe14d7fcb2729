import json
import os
import re

import numpy as np
import pytest

from checks import fuzz, fuzz_readers
from checks.fuzz_seeds import SEEDS
from klbox_jax.data.source import DataError

COUNTS = {"coco": 200, "voc": 100, "images": 200, "weights": 200}


@pytest.mark.parametrize("kind", SEEDS)
def test_sound_files_are_small_and_are_read(kind):
    with fuzz_readers.Readers(watch=False) as readers:
        for name, data in SEEDS[kind]().items():
            assert len(data) <= 20_000
            path = readers.path(kind, name)
            path.write_bytes(data)
            fuzz_readers.read_file(kind, path, np.random.default_rng(0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_files_are_read_or_refused(kind):
    with fuzz_readers.Readers(watch=False) as readers:
        outcomes = [readers.run(kind, index, seed=7) for index in range(COUNTS[kind])]
    assert not [outcome for outcome in outcomes if outcome.verdict in ("crash", "hang")]
    summary = fuzz.summarize(outcomes)
    assert summary["crashes"] == summary["hangs"] == 0
    read = np.mean([outcome.verdict == "read" for outcome in outcomes])
    assert 0.1 < read < 0.9


def test_a_case_is_a_function_of_its_number():
    first, again, other = (fuzz_readers.make_case("coco", index, 3)[:2] for index in (5, 5, 6))
    assert first == again != other


def _verdict(monkeypatch, action):
    monkeypatch.setattr(fuzz_readers, "read_file", lambda *_: action())
    with fuzz_readers.Readers(watch=False) as readers:
        return readers.run("voc", 0, seed=0)


def test_what_counts_as_a_crash_and_as_a_hang(monkeypatch):
    def fail(error):
        raise error

    def hide():
        while True:
            try:
                while True:
                    pass
            except Exception:
                continue

    assert _verdict(monkeypatch, lambda: fail(DataError("a.xml is damaged"))).verdict == "refused"
    assert _verdict(monkeypatch, lambda: fail(DataError("one\ntwo"))).verdict == "crash"
    crash = _verdict(monkeypatch, lambda: fail(KeyError("size")))
    assert crash.verdict == "crash"
    assert "KeyError: 'size'" in crash.text
    monkeypatch.setattr(fuzz_readers, "SECONDS", 0.05)
    assert _verdict(monkeypatch, hide).verdict == "hang"


def test_workers_write_the_summary(tmp_path, capfd):
    summary = fuzz.run({"voc": 20, "weights": 20}, seed=0, output=tmp_path)
    assert summary == json.loads((tmp_path / "fuzz.json").read_text())
    assert (summary["annotations"], summary["images"], summary["weights"]) == (20, 0, 20)
    assert summary["crashes"] == summary["hangs"] == 0
    assert not (tmp_path / "crashes").exists()
    assert sum(summary["messages"].values()) > 0


def test_events_of_a_reader_are_seen():
    # Hooks of the process cannot be taken back, so the events are handed over by hand.
    with fuzz_readers.Readers(watch=False) as readers:
        write, read = os.O_WRONLY | os.O_CREAT, os.O_RDONLY
        readers._audit("os.system", ("ls",))
        assert not readers._events
        with readers._reading():
            for event, arguments in (
                ("open", ("/a", "r", read)),
                ("open", ("/a", None, read)),
                ("import", ("x", None)),
            ):
                readers._audit(event, arguments)
            assert not readers._events
            for event, arguments in (
                ("open", ("/a", "w", write)),
                ("open", ("/a", None, write)),
                ("exec", (None,)),
                ("subprocess.Popen", ("ls", [])),
                ("socket.connect", (None, None)),
            ):
                readers._audit(event, arguments)
        assert len(readers._events) == 5


def test_messages_are_counted_without_their_numbers():
    texts = ("/a.json: annotation 5 has [1, 2] in 'x'", "/a.json: annotation 77 has [3] in 'y'")
    assert len({fuzz.normalized(text) for text in texts}) == 1
    assert not re.search(r"\d", fuzz.normalized(texts[0]))
