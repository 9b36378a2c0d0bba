"""flash-linear-attention itself on the CPU: its layers, models and names, in a process that finds it."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent / "package"


def test_everything_in_the_package_folder_passes(packages):
    path = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(TESTS)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
