"""The command's process: it ends at once, and as other programs of Python do."""

from __future__ import annotations

import os
import subprocess
import sys
import time

GENERATE = ("generate", "47 + 38 =", "-n", "2", "-q", "--device", "cpu", "--num-blocks", "160")


def test_it_ends_when_the_last_token_is_out():
    def share_of_the_end() -> float:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "reprise", *GENERATE], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        last = began
        while os.read(process.stdout.fileno(), 4096):
            last = time.perf_counter()
        assert process.wait() == 0
        return (time.perf_counter() - last) / (last - began)

    # Freeing what the imports have made takes about a fifth of the time that making it takes, each
    # time; a busy machine may be late at the end of a few.
    assert any(share_of_the_end() < 0.08 for _ in range(12))


def test_exit_handlers_run_and_the_status_is_kept():
    program = (
        "import atexit, sys, threading\n"
        "atexit.register(print, 'exit handler')\n"
        "def late(): threading.main_thread().join(); print('thread')\n"
        "threading.Thread(target=late).start()\n"
        "from reprise.cli import main\n"
        "sys.argv = ['reprise', *sys.argv[1:]]\n"
        "main()"
    )
    for arguments, status in ((("--version",), 0), (("generate", "--nonsense"), 2)):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True
        )
        assert done.returncode == status
        assert done.stdout.splitlines()[-2:] == ["thread", "exit handler"]
