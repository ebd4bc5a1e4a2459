"""Retraining on the executors, and what is made of it."""

from __future__ import annotations

import json
import random

import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import nn

from outfluence import DirectInfluence
from outfluence.errors import DataError, NonFiniteError, RunError, StoreMismatchError
from outfluence.fidelity import (
    leave_one_out,
    linear_datamodeling_score,
    mislabel_detection,
    random_subsets,
    retrain,
    topk_removal,
)
from outfluence.store import Store

N, N_TEST = 24, 5


def ridge_data():
    generator = torch.Generator().manual_seed(0)
    x, x_test = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (N, N_TEST))
    w = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    y, y_test = (z @ w + 0.3 * torch.randn(len(z), 1, generator=generator, dtype=torch.float64) for z in (x, x_test))
    return x, y, x_test, y_test


def half_squared_error(output, y):
    return 0.5 * ((output - y) ** 2).sum()


class Fit:
    """Least squares with weight decay, in closed form; the seed adds noise to the labels."""

    def __init__(self, x, y, noise=0.0, log=None):
        self.x, self.y, self.noise, self.log = x, y, noise, log

    def __call__(self, indices, seed):
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{len(indices)} {seed}\n")
        x, y = self.x[indices], self.y[indices]
        y = y + self.noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
        model = nn.Linear(3, 1, bias=False).double()
        eye = torch.eye(3, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(torch.linalg.solve(x.T @ x + 1e-2 * len(indices) * eye, x.T @ y).T)
        return model


def scores_of(x, y, x_test, y_test):
    model = Fit(x, y)(np.arange(N), 0)
    return DirectInfluence(model, half_squared_error, 1e-2).fit((x, y)).influences(x_test, y_test, x, y).numpy()


def test_subsets_are_random_halves():
    subsets = random_subsets(101, 7, seed=3)
    assert subsets.shape == (7, 101)
    assert (subsets.sum(1) == 50).all()
    assert len(np.unique(subsets, axis=0)) == 7
    assert np.array_equal(subsets, random_subsets(101, 7, seed=3))
    assert not np.array_equal(subsets, random_subsets(101, 7, seed=4))
    with pytest.raises(DataError, match="fraction"):
        random_subsets(10, 2, fraction=1.0)


@pytest.mark.parametrize("kind", [np.asarray, torch.Tensor.numpy, da.from_array, lambda t: xr.DataArray(t.numpy())])
def test_the_score_is_the_mean_rank_correlation(kind):
    generator = torch.Generator().manual_seed(0)
    scores, losses = torch.randn(4, 12, generator=generator), torch.randn(9, 2, 4, generator=generator).numpy()
    subsets = random_subsets(12, 9)
    expected = []
    for i in range(4):
        predicted = [-sum(scores[i, j].item() for j in range(12) if subset[j]) for subset in subsets]
        expected.append(spearmanr(predicted, losses.mean(1)[:, i]).statistic)
    given = kind(scores.numpy()) if kind is da.from_array else kind(scores)
    estimate = linear_datamodeling_score(given, subsets, losses)
    assert np.allclose(estimate.each, expected)
    assert estimate.value == pytest.approx(np.mean(expected))
    assert estimate.low < estimate.value < estimate.high
    assert str(estimate).startswith(f"{estimate.value:.3f} (")


def test_equal_losses_count_as_zero():
    subsets, scores = random_subsets(12, 9), np.random.default_rng(0).normal(size=(2, 12))
    losses = -(scores @ subsets.T).T
    losses[:, 1] = 1.0
    assert linear_datamodeling_score(scores, subsets, losses).each.tolist() == pytest.approx([1.0, 0.0])


def test_what_does_not_fit_together_is_refused():
    subsets = random_subsets(12, 9)
    with pytest.raises(DataError, match="do not fit together"):
        linear_datamodeling_score(np.zeros((4, 11)), subsets, np.zeros((9, 4)))
    with pytest.raises(DataError, match="do not fit together"):
        linear_datamodeling_score(np.zeros((4, 12)), subsets[:2], np.zeros((2, 4)))
    with pytest.raises(NonFiniteError, match="diverge"):
        linear_datamodeling_score(np.zeros((4, 12)), subsets, np.full((9, 4), np.nan))
    unfinished = np.zeros((4, 12))
    unfinished[2, 3] = np.nan
    with pytest.raises(NonFiniteError, match=r"test samples \[2\] are NaN"):
        linear_datamodeling_score(unfinished, subsets, np.zeros((9, 4)))


def test_of_one_test_sample_there_is_no_interval():
    subsets, scores = random_subsets(12, 9), np.random.default_rng(0).normal(size=(1, 12))
    estimate = linear_datamodeling_score(scores, subsets, -(scores @ subsets.T).T)
    assert estimate.value == pytest.approx(1)
    assert np.isnan([estimate.low, estimate.high]).all()


def test_what_would_fail_after_training_is_refused_before(tmp_path):
    _, _, x_test, y_test = ridge_data()
    with pytest.raises(DataError, match="for 5 test samples"):
        leave_one_out(np.zeros((4, N)), None, (x_test, y_test), tmp_path / "run", samples=range(5))
    with pytest.raises(DataError, match="three samples or more"):
        leave_one_out(np.zeros((5, N)), None, (x_test, y_test), tmp_path / "run", samples=[1, 2])
    with pytest.raises(DataError, match="for 5 test samples"):
        topk_removal(np.zeros((4, N)), None, (x_test, y_test), tmp_path / "run", ks=[1])
    with pytest.raises(DataError, match="seeds"):
        retrain(None, np.ones((1, N), bool), (x_test, y_test), tmp_path / "run", seeds=0)
    assert not (tmp_path / "run").exists()


def test_intervals_cover_the_mean():
    """Of samples with a known mean, the 95% interval holds it nearly always, and is no wider than it must be."""
    generator = np.random.default_rng(0)
    subsets, hits, widths = random_subsets(30, 40), 0, []
    truth = 0.0
    for _ in range(40):  # scores of noise: no correlation
        estimate = linear_datamodeling_score(generator.normal(size=(25, 30)), subsets, generator.normal(size=(40, 25)))
        hits += estimate.low <= truth <= estimate.high
        widths.append(estimate.high - estimate.low)
    assert hits >= 33
    assert np.mean(widths) == pytest.approx(2 * 1.96 / np.sqrt(39) / 5, rel=0.2)  # of a rank correlation: 1 / (m - 1)


def test_mislabel_detection_is_the_area_under_the_curve():
    generator = np.random.default_rng(0)
    wrong = generator.random(300) < 0.2
    suspicion = np.round(generator.normal(size=300) + wrong, 1)  # with ties
    estimate = mislabel_detection(suspicion, wrong)
    assert estimate.value == pytest.approx(roc_auc_score(wrong, suspicion))
    assert 0.5 < estimate.low < estimate.value < estimate.high < 1
    with pytest.raises(DataError, match="some of each"):
        mislabel_detection(suspicion, np.ones(300, bool))
    with pytest.raises(DataError, match="one number a sample"):
        mislabel_detection(suspicion, wrong[:10])


def test_scores_predict_retraining_of_least_squares(tmp_path):
    """Where the loss is quadratic, the prediction is nearly right; and turned around it is wrong."""
    x, y, x_test, y_test = ridge_data()
    scores, subsets = scores_of(x, y, x_test, y_test), random_subsets(N, 30, fraction=0.9)
    options = {"loss": half_squared_error, "sequential": True}
    found = retrain(Fit(x, y), subsets, (x_test, y_test), tmp_path / "half", **options)
    assert found.losses.dims == ("subset", "seed", "test")
    expected = half_squared_error(Fit(x, y)(np.flatnonzero(subsets[4]), 0)(x_test)[2], y_test[2]).item()
    assert found.losses.values[4, 0, 2] == pytest.approx(expected, rel=1e-12)
    assert np.array_equal(found.subsets.values, subsets)
    assert linear_datamodeling_score(scores, subsets, found.losses).value > 0.85
    assert linear_datamodeling_score(-scores, subsets, found.losses).value < -0.85
    left_out = leave_one_out(scores, Fit(x, y), (x_test, y_test), tmp_path / "one", samples=range(0, N, 2), **options)
    assert left_out.value > 0.95


def test_retraining_goes_on_where_it_stopped(tmp_path):
    x, y, x_test, y_test = ridge_data()
    subsets, log = random_subsets(N, 4), tmp_path / "log"

    class Failing(Fit):
        def __call__(self, indices, seed):
            if (tmp_path / "broken").exists() and seed == 1 and np.array_equal(indices, np.flatnonzero(subsets[2])):
                raise OSError("the disk is full")
            return super().__call__(indices, seed)

    train = Failing(x, y, 0.1, log)
    options = {"loss": half_squared_error, "seeds": 2, "sequential": True}
    (tmp_path / "broken").touch()
    with pytest.raises(RunError, match=r"(?s)training on subset 2 with seed 1.*disk is full"):
        retrain(train, subsets, (x_test, y_test), tmp_path / "run", **options)
    assert len(log.read_text().splitlines()) == 7
    (tmp_path / "broken").unlink()
    found = retrain(train, subsets, (x_test, y_test), tmp_path / "run", **options).load()
    assert len(log.read_text().splitlines()) == 8
    again = retrain(train, subsets, (x_test, y_test), tmp_path / "run", **options).load()
    assert len(log.read_text().splitlines()) == 8
    assert found.identical(again)
    assert not np.isnan(found.losses.values).any()
    assert np.ptp(found.losses.values, axis=1).min() > 0  # seeds differ
    with pytest.raises(StoreMismatchError, match="seeds"):
        retrain(train, subsets, (x_test, y_test), tmp_path / "run", **options | {"seeds": 3})
    with pytest.raises(StoreMismatchError, match="train"):
        retrain(Failing(x, 2 * y, 0.1, log), subsets, (x_test, y_test), tmp_path / "run", **options)
    with pytest.raises(StoreMismatchError, match="subsets"):
        retrain(train, ~subsets, (x_test, y_test), tmp_path / "run", **options)
    receipts = Store(tmp_path / "run").receipts("retrain")
    assert json.dumps(receipts[0])
    assert {"train", "losses", "write"} == set(receipts[0]["seconds_by_part"])


def test_workers_train_the_same_models(client, tmp_path):
    x, y, x_test, y_test = ridge_data()
    subsets, options = random_subsets(N, 5), {"loss": half_squared_error, "seeds": 2}
    here = retrain(Fit(x, y, 0.1), subsets, (x_test, y_test), tmp_path / "here", sequential=True, **options)
    there = retrain(Fit(x, y, 0.1), subsets, (x_test, y_test), tmp_path / "there", client=client, **options)
    assert np.allclose(here.losses.values, there.losses.values, rtol=1e-12, atol=0)
    assert not (tmp_path / "there" / "work").exists()


def test_empty_subsets_are_refused(tmp_path):
    x, y, x_test, y_test = ridge_data()
    for subsets in (np.zeros((2, N), bool), np.ones((2, N)), np.ones(N, bool)):
        with pytest.raises(DataError, match="subsets must be"):
            retrain(Fit(x, y), subsets, (x_test, y_test), tmp_path / "run", sequential=True)
    assert not (tmp_path / "run").exists()


class Nearest(nn.Module):
    """Class scores: minus the squared distance to the mean of a class."""

    def __init__(self, x, y):
        super().__init__()
        means = torch.stack([x[y == c].mean(0) if (y == c).any() else torch.full((2,), 9.0) for c in (0, 1)])
        self.means = nn.Parameter(means)

    def forward(self, x):
        return -(x[:, None] - self.means).square().sum(2)


def test_without_its_strongest_samples_a_prediction_flips(tmp_path):
    """Three near samples carry one test sample; without them it goes to the other class, without others it does not."""
    x = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 0.1], [6.0, 0.0], [0.0, 6.0]] + [[2.5, 2.5]] * 5)
    y = torch.tensor([0, 0, 0, 0, 0] + [1] * 5)
    test = torch.zeros(1, 2), torch.tensor([0])
    scores = -torch.cdist(test[0], x).numpy()
    found = topk_removal(
        scores, lambda i, _seed: Nearest(x[i], y[i]), test, tmp_path / "run", ks=[1, 3], sequential=True
    )
    assert found.top.values[:, 0].tolist() == [0.0, 1.0]
    assert found.random.values[:, 0].tolist() == [0.0, 0.0]
    with pytest.raises(DataError, match="from 1 to 9"):
        topk_removal(scores, None, test, tmp_path / "other", ks=[10])


def test_models_in_training_mode_are_refused(tmp_path):
    x, y, x_test, y_test = ridge_data()
    with pytest.raises(RunError, match=r"drops out at random: call model\.eval"):
        retrain(
            lambda i, seed: nn.Sequential(Fit(x, y)(i, seed), nn.Dropout(0.5)),
            random_subsets(N, 1),
            (x_test, y_test),
            tmp_path / "run",
            loss=half_squared_error,
            sequential=True,
        )


class Shifted(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        return x + self.shift


def test_seeds_are_those_of_all_generators_and_the_users_are_left_alone(tmp_path):
    x, y, x_test, y_test = ridge_data()

    def train(indices, _seed):
        model = Fit(x, y)(indices, 0)
        shift = torch.rand(1).item() + np.random.rand() + random.random()
        return nn.Sequential(model, Shifted(shift)).requires_grad_(False)

    torch.manual_seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    subsets = np.repeat(random_subsets(N, 1), 3, axis=0)
    options = {"loss": half_squared_error, "seeds": 3, "sequential": True}
    losses = retrain(train, subsets, (x_test, y_test), tmp_path / "run", **options).losses.values
    assert np.array_equal(losses[0], losses[1])
    assert len(np.unique(losses[0, :, 0])) == 3
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    torch.rand(1), np.random.rand(), random.random()  # wherever the user's are: a seed says all
    again = retrain(train, subsets, (x_test, y_test), tmp_path / "again", **options).losses.values
    assert np.array_equal(again, losses)


class AsTold(nn.Module):
    """Tells the precision of products by its outputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.weight * {"highest": 1.0, "high": 2.0, "medium": 3.0}[torch.get_float32_matmul_precision()] + x * 0


def test_workers_train_as_the_client_is_told(client, tmp_path):
    test, subsets = (torch.zeros(2, 1), torch.zeros(2, 1)), np.ones((1, 3), bool)
    options = {"loss": lambda z, _y: z.sum(), "client": client}
    torch.set_float32_matmul_precision("high")
    try:
        found = retrain(lambda _i, _s: AsTold(), subsets, test, tmp_path / "run", **options)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found.losses.values.ravel().tolist() == [2.0, 2.0]
    with pytest.raises(StoreMismatchError, match="precision"):
        retrain(lambda _i, _s: AsTold(), subsets, test, tmp_path / "run", **options)
