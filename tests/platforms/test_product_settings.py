"""What a program may set for its own products, and engines of the same bits must know."""

from __future__ import annotations

import pytest
import torch

from reprise.platforms.cpu import CpuPlatform
from reprise.platforms.cuda import CudaPlatform


@pytest.mark.parametrize(
    "name",
    [
        "allow_fp16_accumulation",
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
    ],
)
def test_settings_of_the_library_show(name: str) -> None:
    platform, matmul = CudaPlatform(), torch.backends.cuda.matmul
    plain, before = platform.product_settings(), getattr(matmul, name)
    assert hash(plain) == hash(platform.product_settings())
    setattr(matmul, name, not before)
    try:
        assert platform.product_settings() != plain
    finally:
        setattr(matmul, name, before)
    assert platform.product_settings() == plain


def test_the_library_itself_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = CudaPlatform()
    plain = platform.product_settings()
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda: "another")
    assert platform.product_settings() != plain


def test_elsewhere_nobody_knows() -> None:
    assert CpuPlatform().product_settings() is None
