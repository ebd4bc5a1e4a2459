"""One table of methods crossed with one table of problems, against the dense reference."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import reference
from cases import make_case
from outfluence import (
    ArnoldiInfluence,
    CgInfluence,
    Data,
    DirectInfluence,
    EkfacCgInfluence,
    EkfacInfluence,
    EkfacPreconditioner,
    EnsembleInfluence,
    InverseHarmonicMeanInfluence,
    JacobiPreconditioner,
    LissaInfluence,
    NystroemPreconditioner,
    NystroemSketchInfluence,
    Problem,
    ProjectedInfluence,
    compute_influences,
)
from outfluence.curvature import Curvature
from outfluence.data import tree_map
from outfluence.errors import (
    ConvergenceError,
    ConvergenceWarning,
    DataError,
    ProblemError,
    SingularMatrixError,
)
from outfluence.likelihood import find_likelihood, uniform_draws
from outfluence.linalg import conjugate_gradient
from outfluence.rows import CoordinateRows

LAMBDA = 0.05
TIGHT = {"rtol": 1e-9, "atol": 0.0}
ALL = 10**6  # a rank no model here has

#: Methods that invert a given matrix exactly: how to make one, and what of it is a tolerance.
EXACT = {
    "direct": DirectInfluence,
    "cg": lambda *a, **k: CgInfluence(*a, **TIGHT, **k),
    "block cg": lambda *a, **k: CgInfluence(*a, **TIGHT, solve_simultaneously=True, **k),
    "jacobi cg": lambda *a, **k: CgInfluence(*a, **TIGHT, preconditioner=JacobiPreconditioner(5), **k),
    "nystroem block cg": lambda *a, **k: CgInfluence(
        *a, **TIGHT, preconditioner=NystroemPreconditioner(5), solve_simultaneously=True, precompute_grad=True, **k
    ),
    "arnoldi": lambda *a, **k: ArnoldiInfluence(*a, rank=ALL, **k),
    "woodbury": lambda *a, **k: ArnoldiInfluence(*a, rank=ALL, use_woodbury=True, **k),
    "nystroem": lambda *a, **k: NystroemSketchInfluence(*a, rank=ALL, **k),
    "lissa": lambda *a, scale=4.0, **k: LissaInfluence(*a, scale=scale, maxiter=6000, rtol=1e-3, **k),
}
TOLERANCE = {"lissa": 2e-2}
MATRICES = {"hessian": reference.hessian, "gauss_newton": reference.gauss_newton}


def close(actual, expected, tolerance):
    actual = actual.numpy() if isinstance(actual, torch.Tensor) else actual
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def gradients(case, names=None):
    return [reference.gradients(case.model, case.loss, *data, names) for data in (case.test, case.train)]


class Samples(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return tree_map(lambda t: t[i], self.data)


def loader(data, size=10):  # 10 + 10 + 4
    return DataLoader(Samples(data), batch_size=size)


def damping(case, mode):
    """Small; but iterations need a positive definite matrix, and Hessians of networks are not."""
    if mode != "hessian":
        return LAMBDA
    smallest = np.linalg.eigvalsh(reference.hessian(case.model, case.loss, *case.train)).min()
    return LAMBDA + 1.5 * max(0.0, -float(smallest))


@pytest.mark.parametrize("mode", MATRICES)
@pytest.mark.parametrize("method", EXACT)
def test_equals_the_dense_reference(case, method, mode):
    value = damping(case, mode)
    left, right = gradients(case)
    matrix = MATRICES[mode](case.model, case.loss, *case.train)
    expected = reference.influences(matrix, value, left, right)
    options = {"scale": 1.2 * float(np.linalg.eigvalsh(matrix)[-1]) + value} if method == "lissa" else {}
    model = EXACT[method](case.model, case.loss, value, second_order_mode=mode, **options).fit(loader(case.train))
    tolerance = TOLERANCE.get(method, 1e-6)
    close(model.influences(*case.test, *case.train), expected, tolerance)
    factors = model.influence_factors(*case.test)
    close(factors, np.linalg.solve(matrix + value * np.eye(len(matrix)), left.T).T, tolerance)
    close(model.influences_from_factors(factors, *case.train), expected, tolerance)
    if method != "lissa":  # more right-hand sides than the smaller models have parameters
        close(model.influences(*case.train, *case.test), expected.T, tolerance)
    # The inverse matters: the best multiple of gradient dot products fails by far more than the tolerance.
    plain = left @ right.T
    plain *= (expected * plain).sum() / (plain * plain).sum()
    assert np.abs(plain - expected).max() > 2 * tolerance * np.abs(expected).max()
    assert np.abs(plain - expected).max() > 0.04 * np.abs(expected).max()


@pytest.mark.parametrize("method", ["direct", "arnoldi", "nystroem", "woodbury"])
def test_indefinite_hessians_are_inverted_too(method):
    case = make_case("mlp_regression")
    left, right = gradients(case)
    matrix = reference.hessian(case.model, case.loss, *case.train)
    assert np.linalg.eigvalsh(matrix)[0] + LAMBDA < 0
    model = EXACT[method](case.model, case.loss, LAMBDA).fit(case.train)
    close(model.influences(*case.test, *case.train), reference.influences(matrix, LAMBDA, left, right), 1e-6)


def test_the_harmonic_mean_equals_its_formula(case):
    left, right = gradients(case)
    inverse = reference.harmonic(case.model, case.loss, *case.train, LAMBDA)
    model = InverseHarmonicMeanInfluence(case.model, case.loss, LAMBDA).fit(loader(case.train))
    close(model.influences(*case.test, *case.train), left @ inverse @ right.T, 1e-10)
    for size in (24, 7, 1):
        again = InverseHarmonicMeanInfluence(case.model, case.loss, LAMBDA).fit(loader(case.train, size))
        close(again.influences(*case.test, *case.train), left @ inverse @ right.T, 1e-10)
    again = model.with_regularization(0.5)
    inverse = reference.harmonic(case.model, case.loss, *case.train, 0.5)
    close(again.influences(*case.test, *case.train), left @ inverse @ right.T, 1e-10)


def test_fisher_and_empirical_fisher(case):
    names = [name for name, p in case.model.named_parameters() if p.requires_grad]
    left, right = gradients(case)
    x, y = case.train
    z = reference.call(case.model, x).detach()
    matrices = {"empirical_fisher": reference.fisher(case.model, case.loss, x, y)}
    likelihood = find_likelihood(Problem(case.model, case.loss), Data.from_arrays(x, y).rows(slice(0, 2)))
    u = torch.from_numpy(uniform_draws(0, 0, 24, 1 if likelihood.family == "categorical" else z.shape[1]))
    if likelihood.family == "categorical":
        assert likelihood.scale == pytest.approx(1)
        drawn, factor = (z.softmax(1).cumsum(1) < u).sum(1), 1.0
    elif likelihood.family == "gaussian":  # squared error, a mean over d outputs: variance d / 2
        assert likelihood.scale == pytest.approx(2 / z.shape[1])
        drawn, factor = z - torch.special.ndtri(u) * (z.shape[1] / 2) ** 0.5, 1.0
    else:  # a mean over d outputs, each with its own label: the Fisher of the sum, over d
        assert likelihood.scale == pytest.approx(1 / z.shape[1])
        drawn, factor = (u <= z.sigmoid()).double(), z.shape[1]
    matrices["fisher"] = reference.fisher(case.model, case.loss, x, drawn, names, factor)
    for mode, matrix in matrices.items():
        for method in ("direct", "block cg"):
            model = EXACT[method](case.model, case.loss, LAMBDA, second_order_mode=mode).fit(loader(case.train))
            close(model.influences(*case.test, *case.train), reference.influences(matrix, LAMBDA, left, right), 1e-6)


@pytest.mark.parametrize("name", ["mlp", "mlp_regression", "bernoulli"])
def test_the_expected_fisher_is_the_gauss_newton_matrix(name):
    """Of many drawn labels; for one linear layer and a constant distribution of labels, see test_kronecker."""
    case = make_case(name)
    x, y = (part.repeat(1000, *[1] * (part.ndim - 1)) for part in case.train)
    problem = Problem(case.model, case.loss)
    newton = DirectInfluence(case.model, case.loss, 1.0, second_order_mode="gauss_newton").fit((x, y))
    fisher = DirectInfluence(case.model, case.loss, 1.0, second_order_mode="fisher").fit((x, y))
    empirical = DirectInfluence(case.model, case.loss, 1.0, second_order_mode="empirical_fisher").fit((x, y))
    exact, drawn, data = (m.inverse.matrices["all"] for m in (newton, fisher, empirical))
    assert (drawn - exact).norm() < 0.03 * exact.norm()
    assert (data - exact).norm() > 0.1 * exact.norm()
    assert problem.n_parameters == len(exact)


@pytest.mark.parametrize("method", [*EXACT, "harmonic"])
def test_blocks_and_a_regularization_for_each(method):
    case = make_case("mlp")
    names = ["2.weight", "2.bias", "0.bias", "0.weight"]
    lambdas = {"second": 0.06, "first": 0.2}
    structure = {"second": names[:2], "first": names[2:]}
    if method == "harmonic":
        model = InverseHarmonicMeanInfluence(case.model, case.loss, lambdas, structure).fit(case.train)
    else:
        model = EXACT[method](
            case.model, case.loss, lambdas, block_structure=structure, second_order_mode="gauss_newton"
        ).fit(case.train)
    by_block = model.influences_by_block(*case.test, *case.train)
    total = 0
    for block, members in structure.items():
        left, right = gradients(case, members)
        if method == "harmonic":
            expected = left @ reference.harmonic(case.model, case.loss, *case.train, lambdas[block], members) @ right.T
        else:
            matrix = reference.gauss_newton(case.model, case.loss, *case.train, members)
            expected = reference.influences(matrix, lambdas[block], left, right)
        close(by_block[block], expected, TOLERANCE.get(method, 1e-6))
        total = total + expected
    close(model.influences(*case.test, *case.train), total, TOLERANCE.get(method, 1e-6))
    factors = model.influence_factors_by_block(*case.test)
    from_factors = model.influences_from_factors_by_block(factors, *case.train)
    perturbed = model.influences_by_block(*case.test, *case.train, mode="perturbation")
    assert list(factors) == list(from_factors) == list(perturbed) == ["second", "first"]
    for block in structure:
        assert torch.allclose(from_factors[block], by_block[block], atol=1e-10)


def fits(case):
    """Every method, fitted; and iterations that go on until rounding errors stop them."""
    options = {"second_order_mode": "gauss_newton"}
    make = {**EXACT}
    make["lissa"] = lambda *a, **k: LissaInfluence(*a, scale=2.0, maxiter=40_000, rtol=1e-8, **k)
    make["arnoldi of low rank"] = lambda *a, **k: ArnoldiInfluence(*a, rank=4, tol=0.0, **k)
    make["woodbury of low rank"] = lambda *a, **k: ArnoldiInfluence(*a, rank=4, tol=0.0, use_woodbury=True, **k)
    make["nystroem of low rank"] = lambda *a, **k: NystroemSketchInfluence(*a, rank=4, **k)
    for name, method in make.items():
        yield name, lambda data, method=method: method(case.model, case.loss, LAMBDA, **options).fit(data)
    yield "harmonic", lambda data: InverseHarmonicMeanInfluence(case.model, case.loss, LAMBDA).fit(data)
    for update in (False, True):
        yield f"ekfac {update}", lambda data, u=update: EkfacInfluence(case.model, u, LAMBDA, fisher="exact").fit(data)
    for projection in ("pca", "sjlt"):
        few = {"rank": 15, "kernel": "exact", "projection": projection}
        yield (
            f"projected {projection}",
            lambda data, few=few: ProjectedInfluence(case.model, case.loss, LAMBDA, **few).fit(data),
        )
    yield "ensemble", lambda data: ensemble(case).fit(data)


def ensemble(case):
    """Of models that differ, and of methods whose rows do."""
    other = copy.deepcopy(case.model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.7)
    low_rank = NystroemSketchInfluence(other, case.loss, LAMBDA, rank=4, second_order_mode="gauss_newton")
    return EnsembleInfluence([EkfacInfluence(case.model, True, LAMBDA, fisher="exact"), low_rank])


NAMES = [name for name, _ in fits(None)]
#: 24 samples for 43 parameters, and for 12.
SIZES = ["mlp", "logistic"]
#: Relative agreement of two solves of the same system; 1e-9 where nothing iterates.
PRECISION = {"lissa": 1e-6, **{name: 1e-7 for name in NAMES if "cg" in name}}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("problem", SIZES)
def test_fit_does_not_depend_on_batches_or_their_order(problem, name):
    case = make_case(problem)
    fit = dict(fits(case))[name]
    expected = fit(loader(case.train, 24)).influences(*case.test, *case.train).numpy()
    order = torch.randperm(24)
    shuffled = tree_map(lambda t: t[order], case.train)
    for size, data in ((10, shuffled), (7, case.train), (1, shuffled)):
        if not (name == "lissa" and size == 1):  # 24 products a pass, each of one sample
            close(fit(loader(data, size)).influences(*case.test, *case.train), expected, PRECISION.get(name, 1e-9))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("problem", SIZES)
def test_fitted_models_are_pickled_copied_and_saved(problem, name):
    case = make_case(problem)
    model = dict(fits(case))[name](case.train)
    expected = model.influences(*case.test, *case.train)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    pickled = pickle.dumps(model)
    assert len(pickled) < 120_000
    for other in (pickle.loads(pickled), copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other.influences(*case.test, *case.train), expected)
        assert other.regularization == model.regularization


@pytest.mark.parametrize("method", ["cg", "lissa", "harmonic"])
def test_what_reads_the_data_again_holds_a_handle(method, tmp_path):
    case = make_case("mlp")
    big = tuple(part.repeat(1500, *[1] * (part.ndim - 1)) for part in case.train)  # 36,000 samples, 1.4 MB
    fit = dict(fits(case))[method]
    if method in ("cg", "lissa"):  # loosely: a pass over so much data takes long
        make = {"cg": CgInfluence, "lissa": LissaInfluence}[method]
        fit = make(case.model, case.loss, 0.5, rtol=1e-2, second_order_mode="gauss_newton").fit
    model = fit(big)
    with pytest.raises(DataError, match=r"lives in memory and pickles only as a recipe.*saved\(folder\)"):
        pickle.dumps(model)
    assert copy.deepcopy(model).inverse.data is model.inverse.data
    saved = fit(Data.of(big).saved(tmp_path / "train"))
    pickled = pickle.dumps(saved)
    assert len(pickled) < 20_000
    expected = model.influences(case.test[0][:1], case.test[1][:1])
    assert torch.allclose(pickle.loads(pickled).influences(case.test[0][:1], case.test[1][:1]), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("problem", SIZES)
def test_another_regularization_without_another_fit(problem, name):
    case = make_case(problem)
    fit = dict(fits(case))[name]
    first = fit(case.train)
    again = first.with_regularization(0.3)
    globals()["LAMBDA"], before = 0.3, LAMBDA
    try:
        expected = dict(fits(case))[name](case.train)
    finally:
        globals()["LAMBDA"] = before
    assert expected.regularization == again.regularization == dict.fromkeys(again.problem.blocks, 0.3)
    actual = again.influences(*case.test, *case.train)
    close(actual, expected.influences(*case.test, *case.train).numpy(), PRECISION.get(name, 1e-9))
    assert not torch.allclose(first.influences(*case.test), again.influences(*case.test), rtol=1e-2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n_test", "n_train"), [(3, 7), (8, 3)])
def test_perturbation_equals_finite_differences_of_the_scores(name, n_test, n_train):
    case = make_case("mlp")
    model = dict(fits(case))[name](case.train)
    test = [part[:n_test] for part in case.train]
    x, y = (part[:n_train] for part in case.test)
    derivative = model.influences(*test, x, y, mode="perturbation").numpy()
    assert derivative.shape == (n_test, n_train, 4)
    factors = model.influence_factors(*test)
    step = 1e-5
    for feature in range(4):
        shift = step * torch.eye(4, dtype=torch.float64)[feature]
        up, down = (model.influences_from_factors(factors, x + s, y) for s in (shift, -shift))
        close(((up - down) / (2 * step)).numpy(), derivative[..., feature], 1e-6)
    close(model.influences_from_factors(factors, x, y, mode="perturbation"), derivative, 1e-10)
    close(model.influences(*test, x, y), model.influences_from_factors(factors, x, y).numpy(), 1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("problem", SIZES)
def test_self_influences_are_the_diagonal(problem, name):
    case = make_case(problem)
    model = dict(fits(case))[name](case.train)
    whole = model.influences(*case.train)
    close(model.self_influences(*case.train), whole.diagonal().numpy(), PRECISION.get(name, 1e-9))


# Low rank


@pytest.mark.parametrize("woodbury", [False, True])
def test_arnoldi_of_low_rank(woodbury):
    """The leading eigenpairs; with Woodbury the matrix is lambda elsewhere."""
    case = make_case("attention")
    left, right = gradients(case)
    matrix = reference.hessian(case.model, case.loss, *case.train)
    values, vectors = np.linalg.eigh(matrix)
    lead = np.argsort(-np.abs(values))[:5]
    mu, v = values[lead], vectors[:, lead]
    inverse = v @ np.diag(1 / (mu + LAMBDA)) @ v.T
    if woodbury:
        inverse = np.linalg.inv(v @ np.diag(mu) @ v.T + LAMBDA * np.eye(len(matrix)))
    model = ArnoldiInfluence(
        case.model, case.loss, LAMBDA, rank=5, krylov_dimension=20, tol=1e-12, use_woodbury=woodbury
    ).fit(case.train)
    assert model.n_parameters > 20  # or the matrix would have been built
    close(model.influences(*case.test, *case.train), left @ inverse @ right.T, 1e-8)
    close(model.influence_factors(*case.test), left @ inverse, 1e-8)
    rows = model.left_rows(*case.test)
    assert isinstance(rows, CoordinateRows)
    assert rows.coordinates.shape == (7, 5)
    of_gradients = {f"identity.{n}": (0, a.shape[1]) for n, a in model.gradient_rows(*case.test).arrays.items()}
    assert (rows.identity is None) == (not woodbury)
    assert {name: tuple(a.shape) for name, a in model.inverse.left(model.empty_gradients()).arrays.items()} == (
        {"coordinates": (0, 5)} | (of_gradients if woodbury else {})
    )


def test_nystroem_is_exact_for_a_matrix_of_low_rank():
    case = make_case("cnn", n_train=4)  # Gauss-Newton of rank 8 at most: two free classes a sample
    left, right = gradients(case)
    matrix = reference.gauss_newton(case.model, case.loss, *case.train)
    assert np.linalg.matrix_rank(matrix) <= 8 < len(matrix)
    model = NystroemSketchInfluence(case.model, case.loss, 1e-3, 10, second_order_mode="gauss_newton").fit(case.train)
    close(model.influences(*case.test, *case.train), reference.influences(matrix, 1e-3, left, right), 1e-6)
    assert model.left_rows(*case.test).coordinates.shape[1] <= 8


def test_nystroem_equals_its_formula():
    case = make_case("attention")
    left, right = gradients(case)
    matrix = reference.gauss_newton(case.model, case.loss, *case.train)
    generator = torch.Generator().manual_seed(0)
    sketch = torch.linalg.qr(torch.randn(len(matrix), 6, generator=generator, dtype=torch.float64))[0].numpy()
    image = matrix @ sketch
    approximation = image @ np.linalg.inv(sketch.T @ image) @ image.T
    model = NystroemSketchInfluence(case.model, case.loss, LAMBDA, 6, "full", "gauss_newton").fit(case.train)
    close(model.influences(*case.test, *case.train), reference.influences(approximation, LAMBDA, left, right), 1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: ArnoldiInfluence(m, F.cross_entropy, rank=4, use_woodbury=True), "without a regularization > 0"),
        (lambda m: NystroemSketchInfluence(m, F.cross_entropy, 0.0, 4), "rank 4 of 43: without a regularization > 0"),
        (
            lambda m: ArnoldiInfluence(m, F.cross_entropy, rank=ALL, second_order_mode="empirical_fisher"),
            "an eigenvalue of the regularized matrix is",
        ),
        (lambda m: ArnoldiInfluence(m, F.cross_entropy, 0.1, rank=0), "rank must be a whole number, at least 1"),
        (lambda m: InverseHarmonicMeanInfluence(m, F.cross_entropy, 0), "divides by the regularization"),
        (lambda m: CgInfluence(m, F.cross_entropy, maxiter=0), "maxiter must be positive"),
        (lambda m: CgInfluence(m, F.cross_entropy, rtol=-1.0), "rtol must be finite and >= 0"),
        (lambda m: LissaInfluence(m, F.cross_entropy, scale=0.0), "scale must be positive"),
        (lambda m: CgInfluence(m, F.cross_entropy, preconditioner="jacobi"), "must be a JacobiPreconditioner"),
        (
            lambda m: CgInfluence(m, F.cross_entropy, 0.1, preconditioner=NystroemPreconditioner(0)),
            "rank must be at least 1",
        ),
        (
            lambda m: ArnoldiInfluence(m, F.cross_entropy, 0.1, eigen_computation_on_gpu=True),
            "needs the model on a GPU",
        ),
    ],
)
def test_bad_options_are_refused_when_fitting(make, message):
    case = make_case("mlp")
    with pytest.raises((ProblemError, SingularMatrixError), match=message):
        make(case.model).fit(case.train)


def test_eigenvalues_that_are_not_found_are_an_error():
    case = make_case("attention")
    model = ArnoldiInfluence(case.model, case.loss, LAMBDA, rank=3, krylov_dimension=5, tol=1e-14, max_iter=1)
    with pytest.raises(ConvergenceError, match=r"of 3 eigenvalues were found: raise max_iter"):
        model.fit(case.train)


# Iterations


def ill_conditioned():
    """A linear regression whose features differ in size by four orders of magnitude, and are correlated."""
    torch.manual_seed(0)
    x = torch.randn(200, 40).double() @ torch.diag(torch.logspace(0, -2, 40).double())
    x = x + 0.3 * x.roll(1, 1)
    return nn.Linear(40, 1).double(), (x, torch.randn(200, 1).double())


@pytest.mark.parametrize(
    ("preconditioner", "block"),
    [(JacobiPreconditioner(20), False), (NystroemPreconditioner(20), False), (NystroemPreconditioner(30), True)],
)
def test_preconditioners_halve_the_iterations(preconditioner, block):
    model, data = ill_conditioned()
    test = tuple(part[:3] for part in data)

    def iterations(p):
        influence = CgInfluence(
            model, F.mse_loss, 1e-5, rtol=1e-8, atol=0.0, preconditioner=p, solve_simultaneously=block
        )
        rows = influence.fit(data).gradient_rows(*test)
        solved, info = influence.inverse.solve(rows)
        assert info["all"]["converged"].all()
        assert (info["all"]["residual"] <= 1e-8).all()
        exact = DirectInfluence(model, F.mse_loss, 1e-5).fit(data).influence_factors(*test)
        close(solved.values, exact.numpy(), 1e-4)
        return info["all"]["iterations"].max()

    assert iterations(preconditioner) <= iterations(None) / 2


def trained_digits():
    """A network on real digits, whose pixels (0 to 16) nobody has scaled: 1,797 samples, 1,210 parameters."""
    from sklearn.datasets import load_digits  # noqa: PLC0415

    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, weight_decay=1e-4)
    for _ in range(600):
        some = torch.randint(0, len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
    optimizer.zero_grad()
    assert F.cross_entropy(model(x), y).item() < 0.15
    return model, (x, y)


def test_ekfac_takes_a_third_of_the_iterations_of_plain_cg_on_a_trained_network():
    model, data = trained_digits()
    test = tuple(part[:3] for part in data)
    counts = {}
    for name in ("plain", "ekfac"):
        ekfac = EkfacInfluence(model, True, fisher="exact")  # fitted with the solver, damped as it is
        influence = CgInfluence(
            model,
            F.cross_entropy,
            1e-5,
            rtol=1e-2,
            atol=0.0,
            preconditioner=EkfacPreconditioner(ekfac) if name == "ekfac" else None,
            precompute_grad=True,
            second_order_mode="gauss_newton",
        ).fit(data)
        info = influence.inverse.solve(influence.gradient_rows(*test))[1]["all"]
        assert info["converged"].all()
        counts[name] = int(info["iterations"].max())
    assert counts["ekfac"] <= counts["plain"] / 3, counts


@pytest.mark.parametrize("tol", [1e-6, 1e-4])
def test_eigenvalues_that_are_there_several_times_are_found_as_often(tol):
    """Of squared errors of d outputs each eigenvalue of the Gauss-Newton matrix is there d times."""
    torch.manual_seed(0)
    model, x = nn.Linear(30, 10, bias=False).double(), torch.randn(200, 30).double()
    data = x, torch.zeros(200, 10).double()
    influence = ArnoldiInfluence(
        model, lambda z, y: (z - y).square().sum() / 2, 0.1, rank=10, tol=tol, second_order_mode="gauss_newton"
    )
    found = influence.fit(data).inverse.values["all"]
    largest = torch.linalg.eigvalsh(x.T @ x / 200)[-1]
    assert torch.allclose(found, largest.expand(10), rtol=2 * tol)


def test_ekfac_cg_equals_the_gauss_newton_solve_in_few_products(monkeypatch):
    model, (x, y) = trained_digits()
    test, passes = (x[:60], y[:60]), []
    exact = DirectInfluence(model, F.cross_entropy, 1e-3, second_order_mode="gauss_newton").fit((x, y))
    expected = exact.influences(*test, x, y)
    plain = EkfacInfluence(model, True, 1e-3).fit((x, y)).influences(*test, x, y)
    matmat = Curvature.matmat
    monkeypatch.setattr(Curvature, "matmat", lambda self, v: passes.append(v.shape[1]) or matmat(self, v))
    for rtol, most, error in ((0.3, 8, 0.1), (0.1, 10, 0.03), (1e-4, 20, 1e-4)):
        passes.clear()
        influence = EkfacCgInfluence(model, F.cross_entropy, 1e-3, rtol=rtol).fit((x, y))
        found = influence.influences(*test, x, y)
        assert (found - expected).norm() < error * expected.norm()
        assert len(passes) <= most
    assert (plain - expected).norm() > 0.3 * expected.norm()
    called = compute_influences(
        Problem(model, F.cross_entropy),
        (x, y),
        test_data=test,
        inversion_method="ekfac_cg",
        hessian_regularization=1e-3,
        rtol=1e-4,
    )
    assert torch.allclose(called, found)


def test_the_ekfac_preconditioner_maps_parameters_by_name():
    case = make_case("mlp")
    structure = {"all": ["2.bias", "0.weight", "0.bias", "2.weight"]}
    ekfac = EkfacInfluence(case.model, True, LAMBDA, fisher="exact").fit(case.train)
    options = {"block_structure": structure, "second_order_mode": "gauss_newton"}
    fitted = EkfacPreconditioner(ekfac)
    cg = CgInfluence(case.model, case.loss, LAMBDA, **TIGHT, preconditioner=fitted, **options).fit(case.train)
    direct = DirectInfluence(case.model, case.loss, LAMBDA, **options).fit(case.train)
    close(cg.influences(*case.test), direct.influences(*case.test).numpy(), 1e-6)
    preconditioner = cg.inverse.preconditioners["all"]
    columns = torch.randn(43, 2, dtype=torch.float64)
    by_name = cg.problem.unflatten(columns.T)
    rows = ekfac.as_rows(ekfac.problem.flatten(by_name))
    expected = cg.problem.flatten(ekfac.problem.unflatten(ekfac.dense(ekfac.inverse.left(rows)).values)).T
    assert torch.allclose(preconditioner.solve(columns, LAMBDA), expected)
    parts = {"a": ["0.weight", "2.weight"], "b": ["0.bias", "2.bias"]}
    with pytest.raises(ProblemError, match=r"must consist of whole layers.*0\.bias"):
        CgInfluence(case.model, case.loss, LAMBDA, preconditioner=fitted, block_structure=parts).fit(case.train)
    with pytest.raises(ProblemError, match="takes an EkfacInfluence, not a DirectInfluence"):
        CgInfluence(case.model, case.loss, LAMBDA, preconditioner=EkfacPreconditioner(direct)).fit(case.train)


@pytest.mark.parametrize("block", [False, True])
def test_more_right_hand_sides_than_parameters(block):
    case = make_case("linear")
    model = CgInfluence(case.model, case.loss, LAMBDA, **TIGHT, solve_simultaneously=block).fit(case.train)
    rows = torch.randn(40, 5, dtype=torch.float64)
    rows[7] = 0
    rows[8:20] = rows[20:32]
    matrix = torch.from_numpy(reference.hessian(case.model, case.loss, *case.train))
    expected = torch.linalg.solve(matrix + LAMBDA * torch.eye(5, dtype=torch.float64), rows.T).T
    solved, info = model.inverse.solve(model.as_rows(rows))
    close(solved.values, expected.numpy(), 1e-8)
    assert info["all"]["converged"].all()
    assert info["all"]["iterations"].max() <= (2 if block else 6)


def test_block_cg_needs_fewer_products():
    model, data = ill_conditioned()
    counts = []
    for block in (False, True):
        influence = CgInfluence(model, F.mse_loss, 1e-5, **TIGHT, solve_simultaneously=block).fit(data)
        counts.append(influence.inverse.solve(influence.gradient_rows(*data))[1]["all"]["iterations"].max())
    assert counts[1] < counts[0] / 5


@pytest.mark.parametrize("block", [False, True])
def test_truncated_cg_keeps_what_it_has(block):
    """The residual may rise at first; the error, in the norm of the matrix, falls with every step."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(200, 200).double())[0]
    matrix = q @ torch.diag(torch.logspace(-4, 0, 200).double()) @ q.T
    b = q @ (torch.randn(200, 3).double() * torch.logspace(0, -2, 200).double()[:, None])
    exact = torch.linalg.solve(matrix, b)
    before = (exact * b).sum(0)
    for maxiter in (2, 5, 20):
        solution = conjugate_gradient(lambda v: matrix @ v, b, rtol=1e-8, atol=0.0, maxiter=maxiter, block=block)
        error = solution.x - exact
        energy = (error * (matrix @ error)).sum(0)
        assert (energy < before).all()
        assert torch.allclose(solution.residual, (b - matrix @ solution.x).norm(dim=0) / b.norm(dim=0))
        assert not solution.converged.any()
        before = energy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lissa_on_a_singular_matrix_stagnates_but_does_not_diverge(dtype):
    model = nn.Linear(30, 1).to(dtype)
    data = torch.randn(8, 30, dtype=dtype), torch.randn(8, 1, dtype=dtype)
    scale = 1.2 * float(np.linalg.eigvalsh(reference.hessian(model, F.mse_loss, *data))[-1])
    influence = LissaInfluence(model, F.mse_loss, scale=scale, maxiter=3000).fit(data)
    with pytest.warns(ConvergenceWarning, match="LiSSA on block 'all'"):
        influence.influence_factors(torch.randn(3, 30, dtype=dtype), torch.randn(3, 1, dtype=dtype))


@pytest.mark.parametrize(
    "make", [lambda *a: NystroemSketchInfluence(*a, 2), lambda *a: ArnoldiInfluence(*a, 2, use_woodbury=True)]
)
def test_a_matrix_of_zeros_leaves_lambda(make):
    model = nn.Linear(30, 1).double()
    data = torch.randn(8, 30).double(), torch.randn(8, 1).double()

    def absolute(z, y):
        return (z - y).abs().sum()

    influence = make(model, absolute, 0.5).fit(data)
    rows = torch.from_numpy(reference.gradients(model, absolute, *data))
    assert torch.allclose(influence.influences(*data), 2 * rows @ rows.T)


@pytest.mark.parametrize("block", [False, True])
def test_cg_that_does_not_converge_says_so(block):
    model, data = ill_conditioned()
    options = {"maxiter": 3, "solve_simultaneously": block, "rtol": 1e-8, "atol": 0.0}
    influence = CgInfluence(model, F.mse_loss, 1e-5, **options).fit(data)
    with pytest.warns(
        ConvergenceWarning, match=r"stopped after 3 iterations with 2 of 2 .* residual is .*Raise maxiter"
    ):
        factors = influence.influence_factors(*(part[:2] for part in data))
    rows = influence.gradient_rows(*(part[:2] for part in data)).values.numpy()
    matrix = reference.hessian(model, F.mse_loss, *data) + 1e-5 * np.eye(41)
    with pytest.warns(ConvergenceWarning):
        info = influence.inverse.solve(influence.as_rows(torch.from_numpy(rows)))[1]["all"]
    left = np.linalg.norm(rows - factors.numpy() @ matrix, axis=1) / np.linalg.norm(rows, axis=1)
    close(info["residual"], left, 1e-10)
    quiet = CgInfluence(model, F.mse_loss, 1e-5, **options, warn_on_max_iteration=False).fit(data)
    quiet.influence_factors(*(part[:2] for part in data))


def test_negative_curvature_is_named():
    case = make_case("mlp_regression")
    model = CgInfluence(case.model, case.loss, 0.0, rtol=1e-14, atol=0.0, maxiter=4).fit(case.train)
    with pytest.warns(ConvergenceWarning, match=r"not positive definite.*raise the regularization, or use"):
        model.influence_factors(*case.test)


def test_tolerances_are_used():
    model, data = ill_conditioned()
    counts = []
    for options in ({"rtol": 1e-2, "atol": 0.0}, {"rtol": 1e-8, "atol": 0.0}, {"rtol": 0.0, "atol": 1e3}):
        influence = CgInfluence(model, F.mse_loss, 1e-5, **options).fit(data)
        info = influence.inverse.solve(influence.gradient_rows(*data))[1]["all"]
        counts.append(int(info["iterations"].max()))
    assert counts[1] > counts[0] > counts[2] == 0


def test_lissa_that_diverges_names_a_scale_that_works():
    case = make_case("cnn")
    options = {"second_order_mode": "gauss_newton", "maxiter": 20_000}
    x = {"x": case.train[0] * 10}["x"]
    data = loader((x, case.train[1]))
    with pytest.raises(
        ConvergenceError, match=r"diverges on block 'all' at scale 0\.1: .*scale=\S+ would have"
    ) as error:
        LissaInfluence(case.model, case.loss, LAMBDA, scale=0.1, **options).fit(data).influence_factors(*case.test)
    scale = float(str(error.value).split("scale=")[1].split(" ")[0])
    model = LissaInfluence(case.model, case.loss, LAMBDA, scale=scale, rtol=1e-6, **options).fit(data)
    exact = DirectInfluence(case.model, case.loss, LAMBDA, second_order_mode="gauss_newton").fit(data)
    close(model.influence_factors(*case.test), exact.influence_factors(*case.test).numpy(), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lissa_on_an_indefinite_matrix_says_that_no_scale_works(dtype):
    case = make_case("mlp_regression")
    case.model.to(dtype)
    case.train, case.test = (tuple(part.to(dtype) for part in data) for data in (case.train, case.test))
    model = LissaInfluence(case.model, case.loss, LAMBDA, maxiter=20_000).fit(loader(case.train))
    with pytest.raises(ConvergenceError, match=r"would at any other: .* negative eigenvalue.*gauss_newton"):
        model.influence_factors(*case.test)


def test_lissa_reports_its_residual_and_shrinks_it():
    case = make_case("mlp")
    worst = []
    for maxiter in (10, 100, 600):
        model = LissaInfluence(
            case.model, case.loss, LAMBDA, maxiter, rtol=1e-12, scale=2.0, second_order_mode="gauss_newton"
        ).fit(loader(case.train, 5))
        with pytest.warns(ConvergenceWarning, match=r"LiSSA on block 'all' \(scale 2\) stopped after"):
            solved, info = model.inverse.solve(model.gradient_rows(*case.test))
        matrix = reference.gauss_newton(case.model, case.loss, *case.train) + LAMBDA * np.eye(43)
        rows = model.gradient_rows(*case.test).dense().values.numpy()
        left = np.linalg.norm(rows - solved.values.numpy() @ matrix, axis=1) / np.linalg.norm(rows, axis=1)
        assert np.allclose(info["all"]["residual"], left, rtol=1e-6, atol=1e-13)
        assert info["all"]["max_error"] == pytest.approx(left.max())
        assert info["all"]["mean_error"] == pytest.approx(left.mean())
        worst.append(left.max())
    assert worst[0] > 2 * worst[1] > 20 * worst[2]


def test_lissas_dampening_adds_to_the_regularization():
    case = make_case("mlp")
    options = {"second_order_mode": "gauss_newton"}
    model = LissaInfluence(case.model, case.loss, 0.05, 5000, dampen=0.01, scale=20.0, rtol=1e-8, **options)
    expected = DirectInfluence(case.model, case.loss, 0.05 + 0.2, **options).fit(case.train)
    close(model.fit(loader(case.train)).influences(*case.test), expected.influences(*case.test).numpy(), 1e-6)


@pytest.mark.parametrize("method", ["cg", "lissa", "harmonic"])
def test_data_that_changed_since_the_fit_are_refused(method):
    case = make_case("mlp")
    model = dict(fits(case))[method](case.train)
    case.train[0][3] += 1
    with pytest.raises(ProblemError, match="was fitted on have changed since"):
        model.check(Data.of(case.test), "test")


@pytest.mark.parametrize("method", [*EXACT])
def test_float32(method):
    case = make_case("mlp")
    exact = DirectInfluence(case.model, case.loss, LAMBDA, second_order_mode="gauss_newton").fit(case.train)
    expected = exact.influences(*case.test, *case.train).numpy()
    case.model.float()
    train, test = ((x.float(), y) for x, y in (case.train, case.test))
    make = EXACT[method] if "cg" not in method else lambda *a, **k: CgInfluence(*a, rtol=1e-5, atol=0.0, **k)
    scores = make(case.model, case.loss, LAMBDA, second_order_mode="gauss_newton").fit(train).influences(*test, *train)
    assert scores.dtype == torch.float32
    close(scores.double(), expected, max(TOLERANCE.get(method, 0), 1e-3))


def test_a_store_of_truncated_solves_is_not_continued_with_another_preconditioner():
    case = make_case("mlp")
    ekfac = EkfacPreconditioner(EkfacInfluence(case.model, True, 0.1))
    kinds = [None, JacobiPreconditioner(1), JacobiPreconditioner(2), NystroemPreconditioner(3), ekfac]
    texts = [str(CgInfluence(case.model, case.loss, preconditioner=kind).solver.options()) for kind in kinds]
    assert len(set(texts)) == len(kinds)
    assert not any(" at 0x" in text for text in texts)  # the same in every process
