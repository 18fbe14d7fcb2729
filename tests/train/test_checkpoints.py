import logging
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from klbox_jax import distributed
from klbox_jax.errors import CheckpointError
from klbox_jax.train.checkpoints import Checkpoints, find_fault, find_steps, restore_params
from klbox_jax.train.state import TrainState
from tests.bits import assert_same_bits
from tests.programs import run_python

pytestmark = pytest.mark.four_devices


def make_state(step, seed=0):
    keys = jax.random.split(jax.random.key(seed + step), 3)
    params = {
        "stem": {"kernel": jax.random.normal(keys[0], (5, 7)), "scale": jnp.float32(1e-42)},  # a subnormal
        "head": {
            "kernel": jax.random.normal(keys[1], (7, 3), jnp.bfloat16),
            "bias": jnp.array([jnp.nan, -0.0, jnp.inf]),
        },
    }
    frozen = {"stem": "frozen", "head": "trained"}
    tx = optax.partition(
        {"frozen": optax.set_to_zero(), "trained": optax.sgd(optax.constant_schedule(0.1), momentum=0.9)},
        frozen,
    )
    state = TrainState(jnp.int32(step), params, tx.init(params))
    return jax.device_put(state, distributed.replicated(distributed.make_mesh()))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save_all(directory, steps, max_to_keep=10):
    with Checkpoints(directory, max_to_keep=max_to_keep) as checkpoints:
        for step in steps:
            checkpoints.save(make_state(step))


def restore(directory):
    with Checkpoints(directory, max_to_keep=10) as checkpoints:
        return checkpoints.restore(abstract(make_state(0)))


def flip(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


def test_round_trip_is_exact_to_the_bit(tmp_path):
    state = make_state(3)
    with Checkpoints(tmp_path / "checkpoints", max_to_keep=1) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(state)
        checkpoints.wait()
        assert checkpoints.steps() == [3]
    restored = restore(tmp_path / "checkpoints")
    assert_same_bits(restored, state)
    assert restored.params["stem"]["kernel"].sharding == state.params["stem"]["kernel"].sharding


def test_restores_to_other_devices_than_it_was_saved_from(tmp_path):
    save_all(tmp_path, [3])
    state = jax.device_put(make_state(3), jax.devices()[1])
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        restored = checkpoints.restore(state)
    assert_same_bits(restored, state)
    assert restored.step.devices() == {jax.devices()[1]}


def test_keeps_the_newest_steps(tmp_path):
    save_all(tmp_path, [1, 2, 3, 4], max_to_keep=2)
    assert find_steps(tmp_path) == [3, 4]
    save_all(tmp_path / "one", [1, 2], max_to_keep=1)
    assert find_steps(tmp_path / "one") == [2]
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoints(tmp_path, max_to_keep=0)


def folders(path):
    """Names of the entries of a folder, except the mark of a completed save."""
    return sorted(entry.name for entry in path.iterdir() if entry.name != ".saved_before")


def test_nothing_is_deleted_before_the_new_digests_exist(tmp_path, monkeypatch):
    def fail(path, value):
        assert folders(tmp_path) == ["1", "2"]
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        checkpoints.save(make_state(1))
        monkeypatch.setattr("klbox_jax.train.checkpoints.write_json", fail)
        with pytest.raises(
            CheckpointError,
            match=rf"^{tmp_path / '2'} cannot be saved: .*No space left.*earlier checkpoints are unchanged \(steps 1\)",
        ):
            checkpoints.save(make_state(2))
    # What the failed save took is free again.
    assert folders(tmp_path) == ["1"]
    assert find_fault(tmp_path / "1") is None
    assert int(restore(tmp_path).step) == 1


def test_a_full_disk_as_tensorstore_reports_it(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        checkpoints.save(make_state(1))
        original = checkpoints._manager.save

        def fail(step, **arguments):
            (tmp_path / f"{step}.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
            raise ValueError(
                "RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"
            )

        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(
            CheckpointError, match=r"cannot be saved: RESOURCE_EXHAUSTED: .*free space on the disk"
        ):
            checkpoints.save(make_state(2))
        assert folders(tmp_path) == ["1"]
        # There is space again.
        monkeypatch.setattr(checkpoints._manager, "save", original)
        checkpoints.save(make_state(2))
    assert folders(tmp_path) == ["2"]


def test_a_protected_step_stays_until_another_is_protected(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        checkpoints.save(make_state(1))
        checkpoints.protect(1)
        for step in (2, 3, 4):
            checkpoints.save(make_state(step))
        assert checkpoints.steps() == [1, 3, 4]
        checkpoints.protect(3, 4)
        for step in (5, 6, 7):
            checkpoints.save(make_state(step))
        assert checkpoints.steps() == [3, 4, 6, 7]
    assert find_fault(tmp_path / "3") is None


def test_lost_digests_are_no_interrupted_first_save(tmp_path):
    """The only checkpoint of a run that has lost its digests: an error, not step 0."""
    save_all(tmp_path, [1, 2], max_to_keep=1)
    (tmp_path / "2" / "digests.json").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"none .* is sound \(steps 2.*to start from step 0"):
            restore(tmp_path)
    assert folders(tmp_path) == ["2"]


def test_saving_the_same_step_twice_saves_once(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        checkpoints.save(make_state(1))
        before = (tmp_path / "1" / "digests.json").stat().st_mtime_ns
        checkpoints.save(make_state(1))
        assert (tmp_path / "1" / "digests.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("step", [4, 5])
def test_never_overwrites_what_was_not_restored(tmp_path, step):
    save_all(tmp_path, [5])
    with (
        Checkpoints(tmp_path, max_to_keep=1) as checkpoints,
        pytest.raises(CheckpointError, match=rf"{tmp_path} already holds step 5, so step {step} is not"),
    ):
        checkpoints.save(make_state(step))
    assert int(restore(tmp_path).step) == 5


def test_one_flipped_bit_in_any_file_is_found(tmp_path):
    save_all(tmp_path, [1])
    folder = tmp_path / "1"
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(paths) > 8
    for path in paths:
        good = path.read_bytes()
        for position in (0, len(good) // 2, len(good) - 2):
            flip(path, position)
            fault = find_fault(folder)
            assert fault, path
            if path.name != "digests.json":
                assert fault.startswith(str(path.relative_to(folder)))
        path.write_bytes(good[: len(good) // 2])
        assert find_fault(folder), path
        path.unlink()
        assert "missing" in find_fault(folder), path
        path.write_bytes(good)
        assert find_fault(folder) is None


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_falls_back_to_the_newest_sound_checkpoint_and_says_why(tmp_path, caplog):
    save_all(tmp_path, [1, 2, 3, 4])
    damaged = largest_file(tmp_path / "3")
    flip(damaged)
    (tmp_path / "4" / "digests.json").unlink()
    with caplog.at_level(logging.WARNING, "absl"), Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        assert checkpoints.latest_step() == 4
        restored = checkpoints.restore(abstract(make_state(0)))
        assert_same_bits(restored, make_state(2))
        messages = [r.getMessage() for r in caplog.records if "is skipped" in r.getMessage()]
        assert messages[0].startswith(f"checkpoint {tmp_path / '4'} is not sound")
        assert "digests.json is missing" in messages[0]
        assert str(damaged.relative_to(tmp_path / "3")) in messages[1]
        assert len(messages) == 2
        # The damaged ones are out of the way but not lost, and their steps can be saved again.
        assert folders(tmp_path) == ["1", "2", "3.unsound", "4.unsound"]
        checkpoints.save(make_state(3))
        assert checkpoints.steps() == [2, 3]
    assert int(restore(tmp_path).step) == 3
    flip(largest_file(tmp_path / "3"))
    assert int(restore(tmp_path).step) == 2
    assert folders(tmp_path) == ["2", "3.unsound", "3.unsound-2", "4.unsound"]


def test_no_sound_checkpoint_is_an_error_and_not_a_restart(tmp_path):
    save_all(tmp_path, [1, 2])
    (tmp_path / "1" / "digests.json").write_text("{}")
    flip(largest_file(tmp_path / "2"))
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=rf"none .* in {tmp_path} is sound \(steps 1, 2.*delete that"
        ):
            restore(tmp_path)
    with pytest.raises(CheckpointError, match="is sound"):
        restore_params(tmp_path)
    assert find_steps(tmp_path) == [1, 2]


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        restore(tmp_path)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        restore_params(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_other_arrays_than_saved_are_listed(tmp_path):
    save_all(tmp_path, [1])
    state = make_state(0)
    params = {"stem": state.params["stem"], "head": dict(state.params["head"])}
    params["head"]["kernel"] = jnp.zeros((7, 3), jnp.float32)
    params["head"]["bias"] = jnp.zeros(4)
    params["mask"] = jnp.zeros(2)
    with (
        Checkpoints(tmp_path, max_to_keep=1) as checkpoints,
        pytest.raises(CheckpointError) as error,
    ):
        checkpoints.restore(state.replace(params=params))
    assert "params.head.bias: saved float32[3], wanted float32[4]" in str(error.value)
    assert "params.head.kernel: saved bfloat16[7, 3], wanted float32[7, 3]" in str(error.value)
    assert "params.mask: saved nothing, wanted float32[2]" in str(error.value)
    assert "stem" not in str(error.value)


def test_restores_params_alone_as_numpy(tmp_path):
    save_all(tmp_path, [1, 2, 3])
    flip(largest_file(tmp_path / "3"))
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    step, params = restore_params(tmp_path)
    assert step == 2
    assert_same_bits(params, jax.tree.map(np.asarray, make_state(2).params))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    step, params = restore_params(tmp_path, 1)
    assert step == 1
    assert_same_bits(params, jax.tree.map(np.asarray, make_state(1).params))
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; it has 1, 2, 3"):
        restore_params(tmp_path, 7)
    with pytest.raises(CheckpointError, match="not the file that was saved"):
        restore_params(tmp_path, 3)
    # Reading never tidies up: another process may be in the middle of a save.
    assert (tmp_path / "9.orbax-checkpoint-tmp").exists()
    assert find_steps(tmp_path) == [1, 2, 3]


KILLED_SAVE = """
    import os, pathlib, signal, sys
    import jax.numpy as jnp
    from klbox_jax.train import checkpoints
    from klbox_jax.train.state import TrainState

    directory, where = sys.argv[1:]
    run = checkpoints.Checkpoints(directory, max_to_keep=1)
    state = TrainState(jnp.int32(1), {"w": jnp.ones(3)}, {})
    run.save(state)

    def kill(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "before_the_digests":
        checkpoints.write_json = kill
    else:
        # Orbax finishes a save by renaming its temporary folder.
        os.rename = os.replace = pathlib.Path.rename = pathlib.Path.replace = kill
    run.save(state.replace(step=jnp.int32(2)))
"""


@pytest.mark.parametrize(
    ("where", "left"),
    [("before_the_digests", ["1", "2"]), ("before_the_rename", ["1", "2.orbax-checkpoint-tmp"])],
)
def test_a_killed_save_costs_only_itself(tmp_path, where, left):
    run_python("-c", KILLED_SAVE, tmp_path, where, status=-signal.SIGKILL)
    assert folders(tmp_path) == left
    state = TrainState(jnp.int32(0), {"w": jnp.zeros(3)}, {})
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        assert not list(tmp_path.glob("*tmp*"))
        state = checkpoints.restore(state)
        assert int(state.step) == 1
        np.testing.assert_array_equal(state.params["w"], np.ones(3))
        checkpoints.save(state.replace(step=jnp.int32(2)))
        assert checkpoints.steps() == [2]
    assert find_fault(tmp_path / "2") is None


def test_a_run_killed_inside_its_first_save_starts_from_step_0(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        checkpoints.save(make_state(1))
    (tmp_path / "1" / "digests.json").unlink()
    (tmp_path / ".saved_before").unlink()
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(make_state(1))
    assert find_fault(tmp_path / "1") is None
    # What was there is kept, under a name that no one restores.
    assert (tmp_path / "1.unsound").is_dir()
