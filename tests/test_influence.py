"""Direct influences against the dense reference, and what every influence model promises."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import reference
from cases import make_case
from outfluence import Data, DirectInfluence, EkfacInfluence
from outfluence.data import tree_leaves, tree_map
from outfluence.errors import DataError, NonFiniteError, NotFittedError, ProblemError, SingularMatrixError
from outfluence.solvers.direct import DirectSolver

LAMBDA = 0.05  # small against the eigenvalues: the inverse matters, and the Hessians of several cases are indefinite
MATRICES = {"hessian": reference.hessian, "gauss_newton": reference.gauss_newton}


def fitted(case, **options):
    return DirectInfluence(case.model, case.loss, LAMBDA, **options).fit(case.train)


def reference_gradients(case, names=None):
    return [reference.gradients(case.model, case.loss, *data, names) for data in (case.test, case.train)]


def close(actual, expected, tolerance=1e-8):
    actual = actual.numpy() if isinstance(actual, torch.Tensor) else actual
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("mode", MATRICES)
def test_direct_equals_the_dense_reference(case, mode):
    left, right = reference_gradients(case)
    matrix = MATRICES[mode](case.model, case.loss, *case.train)
    expected = reference.influences(matrix, LAMBDA, left, right)
    model = fitted(case, second_order_mode=mode)
    close(model.influences(*case.test, *case.train), expected)
    factors = model.influence_factors(*case.test)
    close(factors, np.linalg.solve(matrix + LAMBDA * np.eye(len(matrix)), left.T).T)
    close(model.influences_from_factors(factors, *case.train), expected)


def test_at_this_regularization_the_inverse_matters(case):
    """A test that gradient dot products pass would prove nothing."""
    left, right = reference_gradients(case)
    exact = fitted(case).influences(*case.test, *case.train).numpy()
    plain = left @ right.T
    plain *= (exact * plain).sum() / (plain * plain).sum()  # the best scale there is
    assert np.abs(exact - plain).max() > 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("structure", ["layer_wise", "parameter_wise", "own"])
def test_blocks_ignore_the_curvature_between_them(case, structure):
    names = [name for name, p in case.model.named_parameters() if p.requires_grad]
    if structure == "own":
        structure = {"second": names[1:], "first": names[:1]} if len(names) > 1 else {"all": names}
    model = fitted(case, block_structure=structure)
    by_block = model.influences_by_block(*case.test, *case.train)
    total = 0
    for block, members in model.problem.blocks.items():
        left, right = reference_gradients(case, members)
        matrix = reference.hessian(case.model, case.loss, *case.train, members)
        expected = reference.influences(matrix, LAMBDA, left, right)
        close(by_block[block], expected)
        total = total + expected
    close(model.influences(*case.test, *case.train), total)
    factors = model.influence_factors_by_block(*case.test)
    assert list(factors) == list(by_block) == list(model.problem.blocks)
    from_factors = model.influences_from_factors_by_block(factors, *case.train)
    assert all(torch.allclose(from_factors[block], by_block[block]) for block in by_block)


def test_a_regularization_for_each_block():
    case = make_case("mlp")
    lambdas = {"0": 0.3, "2": 0.02}
    model = DirectInfluence(case.model, case.loss, lambdas, "layer_wise").fit(case.train)
    for block, members in model.problem.blocks.items():
        left, right = reference_gradients(case, members)
        matrix = reference.hessian(case.model, case.loss, *case.train, members)
        actual = model.influences_by_block(*case.test, *case.train)[block]
        close(actual, reference.influences(matrix, lambdas[block], left, right))


@pytest.mark.parametrize("name", ["linear", "mlp", "mlp_regression", "cnn", "attention", "nested"])
@pytest.mark.parametrize(("n_test", "n_train"), [(7, 24), (24, 5)])
def test_perturbation_equals_the_dense_reference(name, n_test, n_train):
    case = make_case(name)
    x, y = (part[:n_train] for part in case.train)
    test = [part[:n_test] for part in (case.train if n_test > 7 else case.test)]
    left = reference.gradients(case.model, case.loss, *test)
    matrix = reference.hessian(case.model, case.loss, *case.train)
    expected = reference.perturbations(case.model, case.loss, matrix, LAMBDA, left, x, y)
    model = fitted(case)
    close(model.influences(*test, x, y, mode="perturbation"), expected)
    blocks = fitted(case, block_structure="layer_wise")
    by_block = blocks.influences_by_block(*test, x, y, mode="perturbation")
    close(sum(by_block.values()), blocks.influences(*test, x, y, mode="perturbation").numpy())


@pytest.mark.parametrize("name", ["mlp", "mlp_regression", "cnn"])
def test_perturbation_is_the_derivative_of_up_weighting(name):
    case = make_case(name)
    model = fitted(case)
    x, y = (part[:3] for part in case.train)
    derivative = model.influences(*case.test, x, y, mode="perturbation")
    step = 1e-5
    for feature in np.ndindex(*x.shape[1:]):
        shift = torch.zeros_like(x)
        shift[(slice(None), *feature)] = step
        up, down = (model.influences(*case.test, x + s, y) for s in (shift, -shift))
        close(derivative[(..., *feature)], ((up - down) / (2 * step)).numpy(), 1e-7)


def test_perturbation_differentiates_the_only_floating_input():
    case = make_case("dict_inputs")
    model = fitted(case)
    scores = model.influences(*case.test, *case.train, mode="perturbation")
    assert scores.shape == (7, 24, 3)
    x, y = case.train
    up = {**x, "features": x["features"] + 1e-6 * torch.eye(3, dtype=torch.float64)[1]}
    slope = (model.influences(*case.test, up, y) - model.influences(*case.test, x, y)) / 1e-6
    assert torch.allclose(scores[..., 1], slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MATRICES)
def test_fit_does_not_depend_on_batches_or_their_order(case, mode):
    expected = fitted(case, second_order_mode=mode).influences(*case.test, *case.train)
    order = torch.randperm(24)
    shuffled = tree_map(lambda t: t[order], case.train)

    class Samples(torch.utils.data.Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, i):
            return tree_map(lambda t: t[i], shuffled)

    for size in (10, 7, 1):  # 10 + 10 + 4
        loader = DataLoader(Samples(), batch_size=size)
        model = DirectInfluence(case.model, case.loss, LAMBDA, second_order_mode=mode).fit(loader)
        close(model.influences(*case.test, *case.train), expected.numpy(), 1e-10)


def test_self_influences_are_the_diagonal(case):
    model = fitted(case)
    close(model.self_influences(*case.train), model.influences(*case.train).diagonal().numpy())


def test_with_regularization_keeps_the_fit():
    case = make_case("mlp")
    first = fitted(case)
    before = first.influences(*case.test, *case.train)
    again = first.with_regularization(0.5)
    expected = DirectInfluence(case.model, case.loss, 0.5).fit(case.train)
    close(again.influences(*case.test, *case.train), expected.influences(*case.test, *case.train).numpy())
    assert torch.equal(first.influences(*case.test, *case.train), before)
    assert again.regularization == {"all": 0.5}
    assert first.regularization == {"all": LAMBDA}


@pytest.mark.parametrize("make", [fitted, lambda c: EkfacInfluence(c.model, True, 1).fit(c.train)])
def test_fitted_models_travel_and_hold_no_data(make):
    case = make_case("mlp")
    big = tuple(part.repeat(2000, *[1] * (part.ndim - 1)) for part in case.train)  # 48,000 samples, 2 MB
    case.train = big
    model = make(case)
    expected = model.influences(*case.test)
    pickled = pickle.dumps(model)
    assert len(pickled) < 100_000
    for other in (pickle.loads(pickled), copy.deepcopy(model)):
        assert torch.equal(other.influences(*case.test), expected)
        assert other.is_fitted


@pytest.mark.parametrize("grad_enabled", [True, False])
@pytest.mark.parametrize("make", [fitted, lambda c: EkfacInfluence(c.model, True, 0.1).fit(c.train)])
def test_nothing_of_the_users_is_changed(make, grad_enabled):
    case = make_case("mlp")
    case.model.train()  # allowed: no layer here behaves differently
    case.model[0].eval()
    case.model[2].weight.grad = torch.ones_like(case.model[2].weight)
    before = {
        "state": copy.deepcopy(case.model.state_dict()),
        "training": [m.training for m in case.model.modules()],
        "hooks": [len(m._forward_hooks) for m in case.model.modules()],
        "random": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
        "requires": [p.requires_grad for p in case.model.parameters()],
        "data": [t.clone() for t in tree_leaves((case.train, case.test))],
    }
    with torch.set_grad_enabled(grad_enabled):
        model = make(case)
        model.influences(*case.test, *case.train)
        model.influences(*case.test, *case.train, mode="perturbation")
    assert all(torch.equal(v, before["state"][k]) for k, v in case.model.state_dict().items())
    assert [m.training for m in case.model.modules()] == before["training"]
    assert [len(m._forward_hooks) for m in case.model.modules()] == before["hooks"]
    assert torch.equal(torch.get_rng_state(), before["random"][0])
    assert np.array_equal(np.random.get_state()[1], before["random"][1])
    assert random.getstate() == before["random"][2]
    assert [p.requires_grad for p in case.model.parameters()] == before["requires"]
    assert [p.grad is None for p in case.model.parameters()] == [True, True, False, True]
    assert torch.equal(case.model[2].weight.grad, torch.ones_like(case.model[2].weight))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves((case.train, case.test)), before["data"], strict=True))
    assert not any(t.requires_grad for t in tree_leaves((case.train, case.test)))


def test_on_another_device_the_users_model_stays():
    case = make_case("mlp")
    model = fitted(case).to("meta")
    assert model.problem.device.type == "meta"
    assert {p.device.type for p in case.model.parameters()} == {"cpu"}


def test_loss_with_a_sum_is_the_same_loss():
    case = make_case("mlp")
    total = DirectInfluence(case.model, nn.CrossEntropyLoss(reduction="sum"), LAMBDA).fit(case.train)
    close(total.influences(*case.test, *case.train), fitted(case).influences(*case.test, *case.train).numpy())


def test_a_loss_without_labels():
    case = make_case("linear")
    model = DirectInfluence(case.model, lambda output, _: output.square().mean(), LAMBDA).fit((case.train[0], None))
    assert model.influences(case.test[0], None, case.train[0], None).shape == (7, 24)


def test_integer_regularization_and_float32_models():
    case = make_case("mlp")
    model = DirectInfluence(case.model.float(), case.loss, 1)
    scores = model.fit((case.train[0].float(), case.train[1])).influences(case.test[0].float(), case.test[1])
    assert scores.dtype == torch.float32


# Bad input


def test_unfitted_models_say_so():
    case = make_case("mlp")
    model = DirectInfluence(case.model, case.loss, LAMBDA)
    assert not model.is_fitted
    with pytest.raises(NotFittedError, match=r"DirectInfluence is not fitted: call \.fit"):
        model.influences(*case.test)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_matrix_is_refused_with_a_way_out(dtype):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)  # three samples leave most directions without curvature
    data = torch.randn(3, 4, dtype=dtype), torch.tensor([0, 1, 2])
    with pytest.raises(SingularMatrixError, match=r"block 'all' has no inverse at regularization 0.*Raise the reg"):
        DirectInfluence(model, F.cross_entropy).fit(data)
    DirectInfluence(model, F.cross_entropy, 1e-2).fit(data)


def test_an_indefinite_matrix_is_solved():
    case = make_case("mlp_regression")
    eigenvalues = np.linalg.eigvalsh(reference.hessian(case.model, case.loss, *case.train)) + LAMBDA
    assert eigenvalues.min() < 0 < eigenvalues.max()
    inverse = DirectSolver(LAMBDA).fit(fitted(case).problem, Data.of(TensorDataset(*case.train)))
    assert inverse.factors["all"].pivots is not None


@pytest.mark.parametrize(
    ("regularization", "message"),
    [
        (-1.0, "must be finite and >= 0"),
        (float("nan"), "must be finite and >= 0"),
        ({"0": 1.0}, r"names blocks \['0'\], but the blocks are \['0', '2'\]"),
        ("much", "is no number"),
    ],
)
def test_a_wrong_regularization_is_refused(regularization, message):
    case = make_case("mlp")
    with pytest.raises((ProblemError, ValueError), match=message):
        DirectInfluence(case.model, case.loss, regularization, "layer_wise").fit(case.train)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_name_the_sample(value):
    case = make_case("mlp")
    model = fitted(case)
    x, y = case.train[0].clone(), case.train[1]
    x[[3, 17]] = value
    with pytest.raises(NonFiniteError, match=r"gradients for training samples 3, 17") as error:
        model.influences(*case.test, x, y)
    assert error.value.samples == (3, 17)
    assert pickle.loads(pickle.dumps(error.value)).samples == (3, 17)


def test_wrong_shapes_are_refused():
    case = make_case("mlp")
    model = fitted(case)
    with pytest.raises(DataError, match="differ in their number of samples"):
        model.influences(case.test[0], case.test[1][:-1])
    with pytest.raises(DataError, match=r"factors must be \(n_test, 43\)"):
        model.influences_from_factors(torch.zeros(2, 44), *case.train)
    with pytest.raises(ValueError, match="'upward' is no InfluenceMode; choose one of 'up', 'perturbation'"):
        model.influences(*case.test, mode="upward")


def test_a_model_that_went_on_training_is_refused_in_memory_too():
    case = make_case("mlp")
    model = fitted(case)
    with torch.no_grad():
        case.model[0].weight.mul_(2)
    with pytest.raises(ProblemError, match=r"has changed since fit \(weights differ\)"):
        model.influences(*case.test)
    with torch.no_grad():
        case.model[0].weight.div_(2)
    model.influences(*case.test)


def test_labels_without_inputs_are_refused():
    case = make_case("mlp")
    with pytest.raises(DataError, match="y was given without x"):
        fitted(case).influences(*case.test, y=case.train[1])


def test_a_changed_regularization_outlives_another_fit():
    case = make_case("mlp")
    assert fitted(case).with_regularization(7).fit(case.train).regularization == {"all": 7.0}


def test_perturbation_of_integers_is_refused():
    case = make_case("tuple_inputs")
    model = fitted(case)
    tokens = (case.test[0][0], case.test[0][1].long())
    with pytest.raises(ProblemError, match="exactly one floating-point array; it holds 0"):
        model.influences_from_factors(model.influence_factors(*case.test), tokens, case.test[1], mode="perturbation")
