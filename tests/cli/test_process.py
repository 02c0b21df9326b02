"""The command's process: it ends at once, and as other programs of Python do."""

from __future__ import annotations

import subprocess
import sys

GENERATE = (
    "generate", "47 + 38 =", "--temperature", "0", "-n", "2", "-q", "--device", "cpu",
    "--num-blocks", "160",
)  # fmt: skip


WITNESS = """
import os, sys
class Witness:
    def __del__(self, write=os.write):
        write(1, b"freed")
witness = Witness()
"""


def test_it_ends_when_the_last_token_is_out():
    """Freeing what the imports have made takes about a fifth of the time that making it takes: no
    object is freed, whereas Python alone frees them all."""
    command = "sys.argv[0] = 'reprise'\nfrom reprise.cli import main\nmain()"
    said = [
        subprocess.run(
            [sys.executable, "-c", WITNESS + rest, *GENERATE], capture_output=True, text=True
        )
        for rest in ("", command)
    ]
    assert [each.returncode for each in said] == [0, 0], said[1].stderr
    assert said[0].stdout == "freed"
    assert said[1].stdout.strip().isdigit()


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
