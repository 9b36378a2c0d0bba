"""The GIL, calls from many threads, and processes that fork."""

import threading
import time

import numpy as np
import pytest

import subquad

from .forks import run_with_forks


def test_the_gil_is_released(keep_num_threads, draw):
    # One thread computes; meanwhile this one has to get its turns. With the GIL held it would get none.
    subquad.set_num_threads(1)
    q = draw("float32", 1, 3000, 4, 64)
    times = []

    def compute():
        start = time.perf_counter()
        subquad.attention(q, q, q)
        times.extend((start, time.perf_counter()))

    thread = threading.Thread(target=compute)
    ticks = []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.0005)
    thread.join()
    start, end = times
    during = [tick for tick in ticks if start < tick < end]
    assert end - start > 0.01, "too short to tell"
    assert len(during) >= 5
    # Turns at both ends only would be those before the call took the GIL and after it gave it back.
    middle = (end - start) / 4
    assert any(start + middle < tick < end - middle for tick in during)


@pytest.mark.parametrize("inner", [1, 3])
def test_concurrent_calls_are_right(inner, keep_num_threads, dtype, draw):
    subquad.set_num_threads(inner)
    inputs = [
        (draw(dtype, 1, 60 + i, 2, 32), draw(dtype, 1, 90 - i, 2, 32), draw(dtype, 1, 90 - i, 2, 16))
        for i in range(4)
    ]
    expected = [subquad.attention(*arrays, causal=True) for arrays in inputs]
    failures = []
    ready = threading.Barrier(len(inputs))

    def work(arrays, result):
        try:
            ready.wait()
            for _ in range(20):
                np.testing.assert_array_equal(subquad.attention(*arrays, causal=True), result)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_number_of_threads_may_change_during_calls(keep_num_threads, draw):
    q, k = draw("float32", 1, 200, 2, 64), draw("float32", 1, 300, 2, 64)
    subquad.set_num_threads(1)
    expected = subquad.attention(q, k, k)
    done = threading.Event()

    def change():
        for i in range(300):
            subquad.set_num_threads(1 + i % 5)
        done.set()

    thread = threading.Thread(target=change)
    thread.start()
    while not done.is_set():
        np.testing.assert_array_equal(subquad.attention(q, k, k), expected)
    thread.join()


PRELUDE = """
    import numpy as np
    import subquad

    subquad.set_num_threads(3)
    generator = np.random.default_rng(0)
    q, k, v = (generator.standard_normal((2, 300, 4, 64)).astype(np.float32) for _ in range(3))
    expected = subquad.attention(q, k, v, causal=True)


    def right():
        return np.array_equal(subquad.attention(q, k, v, causal=True), expected)
"""


def run_fork(run_python, code):
    """Runs `code` after `PRELUDE`."""
    return run_with_forks(run_python, PRELUDE, code)


def test_fork_after_use(run_python):
    code = """
        assert in_child(right)
        assert right()
        # A child has children, and its own number of threads.
        assert in_child(lambda: in_child(right) and right())
        def other():
            subquad.set_num_threads(2)
            return right() and in_child(right)
        assert in_child(other)
        assert right()
        print("fine")
    """
    assert run_fork(run_python, code) == "fine\n"


def test_fork_while_another_thread_computes(run_python):
    code = """
        import threading
        done = threading.Event()
        wrong = []
        def compute():
            while not done.is_set():
                if not right():
                    wrong.append(True)
        thread = threading.Thread(target=compute)
        thread.start()
        results = [in_child(right) for _ in range(5)]
        done.set()
        thread.join()
        assert all(results) and not wrong
        print("fine")
    """
    assert run_fork(run_python, code) == "fine\n"


def test_multiprocessing_fork(run_python):
    code = """
        import multiprocessing
        with multiprocessing.get_context("fork").Pool(2) as pool:
            results = [pool.apply_async(right) for _ in range(4)]
            assert all(result.get(timeout=60) for result in results)
        print("fine")
    """
    assert run_fork(run_python, code) == "fine\n"


def test_workers_of_a_data_loader(run_python):
    code = """
        import torch

        class Items(torch.utils.data.Dataset):
            def __len__(self):
                return 8
            def __getitem__(self, index):
                x = torch.from_numpy(q[:1] + index)
                return subquad.attention(x, x, x)[0]

        # In the parent as well, before and after the workers.
        expected = [Items()[i] for i in range(8)]
        options = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 60}
        got = [item[0] for item in torch.utils.data.DataLoader(Items(), **options)]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert torch.equal(Items()[3], expected[3])
        print("fine")
    """
    assert run_fork(run_python, code) == "fine\n"


def test_the_interpreter_ends_while_threads_wait(run_python):
    assert run_fork(run_python, "print(right())") == "True\n"
