"""What `assess` finds: its numbers against a dense reference, its words on models that are good and bad on purpose."""

from __future__ import annotations

import copy
import json
import os
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import reference
from cases import make_case
from outfluence import (
    ArnoldiInfluence,
    CgInfluence,
    DaskInfluenceCalculator,
    Data,
    DirectInfluence,
    EkfacCgInfluence,
    EkfacInfluence,
    EnsembleInfluence,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
    ProjectedInfluence,
    SequentialInfluenceCalculator,
    Store,
    TracInInfluence,
    assess,
    open_history,
    open_influences,
    plotting,
    tasks,
)
from outfluence.assessment import _some
from outfluence.errors import DataError, Interrupted, ProblemError, RunError

GN = {"second_order_mode": "gauss_newton"}


def spearman(a, b):
    return np.mean([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])


def in_batches(data):
    """10 + 10 + 4."""
    return DataLoader(TensorDataset(*data), batch_size=10)


def matrix_of(case, which):
    if which == "empirical":
        return reference.fisher(case.model, case.loss, *case.train)
    return {"gn": reference.gauss_newton, "hessian": reference.hessian}[which](case.model, case.loss, *case.train)


METHODS = {
    "ekfac": (lambda m, f: EkfacInfluence(m, True, 0.05, loss=f, fisher="exact"), "gn"),
    "empirical": (lambda m, f: EkfacInfluence(m, True, 0.05, loss=f, fisher="empirical"), "empirical"),
    "arnoldi": (lambda m, f: ArnoldiInfluence(m, f, 0.05, rank=6, **GN), "gn"),
    "projected": (lambda m, f: ProjectedInfluence(m, f, 0.05, 20, kernel="exact"), "gn"),
    "projected empirical": (lambda m, f: ProjectedInfluence(m, f, 0.05, 20, "sjlt", "empirical"), "empirical"),
    "nystroem": (lambda m, f: NystroemSketchInfluence(m, f, 0.05, 6, **GN), "gn"),
    "harmonic": (lambda m, f: InverseHarmonicMeanInfluence(m, f, 0.05), "empirical"),
    "hessian": (lambda m, f: CgInfluence(m, f, 0.5, rtol=0.1), "hessian"),
    "dampened": (lambda m, f: LissaInfluence(m, f, 0.05, scale=5.0, dampen=0.1, maxiter=2000, **GN), "gn"),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_numbers_are_those_of_a_dense_reference(name):
    case = make_case("mlp")
    make, which = METHODS[name]
    found = assess(make(case.model, case.loss), case.test, in_batches(case.train))
    damping = {"hessian": 0.5, "dampened": 0.55}.get(name, 0.05)
    matrix = matrix_of(case, which)
    g_test, g_train = (reference.gradients(case.model, case.loss, *data) for data in (case.test, case.train))
    exact, plain = reference.influences(matrix, damping, g_test, g_train), g_test @ g_train.T
    scores = make(case.model, case.loss).fit(in_batches(case.train)).influences(*case.test, *case.train).numpy()

    assert (found.n_test, found.n_train) == (7, 24)
    assert found.residual <= 1e-2
    assert found.regularization == pytest.approx(damping)
    # With what the solve leaves two scores of a sample may change places.
    assert found.spearman.value == pytest.approx(spearman(scores, exact), abs=0.01)
    assert found.gradients.value == pytest.approx(spearman(plain, exact), abs=0.01)
    assert found.signs.value == pytest.approx((np.sign(scores) == np.sign(exact)).mean(), abs=0.02)
    highest = [np.argsort(-s, axis=1)[:, :10] for s in (scores, exact)]
    common = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*highest, strict=True)])
    assert found.top.value == pytest.approx(common, abs=0.02)
    halves = np.array([np.random.default_rng(i).permutation(24) < 12 for i in range(2000)]).T
    assert found.sums.value == pytest.approx(spearman(scores @ halves, exact @ halves), abs=0.05)
    assert found.gradient_sums.value == pytest.approx(spearman(plain @ halves, exact @ halves), abs=0.05)
    gained = (found.sums.value - found.gradient_sums.value) / (1 - found.gradient_sums.value)
    assert found.gained == pytest.approx(gained)

    solved = np.linalg.solve(matrix + damping * np.eye(len(matrix)), g_test.T).T
    assert found.damping == pytest.approx(np.mean(damping * (solved * g_test).sum(1) / (g_test**2).sum(1)), rel=2e-2)
    if name == "arnoldi":
        vectors = np.linalg.eigh(matrix)[1][:, -6:]
        assert found.captured == pytest.approx(((g_test @ vectors) ** 2).sum() / (g_test**2).sum(), rel=1e-3)
    if name == "projected":  # orthogonal directions
        model = make(case.model, case.loss).fit(case.train)
        inside = model.inverse.dense(model.right_rows(model.gradient_rows(*case.test))).values.numpy()
        assert found.captured == pytest.approx((inside**2).sum() / (g_test**2).sum(), rel=1e-6)
    assert (found.captured is None) == (name not in ("arnoldi", "nystroem", "projected", "projected empirical"))


@pytest.mark.parametrize("name", ["mlp", "nested", "mlp_regression", "dict_inputs"])
def test_the_newton_step_is_that_of_a_dense_reference(name):
    case = make_case(name)
    found = assess(DirectInfluence(case.model, case.loss, 5.0), case.test, case.train)
    hessian = reference.hessian(case.model, case.loss, *case.train)
    values = np.linalg.eigvalsh(hessian)
    assert [found.smallest_eigenvalue, found.largest_eigenvalue] == pytest.approx(values[[0, -1]].tolist(), rel=1e-6)
    damped = hessian + max(values[-1] / 20, -1.5 * values[0]) * np.eye(len(hessian))
    mean = reference.gradients(case.model, case.loss, *case.train).mean(0)
    theta = reference.flat(reference.trainable(case.model), reference.trainable(case.model)).numpy()
    # The least of (g + c theta)^T (H + d)^-1 (g + c theta) / 2 over all c >= 0, tried one by one.
    tried = mean + np.linspace(0, 5, 20_001)[:, None] * theta
    promised = (tried * np.linalg.solve(damped, tried.T).T).sum(1) / 2
    x, y = case.train
    losses = [
        case.loss(reference.call(case.model, reference.take(x, i)), reference.take(y, i)).item() for i in range(24)
    ]
    assert found.newton == pytest.approx(promised.min() / np.mean(losses), rel=1e-2)
    assert found.weight_decay == pytest.approx(np.linspace(0, 5, 20_001)[promised.argmin()], abs=1e-3)


def half_squared_error(output, y):
    return 0.5 * ((output - y) ** 2).sum()


def least_squares(n, decay):
    """A linear model of 40 features at the minimum of its loss with weight decay."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (40, 1))
    y = x[:, :20].sum(1, keepdim=True) / 3 + noise
    model = nn.Linear(40, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(x.T @ x / n + decay * torch.eye(40).double(), x.T @ y / n).T)
    return model, (x, y)


def test_what_a_sample_shows_by_chance_is_no_finding():
    model, data = least_squares(4000, 0.0)
    found = [
        assess(DirectInfluence(model, half_squared_error, 0.1), data, data, n_train=200, seed=seed) for seed in range(4)
    ]
    # By chance alone the mean of 200 gradients of 40 numbers promises 40/200 of the loss.
    assert np.mean([one.newton for one in found]) < 0.06
    assert not any(one.findings for one in found)
    with torch.no_grad():
        model.weight += 0.15
    moved = assess(DirectInfluence(model, half_squared_error, 0.1), data, data, n_train=200)
    assert moved.newton > 0.3
    assert "far from a stationary point" in moved.findings[0]


def test_a_model_trained_with_weight_decay_is_at_rest():
    model, data = least_squares(300, 0.5)
    found = assess(DirectInfluence(model, half_squared_error, 0.1), data, data)
    assert found.weight_decay == pytest.approx(0.5, rel=1e-2)
    assert found.newton < 1e-4


# On digits.


class Digits:
    def __init__(self):
        digits = load_digits()
        order = np.random.default_rng(0).permutation(1500)
        x, y = torch.tensor(digits.data[order] / 16, dtype=torch.float32), torch.tensor(digits.target[order])
        self.train, self.test = (x[:1200], y[:1200]), (x[1200:], y[1200:])
        self.good, self.stopped = self.trained(30), self.trained(2)

    def trained(self, epochs):
        """By SGD, whose step falls to zero over 30 epochs."""
        torch.manual_seed(0)
        model, (x, y) = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), self.train
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30 * 20)
        for _ in range(epochs):
            for some in torch.randperm(1200).split(60):
                optimizer.zero_grad()
                F.cross_entropy(model(x[some]), y[some]).backward()
                optimizer.step()
                schedule.step()
        return model.eval().requires_grad_(True)


@pytest.fixture(scope="module")
def digits():
    with torch.random.fork_rng(devices=[]):
        return Digits()


def arnoldi(model, rank, damping=1e-2):
    return ArnoldiInfluence(model, F.cross_entropy, damping, rank=rank, tol=1e-2, **GN)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: EkfacInfluence(m, True, 1e-3),
        lambda m: EkfacCgInfluence(m, F.cross_entropy, 1e-2),
        lambda m: arnoldi(m, 100),
    ],
)
def test_a_good_model_and_method_pass(digits, make):
    found = assess(make(digits.good), digits.test, digits.train, n_train=600)
    assert found.findings == []
    assert "Nothing wrong was found." in str(found)


@pytest.mark.parametrize(
    ("model", "make", "words"),
    [
        ("stopped", lambda m: EkfacInfluence(m, True, 1e-3), ["the model is far from a stationary point"]),
        ("good", lambda m: EkfacInfluence(m, True, 1.0), ["the regularization of 1.0e+00 swamps the curvature"]),
        ("good", lambda m: EkfacCgInfluence(m, F.cross_entropy, 10.0), ["swamps the curvature"]),
        ("good", lambda m: arnoldi(m, 5), ["the rank is too low"]),
        ("good", lambda m: InverseHarmonicMeanInfluence(m, F.cross_entropy, 1e-3), ["the method is too rough"]),
        (
            "good",
            lambda m: CgInfluence(m, F.cross_entropy, 1e-3, maxiter=5, warn_on_max_iteration=False),
            ["the Hessian has negative curvature"],
        ),
        ("stopped", lambda m: arnoldi(m, 2, 1e-3), ["far from a stationary point", "the rank is too low"]),
    ],
)
def test_what_is_wrong_is_said_in_words(digits, model, make, words):
    found = assess(make(getattr(digits, model)), digits.test, digits.train, n_train=600)
    assert len(found.findings) == len(words), found
    assert all(word in finding for word, finding in zip(words, found.findings, strict=True)), found
    assert all(f"- {finding}" in str(found) for finding in found.findings)


def test_little_curvature_left_is_no_swamp(digits):
    """Where the curvature is the same in all directions, exact scores are products of gradients at any lambda."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(400, 10, generator=generator, dtype=torch.float64))[0] * 20
    y = x.sum(1, keepdim=True) + torch.randn(400, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(10, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    small, large = (
        assess(DirectInfluence(model, half_squared_error, damping), (x, y), (x, y)) for damping in (1e-3, 1e3)
    )
    assert small.gradients.value > 0.99
    assert small.findings == []
    assert "swamps" in large.findings[0]


def test_the_seed_chooses_the_samples_and_nothing_of_the_users_changes(digits):
    model = copy.deepcopy(digits.good).train()
    influence = EkfacInfluence(model, True, 1e-3).fit(digits.train)
    inverse, before = influence.inverse, copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first, again, other = (
        assess(influence, digits.test, digits.train, n_test=5, n_train=50, seed=seed).to_json() for seed in (0, 0, 1)
    )
    assert (first["n_test"], first["n_train"]) == (5, 50)
    assert json.dumps(first) == json.dumps(again)
    assert first["spearman"] != other["spearman"]
    assert influence.inverse is inverse
    assert model.training
    assert all(p.grad is None and torch.equal(before[name], p) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert not EkfacInfluence(model, True, 1e-3).is_fitted


def test_chunks_of_the_source_are_read_once(digits):
    x, y = (column.numpy() for column in digits.train)
    reads = []

    class Chunked:
        shape, dtype, chunks = x.shape, x.dtype, (100, 64)

        def __getitem__(self, index):
            reads.append(index)
            return x[index]

    some = _some(Data.from_arrays(Chunked(), y), 300, np.random.default_rng(0))
    whole = [tuple(row) for row in np.column_stack([x, y]).tolist()]
    chosen = [whole.index(tuple(row)) for row in np.column_stack([some.x.numpy(), some.y.numpy()]).tolist()]
    assert len(set(chosen)) == 300
    assert chosen == sorted(chosen)
    assert len(reads) <= 13


def test_too_few_samples_are_refused(digits):
    influence = EkfacInfluence(digits.good, True, 1e-3)
    with pytest.raises(DataError, match="n_train"):
        assess(influence, digits.test, digits.train, n_train=2)
    with pytest.raises(DataError, match="three training samples"):
        assess(influence, digits.test, tuple(part[:2] for part in digits.train))


def test_ensembles_are_assessed_model_by_model(digits):
    models = [EkfacInfluence(copy.deepcopy(digits.good), True, 1e-3) for _ in range(2)]
    ensemble = EnsembleInfluence(models)
    with pytest.raises(ProblemError, match="several models are assessed one by one"):
        assess(ensemble, digits.test, digits.train)
    tracin = TracInInfluence(digits.good, F.cross_entropy, [digits.good.state_dict()])
    for one in (EnsembleInfluence(models[:1]), tracin):
        with pytest.raises(ProblemError, match="several models are assessed one by one"):
            assess(one, digits.test, digits.train)
    train = tuple(part[:90] for part in digits.train)
    with pytest.raises(ProblemError, match="several models are assessed one by one"):
        SequentialInfluenceCalculator(ensemble.fit(train)).influences(train, train, assess=True)


# In stores.


@pytest.fixture
def small(digits):
    train, test = (tuple(part[:n] for part in data) for data, n in ((digits.train, 90), (digits.test, 8)))
    return EkfacInfluence(digits.good, True, 1e-3).fit(train), test, train


def test_a_worker_finds_the_same(tmp_path, small, client):
    model, test, train = small
    lazy = DaskInfluenceCalculator(model, client).influences(test, train, assess=True)
    assert lazy.to_zarr(tmp_path / "run.zarr").attrs["assessment"] == str(assess(model, test, train))
    assert not Store(tmp_path / "run.zarr").receipt("assess", 0)["worker"].endswith(f":{os.getpid()}")


def test_a_calculator_keeps_what_it_finds_in_the_store(tmp_path, small):
    model, test, train = small
    calculator = SequentialInfluenceCalculator(model)
    expected = assess(model, test, train)
    lazy = calculator.influences(test, train, assess=True, train_chunk=30)
    found = lazy.to_zarr(tmp_path / "run.zarr")
    assert found.attrs["assessment"] == open_influences(tmp_path / "run.zarr").attrs["assessment"] == str(expected)
    receipt = Store(tmp_path / "run.zarr").receipt("assess", 0)
    assert receipt["assessment"]["spearman"]["value"] == expected.spearman.value
    assert receipt["assessment"]["findings"] == expected.findings
    # It changes neither the scores nor what the store is: asked for or not, later or before.
    plain = calculator.influences(test, train, train_chunk=30).to_zarr(tmp_path / "plain.zarr")
    assert "assessment" not in plain.attrs
    assert np.array_equal(plain.scores, found.scores)
    assert "assessment" in calculator.influences(test, train, train_chunk=30).to_zarr(tmp_path / "run.zarr").attrs
    later = calculator.influences(test, train, train_chunk=30, assess=True).to_zarr(tmp_path / "plain.zarr")
    assert later.attrs["assessment"] == str(expected)
    assert sorted(set(open_history(tmp_path / "run.zarr").stage.values)) == ["assess", "factors", "scores"]
    plotting.memory(open_history(tmp_path / "run.zarr"))


def test_a_run_that_goes_on_assesses_once(tmp_path, small, monkeypatch):
    model, test, train = small
    lazy = SequentialInfluenceCalculator(model).influences(test, train, assess=True, train_chunk=30)
    calls, true = [], tasks.assess

    def failing(*arguments):
        calls.append(1)
        raise OSError("no")

    monkeypatch.setattr(tasks, "assess", failing)
    with pytest.raises(RunError, match="assess: OSError: no"):
        lazy.to_zarr(tmp_path / "run.zarr")
    store = Store(tmp_path / "run.zarr")
    assert store.is_complete
    assert len(calls) == 2  # repeated once, as any task

    def interrupting(progress):
        raise KeyboardInterrupt

    def counting(*arguments):
        calls.append(1)
        return true(*arguments)

    monkeypatch.setattr(tasks, "assess", counting)
    with pytest.raises(Interrupted):
        lazy.to_zarr(tmp_path / "run.zarr", overwrite=True, progress=interrupting)
    assert not Store(tmp_path / "run.zarr").is_complete
    assert "Newton step" in lazy.to_zarr(tmp_path / "run.zarr").attrs["assessment"]
    assert "Newton step" in lazy.to_zarr(tmp_path / "run.zarr").attrs["assessment"]
    assert len(calls) == 3


def test_in_memory_and_from_kept_gradients(tmp_path, small):
    model, test, train = small
    calculator = SequentialInfluenceCalculator(model)
    computed = calculator.influences(test, train, assess=True).compute()
    assert "Newton step" in computed.attrs["assessment"]
    calculator.influences(test, train, keep_gradients=True).to_zarr(tmp_path / "kept.zarr")
    with pytest.raises(DataError, match="assess needs the training data"):
        calculator.influences(test, from_store=tmp_path / "kept.zarr", assess=True)
