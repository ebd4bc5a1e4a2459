"""The one-call front door."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from cases import make_case
from outfluence import (
    DirectInfluence,
    EkfacInfluence,
    InverseHvpResult,
    Problem,
    TorchTwiceDifferentiable,
    compute_influence_factors,
    compute_influences,
    compute_linear_influences,
    solve_hvp,
)
from outfluence.errors import DataError, ProblemError, SingularMatrixError

LAMBDA = 0.05
GN = {"second_order_mode": "gauss_newton"}
OPTIONS = {
    "direct": GN,
    "cg": {"rtol": 1e-9, "atol": 0.0, **GN},
    "lissa": {"scale": 2.0, "maxiter": 5000, "rtol": 1e-6, **GN},
    "arnoldi": {"rank": 1000, **GN},
    "nystroem": {"rank": 1000, **GN},
    "ekfac": {"update_diagonal": True, "fisher": "exact"},
    "ekfac_cg": {"rtol": 1e-9},
    "projected": {"rank": 1000, "kernel": "exact"},
    "harmonic": {},
}


def expected_factors(case, method, rows):
    if method == "ekfac":
        model = EkfacInfluence(case.model, True, LAMBDA, fisher="exact").fit(case.train)
        return model.dense(model.inverse.left(model.as_rows(torch.from_numpy(rows)))).values.numpy()
    if method == "harmonic":
        return rows @ reference.harmonic(case.model, case.loss, *case.train, LAMBDA)
    matrix = reference.gauss_newton(case.model, case.loss, *case.train)
    return np.linalg.solve(matrix + LAMBDA * np.eye(len(matrix)), rows.T).T


@pytest.mark.parametrize("method", OPTIONS)
def test_every_method_through_every_door(method):
    case = make_case("mlp")
    problem = Problem(case.model, case.loss)
    rows = reference.gradients(case.model, case.loss, *case.test)
    right = reference.gradients(case.model, case.loss, *case.train)
    factors = expected_factors(case, method, rows)
    options = {"hessian_regularization": LAMBDA, **OPTIONS[method]}
    result = compute_influence_factors(problem, case.train, case.test, method, **options)
    assert isinstance(result, InverseHvpResult)
    assert np.allclose(result.x, factors, rtol=1e-4, atol=1e-5)
    scores = compute_influences(problem, case.train, test_data=case.test, inversion_method=method, **options)
    assert np.allclose(scores, factors @ right.T, rtol=1e-4, atol=1e-5)
    few = tuple(part[:3] for part in case.train)
    perturbed = compute_influences(
        problem,
        case.train,
        test_data=case.test,
        input_data=few,
        inversion_method=method,
        influence_type="perturbation",
        **options,
    )
    expected = reference.perturbations(case.model, case.loss, np.zeros((43, 43)), 1.0, factors, *few)
    assert np.allclose(perturbed, expected, rtol=1e-4, atol=1e-4)
    solved = solve_hvp(method, problem, case.train, torch.from_numpy(rows[0]), **options)
    assert solved.x.shape == (43,)
    assert np.allclose(solved.x, factors[0], rtol=1e-4, atol=1e-5)
    info = {
        "direct": {"matrix"},
        "cg": {"iterations", "residual", "converged"},
        "lissa": {"max_error", "mean_error", "residual", "converged", "iterations"},
        "arnoldi": {"eigenvalues", "eigenvectors"},
        "nystroem": {"eigenvalues", "eigenvectors"},
        "ekfac": {"eigenvalues"},
        "ekfac_cg": {"iterations", "residual", "converged"},
        "projected": {"kernel"},
        "harmonic": set(),
    }
    assert set(result.info) == set(solved.info) == info[method]
    if method == "direct":
        assert np.allclose(solved.info["matrix"], reference.gauss_newton(case.model, case.loss, *case.train))
    if method == "cg":
        assert solved.info["converged"].tolist() == [True]
        assert result.info["iterations"].shape == (7,)
    if method in ("arnoldi", "nystroem"):
        v, mu = solved.info["eigenvectors"], solved.info["eigenvalues"]
        matrix = reference.gauss_newton(case.model, case.loss, *case.train)
        assert np.allclose(v @ torch.diag(mu) @ v.T, matrix, atol=1e-8)


def test_training_data_stand_in_for_the_others(capsys):
    case = make_case("linear")
    problem = Problem(case.model, case.loss)
    scores = compute_influences(problem, case.train, hessian_regularization=LAMBDA, progress=True)
    model = DirectInfluence(case.model, case.loss, LAMBDA).fit(case.train)
    assert torch.allclose(scores, model.influences(*case.train))
    assert "scores" in capsys.readouterr().err


def test_info_and_order_by_block():
    case = make_case("mlp")
    names = {"b": ["2.bias", "2.weight"], "a": ["0.weight", "0.bias"]}
    problem = Problem(case.model, case.loss, names)
    result = compute_influence_factors(
        problem, case.train, case.test, "cg", hessian_regularization={"a": 0.1, "b": 0.3}, **GN
    )
    assert list(result.info["converged"]) == ["b", "a"]
    direct = DirectInfluence(case.model, case.loss, {"a": 0.1, "b": 0.3}, names, "gauss_newton").fit(case.train)
    assert torch.allclose(result.x, direct.influence_factors(*case.test), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("newton", {}, "no inversion_method 'newton'; choose one of direct, cg, lissa, arnoldi, nystroem, ekfac"),
        ("cg", {"rtoll": 1}, r"'cg' takes no option 'rtoll' \(did you mean 'rtol'\?\); it takes rtol, atol, maxiter"),
        ("harmonic", {"rank": 3}, "'harmonic' takes no option 'rank'; it takes none"),
        ("direct", {"regularization": 3}, "'direct' takes no option 'regularization'.*it takes second_order_mode"),
        ("nystroem", {}, "'nystroem' needs the option 'rank'"),
    ],
)
def test_options_are_checked_against_the_method(method, options, message):
    case = make_case("mlp")
    with pytest.raises(ProblemError, match=message):
        compute_influences(Problem(case.model, case.loss), case.train, inversion_method=method, **options)


def test_ekfac_takes_no_blocks_of_others():
    case = make_case("mlp")
    with pytest.raises(ProblemError, match="works layer by layer"):
        compute_influences(Problem(case.model, case.loss, "parameter_wise"), case.train, inversion_method="ekfac")


def test_right_hand_sides_are_checked():
    case = make_case("mlp")
    with pytest.raises(DataError, match=r"right-hand sides must be \(n, 43\)"):
        solve_hvp("direct", Problem(case.model, case.loss), case.train, torch.zeros(2, 42))
    with pytest.raises(DataError, match="NaN or infinite"):
        solve_hvp("direct", Problem(case.model, case.loss), case.train, torch.full((43,), float("nan")))


@pytest.mark.parametrize("method", OPTIONS)
def test_no_right_hand_sides_and_zeros(method):
    case = make_case("mlp")
    options = {"hessian_regularization": LAMBDA, **OPTIONS[method]}
    for n in (0, 2):
        result = solve_hvp(method, Problem(case.model, case.loss), case.train, torch.zeros(n, 43).double(), **options)
        assert torch.equal(result.x, torch.zeros(n, 43).double())


def test_torch_twice_differentiable(case):
    problem = TorchTwiceDifferentiable(case.model, case.loss)
    x, y = case.train
    matrix = reference.hessian(case.model, case.loss, x, y)
    assert problem.num_params == len(matrix)
    assert np.allclose(problem.grad(x, y), reference.gradients(case.model, case.loss, x, y).mean(0))
    assert np.allclose(problem.hessian(x, y), matrix, atol=1e-10)
    vectors = torch.randn(3, len(matrix), dtype=torch.float64)
    assert np.allclose(problem.mvp(x, y, vectors), vectors.numpy() @ matrix, atol=1e-10)
    assert np.allclose(problem.mvp(x, y, vectors[0]), matrix @ vectors[0].numpy(), atol=1e-10)
    scores = compute_influences(problem, case.train, hessian_regularization=0.3)
    expected = DirectInfluence(case.model, case.loss, 0.3).fit(case.train).influences(*case.train)
    assert torch.allclose(scores, expected)


def test_a_problem_on_another_device_leaves_the_model():
    case = make_case("mlp")
    problem = TorchTwiceDifferentiable(case.model, case.loss, device="meta")
    assert problem.device.type == "meta"
    assert {p.device.type for p in case.model.parameters()} == {"cpu"}
    assert TorchTwiceDifferentiable(case.model, case.loss, device="cpu").model is case.model
    assert TorchTwiceDifferentiable(case.model, case.loss).to("meta").device.type == "meta"


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("influence_type", ["up", "perturbation"])
def test_linear_influences_equal_those_of_the_fitted_model(outputs, influence_type):
    x, y = torch.randn(30, 4).double(), torch.randn(30, outputs).double()
    xt, yt = torch.randn(6, 4).double(), torch.randn(6, outputs).double()
    weights = np.linalg.lstsq(np.c_[x.numpy(), np.ones(30)], y.numpy(), rcond=None)[0]
    model = nn.Linear(4, outputs).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(weights[:4].T))
        model.bias.copy_(torch.from_numpy(weights[4]))
    actual = compute_linear_influences(x, y.numpy(), xt, yt, influence_type, LAMBDA)
    direct = DirectInfluence(model, F.mse_loss, LAMBDA).fit((x, y))
    expected = direct.influences(xt, yt, x, y, mode=influence_type)
    assert actual.shape == expected.shape
    assert torch.allclose(actual, expected, rtol=1e-8, atol=1e-10)
    if outputs == 1:
        flat = compute_linear_influences(x, y[:, 0], xt, yt[:, 0], influence_type, LAMBDA)
        assert torch.allclose(flat, actual)


def test_linear_influences_check_their_input():
    x, y = torch.randn(3, 4), torch.randn(3)
    with pytest.raises(DataError, match="shapes do not fit"):
        compute_linear_influences(x, y[:2], x, y)
    with pytest.raises(DataError, match="x_test must be a matrix"):
        compute_linear_influences(x, y, torch.zeros(2, 2, 2), y)
    with pytest.raises(SingularMatrixError):
        compute_linear_influences(x, y, x, y)
