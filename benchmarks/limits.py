"""How near to what this machine can do: python benchmarks/limits.py [CASE ...].

For each case one line of JSON, from runs in this process with one thread (with `THREADS`, if it is set). First what is
attainable is measured in the same run: the rate of a large matrix product (`gemm_gflops`), of memory larger than the
caches that is read and written (`memory_read_gib_s`, `memory_write_gib_s`), and of files written and synced
(`write_mib_s`). `limit_seconds` of a stage is what its fewest floating-point operations take, or the fewest bytes that
it must move, if these take longer: the best program does both at once. They are:

    gradients      one pass forward and one backward, to the outputs of the layers; right rows are written to memory
    rows           of coordinates: the projection, a product with a matrix (P, k); of the others nothing. What is formed
                   of a gradient on the way need not leave the caches
    scores         2 k for each pair of samples, k the numbers of a row (P where it is dense or factored); right and
                   left rows are read, and scores written
    writing        the scores, to a disk

`seconds` are those in tasks, `ratio` is the limit over them: one is as good as it can get. `seconds_by_part` says where
the time goes. Of `REPEATS` runs the fastest counts; the rates are the best before and after it.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from outfluence import (
    ArnoldiInfluence,
    EkfacInfluence,
    SequentialInfluenceCalculator,
    Store,
)
from outfluence.machine import float32_products

REPEATS, THREADS = 3, int(os.environ.get("THREADS", "1"))
WIDTHS = (64, 256, 256, 64, 10)


class Opaque(nn.Module):
    """A network whose layers cannot be told: its gradients are dense."""

    def __init__(self, *widths):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(a, b) / a**0.5 for a, b in itertools.pairwise(widths))

    def forward(self, x):
        """Scores of classes, ``(n, 10)``."""
        for weight in self.weights:
            x = torch.tanh(torch.einsum("ni,io->no", x, weight))
        return x


def mlp(*widths):
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def samples(n):
    return torch.randn(n, WIDTHS[0]), torch.randint(0, WIDTHS[-1], (n,))


def ekfac(**options):
    return EkfacInfluence(mlp(*WIDTHS), True, 1e-4, **options)


def arnoldi(model):
    return ArnoldiInfluence(
        model, nn.functional.cross_entropy, 1e-3, rank=100, second_order_mode="gauss_newton", tol=1e-1
    )


#: By name: the method, training and test samples, and whether left rows are dense factors that are given.
CASES = {
    "factored rows": (ekfac, 5_000, 500, False),
    "dense factors": (ekfac, 5_000, 500, True),
    "dense rows": (lambda: arnoldi(Opaque(*WIDTHS)), 5_000, 500, True),
    "coordinate rows": (lambda: arnoldi(mlp(*WIDTHS)), 20_000, 2_000, False),
    "coordinates and constants": (lambda: ekfac(tolerance=0.015), 5_000, 500, False),
}


def best(function):
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return min(taken)


def attainable(folder):
    """FLOPs a second of a matrix product, bytes a second from memory, into memory, and to a file."""
    left, right, out = torch.randn(512, 8192), torch.randn(1024, 8192), torch.empty(512, 1024)
    product = partial(torch.matmul, left, right.T, out=out)
    seconds = best(product)
    with float32_products(torch.device("cpu")):
        seconds = min(seconds, best(product))
    flops = 2 * 512 * 1024 * 8192 / seconds
    large = torch.zeros(64 << 20)
    read = large.nbytes / min(best(large.sum), best(partial(torch.dot, large, large)))
    written = large.nbytes / min(best(large.zero_), best(partial(large.fill_, 1.0)))
    content = os.urandom(32 << 20)

    def write():
        with (folder / "bytes").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    return flops, read, written, len(content) / best(write)


def run(case, folder):
    make, n_train, n_test, given = CASES[case]
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    train, test = samples(n_train), samples(n_test)
    influence = make().fit((train[0][:500], train[1][:500]))
    calculator = SequentialInfluenceCalculator(influence)
    factors = influence.influence_factors(*test) if given else None
    rates, taken = [attainable(folder)], []
    for i in range(REPEATS):
        path = folder / f"{i}.zarr"
        lazy = calculator.influences_from_factors(factors, train) if given else calculator.influences(test, train)
        lazy.to_zarr(path)
        receipts, parts = Store(path).receipts("scores"), {}
        for receipt in receipts:
            for part, value in receipt["seconds_by_part"].items():
                parts[part] = parts.get(part, 0.0) + value
        taken.append((sum(receipt["seconds"] for receipt in receipts), parts))
    rates.append(attainable(folder))
    gemm, from_memory, into_memory, write = (max(rate) for rate in zip(*rates, strict=True))
    seconds, parts = min(taken, key=lambda pair: pair[0])
    size, work = influence.n_parameters, lazy.plan.work
    width, is_projected = work.arrays.get("coordinates", size), isinstance(influence, ArnoldiInfluence) and not given
    right, left, scores = n_train * work.right_bytes, n_test * work.row_bytes, 4 * n_train * n_test
    flops_and_memory = {
        "gradients": (4 * size * n_train, right / into_memory),
        "rows": (2 * size * width * n_train * is_projected, 4 * size * width * is_projected / from_memory),
        "scores": (2 * width * n_train * n_test, (right + left) / from_memory + scores / into_memory),
    }
    limits = {name: max(flops / gemm, memory) for name, (flops, memory) in flops_and_memory.items()}
    limits["writing"] = scores / write
    limit = sum(limits.values())
    return {
        "case": case,
        "parameters": size,
        "numbers_a_row": width,
        "n_train": n_train,
        "n_test": n_test,
        "threads": THREADS,
        "gemm_gflops": round(gemm / 1e9, 1),
        "memory_read_gib_s": round(from_memory / 2**30, 1),
        "memory_write_gib_s": round(into_memory / 2**30, 1),
        "write_mib_s": round(write / 2**20),
        "limit_seconds": {name: round(value, 3) for name, value in limits.items()},
        "seconds": round(seconds, 3),
        "ratio": round(limit / seconds, 2),
        "seconds_by_part": {name: round(value, 3) for name, value in parts.items()},
    }


def main():
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: importlib.metadata.version(name) for name in ("outfluence", "torch", "zarr")},
        "python": platform.python_version(),
        "repeats": REPEATS,
    }
    for case in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(case, Path(folder)) | about), flush=True)


if __name__ == "__main__":
    main()
