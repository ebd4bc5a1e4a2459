"""All results come from one pass: strongest scores, means of groups, kept gradients; what is damaged or bad is told."""

from __future__ import annotations

import dataclasses
import errno
import os
import warnings

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from cases import make_case
from outfluence import (
    ArnoldiInfluence,
    CgInfluence,
    DaskInfluenceCalculator,
    Data,
    DirectInfluence,
    EkfacInfluence,
    InfluenceMode,
    NystroemSketchInfluence,
    SequentialInfluenceCalculator,
    Store,
    open_influences,
    store,
    top_k,
)
from outfluence.errors import (
    DamageWarning,
    DataError,
    Interrupted,
    PlanError,
    RunError,
    StoreError,
    StoreMismatchError,
)
from outfluence.influence import InfluenceModel
from outfluence.plan import Plan
from outfluence.record import Record
from outfluence.tasks import run_task, strongest

#: What the factors of EK-FAC are stored as.
FACTORS = ("factor_inputs", "factor_output_gradients")
CHUNKS = {"test_chunk": 3, "train_chunk": 10}  # 3 + 3 + 1 test, 10 + 10 + 4 training samples


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    train = torch.randn(143, 20), torch.randint(0, 4, (143,))
    test = torch.randn(37, 20), torch.randint(0, 4, (37,))
    return EkfacInfluence(model, True, 1e-2).fit(train), test, train


@given(
    values=st.lists(st.integers(-2, 2), min_size=1, max_size=60),
    rows=st.integers(1, 4),
    k=st.integers(1, 60),
    largest=st.booleans(),
    seed=st.integers(0, 99),
)
def test_strongest_equals_sorting_with_ties(values, rows, k, largest, seed):
    shuffled = np.random.default_rng(seed).permuted(np.tile(values, (rows, 1)), axis=1).astype("f4")
    k = min(k, shuffled.shape[1])
    expected = np.argsort(-shuffled if largest else shuffled, axis=1, kind="stable")[:, :k]
    best, index = strongest(torch.from_numpy(shuffled), k, largest)
    assert np.array_equal(index, expected)
    assert np.array_equal(best, np.take_along_axis(shuffled, expected, 1))


@settings(
    max_examples=12,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    test_chunk=st.integers(3, 15),
    train_chunk=st.integers(10, 150),
    top=st.integers(1, 143),
    bottom=st.integers(1, 143),
    data=st.data(),
)
def test_any_chunks_any_order_and_any_part_done(fitted, tmp_path_factory, test_chunk, train_chunk, top, bottom, data):
    """Strongest scores equal the sorted matrix, whatever is done again."""
    model, (x, y), train = fitted
    x, y = x[:13], y[:13]
    groups = np.array(list("abcabcabcabca"))
    path = tmp_path_factory.mktemp("any") / "a.zarr"
    lazy = SequentialInfluenceCalculator(model).influences(
        (x, y), train, top_k=top, bottom_k=bottom, groups=groups, test_chunk=test_chunk, train_chunk=train_chunk
    )
    first = lazy.to_zarr(path).load()
    matrix = first["scores"].values
    for kind, k in (("top", top), ("bottom", bottom)):
        order = np.argsort(-matrix if kind == "top" else matrix, axis=1, kind="stable")[:, :k]
        assert np.array_equal(first[f"{kind}_train"], order)
        assert np.array_equal(first[f"{kind}_scores"], np.take_along_axis(matrix, order, 1))
    for name in "abc":
        mean = matrix[groups == name].astype("f8").mean(0)
        assert np.allclose(first["group_means"].sel(group=name), mean, rtol=1e-6, atol=1e-6 * np.abs(matrix).max())
    tasks = [(stage.name, task) for stage in lazy.plan.stages for task in range(stage.n_tasks)]
    again = data.draw(st.sets(st.sampled_from(tasks)), label="to do again")
    for stage, task in again:
        Store(path).withdraw_receipt(stage, task)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second = lazy.to_zarr(path).load()
    # To merge again takes the candidates of all strips, and those are gone; nothing else is damaged.
    assert not caught or "strongest" in {stage for stage, _ in again}
    xr.testing.assert_identical(second.drop_attrs(), first.drop_attrs())


def test_without_the_matrix(fitted, tmp_path, client):
    model, test, train = fitted
    calculators = SequentialInfluenceCalculator(model), DaskInfluenceCalculator(model, client)
    groups = np.arange(37) % 5
    for i, calculator in enumerate(calculators):
        lazy = calculator.influences(
            test, train, matrix=False, top_k=7, groups=groups, self_influences=True, test_chunk=10, train_chunk=20
        )
        dataset = lazy.to_zarr(tmp_path / f"{i}.zarr")
        assert set(dataset.data_vars) == {*FACTORS, "top_scores", "top_train", "group_means", "self_influences"}
        assert not (tmp_path / f"{i}.zarr" / "work").exists()
        assert lazy.plan.work.sizes.keys() == {
            "factors",
            "strongest scores",
            "means of groups",
            "self-influences",
        }
        full = calculator.influences(test, train, test_chunk=10, train_chunk=20).to_zarr(tmp_path / f"full{i}.zarr")
        expected = top_k(full, 7)
        assert np.array_equal(dataset["top_train"], expected["train"])
        assert np.array_equal(dataset["top_scores"], expected["scores"])
        means = np.stack([full["scores"].values[groups == g].astype("f8").mean(0) for g in range(5)])
        assert np.allclose(dataset["group_means"], means, atol=1e-6 * np.abs(means).max())
        assert list(dataset["group"].values) == list(range(5))
        assert np.allclose(dataset["self_influences"], model.self_influences(*train), rtol=1e-5)
    in_memory = calculators[0].influences(test, train, matrix=False, top_k=7, test_chunk=10, train_chunk=20).compute()
    assert np.array_equal(in_memory["top_train"], expected["train"])


def test_means_of_groups_of_features(tmp_path):
    case = make_case("mlp")
    model = DirectInfluence(case.model, case.loss, 0.05).fit(case.train)
    calculator = SequentialInfluenceCalculator(model)
    groups = ["x", "y", "x", "y", "z", "x", "x"]
    dataset = calculator.influences(
        case.test, case.train, "perturbation", groups=groups, self_influences=True, **CHUNKS
    ).to_zarr(tmp_path / "a.zarr")
    for name in "xyz":
        mean = dataset["scores"].values[np.array(groups) == name].mean(0)
        assert np.allclose(dataset["group_means"].sel(group=name), mean, rtol=1e-12)
    assert np.allclose(dataset["self_influences"], model.self_influences(*case.train))


@pytest.mark.parametrize("method", ["direct", "arnoldi", "woodbury", "cg", "ekfac"])
@pytest.mark.parametrize("on_dask", [False, True])
def test_kept_gradients_score_new_samples(method, on_dask, client, tmp_path, monkeypatch):
    case = make_case("mlp")
    options = {"second_order_mode": "gauss_newton"}
    model = {
        "direct": lambda: DirectInfluence(case.model, case.loss, 0.05, **options),
        "arnoldi": lambda: ArnoldiInfluence(case.model, case.loss, 0.05, rank=5, **options),
        "woodbury": lambda: ArnoldiInfluence(case.model, case.loss, 0.05, rank=5, use_woodbury=True, **options),
        "cg": lambda: CgInfluence(case.model, case.loss, 0.05, rtol=1e-12, atol=0.0, **options),
        "ekfac": lambda: EkfacInfluence(case.model, True, 0.05),
    }[method]().fit(case.train)
    calculator = DaskInfluenceCalculator(model, client) if on_dask else SequentialInfluenceCalculator(model)
    path = tmp_path / "kept.zarr"
    first = calculator.influences(case.test, case.train, keep_gradients=True, **CHUNKS).to_zarr(path)
    factored = ("inputs", "output_gradients")
    names = {
        "arnoldi": ["gradient_coordinates"],
        "woodbury": ["gradient_coordinates", *(f"gradient_identity.{name}" for name in factored)],
        "ekfac": [f"gradient_{name}" for name in factored],
    }
    for name in names.get(method, names["ekfac"]):
        assert first[name].shape[0] == 24
    new = tuple(part[:5] for part in case.train)
    expected = model.influences(*new, *case.train)
    if not on_dask:  # the model sees the test samples only
        right_rows = InfluenceModel.right_rows

        def of_none(self, gradients, left=None):
            assert len(gradients) == 0, "a gradient was computed that is in the store"
            return right_rows(self, gradients, left)

        monkeypatch.setattr(InfluenceModel, "right_rows", of_none)
    lazy = calculator.influences(new, from_store=path, top_k=3, test_chunk=2, train_chunk=7)
    again = lazy.to_zarr(tmp_path / "new.zarr")
    assert np.allclose(again["scores"], expected, rtol=1e-8, atol=1e-10)
    assert np.array_equal(again["top_train"], top_k(again, 3)["train"])
    assert "read from a store" in str(lazy.plan)


def test_gradients_in_another_basis_are_refused(tmp_path):
    """Gradients, and those in the eigenbasis of EK-FAC, consist of arrays of the same names and sizes."""
    case = make_case("mlp")
    ekfac = EkfacInfluence(case.model, True, 0.05).fit(case.train)
    direct = DirectInfluence(case.model, case.loss, 0.05, "layer_wise").fit(case.train)
    of_ekfac, of_direct = SequentialInfluenceCalculator(ekfac), SequentialInfluenceCalculator(direct)
    of_ekfac.influences(case.test, case.train, keep_gradients=True).to_zarr(tmp_path / "rotated.zarr")
    dense = ekfac.influence_factors(*case.test)
    of_ekfac.influences_from_factors(dense, case.train, keep_gradients=True).to_zarr(tmp_path / "plain.zarr")
    with pytest.raises(DataError, match="basis"):
        of_direct.influences(case.test, from_store=tmp_path / "rotated.zarr")
    with pytest.raises(DataError, match="basis"):
        of_ekfac.influences(case.test, from_store=tmp_path / "plain.zarr")
    with pytest.raises(DataError, match="basis"):
        of_ekfac.influences_from_factors(dense, from_store=tmp_path / "rotated.zarr")
    expected = ekfac.influences(*case.test, *case.train).numpy()
    again = of_ekfac.influences_from_factors(dense, from_store=tmp_path / "plain.zarr").compute()
    assert np.allclose(again, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["ekfac", "nystroem", "cg"])
def test_samples_of_other_numbers_of_positions(method, tmp_path):
    """Test samples may be longer than training samples; factors that were stored must be like those of the fit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def loss(z, y):
        return nn.functional.cross_entropy(z.mean(1), y)

    influence = {
        "ekfac": EkfacInfluence(model, True, 0.05, loss=loss, fisher="empirical"),
        "nystroem": NystroemSketchInfluence(model, loss, 0.05, 10, second_order_mode="gauss_newton"),
        "cg": CgInfluence(model, loss, 0.05, rtol=1e-12, atol=0.0, second_order_mode="gauss_newton"),
    }[method]
    train = torch.randint(0, 9, (20, 3)), torch.randint(0, 3, (20,))
    test = torch.randint(0, 9, (7, 12)), torch.randint(0, 3, (7,))
    calculator = SequentialInfluenceCalculator(influence.fit(train))
    expected = influence.influences(*test, *train).numpy()
    dataset = calculator.influences(test, train, keep_gradients=True, **CHUNKS).to_zarr(tmp_path / "a.zarr")
    assert np.allclose(dataset["scores"], expected, rtol=1e-7, atol=1e-9)
    again = calculator.influences(test, from_store=tmp_path / "a.zarr").compute()
    assert np.allclose(again, expected, rtol=1e-7, atol=1e-9)
    factors = calculator.influence_factors(test).to_zarr(tmp_path / "f.zarr")
    if method == "cg":  # these are as long as the model
        again = calculator.influences_from_factors(factors, train).compute()
        assert np.allclose(again, expected, rtol=1e-7, atol=1e-9)
    else:
        with pytest.raises(DataError, match="of another size than those of the fit"):
            calculator.influences_from_factors(factors, train)


def test_gradients_of_something_else_are_refused(tmp_path):
    case = make_case("mlp")
    model = ArnoldiInfluence(case.model, case.loss, 0.05, rank=5).fit(case.train)
    calculator = SequentialInfluenceCalculator(model)
    plain, kept = tmp_path / "plain.zarr", tmp_path / "kept.zarr"
    calculator.influences(case.test, case.train).to_zarr(plain)
    calculator.influences(case.test, case.train, keep_gradients=True).to_zarr(kept)
    with pytest.raises(DataError, match="keeps no gradients: make it with keep_gradients=True"):
        calculator.influences(case.test, from_store=plain)
    with pytest.raises(DataError, match="not both"):
        calculator.influences(case.test, case.train, from_store=kept)
    with pytest.raises(DataError, match="not both"):
        calculator.influences(case.test)
    with pytest.raises(DataError, match="kept gradients know nothing of their features"):
        calculator.influences(case.test, mode="perturbation", from_store=kept)
    with pytest.raises(DataError, match="cannot be had from_store"):
        calculator.influences(case.test, from_store=kept, self_influences=True)
    direct = SequentialInfluenceCalculator(DirectInfluence(case.model, case.loss, 0.05).fit(case.train))
    with pytest.raises(DataError, match="keeps coordinates of gradients, DirectInfluence needs inputs, output_g"):
        direct.influences(case.test, from_store=kept)
    some = tuple(part[:12] for part in case.train)
    other = ArnoldiInfluence(case.model, case.loss, 0.05, rank=5).fit(some)
    with pytest.raises(DataError, match="another fit or rank"):
        SequentialInfluenceCalculator(other).influences(case.test, from_store=kept)
    lazy = calculator.influences(case.test, from_store=kept)
    with pytest.raises(StoreMismatchError, match="choose another path"):
        lazy.to_zarr(kept, overwrite=True)
    assert np.allclose(lazy.compute(), open_influences(kept)["scores"])


def test_what_cannot_be_asked_for(fitted):
    model, test, train = fitted
    calculator = SequentialInfluenceCalculator(model)
    for options, message in [
        ({"matrix": False}, "nothing is asked for"),
        ({"top_k": 144}, "top_k must be between 1 and the 143 training samples"),
        ({"bottom_k": 0}, "bottom_k must be between"),
        ({"top_k": 3, "mode": "perturbation"}, "mode='up' only"),
        ({"groups": [1, 2]}, "each of the 37 test samples"),
        ({"groups": np.zeros(37)}, "with integers or texts"),
    ]:
        with pytest.raises(DataError, match=message):
            calculator.influences(test, train, **options)


@pytest.mark.parametrize("on_dask", [False, True])
def test_a_bad_test_sample_does_not_stop_the_others(fitted, client, tmp_path, on_dask):
    model, (x, y), train = fitted
    x = x.clone()
    x[13] = float("inf")
    calculator = DaskInfluenceCalculator(model, client) if on_dask else SequentialInfluenceCalculator(model)
    groups = np.arange(37) // 10  # the bad one is in tile and group 1
    lazy = calculator.influences((x, y), train, top_k=4, groups=groups, test_chunk=10, train_chunk=50)
    path = tmp_path / "a.zarr"
    good = (np.arange(37) < 10) | (np.arange(37) >= 20)
    for attempt in range(2):  # the second changes nothing, and computes nothing but the bad task
        before = {f.name: f.stat().st_mtime_ns for f in (path / "receipts").glob("[!.]*")} if attempt else {}
        with pytest.raises(
            RunError, match=r"factors of samples 10 to 19: NonFiniteError: .* test samples? 13"
        ) as error:
            lazy.to_zarr(path)
        assert len(error.value.failures) == 1
        with pytest.warns(UserWarning, match="not finished"):
            dataset = open_influences(path).load()
        expected = model.influences(x[good], y[good], *train)
        assert np.allclose(dataset["scores"][good], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert np.isnan(dataset["scores"][~good]).all()
        assert np.array_equal(dataset["top_train"][good], top_k(dataset["scores"][good], 4)["train"])
        assert (dataset["top_train"][~good] == -1).all()
        assert np.isnan(dataset["group_means"][1]).all()
        assert not np.isnan(dataset["group_means"][[0, 2, 3]]).any()
        after = {f.name: f.stat().st_mtime_ns for f in (path / "receipts").glob("[!.]*")}
        assert before.items() <= after.items()


@pytest.mark.parametrize("on_dask", [False, True])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_found_and_mended(fitted, client, tmp_path, on_dask, damage):
    model, test, train = fitted
    calculator = DaskInfluenceCalculator(model, client) if on_dask else SequentialInfluenceCalculator(model)
    lazy = calculator.influences(test, train, test_chunk=10, train_chunk=50)
    path = tmp_path / "a.zarr"
    whole = lazy.to_zarr(path).load()
    for chunk in (path / "scores" / "c" / "1" / "0", path / "factors" / "inputs" / "c" / "2" / "0"):
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 1
        match damage:
            case "flip":
                chunk.write_bytes(content)
            case "truncate":
                chunk.write_bytes(content[: len(content) // 2])
            case "delete":
                chunk.unlink()
    Store(path).withdraw_receipt("scores", 2)  # unfinished: the run goes on, and looks at what is there
    with pytest.warns(DamageWarning) as caught:
        again = lazy.to_zarr(path).load()
    texts = [str(one.message) for one in caught if one.category is DamageWarning]
    assert len(texts) == 2
    assert "scores of samples 0 to 49 are damaged" in texts[0]
    assert "factors of samples 20 to 29 are damaged" in texts[1]
    xr.testing.assert_identical(again.drop_attrs(), whole.drop_attrs())


@pytest.mark.parametrize("on_dask", [False, True])
def test_an_interrupted_run_says_how_to_go_on(fitted, client, tmp_path, on_dask):
    model, test, train = fitted
    calculator = DaskInfluenceCalculator(model, client) if on_dask else SequentialInfluenceCalculator(model)
    lazy = calculator.influences(test, train, train_chunk=10)
    events = []

    def interrupt(progress):
        events.append(progress)
        if progress.stage == "scores" and progress.tasks_done == 3:
            raise KeyboardInterrupt

    with pytest.raises(
        Interrupted, match=r"interrupted; what was computed is stored in .* scores \d+ of 15\)\. The same"
    ):
        lazy.to_zarr(tmp_path / "a.zarr", progress=interrupt)
    assert not Store(tmp_path / "a.zarr").is_complete
    assert events[-1].n_samples == 143
    again = lazy.to_zarr(tmp_path / "a.zarr").load()
    assert again.drop_attrs().identical(lazy.to_zarr(tmp_path / "b.zarr").load().drop_attrs())


@pytest.mark.parametrize("calls", [0, 1, 5, 9, 14, 22, 30])
def test_a_full_disk_loses_nothing(fitted, tmp_path, monkeypatch, calls):
    model, test, train = fitted
    lazy = SequentialInfluenceCalculator(model).influences(test, train, top_k=5, test_chunk=10, train_chunk=50)
    whole = lazy.to_zarr(tmp_path / "whole.zarr").load()
    path, original, left = tmp_path / "a.zarr", store._sync, [calls]

    def full(file):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_sync", full)
        with pytest.raises((RunError, StoreError, OSError), match="No space left on device"):
            lazy.to_zarr(path)
    before = stamps(path)
    again = lazy.to_zarr(path).load()
    xr.testing.assert_identical(again.drop_attrs(), whole.drop_attrs())
    assert before.items() <= stamps(path).items()


def stamps(path):
    return {file.name: file.stat().st_mtime_ns for file in (path / "receipts").glob("[!.]*")}


def test_batches_are_halved_where_memory_does_not_suffice(fitted, tmp_path, monkeypatch):
    model, test, train = fitted
    original, sizes = InfluenceModel.gradient_rows, []

    def greedy(self, x, y, *arguments):
        sizes.append(len(x))
        if len(x) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, x, y, *arguments)

    expected = model.influences(*test, *train)
    monkeypatch.setattr(InfluenceModel, "gradient_rows", greedy)
    scores = SequentialInfluenceCalculator(model).influences(test, train).compute()
    assert np.allclose(scores, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert max(sizes) > 10


def test_a_killed_workers_task_is_tried_in_smaller_batches(fitted):
    model, test, train = fitted
    lazy = SequentialInfluenceCalculator(model).influences(test, train)
    job = dataclasses.replace(lazy.job, plan=lazy.plan)
    assert job.in_batches(8).plan.batch_size == 8
    assert job.in_batches(8).plan.peak < lazy.plan.peak


def test_the_plan_is_made_before_any_work(fitted, client):
    model, test, train = fitted
    for calculator in (SequentialInfluenceCalculator(model), DaskInfluenceCalculator(model, client)):
        plan = calculator.plan(test, train, top_k=5, self_influences=True, memory_limit="1GiB")
        assert isinstance(plan, Plan)
        assert plan.seconds.keys() == {"factors", "scores", "strongest"}
        assert all(seconds > 0 for seconds in plan.seconds.values())
        assert plan.flops["scores"] > 2 * 37 * 143 * model.n_parameters  # and what gradients take
        assert plan.costs.n_workers == (2 if isinstance(calculator, DaskInfluenceCalculator) else 1)
        for text in (str(plan), plan._repr_html_()):
            for words in (
                "time of scores",
                "keep the gradients?",
                "FLOPs of scores",
                "strongest scores",
                "computed once",
            ):
                assert words in text
        assert "<table>" in plan._repr_html_()
        with pytest.raises(PlanError, match=r"Set memory_limit to \d+MiB"):
            calculator.plan(test, train, memory_limit="1MiB")


@pytest.mark.parametrize("method", ["cg", "nystroem"])
def test_plans_of_other_methods(method):
    case = make_case("mlp")
    model = (
        CgInfluence(case.model, case.loss, 0.05)
        if method == "cg"
        else NystroemSketchInfluence(case.model, case.loss, 0.05, 5)
    ).fit(case.train)
    for mode in InfluenceMode:
        text = str(SequentialInfluenceCalculator(model).plan(case.test, case.train, mode=mode))
        assert ("as iterations take" in text) == (method == "cg")
        assert "time of scores" in text


def test_huge_chunks_of_the_source_are_part_of_the_plan(fitted, tmp_path):
    model, test, (x, y) = fitted
    calculator = SequentialInfluenceCalculator(model)
    stored = [
        zarr.create_array(str(tmp_path / f"{rows}.zarr"), data=x.numpy(), chunks=(rows, 20)) for rows in (1, 30, 143)
    ]
    plans = [calculator.influences(test, (array, y)).plan for array in stored]
    samples = [plan.memory("scores")["samples of a chunk"] for plan in plans]
    assert samples[0] < samples[1] < samples[2]
    assert samples[2] >= 2 * 143 * 80
    assert plans[1].train_chunk % 30 == 0  # no chunk of the source is decoded twice


def test_where_all_of_a_chunk_or_a_group_is_missing_the_rest_completes(fitted, tmp_path):
    """A chunk that is all NaN, or all -1, is written like any other."""
    model, _, train = fitted
    x, y = torch.randn(2100, 20), torch.randint(0, 4, (2100,))
    x[5] = float("nan")
    lazy = SequentialInfluenceCalculator(model).influences(
        (x, y), train, matrix=False, top_k=3, groups=np.zeros(2100, int), test_chunk=1024
    )
    with pytest.raises(RunError, match="test sample 5") as error:
        lazy.to_zarr(tmp_path / "a.zarr")
    assert len(error.value.failures) == 1
    with pytest.warns(UserWarning, match="not finished"):
        dataset = open_influences(tmp_path / "a.zarr").load()
    assert (dataset["top_train"][:1024] == -1).all()
    expected = (
        SequentialInfluenceCalculator(model)
        .influences((x[1024:], y[1024:]), train, top_k=3)
        .to_zarr(tmp_path / "b.zarr")
    )
    assert np.array_equal(dataset["top_train"][1024:], expected["top_train"])
    assert np.isnan(dataset["group_means"]).all()


def test_damage_is_found_where_a_task_is_done_in_part(fitted, tmp_path):
    model, (x, y), train = fitted
    x = x.clone()
    x[33] = float("nan")  # in the last tile
    lazy = SequentialInfluenceCalculator(model).influences((x, y), train, test_chunk=10, train_chunk=50)
    path = tmp_path / "a.zarr"
    with pytest.raises(RunError):
        lazy.to_zarr(path)
    (path / "scores" / "c" / "0" / "0").unlink()
    with pytest.warns(DamageWarning, match="scores of samples 0 to 49"), pytest.raises(RunError):
        lazy.to_zarr(path)
    with pytest.warns(UserWarning, match="not finished"):
        assert not np.isnan(open_influences(path)["scores"][:30]).any()


def test_a_stale_part_does_not_overwrite_the_whole(fitted, tmp_path):
    """A task of a killed client may still be running, without the factors that the next run has computed."""
    model, test, train = fitted
    lazy = SequentialInfluenceCalculator(model).influences(test, train, groups=np.zeros(37, int), train_chunk=50)
    path = tmp_path / "a.zarr"
    whole = lazy.to_zarr(path).load()
    job = dataclasses.replace(lazy.job, plan=lazy.plan, store=path, store_id=Store(path).id)
    receipt = Store(path).receipt("scores", 1)
    Store(path).withdraw_receipt("scores", 1)
    run_task(job, "scores", (0,), 1)  # it had no factors when it was handed in; they are there now
    assert open_influences(path).load().identical(whole)
    stale = Record(Store(path), task=("scores", 1))
    stale.missing.append([0, 10])
    with pytest.raises(StoreError, match="has been done by another run"):
        stale.write("group_means", (slice(0, 1), slice(50, 100)), np.full((1, 50), np.nan, "f4"))
    assert Store(path).receipt("scores", 1)["written"] == receipt["written"]


@pytest.mark.parametrize("content", ["", '{"stage": "sco'])
def test_an_unreadable_receipt_is_none(fitted, tmp_path, content):
    """A file system may lose what was written last."""
    model, test, train = fitted
    lazy = SequentialInfluenceCalculator(model).influences(test, train, train_chunk=50)
    path = tmp_path / "a.zarr"
    whole = lazy.to_zarr(path).load()
    for file in (path / "receipts").iterdir():
        file.write_text(content)
    Store(path).withdraw_receipt("factors", 0)
    with pytest.warns(DamageWarning):
        again = lazy.to_zarr(path).load()
    xr.testing.assert_identical(again.drop_attrs(), whole.drop_attrs())


def test_inputs_of_a_run_that_were_lost_are_written_again(fitted, client, tmp_path):
    model, test, train = fitted
    lazy = DaskInfluenceCalculator(model, client).influences(test, train, train_chunk=10)
    path = tmp_path / "a.zarr"

    def interrupt(progress):
        if progress.tasks_done == 3 and progress.stage == "scores":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        lazy.to_zarr(path, progress=interrupt)
    # A task may still be under way, and reads what is lost: it must fail, not take it for data.
    lost = list((path / "work").glob("*/x0/c/0/0"))
    assert len(lost) == 2
    for file in lost:
        file.unlink()
    again = lazy.to_zarr(path)
    whole = lazy.to_zarr(tmp_path / "b.zarr")
    assert again.load().drop_attrs().identical(whole.load().drop_attrs())


def test_a_replacement_that_is_interrupted_leaves_the_old_store(fitted, tmp_path, monkeypatch):
    model, test, train = fitted
    path = tmp_path / "a.zarr"
    lazy = SequentialInfluenceCalculator(model).influences(test, train)
    whole = lazy.to_zarr(path).load()

    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Data, "content_now", interrupt)
        with pytest.raises(KeyboardInterrupt):
            lazy.to_zarr(path, overwrite=True)
    assert open_influences(path).load().identical(whole)
    Store(path).move_aside()  # killed in the middle
    assert lazy.to_zarr(path).load().identical(whole)
    assert [file.name for file in tmp_path.iterdir()] == ["a.zarr"]


def test_all_that_was_asked_for_is_given_in_memory(fitted):
    model, test, train = fitted
    calculator = SequentialInfluenceCalculator(model)
    result = calculator.influences(test, train, top_k=np.int64(3), self_influences=True).compute()
    assert set(result.data_vars) == {"scores", "top_scores", "top_train", "self_influences", *FACTORS}
    assert isinstance(calculator.influences(test, train).compute(), np.ndarray)
    x = train[0].clone()
    x[3] = float("nan")
    with pytest.raises(RunError) as error:
        calculator.influences(test, (x, train[1])).compute()
    assert any("compute() keeps nothing" in note for note in error.value.__notes__)
