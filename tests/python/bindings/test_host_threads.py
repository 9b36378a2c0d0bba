"""Calls share the threads of PyTorch's OpenMP runtime, where that is safe."""

import pytest

from .forks import run_with_forks

pytest.importorskip("torch")

PRELUDE = """
    import time
    from pathlib import Path
    import numpy as np
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 300, 4, 64) for _ in range(3))


    def busy():
        # Large enough for PyTorch to start its threads.
        torch.randn(512, 512) @ torch.randn(512, 512)
        torch.randn(1 << 20).exp_()


    def own_threads():
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        return sum(name.startswith("subquad-") for name in names)


    def come_to(count):
        # A thread gets its name once it runs.
        end = time.monotonic() + 20
        while own_threads() != count and time.monotonic() < end:
            time.sleep(0.01)
        return own_threads() == count
"""


@pytest.fixture
def run(run_python):
    """Runs code after `PRELUDE`."""
    return lambda code: run_with_forks(run_python, PRELUDE, code)


def test_no_threads_beside_those_of_torch(run):
    code = """
        import subquad
        expected = subquad.attention(q, k, v, causal=True)
        assert own_threads() == 0
        # Any other number than that of PyTorch takes threads of our own, and gives the same.
        subquad.set_num_threads(3)
        assert torch.equal(subquad.attention(q, k, v, causal=True), expected)
        assert come_to(2)
        subquad.set_num_threads(1)
        assert torch.equal(subquad.attention(q, k, v, causal=True), expected)
        print("fine")
    """
    assert run(code) == "fine\n"


def test_numpy_without_torch_has_threads_of_its_own(run_python):
    code = """
        import time
        from pathlib import Path
        import numpy as np
        import subquad
        subquad.set_num_threads(2)
        q = np.ones((2, 300, 4, 64), np.float32)
        subquad.attention(q, q, q)
        time.sleep(0.5)  # A thread gets its name once it runs.
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        print(sum(name.startswith("subquad-") for name in names))
    """
    assert run_python(code) == "1\n"


def test_threads_of_python_have_teams_of_their_own(run):
    code = """
        import threading
        import subquad
        expected = subquad.attention(q, k, v, causal=True)
        wrong = []

        def work():
            for _ in range(20):
                busy()
                if not torch.equal(subquad.attention(q, k, v, causal=True), expected):
                    wrong.append(True)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert own_threads() == 0
        print("fine")
    """
    assert run(code) == "fine\n"


def test_a_fork_leaves_the_team_of_its_parent_alone(run):
    code = """
        import subquad
        busy()
        expected = subquad.attention(q, k, v, causal=True)

        def right():
            # With NumPy: the runtime of a child believes in threads that only the parent has, so that operators of
            # PyTorch may wait for ever there.
            return np.array_equal(subquad.attention(q, k, v, causal=True).numpy(), expected.numpy())

        assert in_child(lambda: right() and come_to(1))
        assert in_child(lambda: in_child(right) and right())
        assert right()
        assert own_threads() == 0
        print("fine")
    """
    assert run(code) == "fine\n"


def test_a_fork_that_imports_first_leaves_the_team_of_its_parent_alone(run):
    code = """
        busy()

        def work():
            import subquad
            out = subquad.attention(q, k, v)
            return bool(np.isfinite(out.numpy()).all()) and come_to(1)

        assert in_child(work)
        print("fine")
    """
    assert run(code) == "fine\n"
