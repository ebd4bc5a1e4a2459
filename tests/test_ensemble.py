"""Several models, one store: means of their scores, and products of gradients at checkpoints."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from cases import make_case
from outfluence import (
    CgInfluence,
    DaskInfluenceCalculator,
    DirectInfluence,
    EkfacInfluence,
    EnsembleInfluence,
    NystroemSketchInfluence,
    ProjectedInfluence,
    SequentialInfluenceCalculator,
    TracInInfluence,
)
from outfluence.errors import ProblemError, StoreMismatchError

LAMBDA = 0.05
GAUSS_NEWTON = {"second_order_mode": "gauss_newton"}


def models_of(case, n=3):
    """As trained from different seeds."""
    models = [copy.deepcopy(case.model) for _ in range(n)]
    for i, model in enumerate(models):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return models


def mixed(case):
    """Methods whose rows differ: factors, factors of their own, coordinates and gradients."""
    first, second, third = models_of(case)
    return [
        EkfacInfluence(first, True, LAMBDA, fisher="exact"),
        CgInfluence(second, case.loss, LAMBDA, rtol=1e-11, atol=0.0, **GAUSS_NEWTON),
        NystroemSketchInfluence(third, case.loss, 2 * LAMBDA, 5, "layer_wise", **GAUSS_NEWTON),
    ]


def close(actual, expected, tolerance=1e-9):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", ["mlp", "cnn", "dict_inputs", "nested", "linear"])
def test_scores_are_the_mean_of_the_dense_formulas(name):
    case = make_case(name)
    models, expected = models_of(case), 0
    for i, model in enumerate(models):
        matrix = reference.gauss_newton(model, case.loss, *case.train)
        left, right = (reference.gradients(model, case.loss, *data) for data in (case.test, case.train))
        expected = expected + reference.influences(matrix, LAMBDA * (1 + i), left, right) / 3
    members = [DirectInfluence(m, case.loss, LAMBDA * (1 + i), **GAUSS_NEWTON) for i, m in enumerate(models)]
    ensemble = EnsembleInfluence(members).fit(case.train)
    close(ensemble.influences(*case.test, *case.train), expected)
    assert not members[0].is_fitted  # they stay as they are
    assert ensemble.regularization == {"0.all": LAMBDA, "1.all": 2 * LAMBDA, "2.all": 3 * LAMBDA}


def test_everything_is_a_mean_over_the_members():
    case = make_case("mlp")
    members = [model.fit(case.train) for model in mixed(case)]
    ensemble = EnsembleInfluence(members).fit(case.train)

    def mean(function):
        return torch.stack([function(member) for member in members]).mean(0)

    for mode in ("up", "perturbation"):
        expected = mean(lambda m, mode=mode: m.influences(*case.test, *case.train, mode=mode))
        close(ensemble.influences(*case.test, *case.train, mode=mode), expected)
        by_block = ensemble.influences_by_block(*case.test, *case.train, mode=mode)
        assert list(by_block) == ["0.0", "0.2", "1.all", "2.0", "2.2"]
        close(sum(by_block.values()), expected)
        close(by_block["2.2"], members[2].influences_by_block(*case.test, *case.train, mode=mode)["2"] / 3)
        factors = ensemble.influence_factors(*case.test)
        close(ensemble.influences_from_factors(factors, *case.train, mode=mode), expected)
        close(
            sum(
                ensemble.influences_from_factors_by_block(
                    ensemble.influence_factors_by_block(*case.test), *case.train, mode=mode
                ).values()
            ),
            expected,
        )
    close(factors, torch.cat([member.influence_factors(*case.test) / 3 for member in members], 1))
    close(ensemble.self_influences(*case.train), mean(lambda m: m.self_influences(*case.train)))
    assert ensemble.n_parameters == 3 * 43
    left, gradients = ensemble.left_rows(*case.test), ensemble.gradient_rows(*case.test)
    right = ensemble.right_rows(gradients, left)
    close(left.dot_each(right), left.dot(right).diagonal())
    close(left.dot_each(right), ensemble.self_influences(*case.test))
    again = ensemble.with_regularization(0.3)
    assert again.regularization == dict.fromkeys(["0.0", "0.2", "1.all", "2.0", "2.2"], 0.3)
    refitted = again.fit(case.train).influences(*case.test, *case.train)
    close(refitted, mean(lambda m: m.with_regularization(0.3).influences(*case.test, *case.train)))


@pytest.mark.parametrize("on_dask", [False, True])
def test_one_store_for_all_members(on_dask, client, tmp_path):
    case = make_case("mlp")
    expected = EnsembleInfluence(mixed(case)).fit(case.train).influences(*case.test, *case.train)
    unfitted = EnsembleInfluence(mixed(case))
    make = DaskInfluenceCalculator if on_dask else SequentialInfluenceCalculator
    options = {"client": client} if on_dask else {}
    ensemble = make(unfitted, **options).fit(case.train, tmp_path / "fit.zarr")
    calculator = make(ensemble, **options)
    wanted = {"keep_gradients": True, "self_influences": True, "top_k": 3, "test_chunk": 3, "train_chunk": 10}
    found = calculator.influences(case.test, case.train, **wanted).to_zarr(tmp_path / "scores.zarr")
    close(found.scores, expected)
    close(found.self_influences, ensemble.self_influences(*case.train))
    assert (found.top_train.values[:, 0] == expected.numpy().argmax(1)).all()
    assert found["factor_1.values"].dims == ("test", "model_1_parameter")
    # The rows of training samples, without the samples: other test samples, the same scores.
    again = calculator.influences(case.test, from_store=tmp_path / "scores.zarr").to_zarr(tmp_path / "again.zarr")
    close(again.scores, expected)
    stored = calculator.influence_factors(case.test).to_zarr(tmp_path / "factors.zarr")
    close(calculator.influences_from_factors(stored, case.train).compute(), expected)
    per_feature = calculator.influences(case.test, case.train, "perturbation").compute()
    close(per_feature, ensemble.influences(*case.test, *case.train, mode="perturbation"))
    other = [*mixed(case)[:2], NystroemSketchInfluence(models_of(case)[2], case.loss, LAMBDA, 4, **GAUSS_NEWTON)]
    with pytest.raises(StoreMismatchError, match="options"):
        make(EnsembleInfluence(other).fit(case.train), **options).influences(case.test, case.train, **wanted).to_zarr(
            tmp_path / "scores.zarr"
        )


def test_a_member_that_went_on_training_is_refused():
    case = make_case("mlp")
    members = mixed(case)
    ensemble = EnsembleInfluence(members).fit(case.train)
    with torch.no_grad():
        members[1].problem.model[0].weight.mul_(2)
    with pytest.raises(ProblemError, match=r"has changed since fit \(weights differ\)"):
        ensemble.influences(*case.test)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (lambda c: [c.model], "an ensemble is of influence models .* not of Sequential"),
        (lambda c: [], "an ensemble needs influence models, there are none"),
        (
            lambda c: [EkfacInfluence(c.model), EkfacInfluence(c.model)],
            "model 1 shares trainable parameters",
        ),
        (
            lambda c: [EkfacInfluence(c.model), EkfacInfluence(copy.deepcopy(c.model).float())],
            "must be of one floating type, on one device",
        ),
    ],
)
def test_bad_ensembles_are_refused(members, message):
    with pytest.raises(ProblemError, match=message):
        EnsembleInfluence(members(make_case("mlp")))


def test_stores_know_the_regularization_and_nothing_of_how_it_came(tmp_path):
    case = make_case("mlp")

    def fitted(value):
        return EnsembleInfluence([DirectInfluence(m, case.loss, value, **GAUSS_NEWTON) for m in models_of(case)]).fit(
            case.train
        )

    first = fitted(np.float32(0.5))
    SequentialInfluenceCalculator(first).influences(case.test, case.train).to_zarr(tmp_path / "a.zarr")
    again = SequentialInfluenceCalculator(fitted(0.1).with_regularization(0.5))
    again.influences(case.test, case.train).to_zarr(tmp_path / "a.zarr")  # the same job: it is finished
    with pytest.raises(StoreMismatchError, match="regularization"):
        SequentialInfluenceCalculator(fitted(0.1)).influences(case.test, case.train).to_zarr(tmp_path / "a.zarr")
    unfitted = EnsembleInfluence([DirectInfluence(m, case.loss, 0.1, **GAUSS_NEWTON) for m in models_of(case)])
    SequentialInfluenceCalculator(unfitted).fit(case.train, tmp_path / "fit.zarr")
    other = EnsembleInfluence([DirectInfluence(m, case.loss, 0.2, **GAUSS_NEWTON) for m in models_of(case)])
    with pytest.raises(StoreMismatchError, match="regularization"):
        SequentialInfluenceCalculator(other).fit(case.train, tmp_path / "fit.zarr")


def test_ensembles_of_ensembles_and_a_shared_frozen_layer(tmp_path):
    torch.manual_seed(0)
    backbone = nn.Linear(4, 6).double().requires_grad_(False)
    models = [nn.Sequential(backbone, nn.Tanh(), nn.Linear(6, 3).double()) for _ in range(3)]
    case = make_case("mlp")
    members = [ProjectedInfluence(m, case.loss, 0.1, rank) for m, rank in zip(models, (6, 9, 12), strict=True)]
    expected = sum(
        weight * m.fit(case.train).influences(*case.test, *case.train)
        for m, weight in zip(members, (0.25, 0.25, 0.5), strict=True)
    )
    nested = EnsembleInfluence([EnsembleInfluence(members[:2]), EnsembleInfluence(members[2:])]).fit(case.train)
    close(nested.influences(*case.test, *case.train), expected)
    stored = SequentialInfluenceCalculator(nested).influences(case.test, case.train).to_zarr(tmp_path / "a.zarr")
    close(stored.scores, expected)


# TracIn


def test_tracin_is_the_sum_over_checkpoints(tmp_path):
    """Pruthi et al. 2020, equation 1: of state dicts and of files, with the learning rate of each."""
    case = make_case("cnn")
    models, rates = models_of(case), [0.3, 0.2, 0.05]
    expected = sum(
        rate * reference.gradients(m, case.loss, *case.test) @ reference.gradients(m, case.loss, *case.train).T
        for m, rate in zip(models, rates, strict=True)
    )
    torch.save(models[1].state_dict(), tmp_path / "1.pt")
    checkpoints = [models[0].state_dict(), tmp_path / "1.pt", models[2].state_dict()]
    before = copy.deepcopy(case.model.state_dict())
    tracin = TracInInfluence(case.model, case.loss, checkpoints, rates).fit(case.train)
    close(tracin.influences(*case.test, *case.train), expected)
    stored = SequentialInfluenceCalculator(tracin).influences(case.test, case.train).to_zarr(tmp_path / "scores.zarr")
    close(stored.scores, expected)
    selves = sum(
        rate * (reference.gradients(m, case.loss, *case.train) ** 2).sum(1)
        for m, rate in zip(models, rates, strict=True)
    )
    close(tracin.self_influences(*case.train), selves)
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
    # Factors are dense, also where gradients are kept as factors.
    wide = make_case("mlp")
    wide_tracin = TracInInfluence(wide.model, wide.loss, [wide.model.state_dict()], np.float32(0.5)).fit(wide.train)
    gradients = reference.gradients(wide.model, wide.loss, *wide.test)
    close(wide_tracin.influence_factors(*wide.test), 0.5 * gradients)
    matrix = np.eye(gradients.shape[1])
    by_feature = reference.perturbations(wide.model, wide.loss, matrix, 0.0, 0.5 * gradients, *wide.train)
    close(wide_tracin.influences(*wide.test, *wide.train, mode="perturbation"), by_feature)
    once = TracInInfluence(case.model, case.loss, [models[0].state_dict()]).fit(case.train)
    dot = (
        reference.gradients(models[0], case.loss, *case.test) @ reference.gradients(models[0], case.loss, *case.train).T
    )
    close(once.influences(*case.test, *case.train), dot)


def test_tracin_of_training_predicts_what_a_step_on_a_sample_does():
    """With small steps the loss of a test sample falls by the sum of the scores of the samples that were stepped on."""
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(6, 3).double(), (torch.randn(8, 6).double(), torch.randint(0, 3, (8,)))
    test = torch.randn(5, 6).double(), torch.randint(0, 3, (5,))

    def losses():
        with torch.no_grad():
            return F.cross_entropy(model(test[0]), test[1], reduction="none")

    checkpoints, before = [], losses()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(20):
        checkpoints.append(copy.deepcopy(model.state_dict()))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, reduction="sum").backward()
        optimizer.step()
    scores = TracInInfluence(model, F.cross_entropy, checkpoints, 1e-3).fit((x, y)).influences(*test, x, y)
    close(scores.sum(1), before - losses(), 2e-2)


@pytest.mark.parametrize(
    ("checkpoints", "rates", "message"),
    [
        ([], 1.0, "there are 0 checkpoints and 0 learning rates"),
        ([{}], [1.0, 2.0], "there are 1 checkpoints and 2 learning rates"),
        ([{}], float("nan"), "a finite learning rate for each"),
        ("one.pt", 1.0, "put a single one into a list"),
        ([nn.Linear(2, 2).state_dict()], 1.0, r"(?s)checkpoint 0 is no state dict of this Sequential: .*Missing key"),
        (["no/such/file.pt"], 1.0, r"checkpoint 0 \(no/such/file.pt\) cannot be read: FileNotFoundError"),
    ],
)
def test_bad_checkpoints_are_refused(checkpoints, rates, message):
    case = make_case("mlp")
    with pytest.raises(ProblemError, match=message):
        TracInInfluence(case.model, case.loss, checkpoints, rates)


def test_tracin_has_nothing_to_regularize():
    case = make_case("mlp")
    tracin = TracInInfluence(case.model, case.loss, [case.model.state_dict()]).fit(case.train)
    with pytest.raises(ProblemError, match="nothing is inverted"):
        tracin.with_regularization(0.1)
