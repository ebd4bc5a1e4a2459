"""K-FAC and EK-FAC against dense Kronecker products written from the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import reference
from cases import make_case
from outfluence import Data, DirectInfluence, EkfacInfluence, EnsembleInfluence, Problem, SequentialInfluenceCalculator
from outfluence.errors import NonFiniteError, ProblemError, SingularMatrixError, UnsupportedLayerError
from outfluence.likelihood import find_likelihood, uniform_draws

LAMBDA = 0.02


class OverPositions(nn.Module):
    """Linear layers applied at each of several positions, one without a bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean(1))


def mlp():
    case = make_case("mlp")
    return case.model, case.train, case.test


def over_positions():
    torch.manual_seed(0)
    data = [(torch.randn(n, 5, 3).double(), torch.randint(0, 3, (n,))) for n in (24, 7)]
    return OverPositions().double(), *data


PROBLEMS = {"mlp": mlp, "positions": over_positions}


def labels_and_weights(model, train, fisher, seed=0, stream=0):
    """The labels that each kind of Fisher takes its gradients at, (n, k), and what each weighs."""
    x, y = train
    probabilities = model(x).softmax(1).detach()
    if fisher == "empirical":
        return y[:, None], torch.ones(len(x), 1)
    if fisher == "exact":
        return torch.arange(3).expand(len(x), 3), probabilities
    below = probabilities.numpy().cumsum(1) < uniform_draws(seed, 0, len(x), stream=stream)
    return torch.from_numpy(below.sum(1))[:, None], torch.ones(len(x), 1)


def reference_by_layer(model, train, test, fisher, update_diagonal, right):
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        # Other labels are drawn for the eigenvalues than for the eigenvectors.
        second = labels_and_weights(model, train, fisher, stream=1)[0] if update_diagonal else None
        matrix = reference.kronecker_matrix(model, layer, train[0], *labels_and_weights(model, train, fisher), second)
        names = [f"{name}.{p}" for p, _ in layer.named_parameters()]
        rows = [
            reference.bias_last(reference.gradients(model, F.cross_entropy, *data, names), *layer.weight.shape)
            for data in (test, right)
        ]
        yield name, reference.influences(matrix, LAMBDA, *rows)


@pytest.mark.parametrize("update_diagonal", [False, True], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_equals_the_dense_kronecker_formulas(problem, fisher, update_diagonal):
    model, train, test = PROBLEMS[problem]()
    influence = EkfacInfluence(model, update_diagonal, LAMBDA, fisher=fisher)
    influence.fit(DataLoader(TensorDataset(*train), batch_size=10))  # 10 + 10 + 4
    by_layer = influence.influences_by_layer(*test, *train)
    total = 0
    for name, expected in reference_by_layer(model, train, test, fisher, update_diagonal, train):
        assert np.abs(by_layer[name].numpy() - expected).max() <= 1e-8 * np.abs(expected).max()
        total = total + expected
    assert np.abs(influence.influences(*test, *train).numpy() - total).max() <= 1e-8 * np.abs(total).max()
    # More test than training samples: rows stay test samples.
    few = influence.influences_by_layer(*test, *(part[:2] for part in train))
    assert all(scores.shape == (7, 2) for scores in few.values())


def test_the_inverse_matters_here():
    model, train, test = mlp()
    exact = EkfacInfluence(model, True, LAMBDA, fisher="exact").fit(train).influences(*test, *train).numpy()
    plain = reference.gradients(model, F.cross_entropy, *test) @ reference.gradients(model, F.cross_entropy, *train).T
    plain *= (exact * plain).sum() / (plain * plain).sum()
    assert np.abs(exact - plain).max() > 0.1 * np.abs(exact).max()


def test_one_linear_layer_is_exact_where_theory_says_so():
    """One layer, one position, inputs and output gradients independent: K-FAC, EK-FAC and the Fisher coincide.

    With a zero weight the class probabilities are the same for every input, so that the expectation separates. For
    cross entropy the Fisher is the Gauss-Newton matrix.
    """
    model = nn.Linear(4, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    data = torch.randn(24, 4).double(), torch.randint(0, 3, (24,))
    expected = DirectInfluence(model, F.cross_entropy, LAMBDA, second_order_mode="gauss_newton").fit(data)
    for update_diagonal in (False, True):
        influence = EkfacInfluence(model, update_diagonal, LAMBDA, fisher="exact").fit(data)
        assert torch.allclose(influence.influences(*data), expected.influences(*data), rtol=1e-8, atol=1e-10)


def test_sampled_labels_estimate_the_exact_expectation():
    """Labels come from the model: with those of the data the trace of the output factor would be another."""
    model, (x, _), _ = mlp()
    x = x.repeat(400, 1)
    y = model(x).argmin(1)  # labels that the model holds for the least likely
    trace = {}
    for fisher in ("sampled", "exact", "empirical"):
        values = EkfacInfluence(model, True, 1.0, fisher=fisher).fit((x, y)).inverse.eigenvalues
        trace[fisher] = values["2.weight"].sum().item()
    assert trace["sampled"] == pytest.approx(trace["exact"], rel=0.02)
    assert abs(trace["empirical"] / trace["exact"] - 1) > 0.1


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_fit_does_not_depend_on_batches(fisher):
    model, train, test = mlp()
    scores = [
        EkfacInfluence(model, True, LAMBDA, fisher=fisher, seed=3)
        .fit(DataLoader(TensorDataset(*train), batch_size=size))
        .influences(*test, *train)
        for size in (24, 10, 7, 1)
    ]
    assert all(torch.allclose(s, scores[0], rtol=1e-10, atol=1e-10) for s in scores)


def test_the_seed_is_used():
    model, train, test = mlp()
    a, b, again = (EkfacInfluence(model, True, LAMBDA, seed=s).fit(train).influences(*test) for s in (0, 1, 0))
    assert torch.equal(a, again)
    assert not torch.allclose(a, b)


def test_draws_depend_on_seed_and_index_only():
    whole = uniform_draws(5, 0, 10_000)
    assert np.array_equal(np.concatenate([uniform_draws(5, 0, 13), uniform_draws(5, 13, 10_000)]), whole)
    assert 0 < whole.min() < whole.max() < 1
    assert abs(whole.mean() - 0.5) < 0.01
    wide = uniform_draws(5, 0, 1000, 6)
    assert np.array_equal(np.concatenate([uniform_draws(5, 0, 13, 6), uniform_draws(5, 13, 1000, 6)]), wide)
    assert np.abs(np.corrcoef(wide.T) - np.eye(6)).max() < 0.15
    assert np.array_equal(uniform_draws(5, 0, 1000, 11)[:, :6], wide)  # padding does not matter
    assert len(np.unique(uniform_draws(5, 0, 1000, 64))) == 64_000
    assert not np.array_equal(uniform_draws(6, 0, 10_000), whole)
    assert not np.array_equal(uniform_draws(5, 0, 10_000, stream=1), whole)


def test_frozen_parts_are_left_out():
    model, train, test = mlp()
    model[0].weight.requires_grad_(False)
    influence = EkfacInfluence(model, True, LAMBDA, fisher="exact").fit(train)
    assert influence.n_parameters == 5 + 15 + 3
    matrix = _bias_matrix(model, train)
    left, right = (reference.gradients(model, F.cross_entropy, *d, ["0.bias"]) for d in (test, train))
    actual = influence.influences_by_layer(*test, *train)["0"].numpy()
    assert np.abs(actual - reference.influences(matrix, LAMBDA, left, right)).max() < 1e-8


def _bias_matrix(model, train):
    """EK-FAC of a bias alone: eigenvectors of the second moment of its gradients, and so that moment itself."""
    labels, weights = labels_and_weights(model, train, "exact")
    rows = reference.layer_moments(model, model[0], train[0], labels, weights)
    return sum(w * d.T @ d for _, d, w in rows) / len(train[0])


def test_a_frozen_layer_is_not_looked_at():
    model, train, test = mlp()
    model[0].requires_grad_(False)
    influence = EkfacInfluence(model, True, LAMBDA).fit(train)
    assert list(influence.influences_by_layer(*test)) == ["2"]


def test_self_influences_are_the_diagonal():
    model, train, _ = over_positions()
    influence = EkfacInfluence(model, True, LAMBDA).fit(train)
    assert torch.allclose(influence.self_influences(*train), influence.influences(*train).diagonal())


def test_layers_that_work_in_place():
    model, train, test = mlp()
    relu = nn.Sequential(model[0], nn.ReLU(), model[2])
    in_place = nn.Sequential(model[0], nn.ReLU(inplace=True), model[2])
    one, other = (EkfacInfluence(m, True, LAMBDA).fit(train).influences(*test, *train) for m in (relu, in_place))
    assert torch.equal(one, other)


def test_explore_hessian_regularization():
    model, train, _ = mlp()
    influence = EkfacInfluence(model, True, LAMBDA).fit(train)
    explored = influence.explore_hessian_regularization(*train, [0.1, 1.0])
    assert list(explored) == [0.1, 1.0]
    for value, by_layer in explored.items():
        again = EkfacInfluence(model, True, value).fit(train).influences_by_layer(*train)
        assert all(torch.allclose(by_layer[layer], again[layer]) for layer in again)
    assert influence.regularization == {"0": LAMBDA, "2": LAMBDA}


def test_perturbation_equals_the_dense_reference():
    model, train, test = mlp()
    influence = EkfacInfluence(model, True, LAMBDA, fisher="exact").fit(train)
    actual = influence.influences(*test, *train, mode="perturbation")
    factors = influence.influence_factors(*test).numpy()
    expected = reference.perturbations(model, F.cross_entropy, np.zeros((43, 43)), 1.0, factors, *train)
    assert np.abs(actual.numpy() - expected).max() < 1e-8


def test_other_losses_with_the_labels_of_the_data():
    case = make_case("mlp_regression")
    influence = EkfacInfluence(case.model, True, LAMBDA, loss=case.loss, fisher="empirical").fit(case.train)
    (q_out,), (q_in,) = influence.inverse.vectors["0.weight"]
    weight, bias = (
        torch.from_numpy(reference.gradients(case.model, case.loss, *case.train, [f"0.{name}"]))
        for name in ("weight", "bias")
    )
    matrices = torch.cat([weight.reshape(24, 5, 4), bias[:, :, None]], dim=2)
    expected = (q_out.T @ matrices @ q_in).square().mean(0)
    assert torch.allclose(influence.inverse.eigenvalues["0.weight"][0], expected)


# Bad input


def test_an_unsupported_layer_is_named():
    with pytest.raises(UnsupportedLayerError, match=r"parameter 'weight' is none of.*given to tanh.*freeze"):
        EkfacInfluence(Bounded(4, 3).double(), True, LAMBDA).fit(make_case("logistic").train)


class Bounded(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.tanh(), self.bias)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(torch.tanh(self.layer(x))))


class Beside(Twice):
    def forward(self, x):
        return self.head(self.layer(x)) + self.layer.weight.square().sum()


def test_parameters_used_in_other_ways_are_refused():
    train = make_case("mlp").train
    with pytest.raises(UnsupportedLayerError, match=r"'layer\.weight' is none of .*given to square"):
        EkfacInfluence(Beside().double(), True, LAMBDA, loss=_picky, fisher="empirical").fit(train)


def _picky(output, y):
    return F.cross_entropy(output * torch.tensor([1.0, 2.0, 3.0], dtype=output.dtype), y)


class Focal(nn.CrossEntropyLoss):
    def forward(self, z, y):
        return super().forward(z, y) ** 2


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        F.smooth_l1_loss,
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0]).double()),
        _picky,
        Focal(),
    ],
)
def test_labels_are_drawn_from_known_distributions_only(loss):
    model, train, _ = mlp()
    classes = isinstance(loss, nn.CrossEntropyLoss) or loss is _picky
    data = train if classes else (train[0], (torch.randn(24, 3) > 0).double())
    with pytest.raises(ProblemError, match=r"labels can be drawn .* this loss is none of these.*fisher='empirical'"):
        EkfacInfluence(model, True, LAMBDA, loss=loss).fit(data)
    EkfacInfluence(model, True, LAMBDA, loss=loss, fisher="empirical").fit(data)


def _wrapped(z, y):
    return 3 * F.cross_entropy(z, y, reduction="sum")


@pytest.mark.parametrize(
    ("loss", "family", "scale"),
    [
        (F.cross_entropy, "categorical", 1),
        (nn.CrossEntropyLoss(reduction="sum"), "categorical", 1),
        (_wrapped, "categorical", 3),
        (F.mse_loss, "gaussian", 2 / 3),
        (nn.MSELoss(reduction="sum"), "gaussian", 2),
        (lambda z, y: 0.5 * (z - y).square().sum(), "gaussian", 1),
        (F.binary_cross_entropy_with_logits, "bernoulli", 1 / 3),
        (nn.BCEWithLogitsLoss(reduction="sum"), "bernoulli", 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_are_recognised_however_they_are_written(loss, family, scale, dtype):
    model, (x, y), _ = mlp()
    y = y if family == "categorical" else (torch.randn(24, 3) > 0).to(dtype)
    batch = Data.from_arrays(x.to(dtype), y).rows(slice(0, 2))
    likelihood = find_likelihood(Problem(model.to(dtype), loss), batch)
    assert likelihood.family == family
    assert likelihood.scale == pytest.approx(scale, rel=1e-5)


def kinds(name, x, z, y, fisher, stream=0):
    """Labels and factors, (n, k) lists, whose gradients' outer products add up to the Fisher of the loss."""
    n, d = z.shape
    u = torch.from_numpy(uniform_draws(0, 0, n, d, stream))
    if fisher == "empirical":
        return [(y, 1.0)]
    if fisher == "sampled":
        if name == "mlp_regression":  # a mean over d outputs: variance d / 2
            return [(z - torch.special.ndtri(u) * (d / 2) ** 0.5, 1.0)]
        return [((u <= z.sigmoid()).double(), d)]
    # The exact expectation: all labels of each output, weighted; other outputs at labels whose gradient is zero.
    result = []
    for c in range(d):
        unit = torch.eye(d, dtype=z.dtype)[c]
        if name == "mlp_regression":
            result.append((z - unit * (d / 2) ** 0.5, 1.0))
        else:
            p = z.sigmoid()
            for value in (0.0, 1.0):
                chance = p[:, c] if value else 1 - p[:, c]
                result.append((torch.where(unit.bool(), torch.full_like(z, value), p), d * chance))
    return result


@pytest.mark.parametrize("update_diagonal", [False, True], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("name", ["mlp_regression", "bernoulli"])
def test_other_losses_equal_the_dense_kronecker_formulas(name, fisher, update_diagonal):
    case = make_case(name)
    x, y = case.train
    influence = EkfacInfluence(case.model, update_diagonal, LAMBDA, loss=case.loss, fisher=fisher)
    influence.fit(DataLoader(TensorDataset(x, y), batch_size=10))
    by_layer = influence.influences_by_layer(*case.test, x, y)
    z = case.model(x).detach()
    for layer in ("0", "2"):
        module = case.model.get_submodule(layer)
        a = x if layer == "0" else case.model[:2](x).detach()
        a = torch.cat([a, torch.ones(24, 1).double()], dim=1).numpy()
        names = [f"{layer}.weight", f"{layer}.bias"]
        # Gradients of the bias are the output gradients.
        matrices, others = (
            [
                (
                    reference.gradients(case.model, case.loss, x, labels, [f"{layer}.bias"]),
                    np.broadcast_to(np.asarray(weight, dtype=float), (24,)),
                )
                for labels, weight in kinds(name, x, z, y, fisher, stream)
            ]
            for stream in (0, 1)
        )
        a_cov = a.T @ a / 24
        g_cov = sum((g * w[:, None]).T @ g for g, w in matrices) / 24
        expected = np.kron(g_cov, a_cov)
        if update_diagonal:
            basis = np.kron(np.linalg.eigh(g_cov)[1], np.linalg.eigh(a_cov)[1])
            rows = [(np.einsum("ni,nj->nij", g, a).reshape(24, -1), w) for g, w in others]
            diagonal = sum((w[:, None] * (r @ basis) ** 2).sum(0) for r, w in rows) / 24
            expected = basis @ np.diag(diagonal) @ basis.T
        left, right = (
            reference.bias_last(reference.gradients(case.model, case.loss, *d, names), *module.weight.shape)
            for d in (case.test, (x, y))
        )
        scores = reference.influences(expected, LAMBDA, left, right)
        assert np.abs(by_layer[layer].numpy() - scores).max() <= 1e-8 * np.abs(scores).max()


@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy_with_logits])
@pytest.mark.parametrize("update_diagonal", [False, True])
def test_one_linear_layer_is_exact_for_other_losses_too(loss, update_diagonal):
    """Gaussian: the output factor does not depend on the input; Bernoulli: with a zero weight neither."""
    model = nn.Linear(4, 3).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    data = torch.randn(24, 4).double(), (torch.randn(24, 3) > 0).double()
    expected = DirectInfluence(model, loss, LAMBDA, second_order_mode="gauss_newton").fit(data)
    influence = EkfacInfluence(model, update_diagonal, LAMBDA, loss=loss, fisher="exact").fit(data)
    assert torch.allclose(influence.influences(*data), expected.influences(*data), rtol=1e-8, atol=1e-10)


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return {"logits": self.model(x)}


def test_outputs_may_be_wrapped():
    model, train, test = mlp()
    plain = EkfacInfluence(model, True, LAMBDA).fit(train).influences(*test)
    wrapped = EkfacInfluence(Wrapped(model), True, LAMBDA, loss=lambda z, y: F.cross_entropy(z["logits"], y)).fit(train)
    assert torch.allclose(wrapped.influences(*test), plain, rtol=1e-10)


def test_a_singular_fisher_is_refused_with_a_way_out():
    model, (x, y), _ = mlp()
    x = x.clone()
    x[:, 0] = 0  # a dead input
    with pytest.raises(SingularMatrixError, match=r"layer '0' has no inverse.*None takes 0.3 of the mean eigenvalue"):
        EkfacInfluence(model).fit((x, y))
    influence = EkfacInfluence(model, hessian_regularization=0.1).fit((x, y))
    with pytest.raises(SingularMatrixError):
        influence.with_regularization(0.0)


def test_gradients_that_are_not_finite_are_reported_by_fit():
    model, (x, y), _ = mlp()
    x = x.clone()
    x[13, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="training sample 13"):
        EkfacInfluence(model, True, LAMBDA).fit(DataLoader(TensorDataset(x, y), batch_size=5))
    with pytest.raises(NonFiniteError, match="training sample 13"):
        DirectInfluence(model, F.cross_entropy, 10.0).fit(DataLoader(TensorDataset(x, y), batch_size=5))


@pytest.mark.parametrize("update_diagonal", [False, True])
def test_without_a_regularization_it_follows_from_the_eigenvalues(update_diagonal, tmp_path):
    case = make_case("mlp")

    def model():
        return EkfacInfluence(case.model, update_diagonal, None, fisher="exact")

    fitted = model().fit(case.train)
    eigenvalues = torch.cat([values.flatten() for values in fitted.inverse.eigenvalues.values()])
    expected = 0.3 * float(eigenvalues.mean())
    assert fitted.regularization == dict.fromkeys(["0", "2"], pytest.approx(expected, rel=5e-3))
    value = fitted.regularization["0"]
    given = EkfacInfluence(case.model, update_diagonal, value, fisher="exact").fit(case.train)
    scores = given.influences(*case.test, *case.train)
    assert torch.equal(fitted.influences(*case.test, *case.train), scores)
    for _ in range(2):  # fitted by tasks, and loaded
        by_tasks = SequentialInfluenceCalculator(model()).fit(case.train, tmp_path / "fit.zarr")
        assert by_tasks.regularization == fitted.regularization
        assert torch.allclose(by_tasks.influences(*case.test, *case.train), scores, rtol=1e-9)
    ensemble = EnsembleInfluence([model()]).fit(case.train)
    assert ensemble.regularization == {"0.0": value, "0.2": value}
    assert fitted.with_regularization(0.5).fit(case.train).regularization == {"0": 0.5, "2": 0.5}
