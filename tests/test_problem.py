"""Blocks, layouts, and what a Problem refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from cases import Nested, make_case
from outfluence import BlockMode, DirectInfluence, EkfacInfluence, Problem, SequentialInfluenceCalculator
from outfluence.data import Data, tree_leaves
from outfluence.errors import NonFiniteError, ProblemError
from outfluence.fingerprint import fingerprint

NAMES = ["scale", "body.0.weight", "body.0.bias", "body.1.1.weight", "body.1.1.bias"]


def nested(structure):
    return Problem(Nested(), F.cross_entropy, structure)


@pytest.mark.parametrize(
    ("structure", "blocks"),
    [
        (BlockMode.FULL, {"all": NAMES}),
        ("layer_wise", {"(root)": NAMES[:1], "body.0": NAMES[1:3], "body.1.1": NAMES[3:]}),
        (BlockMode.PARAMETER_WISE, {name: [name] for name in NAMES}),
        ({"late": NAMES[3:], "early": NAMES[:3]}, {"late": NAMES[3:], "early": NAMES[:3]}),
        ({"a": dict.fromkeys(NAMES[:4]), "b": NAMES[4]}, {"a": NAMES[:4], "b": NAMES[4:]}),
    ],
)
def test_blocks(structure, blocks):
    problem = nested(structure)
    assert list(problem.blocks) == list(blocks)
    assert {name: list(members) for name, members in problem.blocks.items()} == blocks
    stops = [section.stop for section in problem.sections.values()]
    assert stops[-1] == problem.n_parameters == 4 + 12 + 3 + 9 + 3


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"a": NAMES, "b": NAMES[:1]}, "scale: in more than one block"),
        ({"a": NAMES[1:]}, "scale: in no block; freeze"),
        ({"a": [*NAMES, "head.weight"]}, r"head\.weight: no trainable parameter"),
        ({"a": NAMES, "b": []}, "b: a block without parameters"),
        ("rows", "'rows' is no BlockMode; choose one of 'full', 'layer_wise', 'parameter_wise'"),
    ],
)
def test_wrong_blocks_are_refused(structure, message):
    with pytest.raises(ValueError, match=message):
        nested(structure)


def test_gradients_equal_autograd(case):
    problem = Problem(case.model, case.loss)
    expected = reference.gradients(case.model, case.loss, *case.train)
    assert np.abs(problem.gradients(*case.train).values.numpy() - expected).max() < 1e-12


def test_dense_gradients_are_written_where_they_are_wanted(case):
    problem = Problem(case.model, case.loss)
    rows = torch.zeros(len(tree_leaves(case.train)[0]) + 2, problem.n_parameters, dtype=problem.dtype)
    gradients = problem.gradients(*case.train, into=rows[1:-1]).values
    assert gradients.data_ptr() == rows[1:].data_ptr()
    assert torch.equal(gradients, problem.gradients(*case.train).values)
    assert not rows[[0, -1]].any()


def test_flatten_and_unflatten_are_inverse():
    problem = nested("layer_wise")
    rows = torch.randn(3, problem.n_parameters)
    assert torch.equal(problem.flatten(problem.unflatten(rows)), rows)


def test_no_trainable_parameters():
    model = nn.Linear(2, 2)
    model.requires_grad_(False)
    with pytest.raises(ProblemError, match="Linear has no trainable parameters"):
        DirectInfluence(model, F.cross_entropy)


def sample(width=4):
    return Data.from_arrays(torch.randn(3, width), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    "loss", [lambda z, y: F.cross_entropy(z, y, reduction="none"), lambda z, y: z.square(), lambda z, y: 1.0]
)
def test_a_loss_that_is_no_scalar(loss):
    with pytest.raises(ProblemError, match="the loss of one sample must be a scalar tensor"):
        DirectInfluence(nn.Linear(4, 3), loss, 1.0).fit(sample())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(4), r"layer '1' \(BatchNorm1d\) normalises over the batch.*model\.eval\(\)"),
        (nn.Dropout(0.1), r"layer '1' \(Dropout\) drops out at random: call model\.eval"),
        (nn.Sequential(nn.AlphaDropout(0.5)), r"layer '1\.0' \(AlphaDropout\) drops out"),
    ],
)
def test_layers_that_depend_on_batch_or_chance(layer, message):
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3))
    with pytest.raises(ProblemError, match=message):
        DirectInfluence(model, F.cross_entropy, 1.0).fit(sample())
    model.eval()
    DirectInfluence(model, F.cross_entropy, 1.0).fit(sample())


def test_batch_norm_without_running_statistics_is_refused_also_in_eval_mode():
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).eval()
    with pytest.raises(ProblemError, match="normalises over the batch"):
        DirectInfluence(model, F.cross_entropy, 1.0).fit(sample())


def test_inactive_dropout_and_group_norm_are_fine_in_training_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.Dropout(0.0), nn.Linear(4, 3)).train()
    DirectInfluence(model, F.cross_entropy, 1.0).fit(sample())


def test_a_model_that_fails_says_on_what():
    with pytest.raises(ProblemError, match=r"fails on training sample 0 \(x: float32 \(5,\), y: int64 \(\)\)"):
        DirectInfluence(nn.Linear(4, 3), F.cross_entropy, 1.0).fit(sample(5))
    with pytest.raises(ProblemError, match=r"fails on training sample 0 \(x: float64"):
        DirectInfluence(nn.Linear(4, 3), F.cross_entropy, 1.0).fit((np.zeros((2, 4)), np.zeros(2, int)))


def test_a_first_sample_that_is_not_finite():
    x = torch.randn(3, 4)
    x[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="gradients for training sample 0"):
        DirectInfluence(nn.Linear(4, 3), F.cross_entropy, 1.0).fit((x, torch.tensor([0, 1, 2])))


def test_second_derivatives_that_are_not_finite_name_the_sample():
    class Root(nn.Linear):
        def forward(self, x):  # at 0 the gradient of x^1.5 is finite, the second derivative is not
            return super().forward(x).clamp(min=0) ** 1.5

    model = Root(1, 1, bias=False)
    nn.init.ones_(model.weight)
    x = torch.tensor([[1.0], [2.0], [0.5], [0.0]])
    with torch.no_grad():
        x[3] = 1e-45
    with pytest.raises(NonFiniteError, match=r"second derivatives \(hessian\) for training sample 3"):
        DirectInfluence(model, lambda z, y: (z.double() ** -0.9).sum().float(), 1.0).fit((x, None))


def test_fingerprints_tell_problems_apart():
    def of(model, loss=F.cross_entropy, structure="full"):
        return Problem(model, loss, structure).fingerprint()

    case = make_case("mlp")
    first = of(case.model)
    assert of(case.model) == first
    with torch.no_grad():
        case.model[0].weight[0, 0] += 1e-9
    changed = of(case.model)
    assert {k for k in first if first[k] != changed[k]} == {"weights"}
    assert of(case.model, F.nll_loss)["loss"] != first["loss"]
    assert of(case.model, lambda z, y: z.sum())["loss"] != of(case.model, lambda z, y: z.mean())["loss"]
    assert (
        of(case.model, nn.CrossEntropyLoss(label_smoothing=0.1))["loss"]
        != of(case.model, nn.CrossEntropyLoss())["loss"]
    )
    assert of(case.model, structure="layer_wise")["blocks"] != first["blocks"]
    case.model[1] = nn.ReLU()
    assert of(case.model)["model"] != first["model"]


class Weighted:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, z, y):
        return F.cross_entropy(z, y) * self.weight


def power(p):
    def loss(z, y, *, q=p):
        return z.pow(q).sum()

    return loss


def over(weight):
    return lambda z, y: (z * weight).sum()


LONG = torch.ones(5000)
CHANGED = LONG.index_fill(0, torch.tensor([2500]), 2.0)  # a repr of it would not show where


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (power(2), power(3)),
        (Weighted(1.0), Weighted(2.0)),
        (Weighted(1.0).__call__, Weighted(2.0).__call__),
        (over(LONG), over(CHANGED)),
        (partial(F.cross_entropy, weight=LONG), partial(F.cross_entropy, weight=CHANGED)),
        (nn.CrossEntropyLoss(LONG), nn.CrossEntropyLoss(CHANGED)),
    ],
)
def test_fingerprints_see_what_a_loss_depends_on(one, other):
    assert fingerprint(one) == fingerprint(one)
    without_stride = torch.as_strided(torch.tensor([7, 8, 9]), (1,), (0,))  # contiguous, as it is one number
    assert fingerprint(without_stride) == fingerprint(torch.tensor([7])) != fingerprint(torch.tensor([8]))
    assert fingerprint(one) != fingerprint(other)


PROGRAM = """
import torch
from outfluence.fingerprint import fingerprint
SCALES = {"a", "b", "c", "d"}
class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 3)
        self.own = {"x": {1, 2}, "f": lambda x: x in {"u", "v", "w"}}
    def forward(self, x):
        return self.helper(super().forward(x))
    def helper(self, x):
        return x * len(SCALES)
torch.manual_seed(0)
net = Net()
def loss(z, y, depth=3):
    return loss(z, y, depth - 1) if depth else net(z).sum()
print(fingerprint((net, loss)))
"""


def test_fingerprints_are_the_same_in_every_process(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "changed.py").write_text(PROGRAM.replace('"a", "b", "c", "d"', '"a", "b", "c"'))

    def run(*arguments, seed):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(tmp_path)}
        return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=True).stdout

    first = run(str(tmp_path / "program.py"), seed=1)
    assert len(first) == 33
    assert run("-c", "import program", seed=2) == first
    assert run("-c", "import changed", seed=2) != first


class Counting(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Mixing(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0) / 2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Mixing(4, 3), "another output for sample 0 alone than among others"),
        (Counting(4, 3), "changes the buffer 'calls': call model.eval"),
        (nn.Linear(4, 3).half(), r"parameters are torch.float16: .*Convert with model.float"),
        (nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 3)), "are torch.float32, torch.float64"),
    ],
)
def test_models_whose_samples_do_not_stand_alone(model, message):
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(ProblemError, match=message):
        DirectInfluence(model, F.cross_entropy, 1.0).fit(sample())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


class Talkative(nn.Linear):
    def forward(self, x):
        return super().forward(x), self.weight.sum(0), x.T


def test_outputs_without_an_axis_of_samples_are_the_losses_business():
    DirectInfluence(Talkative(4, 3), lambda z, y: F.cross_entropy(z[0], y), 1.0).fit(sample())


def test_the_activations_of_one_sample_are_measured_alone():
    model = nn.Sequential(nn.Linear(1000, 10), nn.ReLU(), nn.Linear(10, 3))
    data = Data.from_arrays(torch.randn(500, 1000), torch.zeros(500, dtype=torch.int64))
    measured = Problem(model, F.cross_entropy).activation_bytes(data.rows(slice(0, 1)))
    assert 4 * 1010 <= measured <= 4 * 1010 + 200


def test_fingerprints_see_what_is_used_of_a_module_of_the_users_and_no_more(monkeypatch, tmp_path):
    """A module is a large thing: only what a function names in it counts."""
    helpers = types.ModuleType("helpers_of_a_user")
    helpers.SCALE, helpers.OTHER, helpers.inner = 2.0, 1.0, types.ModuleType("helpers_of_a_user.inner")
    helpers.inner.SHIFT, helpers.itself, helpers.__file__ = 0.5, helpers, str(tmp_path / "helpers_of_a_user.py")
    monkeypatch.setitem(sys.modules, "helpers_of_a_user", helpers)
    monkeypatch.setattr(sys.modules[__name__], "_helpers", helpers, raising=False)

    def loss(z, y):
        return ((z - y) ** 2).mean() * _helpers.SCALE + _helpers.inner.SHIFT  # noqa: F821

    before = fingerprint(loss)
    helpers.OTHER = 3.0
    assert fingerprint(loss) == before
    helpers.SCALE = 3.0
    scaled = fingerprint(loss)
    assert scaled != before
    helpers.inner.SHIFT = 0.0
    assert fingerprint(loss) not in (before, scaled)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("what", ["the model", "the model in place", "a layer"])
def test_of_what_is_compiled_the_original_is_run(what):
    """Compiled code cannot be looked into; torch runs what it was compiled from."""
    case, ran = make_case("mlp"), []
    plain = DirectInfluence(Around(case.model), case.loss, 0.1).fit(case.train)
    expected = plain.influences(*case.test, *case.train)
    assert expected.abs().max() > 0

    def backend(graph, _inputs):
        return lambda *args: ran.append(1) or graph(*args)

    if what == "the model":
        model = torch.compile(Around(case.model), backend=backend)
    elif what == "a layer":
        model = Around(torch.compile(case.model, backend=backend))
    else:
        model = Around(case.model)
        model.compile(backend=backend)
    problem = Problem(model, case.loss).structured(Data.of(case.train).rows(slice(0, 3)))
    assert not problem.structure.dense
    influence = DirectInfluence(model, case.loss, 0.1).fit(case.train)
    assert torch.equal(influence.influences(*case.test, *case.train), expected)
    assert not ran
    model(case.train[0])
    assert ran  # for the user it stays compiled


class Tempered(nn.Module):
    """A number without axes that is given to a function nobody knows."""

    def __init__(self):
        super().__init__()
        self.layer, self.log_scale = nn.Linear(3, 2), nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.layer(x) * self.log_scale.exp()


class Weighted(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def forward(self, z, y):
        return (F.cross_entropy(z, y, reduction="none") * self.weight[y]).sum()


def test_dense_gradients_of_whatever_is_differentiable():
    torch.manual_seed(0)
    model, x, y = Tempered().double(), torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])
    expected = reference.gradients(model, F.cross_entropy, x, y)
    assert np.allclose(Problem(model, F.cross_entropy).gradients(x, y).dense().values, expected)
    assert np.allclose(Problem(model, F.cross_entropy).gradients(x.requires_grad_(), y).dense().values, expected)
    x, loss = x.detach(), Weighted()
    rows = Problem(model, loss).gradients(x, y)
    assert not rows.values.requires_grad
    assert np.allclose(rows.values, reference.gradients(model, loss, x, y))
    influence = DirectInfluence(model, loss, 0.1).fit((x, y))
    assert influence.influences(x, y).shape == (5, 5)


def test_blocks_of_a_compiled_model_go_by_either_name():
    model = torch.compile(nn.Sequential(nn.Linear(3, 2)), backend="eager")
    names = [name for name, _ in model.named_parameters()]
    assert names[0] == "_orig_mod.0.weight"
    assert Problem(model, F.cross_entropy, {"a": names}).blocks == {"a": ("0.weight", "0.bias")}


class Attending(nn.Module):
    """A head of attention, by torch's function or written out."""

    def __init__(self, by_torch, by_name=False):
        super().__init__()
        self.project, self.head = nn.Linear(3, 12), nn.Linear(4, 3)
        self.by_torch, self.by_name = by_torch, by_name

    def forward(self, x):
        query, key, value = self.project(x)[:, None].chunk(3, dim=-1)
        if not self.by_torch:
            mixed = (query @ key.mT / 2).softmax(-1) @ value
        elif self.by_name:
            mixed = F.scaled_dot_product_attention(key=key, query=query, value=value)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        return self.head(mixed[:, 0].mean(1))


@pytest.mark.parametrize(("n_positions", "by_name"), [(4, False), (4, True), (130, False)])
def test_attention_can_be_differentiated_twice(n_positions, by_name):
    """Of torch's kernels for attention there is one derivative only, and of one sample at a time."""
    torch.manual_seed(0)
    by_torch, written_out = Attending(True, by_name).double(), Attending(False).double()
    written_out.load_state_dict(by_torch.state_dict())
    n = 9 if n_positions == 4 else 3
    x, y = torch.randn(n, n_positions, 3).double(), torch.randint(0, 3, (n,))
    for make in (
        lambda model: DirectInfluence(model, F.cross_entropy, 0.5),
        lambda model: DirectInfluence(model, F.cross_entropy, 0.1, second_order_mode="gauss_newton"),
        lambda model: EkfacInfluence(model, True, 0.1, fisher="exact"),
    ):
        for mode in ("up", "perturbation"):
            found, expected = (
                make(model).fit((x, y)).influences(x[:2], y[:2], x, y, mode=mode) for model in (by_torch, written_out)
            )
            assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_attention_is_torchs_own_where_it_is_over_many_positions():
    """Its kernel does not keep the weights of all pairs of positions for the backward pass."""
    model = Attending(True).double()

    def kept(n_positions):
        sizes = []
        problem = Problem(model, F.cross_entropy).structured(
            Data.of((torch.randn(3, 4, 3).double(), torch.zeros(3).long())).rows(slice(0, 3))
        )
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            problem.record(torch.randn(1, n_positions, 3).double())
        return max(sizes)

    assert kept(128) == 128**2
    assert kept(129) < 129**2


def test_plans_count_attention_as_it_is_computed():
    """Over many positions the weights of all pairs are kept only where gradients are differentiated again."""
    model, x, y = Attending(True).double(), torch.randn(4, 150, 3).double(), torch.tensor([0, 1, 2, 0])
    calculator = SequentialInfluenceCalculator(EkfacInfluence(model, True, 0.1).fit((x, y)))
    once, twice = (
        calculator.influences((x, y), (x, y), mode).plan.work.activation_bytes for mode in ("up", "perturbation")
    )
    assert once < 150**2 * 8 < twice
