import signal
import threading

from klbox_jax.errors import Preempted
from klbox_jax.train import preemption as preemption_module
from klbox_jax.train.preemption import SIGNALS, Preemption
from tests.programs import finish, free_address, start_python


def test_a_signal_is_recorded_and_the_handlers_are_restored():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Preemption() as preemption:
        assert preemption.signal() == 0
        signal.raise_signal(signal.SIGTERM)
        assert preemption.signal() == signal.SIGTERM
        # A second one would end the process.
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 2
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert Preempted(signal.SIGTERM, "here").status == 143
    assert Preempted(signal.SIGINT, "here").status == 130
    assert str(Preempted(signal.SIGINT, "here")) == "SIGINT: here"


def test_another_thread_receives_no_signal():
    received = []

    def listen():
        with Preemption() as preemption:
            received.append(preemption.signal())

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert received == [0]


def test_several_processes_answer_one_question_later(monkeypatch):
    """The signal of each process goes to the devices; their maximum comes back with the next call."""
    asked = []
    monkeypatch.setattr(preemption_module.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        preemption_module,
        "_largest",
        lambda number: asked.append(number) or max(number, 2 * (len(asked) == 2)),
    )
    with Preemption() as preemption:
        # The other process hears SIGINT, 2, before the second question.
        assert [preemption.signal() for _ in range(3)] == [0, 0, 2]
    assert asked == [0, 0, 0]


def test_the_largest_number_of_all_devices():
    assert int(preemption_module._largest(15)) == 15


PROCESS = """
    import time
    from klbox_jax.train.preemption import Preemption

    with Preemption() as preemption:
        print("ready", flush=True)
        while not preemption.signal():
            time.sleep(0.01)
        print("signal", preemption.signal(), flush=True)
        time.sleep(60)
"""


def test_a_second_signal_kills_at_once():
    process = start_python("-c", PROCESS)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == f"signal {int(signal.SIGTERM)}\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == -signal.SIGTERM
        assert "SIGTERM: stopping as soon as nothing is lost" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


TOGETHER = """
    import signal
    import jax
    from klbox_jax import distributed
    from klbox_jax.train.preemption import Preemption

    distributed.initialize()
    with Preemption() as preemption:
        for step in range(1, 100):
            if step == 3 and jax.process_index() == 1:
                signal.raise_signal(signal.SIGTERM)
            if number := preemption.signal():
                print("stopped", step, number)
                break
"""


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step():
    variables = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
    processes = [start_python("-c", TOGETHER, **variables, JAX_PROCESS_ID=str(rank)) for rank in range(2)]
    outputs = finish(*processes, timeout=120)
    for output, errors in outputs:
        # The question of step 3 is answered in step 4.
        assert output.splitlines()[-1] == f"stopped 4 {int(signal.SIGTERM)}", errors
