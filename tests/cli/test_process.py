"""The command's process: it ends at once, and as other programs of Python do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reprise.processes.child import Child

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


@pytest.mark.cold
def test_ctrl_c_while_torch_is_imported_ends_the_command(tmp_path: Path) -> None:
    """torch imports numpy in C++, where what is raised is lost: a command went on and broke
    seconds later."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    os._exit(7)\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "reprise", "generate", "hi"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")


def test_ctrl_c_is_no_business_of_a_child_that_still_imports() -> None:
    """A terminal tells all processes at once: children printed tracebacks of their imports."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    program = (
        "import os, signal\n"
        "for number in (signal.SIGINT, signal.SIGTERM): os.kill(os.getpid(), number)\n"
        "from reprise.processes.child import leave_signals_to_parent\n"
        "leave_signals_to_parent()\n"
        "for number in (signal.SIGINT, signal.SIGTERM): os.kill(os.getpid(), number)\n"
        "os._exit(7 if not signal.pthread_sigmask(signal.SIG_BLOCK, []) else 8)\n"
    )
    child = Child("a child", ["-c", program], "")
    assert child.end(60) == 7
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
