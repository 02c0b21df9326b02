"""Modules in C of one name, as Triton's launchers are, do not become each other."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

NAME = "launcher_of_a_test"
SOURCE = """
#include <Python.h>
static PyObject* number(PyObject* self, PyObject* args) { return PyLong_FromLong(%d); }
static PyMethodDef methods[] = {{"number", number, METH_VARARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "launcher_of_a_test", NULL, -1, methods};
PyMODINIT_FUNC PyInit_launcher_of_a_test(void) { return PyModule_Create(&module); }
"""


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three such modules; their ``number()`` is their place."""
    pytest.importorskip("triton")
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        pytest.skip("no compiler")
    from triton.runtime.build import _build

    found = []
    for number in range(3):
        place = tmp_path / str(number)
        place.mkdir()
        (place / "main.c").write_text(SOURCE % number)
        found.append(_build(NAME, str(place / "main.c"), str(place), [], [], [], []))
    return found


def load(path: str) -> ModuleType:
    from triton.runtime import build

    from reprise.ops.launchers import load_apart

    load_apart()
    load_apart()
    return build._load_module_from_path(NAME, path)


def test_a_module_that_is_loaded_again_is_itself(files: list[str]) -> None:
    for _ in range(2):
        modules = [load(each) for each in files]
        assert [each.number() for each in modules] == [0, 1, 2]


def test_threads_load_modules_side_by_side(files: list[str]) -> None:
    def many(number: int) -> set[int]:
        return {load(files[number]).number() for _ in range(300)}

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(many, range(3))) == [{0}, {1}, {2}]
    finally:
        sys.setswitchinterval(interval)
