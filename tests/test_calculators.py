"""Calculators give what the model gives in memory, whatever the chunks and whoever computes; nothing twice."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import os
import warnings

import dask.array as da
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
import zarr
from distributed import Client, LocalCluster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cases import make_case
from outfluence import (
    ArnoldiInfluence,
    CgInfluence,
    DaskInfluenceCalculator,
    Data,
    DirectInfluence,
    EkfacInfluence,
    EkfacPreconditioner,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
    ProjectedInfluence,
    SequentialInfluenceCalculator,
    Store,
    open_influences,
)
from outfluence.errors import (
    ClusterError,
    ConvergenceWarning,
    DataError,
    NonFiniteError,
    NotFittedError,
    PlanError,
    ProblemError,
    RunError,
    StoreError,
    StoreMismatchError,
)
from outfluence.executors import DaskExecutor
from outfluence.influence import InfluenceModel
from outfluence.tasks import run_task

CHUNKS = {"test_chunk": 3, "train_chunk": 10}  # 3 + 3 + 1 test, 10 + 10 + 4 training samples


def direct(case):
    return DirectInfluence(case.model, case.loss, 0.05).fit(case.train)


def ekfac(case):
    return EkfacInfluence(case.model, True, 0.05, fisher="exact").fit(case.train)


@pytest.fixture(scope="module")
def mlp32():
    """A float32 network with uneven numbers of samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    train = torch.randn(143, 20), torch.randint(0, 4, (143,))
    test = torch.randn(37, 20), torch.randint(0, 4, (37,))
    return EkfacInfluence(model, True, 1e-2).fit(train), test, train


@pytest.fixture
def fresh_client():
    """A worker that has done nothing before: what it takes is taken by this run."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def same(a, b, tolerance=1e-10):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


@pytest.mark.parametrize("make", [direct, ekfac])
@pytest.mark.parametrize("mode", ["up", "perturbation"])
def test_sequential_equals_in_memory(make, mode):
    case = make_case("mlp")
    model = make(case)
    calculator = SequentialInfluenceCalculator(model)
    expected = model.influences(*case.test, *case.train, mode=mode)
    same(calculator.influences(case.test, case.train, mode, **CHUNKS).compute(), expected)
    same(calculator.influence_factors(case.test).compute(), model.influence_factors(*case.test))
    same(calculator.self_influences(case.train).compute(), model.self_influences(*case.train))
    factors = model.influence_factors(*case.test)
    same(calculator.influences_from_factors(factors, case.train, mode, **CHUNKS).compute(), expected)


def others(case):
    """The methods that read their data again, and those whose rows are coordinates."""
    model, loss, options = case.model, case.loss, {"second_order_mode": "gauss_newton"}
    ekfac = EkfacPreconditioner(EkfacInfluence(model, True, 0.05, fisher="exact"))
    cg = {"rtol": 1e-12, "atol": 0.0, "preconditioner": ekfac, **options}
    return {
        "cg": CgInfluence(model, loss, 0.05, **cg),
        "block cg": CgInfluence(model, loss, 0.05, **cg, solve_simultaneously=True, precompute_grad=True),
        "lissa": LissaInfluence(model, loss, 0.5, maxiter=5000, rtol=1e-11, scale=2.0, **options),
        "harmonic": InverseHarmonicMeanInfluence(model, loss, 0.05),
        "arnoldi": ArnoldiInfluence(model, loss, 0.05, rank=5, **options),
        "woodbury": ArnoldiInfluence(model, loss, 0.05, rank=5, use_woodbury=True, **options),
        "nystroem": NystroemSketchInfluence(model, loss, 0.05, 5, **options),
        "projected": ProjectedInfluence(model, loss, 0.05, rank=15, kernel="exact"),
        "blocks": NystroemSketchInfluence(model, loss, 0.05, 20, "parameter_wise", **options),  # some of full rank
    }


@pytest.mark.parametrize("mode", ["up", "perturbation"])
@pytest.mark.parametrize("method", others(make_case("mlp")))
def test_every_method_through_stores(method, mode, tmp_path):
    case = make_case("mlp")
    model = others(case)[method].fit(DataLoader(TensorDataset(*case.train), batch_size=10))
    calculator = SequentialInfluenceCalculator(model)
    expected = model.influences(*case.test, *case.train, mode=mode)
    lazy = calculator.influences(case.test, case.train, mode, self_influences=True, **CHUNKS)
    dataset = lazy.to_zarr(tmp_path / "a.zarr")
    same(dataset["scores"], expected, 1e-8)
    same(dataset["self_influences"], model.self_influences(*case.train), 1e-8)
    # Factors: dense in memory; in a store, what the method works with; and scores from either.
    dense = calculator.influence_factors(case.test).compute()
    same(dense, model.influence_factors(*case.test), 1e-8)
    stored = calculator.influence_factors(case.test).to_zarr(tmp_path / "f.zarr")
    identity = {"factor_identity.output_gradients": 5 + 3, "factor_identity.inputs": 5 + 6}
    widths = {
        "arnoldi": {"factor_coordinates": 5},
        "projected": {"factor_coordinates": 2 * 2 + 2 * 2},
        "woodbury": {"factor_coordinates": 5, **identity},
        "nystroem": {"factor_coordinates": 5, **identity},
        # Of the head's three classes softmax leaves one direction free: ranks 10 of 15 and 2 of 3. Weight and bias are
        # in different blocks, so that biases are apart.
        "blocks": {
            "factor_coordinates": 20 + 5 + 10 + 2,
            "factor_identity.formed": 5 + 3,
            "factor_identity.output_gradients": 5 + 3,
            "factor_identity.inputs": 4 + 5,
        },
    }.get(method, {"factors": 43})
    assert {name: array.shape for name, array in stored.data_vars.items()} == {n: (7, w) for n, w in widths.items()}
    for factors in (dense, stored):
        same(calculator.influences_from_factors(factors, case.train, mode, **CHUNKS).compute(), expected, 1e-8)


@pytest.mark.parametrize("method", ["cg", "lissa", "harmonic", "arnoldi", "nystroem"])
def test_every_method_on_dask_workers(method, client, tmp_path):
    case = make_case("mlp")
    model = others(case)[method].fit(case.train)  # in memory only: stored beside the result for the workers
    lazy = DaskInfluenceCalculator(model, client).influences(case.test, case.train, self_influences=True, **CHUNKS)
    dataset = lazy.to_zarr(tmp_path / "a.zarr")
    same(dataset["scores"], model.influences(*case.test, *case.train), 1e-8)
    same(dataset["self_influences"], model.self_influences(*case.train), 1e-8)
    assert not (tmp_path / "a.zarr" / "work").exists()


def test_coordinates_of_another_fit_are_refused(tmp_path):
    case = make_case("mlp")
    some = tuple(part[:12] for part in case.train)
    options = {"regularization": 0.05, "rank": 5}
    model, refit, less, lower = (
        ArnoldiInfluence(case.model, case.loss, **o).fit(data)
        for o, data in ((options, case.train), (options, case.train), (options, some), (options | {"rank": 4}, some))
    )
    stored = SequentialInfluenceCalculator(model).influence_factors(case.test).to_zarr(tmp_path / "f.zarr")
    for other in (less, lower):
        with pytest.raises(DataError, match="in the basis of another fit"):
            SequentialInfluenceCalculator(other).influences_from_factors(stored, case.train)
    scores = SequentialInfluenceCalculator(refit).influences_from_factors(
        open_influences(tmp_path / "f.zarr"), case.train
    )
    same(scores.compute(), model.influences(*case.test, *case.train))
    with pytest.raises(DataError, match="holds no factors of DirectInfluence"):
        SequentialInfluenceCalculator(direct(case)).influences_from_factors(stored, case.train)


class Chatty(nn.Sequential):
    def forward(self, x):
        warnings.warn("hello", FutureWarning, stacklevel=2)
        return super().forward(x)


def test_other_warnings_of_tasks_stay_what_they_are(tmp_path):
    case = make_case("mlp")
    with pytest.warns(FutureWarning, match="hello"):
        model = DirectInfluence(Chatty(*case.model), case.loss, 0.05).fit(case.train)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SequentialInfluenceCalculator(model).influences(case.test, case.train).to_zarr(tmp_path / "a.zarr")
    assert {one.category for one in caught} == {FutureWarning}


def test_solves_that_did_not_converge_are_told_to_the_client(client, tmp_path):
    case = make_case("mlp")
    model = CgInfluence(case.model, case.loss, 0.05, maxiter=2, rtol=1e-8, second_order_mode="gauss_newton")
    lazy = DaskInfluenceCalculator(model.fit(case.train), client).influences(case.test, case.train, **CHUNKS)
    with pytest.warns(
        ConvergenceWarning, match=r"3 warning\(s\) from tasks of 'factors', the first: conjugate gradient"
    ):
        lazy.to_zarr(tmp_path / "a.zarr")
    assert "stopped after 2 iterations" in Store(tmp_path / "a.zarr").receipt("factors", 0)["warnings"][0]


def test_a_conjugate_gradient_solve_keeps_to_its_plan(fresh_client, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 400), nn.Tanh(), nn.Linear(400, 10))
    train = torch.randn(600, 100), torch.randint(0, 10, (600,))
    test = torch.randn(130, 100), torch.randint(0, 10, (130,))
    options = {"maxiter": 4, "warn_on_max_iteration": False, "second_order_mode": "gauss_newton"}
    influence = CgInfluence(model, F.cross_entropy, 0.1, **options).fit(train)
    lazy = DaskInfluenceCalculator(influence, fresh_client).influences(test, train, memory_limit="700MiB")
    lazy.to_zarr(tmp_path / "a.zarr")
    store = Store(tmp_path / "a.zarr")
    for stage in lazy.plan.stages:
        peak = max(store.receipt(stage.name, task)["peak_bytes"] for task in range(stage.n_tasks))
        assert 0 < peak <= sum(lazy.plan.memory(stage.name).values()) <= 700 << 20


@pytest.mark.parametrize("name", ["cnn", "dict_inputs", "tuple_inputs", "attention", "mlp_regression"])
def test_any_inputs_and_layers(name, tmp_path):
    case = make_case(name)
    model = direct(case)
    result = SequentialInfluenceCalculator(model).influences(
        Data.from_arrays(*case.test), Data.from_arrays(*case.train), self_influences=True, **CHUNKS
    )
    dataset = result.to_zarr(tmp_path / "a.zarr")
    same(dataset["scores"], model.influences(*case.test, *case.train))
    same(dataset["self_influences"], model.self_influences(*case.train))
    same(dataset["factors"], model.influence_factors(*case.test))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    test_chunk=st.integers(1, 9),
    train_chunk=st.integers(1, 30),
    batch_size=st.integers(1, 30),
    done=st.sets(st.tuples(st.sampled_from(["factors", "scores"]), st.integers(0, 23))),
)
def test_any_chunks_and_any_part_done_give_the_same_store(tmp_path_factory, test_chunk, train_chunk, batch_size, done):
    case = make_case("mlp")
    model = direct(case)
    path = tmp_path_factory.mktemp("any") / "a.zarr"
    loader = DataLoader(TensorDataset(*case.train), batch_size=batch_size)
    lazy = SequentialInfluenceCalculator(model).influences(
        case.test, loader, self_influences=True, test_chunk=test_chunk, train_chunk=train_chunk
    )
    first = lazy.to_zarr(path).load()
    same(first["scores"], model.influences(*case.test, *case.train))
    # Forget all tasks but some, and what they wrote: what is missing is computed again, to the bit.
    store = Store(path)
    for stage in lazy.plan.stages:
        for task in range(stage.n_tasks):
            if (stage.name, task) not in done:
                (path / "receipts" / f"{stage.name}-{task:08d}.json").unlink()
                name, axis = ("factors/values", 0) if stage.name == "factors" else ("scores", 1)
                region = [slice(None)] * 2
                region[axis] = stage.samples(task)
                zarr.open_array(path / name, mode="r+")[tuple(region)] = np.nan
    kept = {stage.name: store.done(stage.name) for stage in lazy.plan.stages}
    stamps = {file: file.stat().st_mtime_ns for file in (path / "receipts").iterdir()}
    again = lazy.to_zarr(path).load()
    assert again.identical(first)
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert sum(map(len, kept.values())) == len(stamps)


def counted(monkeypatch):
    counts = {"factors": 0, "gradients": 0}
    gradient_rows, encode = InfluenceModel.gradient_rows, InfluenceModel.encode

    def count_gradients(self, x, y, *args):
        counts["gradients"] += len(x)
        return gradient_rows(self, x, y, *args)

    def count_factors(self, gradients, *args):
        counts["factors"] += len(gradients)
        return encode(self, gradients, *args)

    monkeypatch.setattr(InfluenceModel, "gradient_rows", count_gradients)
    monkeypatch.setattr(InfluenceModel, "encode", count_factors)
    return counts


def test_each_factor_and_each_gradient_is_computed_once(monkeypatch, tmp_path):
    case = make_case("mlp")
    lazy = SequentialInfluenceCalculator(ekfac(case)).influences(case.test, case.train, self_influences=True, **CHUNKS)
    counts = counted(monkeypatch)
    lazy.to_zarr(tmp_path / "a.zarr")
    assert counts == {"factors": 7, "gradients": 7 + 24}
    lazy.to_zarr(tmp_path / "a.zarr")  # finished: nothing
    assert counts == {"factors": 7, "gradients": 7 + 24}
    (tmp_path / "a.zarr" / "receipts" / "scores-00000002.json").unlink()
    lazy.to_zarr(tmp_path / "a.zarr")
    assert counts == {"factors": 7, "gradients": 7 + 24 + 4}


def test_stored_factors_are_used_and_not_computed_again(monkeypatch, tmp_path):
    case = make_case("mlp")
    model = ekfac(case)
    calculator = SequentialInfluenceCalculator(model)
    expected = model.influences(*case.test, *case.train).numpy()
    dataset = calculator.influence_factors(case.test).to_zarr(tmp_path / "factors.zarr")
    assert sorted(dataset.data_vars) == ["factor_inputs", "factor_output_gradients"]
    dense = calculator.influence_factors(case.test).compute()
    counts = counted(monkeypatch)
    for factors in (dataset, dense, torch.from_numpy(dense), da.from_array(dense)):
        same(calculator.influences_from_factors(factors, case.train).compute(), expected)
    assert counts["factors"] == 0


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_scores_have_the_models_type_whatever_the_inputs(kind, tmp_path):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.embed(x).mean(1))

    model = Tokens().to(getattr(torch, kind))
    data = torch.randint(0, 9, (12, 5)), torch.randint(0, 3, (12,))
    influence = DirectInfluence(model, F.cross_entropy, 0.1).fit(data)
    dataset = SequentialInfluenceCalculator(influence).influences(data, data).to_zarr(tmp_path / "a.zarr")
    assert dataset["scores"].dtype == kind
    assert zarr.open_array(tmp_path / "a.zarr" / "scores", mode="r").dtype == kind
    same(dataset["scores"], influence.influences(*data), 1e-5)
    assert np.abs(dataset["scores"].values % 1).max() > 0.01  # not truncated


def test_the_store_says_what_made_it(mlp32, tmp_path):
    model, test, train = mlp32
    SequentialInfluenceCalculator(model).influences(test, train).to_zarr(tmp_path / "a.zarr")
    about = xr.open_zarr(tmp_path / "a.zarr").attrs["outfluence"]
    identity = about["identity"]
    assert identity["method"] == "EkfacInfluence"
    assert identity["options"] == {
        "update_diagonal": True,
        "fisher": "sampled",
        "seed": 0,
        "tolerance": 0.0,
        "rank": None,
        "weight_sharing": "expand",
    }
    assert identity["regularization"] == {"0": 1e-2, "2": 1e-2}
    assert identity["train_data"] == identity["fit_data"] == Data.of(train).fingerprint
    assert identity["test_data"] == Data.of(test).fingerprint
    assert about["versions"]["torch"] == importlib.metadata.version("torch")
    assert about["plan"]["work"]["n_train"] == 143
    receipt = Store(tmp_path / "a.zarr").receipts("scores")[0]
    assert receipt["start"] == 0
    assert receipt["peak_bytes"] > 0
    assert set(receipt["seconds_by_part"]) == {"read", "gradients", "read factors", "scores", "write"}


# Dask


def run_both(client, model, test, train, tmp_path, mode="up"):
    arguments = {"test_chunk": 10, "train_chunk": 40, "mode": mode, "self_influences": True}
    sequential, dask = (
        calculator.influences(test, train, **arguments).to_zarr(tmp_path / f"{i}.zarr").load()
        for i, calculator in enumerate((SequentialInfluenceCalculator(model), DaskInfluenceCalculator(model, client)))
    )
    for name in ("scores", "self_influences", "factor_inputs", "factor_output_gradients"):
        same(dask[name], sequential[name], 1e-6)
    return dask


@pytest.mark.parametrize("mode", ["up", "perturbation"])
def test_dask_equals_sequential_on_uneven_chunks(client, mlp32, tmp_path, mode):
    model, test, train = mlp32
    dask = run_both(client, model, test, train, tmp_path, mode)
    same(dask["scores"], model.influences(*test, *train, mode=mode), 1e-4)


def test_dask_from_loaders_arrays_and_files(client, mlp32, tmp_path):
    model, test, train = mlp32
    expected = model.influences(*test, *train)
    np.save(tmp_path / "x.npy", train[0].numpy())
    stored = [
        zarr.create_array(str(tmp_path / f"{i}"), data=t.numpy(), chunks=(50, *t.shape[1:]))
        for i, t in enumerate(train)
    ]
    sources = {
        "loader": DataLoader(TensorDataset(*train), batch_size=16),
        "dask": tuple(da.from_array(t.numpy(), chunks=(33, *t.shape[1:])) for t in train),
        "dask from zarr": tuple(da.from_zarr(s) for s in stored),
        "zarr": tuple(stored),
        "map": (np.load(tmp_path / "x.npy", mmap_mode="r"), train[1]),
    }
    calculator = DaskInfluenceCalculator(model, client)
    for name, source in sources.items():
        scores = calculator.influences(DataLoader(TensorDataset(*test), batch_size=9), source, train_chunk=40)
        same(scores.compute(), expected, 1e-5), name


def test_dask_persisted_arrays(client, mlp32):
    model, test, train = mlp32
    arrays = tuple(client.persist(da.from_array(t.numpy(), chunks=(50, *t.shape[1:]))) for t in train)
    with client.as_current():
        assert not Data.of(arrays).portable
        same(DaskInfluenceCalculator(model).influences(test, arrays).compute(), model.influences(*test, *train), 1e-5)


def test_the_current_client_is_used(client, mlp32, tmp_path):
    model, test, train = mlp32
    with client.as_current():
        DaskInfluenceCalculator(model).influences(test, train).to_zarr(tmp_path / "a.zarr")
    workers = {int(r["worker"].partition(":")[2]) for r in Store(tmp_path / "a.zarr").receipts("scores")}
    assert workers <= set(client.run(os.getpid).values())


def test_without_a_client_a_cluster_of_its_own(mlp32, tmp_path):
    model, test, train = mlp32
    dataset = DaskInfluenceCalculator(model).influences(test, train).to_zarr(tmp_path / "a.zarr", progress=True)
    same(dataset["scores"], model.influences(*test, *train), 1e-5)
    assert str(os.getpid()) not in {
        r["worker"].partition(":")[2] for r in Store(tmp_path / "a.zarr").receipts("scores")
    }


def test_nothing_large_passes_through_the_scheduler_and_nothing_stays(client, mlp32, tmp_path):
    model, test, train = mlp32
    path = tmp_path / "a.zarr"
    DaskInfluenceCalculator(model, client).influences(test, train, train_chunk=5).to_zarr(path)
    assert not client.run_on_scheduler(
        lambda dask_scheduler: [k for k in map(str, dask_scheduler.tasks) if "scores" in k]
    )
    assert all(client.run(lambda: __import__("outfluence.tasks").tasks.job_from.cache_info().currsize == 0).values())
    assert not (path / "work").exists()
    receipts = Store(path).receipts("scores")
    assert len(receipts) == 29
    assert max(len(json.dumps(r)) for r in receipts) < 2000


def test_the_profiler_of_workers_takes_no_memory_during_a_run(client, mlp32, tmp_path):
    """Its records grow with time, beyond any plan."""
    model, test, train = mlp32
    kept = {}

    def look(progress):
        if progress.stage == "scores" and progress.is_finished:
            kept.update(client.run(lambda dask_worker: (os.getpid(), len(dask_worker.profile_history))).values())

    client.run(lambda dask_worker: dask_worker.profile_history.append((0.0, {})))
    calculator = DaskInfluenceCalculator(model, client)
    calculator.influences(test, train, train_chunk=5).to_zarr(tmp_path / "a.zarr", progress=look)
    for worker in {int(r["worker"].partition(":")[2]) for r in Store(tmp_path / "a.zarr").receipts("scores")}:
        assert kept[worker] == 0
    runs = client.run(lambda dask_worker: dask_worker.periodic_callbacks["profile"].is_running())
    assert all(runs.values())  # others may want it


def test_workers_with_several_threads_are_refused(mlp32, tmp_path):
    model, test, train = mlp32
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as threaded,
    ):
        with pytest.raises(ClusterError, match=r"run tasks in several threads .* in 2\).*threads_per_worker=1"):
            DaskInfluenceCalculator(model, threaded)
        calculator = DaskInfluenceCalculator(model)
        with threaded.as_current(), pytest.raises(ClusterError, match="several threads"):
            calculator.influences(test, train).to_zarr(tmp_path / "a.zarr")


def test_workers_that_share_a_process_are_refused(mlp32):
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as threads,
        pytest.raises(ClusterError, match="several Dask workers share one process"),
    ):
        DaskInfluenceCalculator(mlp32[0], threads)
    with pytest.raises(ClusterError, match=r"client must be a distributed\.Client, not a str"):
        DaskInfluenceCalculator(mlp32[0], "tcp://127.0.0.1:8786")
    with pytest.raises(ProblemError, match="model must be a fitted influence model"):
        SequentialInfluenceCalculator(mlp32[0].problem.model)


class Forgetful:
    """A client whose cluster is restarted in the middle: futures come back cancelled, or not at all."""

    def __init__(self, client):
        self.client = client

    def __getattr__(self, name):
        return getattr(self.client, name)

    def map(self, function, *numbers, **options):
        futures = self.client.map(function, *numbers, **options)
        self.client.cancel(futures[len(futures) // 2 :], force=True)
        return futures


@pytest.mark.filterwarnings("ignore")
def test_tasks_that_the_cluster_loses_are_failures(client, mlp32, tmp_path, monkeypatch):
    model, test, train = mlp32
    calculator = DaskInfluenceCalculator(model, client)
    lazy = calculator.influences(test, train, train_chunk=20)
    calculator.client = Forgetful(client)
    with pytest.raises(RunError, match=r"factors of samples \d+ to \d+"):
        lazy.to_zarr(tmp_path / "a.zarr")
    assert (tmp_path / "a.zarr" / "work" / "inverse.pt").exists()
    calculator.client = client
    same(lazy.to_zarr(tmp_path / "a.zarr")["scores"], model.influences(*test, *train), 1e-5)


def test_a_path_that_workers_do_not_see(client, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "run", lambda *args, **kwargs: {"tcp://far:1": False, "tcp://off:2": False})
    with pytest.raises(ClusterError, match=r"worker tcp://far:1 \(and 1 more\) cannot see .*all of them share"):
        DaskExecutor(client).check_path(str(tmp_path))


# Stores


def test_only_the_same_job_goes_on_with_a_store(mlp32, tmp_path):
    model, test, train = mlp32
    path = tmp_path / "a.zarr"
    SequentialInfluenceCalculator(model).influences(test, train).to_zarr(path)
    flipped = train[0], train[1].clone()
    flipped[1][77] = (flipped[1][77] + 1) % 4
    weights = copy.deepcopy(model.problem.model)
    with torch.no_grad():
        weights[0].bias[3] += 1e-6
    other = EkfacInfluence(weights, True, 1e-2).fit(train)
    for calculator, data, mode, differs in (
        (SequentialInfluenceCalculator(model), flipped, "up", "train_data"),
        (SequentialInfluenceCalculator(other), train, "up", "weights"),
        (
            SequentialInfluenceCalculator(model.with_regularization(0.02)),
            train,
            "up",
            r"regularization\.0 \(stored: 0.01, now: 0.02\)",
        ),
        (SequentialInfluenceCalculator(model), train, "perturbation", r"mode \(stored: up, now: perturbation\)"),
    ):
        with pytest.raises(StoreMismatchError, match=differs):
            calculator.influences(test, data, mode).to_zarr(path)
    refit = EkfacInfluence(model.problem.model, True, 1e-2, seed=1).fit(train)
    with pytest.raises(StoreMismatchError, match=r"options\.seed \(stored: 0, now: 1\)"):
        SequentialInfluenceCalculator(refit).influences(test, train).to_zarr(path)
    dataset = SequentialInfluenceCalculator(refit).influences(test, flipped).to_zarr(path, overwrite=True)
    same(dataset["scores"], refit.influences(*test, *flipped), 1e-5)


def test_an_unfinished_store_keeps_its_chunks(mlp32, tmp_path):
    model, test, train = mlp32
    path = tmp_path / "a.zarr"
    calculator = SequentialInfluenceCalculator(model)
    calculator.influences(test, train, train_chunk=40).to_zarr(path)
    (path / "receipts" / "scores-00000001.json").unlink()
    with pytest.raises(StoreMismatchError, match="was begun with train_chunk=40, now train_chunk=50"):
        calculator.influences(test, train, train_chunk=50).to_zarr(path)
    calculator.influences(test, train).to_zarr(path)  # no opinion: goes on
    assert Store(path).is_complete


def test_a_fit_that_is_repeated_with_other_last_bits_goes_on_with_the_first(mlp32, tmp_path):
    model, test, train = mlp32
    chunks = {"test_chunk": 10, "train_chunk": 40}
    whole = SequentialInfluenceCalculator(model).influences(test, train, **chunks).to_zarr(tmp_path / "whole.zarr")
    bad = test[0].clone()
    bad[25] = float("nan")
    lazy = SequentialInfluenceCalculator(model).influences(
        Data.from_arrays(bad, test[1], fingerprint="v1"), train, **chunks
    )
    with pytest.raises(RunError, match="test sample 25"):
        lazy.to_zarr(tmp_path / "a.zarr")
    other = {name: tensor * 1.001 for name, tensor in model.inverse.tensors.items()}
    noisy = SequentialInfluenceCalculator(model.with_inverse(model.inverse.with_tensors(other)))
    again = noisy.influences(Data.from_arrays(*test, fingerprint="v1"), train).to_zarr(tmp_path / "a.zarr")
    assert np.array_equal(again["scores"], whole["scores"])


def test_a_finished_task_is_not_done_again(mlp32, tmp_path):
    """A scheduler repeats a task if the worker that held its outcome dies."""
    model, test, train = mlp32
    lazy = SequentialInfluenceCalculator(model).influences(test, train, train_chunk=40)
    lazy.to_zarr(tmp_path / "a.zarr")
    job = dataclasses.replace(
        lazy.job, plan=lazy.plan, store=tmp_path / "a.zarr", store_id=Store(tmp_path / "a.zarr").id
    )
    first = Store(job.store).receipt("scores", 2)
    assert run_task(job, "scores", (), 2).items() <= first.items()
    (job.store / "receipts" / "scores-00000002.json").unlink()
    assert run_task(job, "scores", (), 2)["finished"] > first["finished"]


@pytest.mark.parametrize(("n_test", "limit", "holds"), [(300, 600, True), (1500, 280, False)])
def test_the_measured_peak_is_below_the_projected_one(fresh_client, tmp_path, n_test, limit, holds):
    torch.manual_seed(0)
    # Over so many positions that rows are as long as the model, 64 KiB.
    model = nn.Sequential(nn.Linear(60, 250), nn.Tanh(), nn.Linear(250, 5))
    train = torch.randn(300, 70, 60), torch.randint(0, 5, (300,))
    test = torch.randn(n_test, 70, 60), torch.randint(0, 5, (n_test,))

    def loss(z, y):
        return F.cross_entropy(z.mean(1), y)

    influence = EkfacInfluence(model, True, 1e-2, loss=loss, fisher="empirical").fit(train)
    calculator = DaskInfluenceCalculator(influence, fresh_client)
    lazy = calculator.influences(test, train, self_influences=True, memory_limit=limit << 20)
    assert lazy.plan.holds_factors == holds
    lazy.to_zarr(tmp_path / "a.zarr")
    for stage in lazy.plan.stages:
        projected = sum(lazy.plan.memory(stage.name).values())
        measured = max(receipt["peak_bytes"] for receipt in Store(tmp_path / "a.zarr").receipts(stage.name))
        # Not far below either: 192 MiB of it are for what processes may grow by, whatever they compute.
        assert 0.25 * projected < measured <= projected <= limit << 20


def test_an_existing_path_is_not_overwritten(mlp32, tmp_path):
    model, test, train = mlp32
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "thesis.tex").write_text("mine")
    lazy = SequentialInfluenceCalculator(model).influences(test, train)
    for overwrite in (False, True):
        with pytest.raises(StoreMismatchError, match="is no store of outfluence"):
            lazy.to_zarr(tmp_path / "a.zarr", overwrite=overwrite)
    assert (tmp_path / "a.zarr" / "thesis.tex").exists()
    with pytest.raises(StoreError, match="Choose a path that you may write to"):
        lazy.to_zarr("/proc/a.zarr")


def test_memory_limits_are_kept_or_refused(mlp32):
    model, test, train = mlp32
    calculator = SequentialInfluenceCalculator(model)
    assert calculator.influences(test, train, memory_limit="300MiB").plan.peak <= 300 << 20
    with pytest.raises(PlanError, match="Set memory_limit to"):
        calculator.influences(test, train, memory_limit="1MiB")


# Bad input, before any work


def test_bad_input_is_refused_before_any_work(mlp32, tmp_path):
    model, test, train = mlp32
    calculator = SequentialInfluenceCalculator(model)
    with pytest.raises(NotFittedError, match="EkfacInfluence is not fitted"):
        SequentialInfluenceCalculator(EkfacInfluence(model.problem.model)).influences(test, train)
    with pytest.raises(DataError, match="shuffle=False"):
        calculator.influences(test, DataLoader(TensorDataset(*train), shuffle=True))
    with pytest.raises(ProblemError, match="fails on test sample 0"):
        calculator.influences((test[0][:, :3], test[1]), train)
    with pytest.raises(ProblemError, match="fails on training sample 0"):
        calculator.influences(test, (train[0].double(), train[1]))
    with pytest.raises(DataError, match=r"factors must be \(n_test, 754\)"):
        calculator.influences_from_factors(np.zeros((3, 5), "f4"), train)
    with pytest.raises(ValueError, match="is no InfluenceMode"):
        calculator.influences(test, train, "down")
    bad = test[0].clone()
    bad[0] = float("inf")
    with pytest.raises(NonFiniteError, match="gradients for test sample 0"):
        calculator.influences((bad, test[1]), train)


def test_a_store_is_not_replaced_by_what_is_made_from_it(mlp32, tmp_path):
    model, test, train = mlp32
    calculator = SequentialInfluenceCalculator(model)
    factors = calculator.influence_factors(test).to_zarr(tmp_path / "a.zarr")
    with pytest.raises(StoreMismatchError, match="holds factors or data that the new store is to be made from"):
        calculator.influences_from_factors(factors, train).to_zarr(tmp_path / "a.zarr", overwrite=True)
    same(open_influences(tmp_path / "a.zarr")["factor_inputs"], factors["factor_inputs"], 0.0)
    assert os.listdir(tmp_path) == ["a.zarr"]


def test_a_model_that_goes_on_training_before_the_run_is_refused(mlp32, tmp_path):
    model, test, train = copy.deepcopy(mlp32)
    lazy = SequentialInfluenceCalculator(model).influences(test, train)
    with torch.no_grad():
        model.problem.model[0].weight *= 3
    with pytest.raises(ProblemError, match="has changed since fit"):
        lazy.to_zarr(tmp_path / "a.zarr")
    assert os.listdir(tmp_path) == []


def test_a_replacement_that_cannot_be_made_leaves_the_old_store(mlp32, tmp_path, monkeypatch):
    model, test, train = mlp32
    lazy = SequentialInfluenceCalculator(model).influences(test, train)
    before = lazy.to_zarr(tmp_path / "a.zarr").load()

    def full(*_args):
        raise StoreError("No space left on device")

    monkeypatch.setattr(Store, "create", full)
    with pytest.raises(StoreError, match="No space left"):
        lazy.to_zarr(tmp_path / "a.zarr", overwrite=True)
    assert open_influences(tmp_path / "a.zarr").load().identical(before)


def test_object_stores_are_not_folders(mlp32, tmp_path, monkeypatch):
    model, test, train = mlp32
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="object stores are not supported yet"):
        SequentialInfluenceCalculator(model).influences(test, train).to_zarr("s3://bucket/run.zarr")
    assert os.listdir(tmp_path) == []


def test_a_model_that_went_on_training_is_refused(mlp32):
    model, test, train = copy.deepcopy(mlp32)
    with torch.no_grad():
        model.problem.model[0].weight += 1e-3
    with pytest.raises(ProblemError, match=r"has changed since fit \(weights differ\)"):
        SequentialInfluenceCalculator(model).influences(test, train)


@pytest.mark.parametrize("on_dask", [False, True])
def test_a_bad_sample_is_named_and_the_rest_completes(mlp32, client, tmp_path, on_dask):
    model, test, train = mlp32
    x = train[0].clone()
    x[[57, 61]] = float("nan")
    calculator = DaskInfluenceCalculator(model, client) if on_dask else SequentialInfluenceCalculator(model)
    lazy = calculator.influences(test, (x, train[1]), train_chunk=40)
    message = (
        r"1 task\(s\) of the run failed:\n  scores of samples 40 to 79: NonFiniteError: .* training samples 57, 61"
    )
    with pytest.raises(RunError, match=message) as error:
        lazy.to_zarr(tmp_path / "a.zarr")
    assert len(error.value.failures) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = open_influences(tmp_path / "a.zarr")["scores"].values
    missing = np.isnan(scores)
    assert missing[:, 40:80].all()
    assert not np.delete(missing, np.s_[40:80], axis=1).any()
    with pytest.warns(UserWarning, match="not finished"):
        open_influences(tmp_path / "a.zarr")


def test_factors_that_are_not_finite_are_refused(mlp32, tmp_path):
    model, test, train = mlp32
    factors = model.influence_factors(*test)
    factors[11, 3] = float("inf")
    with pytest.raises(RunError, match="influence factors for test sample 11"):
        SequentialInfluenceCalculator(model).influences_from_factors(factors, train).to_zarr(tmp_path / "a.zarr")


def test_results_print_their_plan(mlp32):
    model, test, train = mlp32
    assert "37 test x 143 training samples" in str(SequentialInfluenceCalculator(model).influences(test, train))
