"""Run the commands of docs/why.md, as ``make why`` does: each with a title line, all of them.

Code blocks marked ``console`` hold commands behind ``$``. Those marked ``console device`` are for
accelerators: they are named and left out where there is none.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "why.md"
_BLOCK = re.compile(r"^```console( device)?\n(.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class Command:
    """One line of the page."""

    arguments: tuple[str, ...]
    needs_device: bool

    @property
    def expects_failure(self) -> bool:
        """``!`` before a command, as in a shell: it shows a fault and has to find it."""
        return self.arguments[0] == "!"

    @property
    def argv(self) -> list[str]:
        """What to start, with this interpreter and the package that it imports."""
        program, *rest = self.arguments[1:] if self.expects_failure else self.arguments
        known = {"reprise": [sys.executable, "-m", "reprise"], "python": [sys.executable]}
        if program not in known:
            raise ValueError(f"{PAGE.name}: {program!r} is neither reprise nor python")
        return [*known[program], *rest]

    def __str__(self) -> str:
        return shlex.join(self.arguments).replace("'!'", "!")


def commands(text: str) -> list[Command]:
    """All commands of a page, in its order."""
    found = []
    for device, block in _BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith("$ "):
                raise ValueError(
                    f"{line!r}: every line of a console block is a command behind '$ '"
                )
            found.append(Command(tuple(shlex.split(line[2:], comments=True)), bool(device)))
    return found


def main() -> int:
    from reprise import platforms

    has_device = platforms.resolve("auto").asynchronous
    failed = []
    began = time.perf_counter()
    for each in commands(PAGE.read_text(encoding="utf-8")):
        print(f"\n=== {each}", flush=True)
        if each.needs_device and not has_device:
            print("left out: it needs an accelerator")
            continue
        started = time.perf_counter()
        status = subprocess.run(each.argv, cwd=PAGE.parent.parent, env=os.environ).returncode
        right = status == (1 if each.expects_failure else 0)
        print(f"--- {time.perf_counter() - started:.1f} s, exit status {status}", flush=True)
        if not right:
            failed.append(str(each))
    print(f"\n{time.perf_counter() - began:.0f} s; " + ("failed:" if failed else "all as told"))
    for each in failed:
        print(f"  {each}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
