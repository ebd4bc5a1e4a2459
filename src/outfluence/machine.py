"""What is asked of the machine: products of float32 matrices with all that a processor has, and memory that is kept."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Blocks of memory up to so many bytes stay with the process when they are freed; larger ones go back to the system.
KEPT_BYTES = 8 << 20
#: Largest relative error of a product that counts as one of float32. Of bfloat16 it would be some 3e-3.
_FLOAT32 = 1e-5
#: Parameters of glibc's mallopt. Setting them ends their growth with the sizes that are freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
#: Bytes that torch's memory begins at a multiple of.
_ALIGNED = 64


@cache
def keep_memory() -> None:
    """Let the C library keep memory that is freed, where it has that choice (glibc).

    It would give all that is larger than 128 KiB back at once, and take new pages for it the next time: these cost more
    than most of what is done in them.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, 64 << 20)
        # Larger blocks would leave gaps that cannot be given back. A little is the library's own.
        libc.mallopt(_MMAP_THRESHOLD, KEPT_BYTES + 4096)


def new_memory(like: Tensor, *shape: int) -> Tensor:
    """As ``like.new_empty``, for what is large, and filled once.

    It is numpy's memory where it is the processor's: numpy asks Linux for large pages, which are filled seven times as
    fast. As aligned as torch's own: else matrix products would differ in the last bits.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    size = math.prod(shape) * like.element_size()
    memory = torch.from_numpy(np.empty(size + _ALIGNED, np.uint8))
    start = -memory.data_ptr() % _ALIGNED
    return memory[start : start + size].view(like.dtype).view(shape)


def precision_asked() -> str:
    """What the user has told `torch.set_float32_matmul_precision`: "highest" (the default), "high" or "medium".

    "" if torch cannot tell, because it was told by each backend.
    """
    with _LOCK:
        if _inside:
            return _inside[0][0]
        with suppress(RuntimeError):
            return torch.get_float32_matmul_precision()
        return ""


@contextmanager
def float32_products(device: torch.device | None, asked: str | None = None) -> Iterator[None]:
    """Compute products of float32 matrices in a precision; afterwards as before.

    torch leaves them to MKL, which does not use the AVX-512 of processors made by AMD. oneDNN does, and is asked for
    them by "medium", which allows it to round to bfloat16; it does so only where a processor has units for that (AMX).
    Where there are none a product takes half the time, with an error of float32: "highest" is what it says. Whether
    that is so is tried once in a process.

    Args:
        device: where; None: as it is asked for, and no faster.
        asked: see `precision_asked`; None: as it is here.
    """
    before = precision_asked()
    target = asked or before
    if target == "highest" and device is not None and device.type == "cpu" and _is_onednn_exact():
        target = "medium"
    by_onednn = target != (asked or before)
    if not before or (_inside and asked is None) or (not _inside and target == before):
        yield
        return
    with _LOCK:
        _inside.append((before, _of_backends(), by_onednn))
        torch.set_float32_matmul_precision(target)
    try:
        yield
    finally:
        with _LOCK:
            was, of_backends, _ = _inside.pop()
            if not _inside:  # the last of several threads: as it was before the first
                torch.set_float32_matmul_precision(was)
                for backend, precision in of_backends:
                    backend.fp32_precision = precision


@contextmanager
def batched_products() -> Iterator[None]:
    """Leave products to MKL, where `float32_products` asks oneDNN for them: such of many small matrices with one.

    oneDNN copies the one for each of the others, and takes twice as long.
    """
    with _LOCK:
        is_inside = bool(_inside) and all(by_onednn for *_, by_onednn in _inside)
        if is_inside:
            torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        with _LOCK:
            if is_inside and _inside:
                torch.set_float32_matmul_precision("medium")


#: What was set before, for each that is inside of `float32_products`, the first entry before any was; and whether it
#: is so that oneDNN computes them.
_inside: list[tuple[str, list[tuple[Any, str]], bool]] = []
_LOCK = threading.RLock()


def _of_backends() -> list[tuple[Any, str]]:
    """What newer versions of torch keep for each backend, and the function that sets all of them overwrites."""
    if _inside:
        return _inside[0][1]
    found: list[Any] = [getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn)]
    return [(backend, backend.fp32_precision) for backend in found if hasattr(backend, "fp32_precision")]


@cache
def _is_onednn_exact() -> bool:
    """Whether products are faster by "medium" than by "highest", and as exact: on AMD with AVX-512, after a trial."""
    processor = ""
    with suppress(OSError):
        processor = Path("/proc/cpuinfo").read_text()
    if "AuthenticAMD" not in processor or "avx512" not in processor:
        return False
    before, of_backends = torch.get_float32_matmul_precision(), _of_backends()
    torch.set_float32_matmul_precision("medium")
    try:
        return all(_error(*shape) < _FLOAT32 for shape in ((64, 64, 64), (16, 48, 4096), (256, 300, 128)))
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, precision in of_backends:
            backend.fp32_precision = precision


def _error(m: int, n: int, k: int) -> float:
    """The largest relative error of products of matrices ``(m, k)`` and ``(k, n)``, of one and of several."""
    options = {"dtype": torch.float32, "device": "cpu"}
    a, b = (torch.arange(1.0, size + 1, **options).sin() for size in (m * k, k * n))  # type: ignore[call-overload]
    a, b = a.view(m, k), b.view(n, k).T
    exact, zeros = a.double() @ b.double(), a.new_zeros(m, n)
    results = [a @ b, torch.addmm(zeros, a, b), torch.bmm(a.expand(3, m, k), b.expand(3, k, n))[2]]
    return max(float((result - exact).norm() / exact.norm()) for result in results)
