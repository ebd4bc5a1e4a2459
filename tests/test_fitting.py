"""A fit by tasks equals the fit in memory, keeps to its memory, is kept, loaded, and goes on where it stopped."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from torch import nn

from cases import make_case
from outfluence import (
    ArnoldiInfluence,
    CgInfluence,
    DaskInfluenceCalculator,
    Data,
    DirectInfluence,
    EkfacInfluence,
    EkfacPreconditioner,
    EnsembleInfluence,
    InverseHarmonicMeanInfluence,
    JacobiPreconditioner,
    LissaInfluence,
    NystroemPreconditioner,
    NystroemSketchInfluence,
    ProjectedInfluence,
    SequentialInfluenceCalculator,
    Store,
    open_history,
)
from outfluence.errors import (
    ConvergenceWarning,
    Interrupted,
    PlanError,
    ProblemError,
    RunError,
    StoreError,
    StoreMismatchError,
)


def methods(case):
    model, loss, options = case.model, case.loss, {"second_order_mode": "gauss_newton"}
    cg = {"rtol": 1e-12, "atol": 0.0, **options}
    unfitted = EkfacInfluence(model, True, 0.05, fisher="exact")
    return {
        "hessian": DirectInfluence(model, loss, 0.3),
        "direct": DirectInfluence(model, loss, 0.05, "layer_wise", **options),
        "empirical fisher": DirectInfluence(model, loss, 0.05, second_order_mode="empirical_fisher"),
        "cg": CgInfluence(model, loss, 0.05, **cg),
        "cg jacobi": CgInfluence(model, loss, 0.05, **cg, preconditioner=JacobiPreconditioner()),
        "cg nystroem": CgInfluence(model, loss, 0.05, **cg, preconditioner=NystroemPreconditioner(5)),
        "cg ekfac": CgInfluence(model, loss, 0.05, **cg, preconditioner=EkfacPreconditioner(unfitted)),
        "lissa": LissaInfluence(model, loss, 0.5, maxiter=5000, rtol=1e-11, scale=2.0, **options),
        "harmonic": InverseHarmonicMeanInfluence(model, loss, 0.05),
        "arnoldi": ArnoldiInfluence(model, loss, 0.05, rank=5, tol=1e-12, **options),
        "woodbury": ArnoldiInfluence(model, loss, 0.05, rank=5, tol=1e-12, use_woodbury=True, **options),
        "nystroem": NystroemSketchInfluence(model, loss, 0.05, 5, **options),
        "kfac": EkfacInfluence(model, False, 0.05),
        "ekfac": EkfacInfluence(model, True, 0.05, fisher="exact"),
        "pca": ProjectedInfluence(model, loss, 0.05, rank=15, projection="pca"),
        "sjlt": ProjectedInfluence(model, loss, 0.05, rank=15, projection="sjlt", kernel="empirical"),
        "ensemble": EnsembleInfluence(
            [
                EkfacInfluence(copy.deepcopy(model), True, 0.05, seed=3),
                ProjectedInfluence(copy.deepcopy(model), loss, 0.05, rank=15),
                DirectInfluence(model, loss, 0.3),
            ]
        ),
        "ekfac sampled": EkfacInfluence(model, True, 0.05, seed=3),
    }


NAMES = list(methods(make_case("mlp")))


def close(a, b, tolerance=1e-8):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


ON_DASK = ["hessian", "cg ekfac", "arnoldi", "nystroem", "ekfac", "ensemble"]


@pytest.mark.parametrize(("name", "on_dask"), [(n, False) for n in NAMES] + [(n, True) for n in ON_DASK])
def test_a_fit_by_tasks_equals_the_fit_in_memory(name, on_dask, client, tmp_path):
    case = make_case("mlp")
    expected = methods(case)[name].fit(case.train).influences(*case.test, *case.train)
    model, train = methods(case)[name], Data.of(case.train).in_batches(5)  # 5 + 5 + 5 + 5 + 4
    calculator = DaskInfluenceCalculator(model, client) if on_dask else SequentialInfluenceCalculator(model)
    path = tmp_path / "fit.zarr"
    fitted = calculator.fit(train, path)
    assert fitted is model
    assert fitted.is_fitted
    close(fitted.influences(*case.test, *case.train), expected)
    assert not (path / "work").exists()
    # The same call loads it, on another machine say, where nothing is computed.
    other = methods(case)[name]
    SequentialInfluenceCalculator(other).fit(train, path)
    assert torch.equal(other.influences(*case.test, *case.train), fitted.influences(*case.test, *case.train))
    # A fit that was loaded is as good as any: it pickles, and calculators take it.
    copied = copy.deepcopy(other)
    close(SequentialInfluenceCalculator(copied).influences(case.test, case.train).compute(), expected)


@pytest.mark.parametrize("name", ["hessian", "ekfac sampled", "nystroem"])
@pytest.mark.parametrize("problem", ["cnn", "attention", "tied", "mlp_regression", "bernoulli"])
def test_fits_of_other_problems(name, problem, tmp_path):
    case = make_case(problem)
    try:
        expected = methods(case)[name].fit(case.train)
    except ProblemError:  # EK-FAC is for linear layers
        with pytest.raises(ProblemError):
            SequentialInfluenceCalculator(methods(case)[name]).fit(case.train)
        return
    train = Data.of(case.train).in_batches(7)
    fitted = SequentialInfluenceCalculator(methods(case)[name]).fit(train)
    for key, tensor in expected.inverse.tensors.items():
        if not key.startswith(("vectors", "out", "in", "factor")):  # columns have a sign
            close(fitted.inverse.tensors[key], tensor)
    close(fitted.influences(*case.test, *case.train), expected.influences(*case.test, *case.train), 1e-6)


def mlp(n=300):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    return model, (torch.randn(n, 20), torch.randint(0, 4, (n,)))


def ekfac(model):
    return EkfacInfluence(model, True, 1e-2)


def stamps(path):
    return {file.name: file.stat().st_mtime_ns for file in (path / "receipts").glob("[!.]*.json")}


@pytest.mark.parametrize(("stop_at", "on_dask"), [(1, False), (3, True), (8, False), (11, True), (14, False)])
def test_an_interrupted_fit_goes_on(on_dask, stop_at, client, tmp_path):
    model, train = mlp()
    train = Data.of(train).in_batches(20)  # 15 batches: 8 tasks a pass and one of the tree

    def calculator(influence):
        return DaskInfluenceCalculator(influence, client) if on_dask else SequentialInfluenceCalculator(influence)

    whole = calculator(ekfac(model)).fit(train, tmp_path / "whole.zarr").inverse.tensors
    seen, path = [], tmp_path / "halves.zarr"

    def interrupt(progress):
        seen.append(progress)
        if len(seen) == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"The same call again goes on"):
        calculator(ekfac(model)).fit(train, path, progress=interrupt)
    before = stamps(path)
    assert not Store(path).is_complete
    again = calculator(ekfac(model)).fit(train, path).inverse.tensors
    for name, tensor in whole.items():
        assert torch.equal(again[name], tensor)
    assert before.items() <= stamps(path).items()
    history = open_history(path)
    assert (history["peak_bytes"] >= 0).all()
    assert history.attrs["projected"]


def test_a_fit_knows_what_made_it(tmp_path):
    model, train = mlp()
    path = tmp_path / "fit.zarr"
    SequentialInfluenceCalculator(ekfac(model)).fit(train, path)
    with pytest.raises(StoreMismatchError, match="fit_data"):
        SequentialInfluenceCalculator(ekfac(model)).fit((train[0] + 1, train[1]), path)
    with pytest.raises(StoreMismatchError, match=r"regularization.0 \(stored: 0.01, now: 0.1\)"):
        SequentialInfluenceCalculator(EkfacInfluence(model, True, 0.1)).fit(train, path)
    with pytest.raises(StoreMismatchError, match=r"options\.update_diagonal"):
        SequentialInfluenceCalculator(EkfacInfluence(model, False, 1e-2)).fit(train, path)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(StoreMismatchError, match="weights"):
        SequentialInfluenceCalculator(ekfac(model)).fit(train, path)


def test_a_damaged_fit_is_refused_and_made_anew(tmp_path):
    model, train = mlp()
    path = tmp_path / "fit.zarr"
    whole = SequentialInfluenceCalculator(ekfac(model)).fit(train, path).inverse.tensors
    chunk = next(file for file in (path / "inverse").rglob("c/**/*") if file.is_file() and file.stat().st_size > 1000)
    content = bytearray(chunk.read_bytes())
    content[500] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        SequentialInfluenceCalculator(ekfac(model)).fit(train, path)
    again = SequentialInfluenceCalculator(ekfac(model)).fit(train, path).inverse.tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_a_damaged_fit_is_made_anew_in_other_batches(tmp_path):
    model, train = mlp(320)
    path = tmp_path / "fit.zarr"
    whole = SequentialInfluenceCalculator(ekfac(model)).fit(Data.of(train).in_batches(8), path).inverse.tensors
    next(file for file in (path / "inverse").rglob("c/**/0") if file.is_file()).unlink()
    with pytest.raises(StoreError, match="damaged"):
        SequentialInfluenceCalculator(ekfac(model)).fit(train, path)
    again = SequentialInfluenceCalculator(ekfac(model)).fit(Data.of(train).in_batches(300), path).inverse.tensors
    for name, tensor in whole.items():
        if name.startswith("eigenvalues"):
            close(again[name], tensor, 1e-4)


def test_a_smaller_limit_is_refused_where_a_pass_was_begun_with_a_larger(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 500), nn.ReLU(), nn.Linear(500, 4))
    train = torch.randn(4000, 400), torch.randint(0, 4, (4000,))

    def interrupt(progress):
        if "pass 2" in progress.stage and progress.tasks_done == 3:
            raise KeyboardInterrupt

    path = tmp_path / "fit.zarr"
    with pytest.raises(Interrupted):
        SequentialInfluenceCalculator(ekfac(model)).fit(train, path, memory_limit="2GiB", progress=interrupt)
    with pytest.raises(PlanError, match="was begun with batches that need"):
        SequentialInfluenceCalculator(ekfac(model)).fit(train, path, memory_limit="200MiB")


@pytest.mark.parametrize("damaged", ["parts", "total"])
def test_damaged_parts_of_an_unfinished_fit_are_made_anew(damaged, tmp_path):
    model, train = mlp(1280)
    train = Data.of(train).in_batches(20)  # 64 tasks, 8 of the tree, one on top
    whole = SequentialInfluenceCalculator(ekfac(model)).fit(train).inverse.tensors
    path = tmp_path / "fit.zarr"

    def interrupt(progress):
        if (damaged == "parts" and progress.tasks_done == 64) or "pass 2" in progress.stage:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        SequentialInfluenceCalculator(ekfac(model)).fit(train, path, progress=interrupt)
    files = sorted((path / "work").glob("fit-0000-*/fit-*.pt"))
    assert len(files) == (64 if damaged == "parts" else 1)
    for file in files[::3]:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 255
        file.write_bytes(content)
    again = SequentialInfluenceCalculator(ekfac(model)).fit(train, path).inverse.tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_a_fit_keeps_to_its_memory_or_is_refused(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 500), nn.ReLU(), nn.Linear(500, 4))
    train = torch.randn(2000, 400), torch.randint(0, 4, (2000,))
    with pytest.raises(PlanError, match=r"Set memory_limit to (\d+)MiB") as error:
        SequentialInfluenceCalculator(ekfac(model)).fit(train, memory_limit="100MiB")
    smallest = int(str(error.value).split("memory_limit to ")[1].split("MiB")[0])
    path = tmp_path / "fit.zarr"
    SequentialInfluenceCalculator(ekfac(model)).fit(train, path, memory_limit=f"{smallest + 20}MiB")
    history = open_history(path)
    history = history.isel(task=history["projected_bytes"] > 0)
    assert (history["projected_bytes"] <= (smallest + 20) << 20).all()
    assert (history["peak_bytes"] <= history["projected_bytes"]).all()


@pytest.mark.parametrize("on_dask", [False, True])
def test_a_bad_sample_is_named(on_dask, client, tmp_path):
    model, (x, y) = mlp()
    x[57] = float("nan")
    calculator = (
        DaskInfluenceCalculator(ekfac(model), client) if on_dask else SequentialInfluenceCalculator(ekfac(model))
    )
    with pytest.raises(RunError, match="NonFiniteError: NaN or infinite inputs of layer '0' for training sample 57"):
        calculator.fit(Data.of((x, y)).in_batches(20), tmp_path / "fit.zarr")


@pytest.mark.parametrize("name", ["cg", "cg ekfac", "lissa", "harmonic"])
def test_few_samples_are_solved_for_by_all_workers(name, client, tmp_path):
    case = make_case("mlp")
    train = Data.of(case.train).in_batches(5)
    model = methods(case)[name].fit(train)
    expected = model.influences(*case.test, *case.train)
    path = tmp_path / "a.zarr"
    found = DaskInfluenceCalculator(model, client).influences(case.test, train).to_zarr(path)
    close(found["scores"], expected)
    store = Store(path)
    assert store.done("factors") == {0}
    sums = [stage for stage in store.stages if stage.startswith("fit-")]
    assert sums
    workers = {int(r["worker"].partition(":")[2]) for stage in sums for r in store.receipts(stage)}
    assert workers <= set(client.run(os.getpid).values())
    assert not (path / "work").exists()


def test_a_solve_that_did_not_converge_says_so_to_the_client(client, tmp_path):
    case = make_case("mlp")
    model = CgInfluence(case.model, case.loss, 0.05, maxiter=2, second_order_mode="gauss_newton").fit(case.train)
    with pytest.warns(ConvergenceWarning, match="conjugate gradient"):
        DaskInfluenceCalculator(model, client).influences(case.test, case.train).to_zarr(tmp_path / "a.zarr")
