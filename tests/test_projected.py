"""Projected gradients: against dense formulas with the projection as a matrix, and what random projections promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from cases import make_case
from outfluence import DirectInfluence, ProjectedInfluence
from outfluence.errors import ProblemError, SingularMatrixError
from outfluence.rows import CoordinateRows
from outfluence.solvers import projected

LAMBDA = 0.02
DENSE = ["rademacher", "gaussian", "sjlt"]
EVERY = ["two_sided", "pca", *DENSE]
ALL = 10**6  # a rank no model here has


class Opaque(nn.Module):
    """A network whose layers cannot be told."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 5), torch.randn(5, 3)])
        self.shift = nn.Parameter(torch.randn(()))

    def forward(self, x):
        return torch.einsum("ni,io->no", torch.tanh(x @ self.weights[0] + self.shift), self.weights[1])


def case_of(name):
    case = make_case("mlp" if name == "opaque" else name)
    if name == "opaque":
        case.model = Opaque().double()
    return case


def close(actual, expected, tolerance=1e-9):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def matrix_of(model):
    """The projection of a fitted model as a matrix, (k, P), from its transpose; block after block."""
    columns = model.inverse._columns
    identity = torch.eye(max(s.stop for s in columns.values()), dtype=torch.float64)
    return model.inverse.dense(CoordinateRows(identity, columns)).values.numpy()


@pytest.mark.parametrize("projection", EVERY)
@pytest.mark.parametrize("name", ["mlp", "cnn", "attention", "dict_inputs", "tied", "nested", "opaque"])
@pytest.mark.parametrize("kernel", ["exact", "empirical"])
def test_equals_the_dense_formula(name, projection, kernel):
    case = case_of(name)
    model = ProjectedInfluence(case.model, case.loss, LAMBDA, 20, projection, kernel).fit(case.train)
    phi = matrix_of(model)
    assert len(phi) <= 20
    left, right = (reference.gradients(case.model, case.loss, *data) for data in (case.test, case.train))
    matrix = (
        reference.gauss_newton(case.model, case.loss, *case.train)
        if kernel == "exact"
        else right.T @ right / len(right)
    )
    inside = np.linalg.inv(phi @ matrix @ phi.T + LAMBDA * np.eye(len(phi)))
    expected = left @ phi.T @ inside @ phi @ right.T
    close(model.influences(*case.test, *case.train), expected)
    close(model.influence_factors(*case.test), left @ phi.T @ inside @ phi)
    assert np.corrcoef(expected.ravel(), (left @ right.T).ravel())[0, 1] < 0.99  # the inverse matters


@pytest.mark.parametrize("projection", ["two_sided", "pca"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "dict_inputs", "opaque"])
@pytest.mark.parametrize("structure", ["full", "layer_wise"])
def test_nothing_is_lost_where_the_rank_is_not_too_low(name, projection, structure):
    case = case_of(name)
    options = {"block_structure": structure}
    model = ProjectedInfluence(case.model, case.loss, LAMBDA, ALL, projection, "exact", **options).fit(case.train)
    exact = DirectInfluence(case.model, case.loss, LAMBDA, second_order_mode="gauss_newton", **options).fit(case.train)
    close(model.influences(*case.test, *case.train), exact.influences(*case.test, *case.train))
    for block, scores in exact.influences_by_block(*case.test, *case.train).items():
        close(model.influences_by_block(*case.test, *case.train)[block], scores)


def test_scores_are_those_of_trak():
    """Park et al. 2023, equation 13, for one model; the test sample's own 1 - p is the loss's."""
    case = make_case("mlp")
    model = ProjectedInfluence(case.model, case.loss, LAMBDA, 20, "rademacher", "margin").fit(case.train)
    phi = matrix_of(model)

    def margin(output, y):
        p = output.softmax(1).gather(1, y[:, None]).sum()
        return torch.log(p / (1 - p))

    test, train = (reference.gradients(case.model, margin, *data) @ phi.T for data in (case.test, case.train))
    with torch.no_grad():
        q, own = (1 - case.model(x).softmax(1).gather(1, y[:, None]).numpy()[:, 0] for x, y in (case.train, case.test))
    expected = test @ np.linalg.inv(train.T @ train / len(train) + LAMBDA * np.eye(20)) @ (train * q[:, None]).T
    close(model.influences(*case.test, *case.train), own[:, None] * expected)


@pytest.mark.parametrize("projection", ["two_sided", *DENSE])
def test_products_are_kept_in_the_mean(projection):
    """Over 150 seeds the mean product of two projected gradients is theirs, within five standard errors."""
    case = make_case("mlp")
    gradients = reference.gradients(case.model, case.loss, *case.test)
    products = []
    for seed in range(150):
        model = ProjectedInfluence(case.model, case.loss, 1.0, 12, projection, "empirical", seed)
        x, y = case.train
        rows = matrix_of(model.fit((x[:2], y[:2]))) @ gradients.T
        products.append(rows.T @ rows)
    mean, error = np.mean(products, 0), np.std(products, 0) / 150**0.5
    assert (np.abs(mean - gradients @ gradients.T) <= 5 * error + 1e-12).all()
    assert (error > 0).any()


def test_entries_are_what_the_names_say(monkeypatch):
    monkeypatch.setattr(projected, "_PIECE", 7)  # pieces that do not divide the layers
    case = make_case("mlp")
    x, y = case.train
    found = {
        name: matrix_of(ProjectedInfluence(case.model, case.loss, 1.0, 50, name, "empirical", 1).fit((x[:1], y[:1])))
        for name in DENSE
    }
    assert all(phi.shape == (50, 43) for phi in found.values())
    assert np.allclose(np.abs(found["rademacher"]), 50**-0.5)
    assert 0.4 < (found["rademacher"] > 0).mean() < 0.6
    normal = found["gaussian"] * 50**0.5
    assert abs(normal.mean()) < 0.1
    assert 0.9 < normal.std() < 1.1
    assert np.abs(np.linalg.norm(found["sjlt"], axis=0) ** 2 - 1).max() < 1.6  # places may coincide
    assert ((np.abs(found["sjlt"]) > 0).sum(0) <= 4).all()
    for phi in found.values():  # no piece is drawn twice: columns differ
        assert len(np.unique(phi, axis=1).T) == 43


@pytest.mark.parametrize("projection", EVERY)
def test_seeds_are_used_and_suffice(projection):
    case = make_case("cnn")

    def scores(seed, kernel="sampled"):
        torch.rand(3)  # whatever the state of torch's generator
        model = ProjectedInfluence(case.model, case.loss, LAMBDA, 10, projection, kernel, seed).fit(case.train)
        return model.influences(*case.test, *case.train)

    assert torch.equal(scores(3), scores(3))
    assert not torch.allclose(scores(3), scores(4), rtol=1e-2)
    if projection != "pca":
        assert not torch.allclose(scores(3, "empirical"), scores(4, "empirical"), rtol=1e-2)


def test_principal_directions_are_those_of_the_covariances():
    case = make_case("mlp")
    model = ProjectedInfluence(case.model, case.loss, LAMBDA, 8, "pca", "empirical").fit(case.train)
    x, y = case.train
    for layer, name in ((case.model[0], "0.weight"), (case.model[2], "2.weight")):
        rows = reference.layer_moments(case.model, layer, x, y[:, None], np.ones((24, 1)))
        inputs, outputs = (np.linalg.eigh(sum(r[i].T @ r[i] for r in rows))[1][:, -2:] for i in (0, 1))
        out, into = (model.inverse.tensors[f"{side}/{name}"][0].numpy() for side in ("out", "in"))
        for found, expected in ((into, inputs), (out, outputs)):  # the same space
            close(found @ found.T, expected @ expected.T, 1e-8)


def test_of_embeddings_the_most_frequent_places_are_principal():
    case = make_case("dict_inputs")
    x, y = case.train
    x["tokens"][:] = torch.tensor([3, 1])
    model = ProjectedInfluence(case.model, case.loss, LAMBDA, 14, "pca", "empirical").fit((x, y))
    into = model.inverse.tensors["in/embed.weight"][0]
    assert sorted(into.argmax(0).tolist()[:2]) == [1, 3]
    assert torch.equal(into.sum(0), torch.ones(into.shape[1], dtype=torch.float64))


def test_the_projection_is_never_there(monkeypatch):
    """Of a model of 131,000 parameters, pieces of 4,096 of them at most are projected."""
    sizes, drawn = [], projected.Sketch._dense

    def watch(self, size, *args):
        sizes.append(size)
        return drawn(self, size, *args)

    monkeypatch.setattr(projected.Sketch, "_dense", watch)
    model = nn.Sequential(nn.Embedding(1000, 64), nn.Flatten(), nn.Linear(2 * 64, 512))
    data = torch.randint(0, 1000, (3, 2)), torch.randint(0, 512, (3,))
    ProjectedInfluence(model, F.cross_entropy, 0.1, 16, "rademacher", "empirical").fit(data)
    assert sum(sizes) == sum(p.numel() for p in model.parameters())
    assert max(sizes) <= projected._PIECE


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ProblemError, "rank must be a whole number, at least 1, not 0"),
        ({"rank": 1}, ProblemError, "a rank of 1 is too low: of each of 2 matrices some numbers are needed"),
        ({"projection": "hash"}, ValueError, "'hash' is no Projection; choose one of 'two_sided'"),
        ({"kernel": "hessian"}, ValueError, "'hessian' is no KernelMode"),
        ({"regularization": 0.0}, SingularMatrixError, r"block 'all', 43 x 43, has no inverse at regularization 0: r"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bad_options_are_refused(options, error, message, dtype):
    case = make_case("mlp")
    x, y = case.train
    options = {"regularization": 1.0, "kernel": "empirical", "rank": ALL} | options
    with pytest.raises(error, match=message):
        ProjectedInfluence(case.model.to(dtype), case.loss, **options).fit((x.to(dtype), y))


def test_a_label_that_is_ignored_has_no_margin():
    case = make_case("mlp")
    x, y = case.train
    y = torch.where(torch.arange(24) < 4, -100, y)
    model = ProjectedInfluence(case.model, case.loss, LAMBDA, 20, kernel="margin").fit((x, y))
    rest = ProjectedInfluence(case.model, case.loss, LAMBDA, 20, "rademacher", "margin").fit((x[4:], y[4:]))
    whole = ProjectedInfluence(case.model, case.loss, LAMBDA, 20, "rademacher", "margin").fit((x, y))
    close(whole.inverse.kernels["all"] * 24, rest.inverse.kernels["all"] * 20)
    assert model.influences(*case.test, x, y)[:, :4].abs().max() == 0


@pytest.mark.parametrize("name", ["mlp_regression", "bernoulli"])
def test_margins_are_of_classes(name):
    case = make_case(name)
    with pytest.raises(ProblemError, match="kernel='margin' is for cross entropy with one label a sample"):
        ProjectedInfluence(case.model, case.loss, 1.0, kernel="margin").fit(case.train)


@pytest.mark.parametrize("projection", DENSE)
@pytest.mark.parametrize("name", ["dict_inputs", "cnn"])
def test_pieces_of_a_layer_are_its_own_columns(name, projection, monkeypatch):
    """Of an embedding, too: places outside a piece add nothing to it."""
    monkeypatch.setattr(projected, "_PIECE", 3)
    case = make_case(name)
    model = ProjectedInfluence(case.model, case.loss, LAMBDA, 12, projection, "empirical").fit(case.train)
    gradients = reference.gradients(case.model, case.loss, *case.test)
    rows = model.right_rows(model.gradient_rows(*case.test))
    close(rows.coordinates, gradients @ matrix_of(model).T)
