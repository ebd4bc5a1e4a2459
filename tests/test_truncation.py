"""EK-FAC scores to a tolerance: what is kept, what stands for the rest, and how far off the scores are."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

import test_kronecker_layers as layers
from outfluence import (
    DaskInfluenceCalculator,
    EkfacInfluence,
    SequentialInfluenceCalculator,
    factors,
)
from outfluence import problem as problem_module
from outfluence.errors import DataError, NonFiniteError, ProblemError
from outfluence.rows import CoordinateRows
from outfluence.solvers import kronecker, moments
from outfluence.solvers.truncation import truncation


def expected_error(eigenvalues, regularization, kept, constants):
    """Root mean square of the error over that of scores, if entries are uncorrelated."""
    error = total = 0.0
    for name, values in eigenvalues.items():
        flat = values.flatten().double().numpy()
        inverse = 1 / (flat + regularization[name])
        used = np.full(len(flat), float(constants[name]) if name in constants else 0.0)
        used[kept[name].numpy()] = inverse[kept[name].numpy()]
        error += (((inverse - used) * flat) ** 2).sum()
        total += ((inverse * flat) ** 2).sum()
    return (error / total) ** 0.5


spectra = st.lists(st.floats(-12, 3), min_size=1, max_size=60).map(
    lambda powers: torch.tensor([10.0**power for power in powers], dtype=torch.float64)
)


@given(
    st.lists(st.tuples(spectra, st.floats(-6, 1), st.booleans()), min_size=1, max_size=4),
    st.floats(1e-4, 0.9),
)
@settings(max_examples=150, deadline=None)
def test_what_is_kept_suffices_and_is_of_the_largest_eigenvalues(units, error):
    eigenvalues = {str(i): values for i, (values, _, _) in enumerate(units)}
    regularization = {str(i): 10.0**power for i, (_, power, _) in enumerate(units)}
    with_constant = {str(i) for i, (_, _, has_one) in enumerate(units) if has_one}
    kept, constants = truncation(eigenvalues, regularization, with_constant, error)
    assert expected_error(eigenvalues, regularization, kept, constants) <= error * (1 + 1e-6)
    for name, values in eigenvalues.items():
        is_kept = torch.zeros(len(values), dtype=torch.bool)
        is_kept[kept[name]] = True
        assert len(kept[name]) == is_kept.sum()
        assert torch.equal(kept[name], kept[name].sort().values)
        if 0 < is_kept.sum() < len(values):
            assert values[is_kept].min() >= values[~is_kept].max()
        assert (name in constants) == (name in with_constant and not is_kept.all())
        if name in constants:
            rest = values[~is_kept]
            inverse = 1 / (rest + regularization[name])
            mean = (inverse * rest**2).sum() / (rest**2).sum()
            assert torch.allclose(constants[name], mean, rtol=1e-6)
    fewer, _ = truncation(eigenvalues, regularization, with_constant, min(0.95, 2 * error))
    assert sum(map(len, fewer.values())) <= sum(map(len, kept.values()))


def test_no_fewer_suffice():
    torch.manual_seed(0)
    eigenvalues = {"a": torch.rand(40).double() ** 6, "b": torch.rand(30).double() ** 9}
    regularization = {"a": 0.01, "b": 0.001}
    for error in (0.3, 0.1, 0.03, 0.01):
        kept, constants = truncation(eigenvalues, regularization, (), error)
        assert not constants
        # Without constants the best choice is that of the largest contributions, over all.
        parts = torch.cat([values / (values + regularization[name]) for name, values in eigenvalues.items()]) ** 2
        rest = parts.sort(descending=True).values.flip(0).cumsum(0).flip(0)
        needed = int((rest > error**2 * parts.sum()).sum())
        assert sum(map(len, kept.values())) == needed


def truncated(name, tolerance=0.2, cheaper=None, monkeypatch=None, **options):
    if cheaper is not None:
        monkeypatch.setattr(kronecker, "_CHEAPER", cheaper)
    model, train, test = layers.problem_of(name)
    fisher = "sampled" if name == "TiedEmbedding" else "exact"
    influence = EkfacInfluence(model, True, layers.LAMBDA, fisher=fisher, tolerance=tolerance, **options)
    return influence.fit(train), train, test


def by_hand(influence, train, test):
    """Scores by layer from the fitted eigenvectors and eigenvalues, and from what is kept, in numpy."""
    return by_hand_with(influence, influence.inverse.kept, influence.inverse.constants, train, test)


def by_hand_with(influence, kept, constants, train, test):
    inverse, scores = influence.inverse, {}
    for name, unit in inverse.units.items():
        sides = [layers.unit_rows(influence.problem.model, name, unit.bias, *data) for data in (test, train)]
        q_out, q_in = inverse.vectors[name]
        for i, rows in enumerate(sides):
            rotated = rows if q_out is None else np.einsum("goa,ngoi->ngai", q_out.numpy(), rows)
            rotated = rotated if q_in is None else np.einsum("ngai,gib->ngab", rotated, q_in.numpy())
            sides[i] = rotated.reshape(len(rows), -1)
        weights = np.full(sides[0].shape[1], float(constants.get(name, 0.0)))
        which = kept[name].numpy()
        weights[which] = 1 / (inverse.eigenvalues[name].flatten().numpy()[which] + layers.LAMBDA)
        layer = name.rpartition(".")[0] or "(root)"
        scores[layer] = scores.get(layer, 0) + (sides[0] * weights) @ sides[1].T
    return scores


@pytest.mark.parametrize("cheaper", [0, 1e9], ids=["constants", "no constants"])
@pytest.mark.parametrize("name", layers.MODELS)
def test_equals_the_dense_formula_with_what_is_kept(name, cheaper, monkeypatch):
    influence, train, test = truncated(name, cheaper=cheaper, monkeypatch=monkeypatch)
    size, kept = influence.n_parameters, sum(map(len, influence.inverse.kept.values()))
    assert 0 < kept < size
    assert bool(influence.inverse.constants) == (cheaper == 0)
    assert isinstance(influence.left_rows(*test), CoordinateRows)
    expected = by_hand(influence, train, test)
    layers.assert_scores(influence.influences_by_layer(*test, *train), expected)
    scores = influence.influences(*test, *train).numpy()
    assert np.allclose(scores, sum(expected.values()), rtol=1e-9, atol=1e-9 * np.abs(scores).max())
    # Factors, as long as the model, give the same scores: the inverse is one matrix, however rows are encoded.
    factors = influence.influence_factors(*test)
    again = influence.influences_from_factors(factors, *train).numpy()
    assert np.allclose(again, scores, rtol=1e-9, atol=1e-9 * np.abs(scores).max())
    exact = layers.fitted(name)[0].influences(*test, *train).numpy()
    assert not np.allclose(scores, exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", layers.MODELS)
def test_self_influences_are_exact(name):
    influence, train, _ = truncated(name)
    exact = EkfacInfluence(influence.problem.model, True, layers.LAMBDA, fisher=influence.solver.fisher).fit(train)
    assert torch.allclose(influence.self_influences(*train), exact.self_influences(*train), rtol=1e-10)


def test_rows_of_stored_gradients_are_encoded_alike():
    influence, train, _ = truncated("Images")
    gradients = influence.gradient_rows(*train)
    from_factors, from_dense = influence.inverse.right(gradients), influence.inverse.right(gradients.dense())
    assert torch.allclose(from_factors.coordinates, from_dense.coordinates, rtol=1e-10, atol=1e-12)
    left = influence.encode(gradients)
    assert torch.allclose(left.dot(from_factors), left.dot(from_dense), rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def digits():
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = (x / 16).float()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(400):
        some = torch.randint(0, 1400, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
    return model, (x[:1400], y[:1400]), (x[1400:1500], y[1400:1500])


def ekfac(model, tolerance, regularization=1e-3):
    return EkfacInfluence(model, True, regularization, tolerance=tolerance)


@pytest.mark.parametrize("tolerance", [0.1, 0.03, 0.01])
def test_scores_of_test_samples_are_within_the_tolerance(digits, tolerance):
    model, train, test = digits
    exact = ekfac(model, 0).fit(train).influences(*test, *train)
    influence = ekfac(model, tolerance).fit(train)
    scores = influence.influences(*test, *train)
    error = float((scores - exact).norm() / exact.norm())
    assert tolerance / 50 < error <= tolerance
    assert sum(map(len, influence.inverse.kept.values())) < 0.6 * influence.n_parameters


def test_a_tolerance_below_rounding_gives_exact_scores(digits):
    model, train, test = digits
    exact = ekfac(model, 0).fit(train).influences(*test, *train)
    assert torch.equal(ekfac(model, 1e-9).fit(train).influences(*test, *train), exact)


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, 7, float("nan")])
def test_a_tolerance_that_is_none_is_refused(digits, tolerance):
    model, train, _ = digits
    with pytest.raises(ProblemError, match="tolerance is a part of the scores' size"):
        ekfac(model, tolerance).fit(train)


def test_another_regularization_keeps_others(digits):
    model, train, test = digits
    influence = ekfac(model, 0.03).fit(train)
    other, fitted = influence.with_regularization(1e-5), ekfac(model, 0.03, 1e-5).fit(train)
    assert {n: len(k) for n, k in other.inverse.kept.items()} == {n: len(k) for n, k in fitted.inverse.kept.items()}
    assert sum(map(len, other.inverse.kept.values())) > sum(map(len, influence.inverse.kept.values()))
    assert torch.allclose(other.influences(*test, *train), fitted.influences(*test, *train), rtol=1e-3, atol=1e-2)
    explored = influence.explore_hessian_regularization(*test, [1e-3, 1e-5])
    assert torch.equal(explored[1e-5]["4"], other.influences_by_layer(*test)["4"])


def test_pickles_and_copies(digits):
    model, train, test = digits
    influence = ekfac(model, 0.03).fit(train)
    scores = influence.influences(*test, *train)
    for again in (pickle.loads(pickle.dumps(influence)), copy.deepcopy(influence)):
        assert torch.equal(again.influences(*test, *train), scores)


def test_fits_and_runs_out_of_core(digits, client, tmp_path):
    model, train, test = digits
    sequential = SequentialInfluenceCalculator(ekfac(model, 0.03))
    influence = sequential.fit(train, tmp_path / "fit.zarr")
    loaded = SequentialInfluenceCalculator(ekfac(model, 0.03)).fit(train, tmp_path / "fit.zarr")
    scores = influence.influences(*test, *train).numpy()
    assert np.array_equal(loaded.influences(*test, *train).numpy(), scores)
    whole = sequential.influences(test, train, keep_gradients=True, self_influences=True).to_zarr(tmp_path / "a.zarr")
    on_dask = DaskInfluenceCalculator(influence, client).influences(test, train).to_zarr(tmp_path / "b.zarr")
    for found in (whole["scores"].values, on_dask["scores"].values):
        assert np.allclose(found, scores, rtol=1e-4, atol=1e-4 * np.abs(scores).max())
    later = sequential.influences(test, from_store=tmp_path / "a.zarr").compute()
    assert np.allclose(later, scores, rtol=1e-4, atol=1e-4 * np.abs(scores).max())
    factors = sequential.influence_factors(test).to_zarr(tmp_path / "factors.zarr")
    from_factors = sequential.influences_from_factors(factors, train).compute()
    assert np.allclose(from_factors, scores, rtol=1e-4, atol=1e-4 * np.abs(scores).max())
    # What is kept depends on the regularization: rows kept with another are rows of something else.
    other = SequentialInfluenceCalculator(influence.with_regularization(1e-2))
    with pytest.raises(DataError, match="basis"):
        other.influences(test, from_store=tmp_path / "a.zarr")


@pytest.mark.parametrize("rank", [40, 700, 10**6])
def test_a_rank_keeps_so_many_entries_and_says_what_it_loses(digits, rank, tmp_path):
    model, train, test = digits
    exact = ekfac(model, 0).fit(train)
    influence = EkfacInfluence(model, True, 1e-3, rank=rank).fit(train)
    kept, values = influence.inverse.kept, influence.inverse.eigenvalues
    n_kept = sum(map(len, kept.values()))
    if rank == 10**6:  # all that add anything
        assert influence.lost_share < 1e-12
    else:
        assert n_kept == rank
    by_unit = dict.fromkeys(values, 1e-3)
    lost = expected_error(values, by_unit, kept, influence.inverse.constants) ** 2
    assert influence.lost_share == pytest.approx(lost, abs=1e-12)
    assert exact.lost_share == 0
    assert influence.left_rows(*test).coordinates.shape[1] == n_kept
    fewer = EkfacInfluence(model, True, 1e-3, rank=rank // 10).fit(train)
    assert fewer.lost_share > influence.lost_share or rank == 10**6
    scores = influence.influences(*test, *train)
    if rank == 10**6:
        difference = scores - exact.influences(*test, *train)
        assert float(difference.norm()) < 1e-4 * float(scores.norm())
    other = influence.with_regularization(1e-2)
    assert sum(map(len, other.inverse.kept.values())) <= rank
    assert other.lost_share <= influence.lost_share + 1e-12  # the larger lambda, the more the constant explains
    loaded = [
        SequentialInfluenceCalculator(EkfacInfluence(model, True, 1e-3, rank=rank)).fit(train, tmp_path / "fit.zarr")
        for _ in range(2)
    ][1]
    assert torch.allclose(loaded.influences(*test, *train), scores, rtol=1e-4, atol=1e-4 * float(scores.abs().max()))
    stored = SequentialInfluenceCalculator(loaded).influences(test, train).to_zarr(tmp_path / "scores.zarr")
    assert stored.attrs["outfluence"]["lost_share"] == pytest.approx(lost, rel=1e-3, abs=1e-12)


@given(st.lists(st.tuples(spectra, st.floats(-6, 1), st.booleans()), min_size=1, max_size=4), st.integers(1, 250))
@settings(max_examples=100, deadline=None)
def test_a_rank_is_used_whole(units, rank):
    eigenvalues = {str(i): values for i, (values, _, _) in enumerate(units)}
    regularization = {str(i): 10.0**power for i, (_, power, _) in enumerate(units)}
    kept, constants = truncation(eigenvalues, regularization, {str(i) for i, (_, _, c) in enumerate(units) if c}, rank)
    n_kept, n_all = sum(map(len, kept.values())), sum(map(len, eigenvalues.values()))
    assert n_kept <= rank
    # Where fewer are kept, the others add nothing that numbers can tell.
    assert n_kept == min(rank, n_all) or expected_error(eigenvalues, regularization, kept, constants) < 1e-7


def test_a_low_rank_is_used_where_only_many_entries_together_beat_a_constant():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 4))
    train = torch.randn(100, 200), torch.randint(0, 4, (100,))
    lost = []
    for rank in (1, 10, 200, 500):
        influence = EkfacInfluence(model, True, None, rank=np.int64(rank)).fit(train)
        assert sum(map(len, influence.inverse.kept.values())) == rank
        lost.append(influence.lost_share)
    assert lost == sorted(lost, reverse=True)


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 2.5}, {"rank": True}, {"rank": 3, "tolerance": 0.1}])
def test_a_rank_that_is_none_is_refused(digits, options):
    model, train, _ = digits
    with pytest.raises(ProblemError, match=r"rank must be a whole number, at least 1|a tolerance or a rank, not both"):
        EkfacInfluence(model, True, 1e-3, **options).fit(train)


class OverPositions(nn.Module):
    """A network at each of any number of positions, and the mean of its outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 6), nn.Linear(6, layers.CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x))).mean(1)


@pytest.mark.parametrize("tolerance", [0.0, 0.2])
@pytest.mark.parametrize(("fitted_with", "test_with", "train_with"), [(8, 2, 30), (1, 5, 1), (30, 1, 2)])
def test_samples_of_other_lengths_than_those_of_the_fit(tolerance, fitted_with, test_with, train_with):
    torch.manual_seed(0)
    model = OverPositions().double()
    fit, test, train = (
        (torch.randn(n, t, 3).double(), torch.randint(0, layers.CLASSES, (n,)))
        for n, t in ((20, fitted_with), (4, test_with), (6, train_with))
    )
    influence = EkfacInfluence(model, True, layers.LAMBDA, fisher="exact", tolerance=tolerance).fit(fit)
    if not tolerance:  # the same formula, with every entry kept
        everything = {name: torch.arange(v.numel()) for name, v in influence.inverse.eigenvalues.items()}
        expected = by_hand_with(influence, everything, {}, train, test)
    else:
        expected = by_hand(influence, train, test)
    layers.assert_scores(influence.influences_by_layer(*test, *train), expected)


def test_a_broken_label_is_named_with_a_tolerance(digits):
    model, (x, y), _ = digits
    loss = nn.MSELoss()
    targets = F.one_hot(y, 10).float()
    targets[3, 0] = float("nan")
    influence = EkfacInfluence(model, True, 1e-3, loss=loss, tolerance=0.1)
    with pytest.raises(NonFiniteError, match="training sample 3") as found:
        influence.fit((x[:64], targets[:64]))
    assert found.value.samples == (3,) or list(found.value.samples) == [3]


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_few_samples_with_a_tolerance(digits, n):
    model, (x, y), test = digits
    exact = ekfac(model, 0).fit((x[:n], y[:n])).influences(*test, x[:n], y[:n])
    scores = ekfac(model, 0.1).fit((x[:n], y[:n])).influences(*test, x[:n], y[:n])
    assert float((scores - exact).norm() / exact.norm()) < 0.5


@pytest.mark.parametrize("tolerance", [0.0, 0.2])
@pytest.mark.parametrize("name", layers.MODELS)
def test_pieces_do_not_matter(name, tolerance, monkeypatch):
    """Batches through the model, stripes of covariances and entries of a few samples at a time, all of them tiny."""
    whole, train, test = truncated(name, tolerance)
    monkeypatch.setattr(problem_module, "_NUMBERS", 1)
    monkeypatch.setattr(problem_module, "_FEWEST", 3)
    monkeypatch.setattr(moments, "_STRIPE", 2)
    monkeypatch.setattr(factors, "_NEAR", 1)
    pieces, _, _ = truncated(name, tolerance)
    assert pieces.problem.batch_size == 3
    for unit, values in whole.inverse.eigenvalues.items():
        assert torch.allclose(pieces.inverse.eigenvalues[unit], values, rtol=1e-6, atol=1e-9 * float(values.max()))
    scores = whole.influences(*test, *train)
    again = pieces.influences(*test, *train)
    assert float((again - scores).norm()) <= 1e-6 * float(scores.norm())
