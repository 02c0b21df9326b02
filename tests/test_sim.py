"""Reprise on the simulated accelerator, in processes of its own: ``pytest --device sim``.

Loading the device makes it torch's accelerator, so the tests of other devices stay apart from it.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import install_package

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "sim"
SHORT = {
    "1": (
        "sim/test_sim_device.py",
        "sim/test_sim_graphs.py",
        "sim/test_sim_races.py",
        "sim/test_sim_compiler.py",
    ),
    "2": ("sim/test_sim_engine.py", "platforms/test_device_graph.py"),
}
"""By seed of the delays. What takes no device is not delayed: one of the long runs has it, too."""
EVERYWHERE = (
    "sim", "platforms/test_device_graph.py", "graphs", "runner", "engine/test_engine.py",
    "engine/test_graph_executors.py", "engine/test_drafts.py", "engine/test_hybrids.py",
    "engine/test_states.py", "engine/test_rows.py", "engine/test_windows.py",
    "engine/test_metamorphic.py",
)  # fmt: skip
RUNS = [pytest.param(seed, files, id=seed) for seed, files in SHORT.items()] + [
    pytest.param(str(seed), EVERYWHERE, id=f"all-{seed}", marks=pytest.mark.long)
    for seed in range(1, 11)
]


@functools.cache
def missing() -> str | None:
    """Why the device cannot be made here."""
    done = python("from reprise_sim import missing; print(missing() or '')")
    return done.stdout.strip() or None


def environment(**more: str) -> dict[str, str]:
    paths = [str(PACKAGE), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in paths if each), **more}


def python(code: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(**more), capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as pip would leave it, with the package compiled."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    done = python("from reprise_sim import build; build.main()")
    assert done.returncode == 0, done.stderr
    made = tmp_path_factory.mktemp("site")
    install_package(PACKAGE, made)
    return made


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("seed", "files"), RUNS)
def test_reprise_on_the_device(site: Path, seed: str, files: tuple[str, ...]) -> None:
    further = ["--on-device"] if files is EVERYWHERE and seed != "1" else []
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--device", "sim",
        *(str(TESTS / each) for each in files), *further,
    ]  # fmt: skip
    variables = environment(SIM_SEED=seed)
    variables["PYTHONPATH"] = os.pathsep.join([str(site), variables["PYTHONPATH"]])
    done = subprocess.run(
        command, env=variables, cwd=TESTS.parent, capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 20


@pytest.mark.timeout(1800)
@pytest.mark.long  # it compiles all of it
def test_it_has_the_cpp_library_of_torch(tmp_path: Path) -> None:
    """Also from a compiler that puts one of its own into what it makes: numbers in messages were
    lost then, or the process."""
    if missing() is not None:
        pytest.skip(str(missing()))
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nexec c++ -static-libstdc++ -static-libgcc "$@"\n')
    compiler.chmod(0o755)
    code = (
        "import sys, torch; from pathlib import Path; from reprise_sim import build, load\n"
        f"build._directory = lambda: Path({str(tmp_path)!r}) / 'built'\n"
        "load()\n"
        "try: torch.empty(1 << 50, dtype=torch.int8, device='sim')\n"
        "except torch.OutOfMemoryError as error: print(error)\n"
    )
    done = python(code, CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    assert re.search(rf"on sim:0: {1 << 50} bytes are asked for, \d+ of \d+ are free", done.stdout)


def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    """Nothing is loaded then, and the tests above are skipped with the reason."""
    code = (
        "import sys; from reprise_sim import build, platform\n"
        "from pathlib import Path\n"
        "build._directory = lambda: Path(sys.argv[0]) / 'nowhere'\n"
        "print(platform.SimPlatform.unavailable_reason())\n"
        "build.main()\n"
        "import torch; print(torch._C._get_privateuse1_backend_name())\n"
    )
    done = python(code, PATH=str(tmp_path), CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    first, second, name = done.stdout.strip().splitlines()
    assert "no C++ compiler" in first
    assert second == f"{first}: tests of device sim will be skipped."
    assert name == "privateuseone"
