"""What products in a lower precision do to scores: python benchmarks/precision.py.

A network of 99,530 parameters is trained on real digits (8 x 8), in float32; for each method, 500 test and 5,000
training samples. One line of JSON for each method and precision:

    as it is                products as `torch.get_float32_matmul_precision()` "highest" gives them here
    tf32, bfloat16, float16 the operands of every matrix product (of the model, its gradients, the fit and the scores)
                            rounded to that type, and added up in float32: what "high" and "medium" do on processors
                            that have units for it, whatever this one has. Rounded here, so it tells nothing about speed
    tf32, rows only         and so on: the fit in float32, gradients and scores rounded

`error` is the root mean square of the difference from the scores in float64, relative to that of the scores;
`spearman` the mean over test samples of the rank correlation with them; `top` how many of the ten highest scores of a
test sample are among those in float64.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import platform
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from outfluence import ArnoldiInfluence, EkfacInfluence
from peers import class_loss, load_model, prepare, spearman

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv"}
METHODS = {
    "ekfac": lambda model, damping: EkfacInfluence(model, True, damping),
    "arnoldi": lambda model, damping: ArnoldiInfluence(
        model, class_loss, damping, rank=50, tol=1e-2, second_order_mode="gauss_newton"
    ),
}


def to_tf32(tensor):
    """To a mantissa of ten bits, to the nearest."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


ROUND = {"tf32": to_tf32, "bfloat16": lambda t: t.bfloat16().float(), "float16": lambda t: t.half().float()}


class Rounded(TorchDispatchMode):
    """Rounds the operands of matrix products."""

    def __init__(self, to):
        super().__init__()
        self._to = ROUND[to]

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        """See `TorchDispatchMode`."""
        if func._schema.name in PRODUCTS:
            last = len(args) - 2
            args = [self._to(a) if i >= last and a.dtype == torch.float32 else a for i, a in enumerate(args)]
        return func(*args, **(kwargs or {}))


def scores(influence, data):
    return influence.influences(data["x_test"], data["y_test"], data["x"], data["y"])


def main():
    case = "MLP 100k"
    about = {
        "case": case,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: importlib.metadata.version(name) for name in ("outfluence", "torch")},
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory() as folder:
        prepare(case, Path(folder))
        data, model = torch.load(Path(folder) / "data.pt"), load_model(case, Path(folder))
        damping = json.loads((Path(folder) / "regularization.json").read_text())
    train = data["x"], data["y"]
    doubles = {name: t.double() if t.is_floating_point() else t for name, t in data.items()}
    for method, make in METHODS.items():
        wide = make(copy.deepcopy(model).double(), damping).fit((doubles["x"], doubles["y"]))
        exact, plain = scores(wide, doubles), make(model, damping).fit(train)
        best = exact.topk(10).indices
        for precision in ("as it is", *ROUND, *(f"{name}, rows only" for name in ROUND)):
            name, _, part = precision.partition(", ")
            with Rounded(name) if name in ROUND else nullcontext():
                fitted = plain if part or name not in ROUND else make(model, damping).fit(train)
                found = scores(fitted, data).double()
            same = [len({*a.tolist()} & {*b.tolist()}) for a, b in zip(found.topk(10).indices, best, strict=True)]
            line = {
                "method": method,
                "precision": precision,
                "error": float(f"{((found - exact).norm() / exact.norm()).item():.2e}"),
                "spearman": spearman(found.numpy(), exact.numpy()),
                "top": round(sum(same) / len(same), 2),
                "n_train": len(found[0]),
                "n_test": len(found),
            }
            print(json.dumps(line | about), flush=True)


if __name__ == "__main__":
    main()
