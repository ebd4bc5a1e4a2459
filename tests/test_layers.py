"""Per-sample gradients of every known layer against autograd, one sample at a time; and products of factored rows."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import outfluence.rows
import reference
from cases import make_case
from outfluence import DirectInfluence, Problem
from outfluence.data import Batch, tree_map
from outfluence.errors import UnsupportedLayerError
from outfluence.factors import Factor, Matrix
from outfluence.rows import DenseRows, FactoredRows

N = 5


class Calls(nn.Module):
    """Modules and parameters, and a function of them and of the inputs."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def floats(*shape):
    return torch.randn(N, *shape, dtype=torch.float64)


def places(size, *shape):
    return torch.randint(0, size, (N, *shape))


def uneven(z, y):
    """A loss in which no two outputs weigh the same."""
    z = z.flatten(1)
    return ((z.sin() * torch.linspace(-1, 2, z.shape[1], dtype=z.dtype)).sum() - y.sum()) ** 2


def ready(model):
    """In float64 and eval mode, with no parameter and no statistic that is zero or one."""
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.5 + (p.ndim == 1))
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + ("var" in name))
    return model


def structured(model, loss, x, y, blocks="full"):
    first = Batch(*(tree_map(lambda t: t[:3], part) for part in (x, y)))
    return Problem(model, loss, blocks).structured(first)


def check_gradients(problem, x, y, rows=None):
    """Each parameter's gradients, to its own scale."""
    rows = (problem.gradients(x, y) if rows is None else rows).dense().values.numpy()
    expected = reference.gradients(problem.model, problem.loss, x, y, problem.names)
    assert rows.shape == expected.shape
    start, largest = 0, np.abs(expected).max()
    assert largest > 0
    for name, p in problem.parameters.items():
        got, want = (array[:, start : start + p.numel()] for array in (rows, expected))
        # A gradient that vanishes, as of the bias of attention's keys, has no scale of its own.
        assert np.abs(got - want).max() <= 1e-10 * np.abs(want).max() + 1e-14 * largest, name
        start += p.numel()


def check(model, x, units, dense=(), y=None, loss=uneven, blocks="full"):
    """Which parameters are factored, with which biases, and that gradients are right."""
    y = torch.randn(N, dtype=torch.float64) if y is None else y
    problem = structured(model, loss, x, y, blocks)
    assert {name: unit.bias for name, unit in problem.structure.units.items()} == units
    assert set(problem.structure.dense) == set(dense)
    check_gradients(problem, x, y)
    return problem


ALONE = {"weight": "bias"}
LONE = {"weight": None, "bias": None}


# One layer

LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,), ALONE),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (4,), {"weight": None}),
    "linear over positions": (lambda: nn.Linear(4, 3), (5, 4), ALONE),
    "linear over a grid": (lambda: nn.Linear(4, 3), (2, 3, 4), ALONE),
    "linear of one": (lambda: nn.Linear(1, 1), (1,), ALONE),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (2, 7), ALONE),
    "conv1d stride": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 8), ALONE),
    "conv1d same": (lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=2), (2, 7), ALONE),
    "conv1d valid": (lambda: nn.Conv1d(2, 3, 2, padding="valid", bias=False), (2, 7), {"weight": None}),
    "conv1d circular": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6), ALONE),
    "conv1d depthwise": (lambda: nn.Conv1d(3, 6, 3, groups=3), (3, 5), ALONE),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 4), ALONE),
    "conv2d uneven": (
        lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        (2, 6, 5),
        ALONE,
    ),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 3), ALONE),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 3, 2, groups=3, bias=False), (3, 4, 4), {"weight": None}),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(1, 2)), (2, 4, 5), ALONE),
    "conv2d reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 4), ALONE),
    "conv2d circular stride": (
        lambda: nn.Conv2d(2, 2, 3, stride=2, padding=(1, 2), padding_mode="circular", groups=2),
        (2, 4, 5),
        ALONE,
    ),
    "conv2d pointwise": (lambda: nn.Conv2d(3, 2, 1), (3, 2, 2), ALONE),
    "conv2d of one position": (lambda: nn.Conv2d(3, 2, 3), (3, 3, 3), ALONE),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2, padding=(0, 1, 0), stride=(1, 2, 1)), (2, 3, 3, 3), ALONE),
    "conv3d groups": (lambda: nn.Conv3d(2, 4, (1, 2, 2), groups=2, dilation=(1, 1, 2)), (2, 2, 3, 4), ALONE),
    "layer norm": (lambda: nn.LayerNorm(4), (3, 4), LONE),
    "layer norm over two axes": (lambda: nn.LayerNorm((3, 4), eps=1e-2), (2, 3, 4), LONE),
    "layer norm without bias": (lambda: nn.LayerNorm(4, bias=False), (4,), {"weight": None}),
    "group norm": (lambda: nn.GroupNorm(2, 4, eps=1e-2), (4, 3), LONE),
    "group norm of images": (lambda: nn.GroupNorm(4, 4), (4, 3, 2), LONE),
    "rms norm": (lambda: nn.RMSNorm(4), (3, 4), {"weight": None}),
    "rms norm over two axes": (lambda: nn.RMSNorm((3, 4), eps=1e-2), (2, 3, 4), {"weight": None}),
    "batch norm": (lambda: nn.BatchNorm1d(4), (4,), LONE),
    "batch norm over positions": (lambda: nn.BatchNorm1d(4, eps=1e-2), (4, 3), LONE),
    "batch norm of images": (lambda: nn.BatchNorm2d(3), (3, 4, 2), LONE),
    "batch norm of volumes": (lambda: nn.BatchNorm3d(2), (2, 3, 2, 2), LONE),
    "instance norm": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 5), LONE),
    "instance norm of images": (lambda: nn.InstanceNorm2d(3, affine=True, eps=1e-2), (3, 2, 3), LONE),
    "instance norm with statistics": (
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        (3, 5),
        LONE,
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_one_layer(name):
    make, shape, units = LAYERS[name]
    check(ready(make()), floats(*shape), units)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_among_others(name):
    """Its input has a gradient, and something comes after it."""
    make, shape, units = LAYERS[name]
    model = Calls(
        lambda m, x: torch.tanh(m.layer(x * m.scale)) * m.after, scale=parameter(), layer=make(), after=parameter()
    )
    units = {f"layer.{w}": b and f"layer.{b}" for w, b in units.items()}
    check(ready(model), floats(*shape), {"scale": None, "after": None} | units)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv1d(4, 3, 2), nn.LayerNorm(4), nn.GroupNorm(2, 4)], ids=repr)
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_one_frozen_parameter(layer, frozen):
    model = ready(copy.deepcopy(layer))
    getattr(model, frozen).requires_grad_(False)
    (other,) = {"weight", "bias"} - {frozen}
    check(model, floats(4, 4), {other: None})


# Embeddings

EMBEDDINGS = {
    "tokens": (lambda: nn.Embedding(6, 3), (4,), 6),
    "one token": (lambda: nn.Embedding(6, 3), (), 6),
    "a grid of tokens": (lambda: nn.Embedding(50, 3), (2, 3), 50),
    "padding": (lambda: nn.Embedding(4, 3, padding_idx=1), (5,), 4),
    "padding, counted from the end": (lambda: nn.Embedding(40, 3, padding_idx=-38), (5,), 3),
    "tokens repeated": (lambda: nn.Embedding(60, 3), (9,), 3),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings(name):
    make, shape, used = EMBEDDINGS[name]
    x = places(used, *shape)
    x.flatten()[:2] = 1
    problem = check(ready(make()), x, {"weight": None})
    assert problem.structure.units["weight"].kind == "one_hot"


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_whose_gradients_are_no_sums_over_tokens(option):
    model = Calls(lambda m, x: m.layer(m.embed(x)), embed=nn.Embedding(6, 3, **option), layer=nn.Linear(3, 2))
    model, x, y = ready(model), places(6, 4), torch.randn(N).double()
    with torch.no_grad():
        model(torch.arange(6))  # max_norm changes the weight in place: once and for all, here
    problem = structured(model, uneven, x, y)
    assert set(problem.structure.units) == {"layer.weight"}
    assert "embedding" in problem.structure.dense["embed.weight"]


def _positions(m, x, shape):
    index = torch.arange(x.shape[1])
    return m.head(torch.tanh(m.tokens(x) + m.pos(index.reshape(shape(x)))))


@pytest.mark.parametrize("length", [4, 3, 2])
@pytest.mark.parametrize("shape", [lambda x: (-1,), lambda x: (1, -1)], ids=["(T,)", "(1, T)"])
def test_positions_that_are_the_same_for_all_samples(shape, length):
    model = Calls(
        lambda m, x: _positions(m, x, shape), tokens=nn.Embedding(6, 3), pos=nn.Embedding(5, 3), head=nn.Linear(3, 2)
    )
    units = {"tokens.weight": None, "pos.weight": None, "head.weight": "head.bias"}
    check(ready(model), places(6, length), units)


def test_layers_of_what_is_the_same_for_all_samples():
    def forward(m, x):
        h = torch.tanh(m.norm(m.pos(torch.arange(4))))
        return x + m.second(torch.tanh(m.first(h)) * m.scale)

    model = Calls(
        forward,
        pos=nn.Embedding(4, 3),
        norm=nn.LayerNorm(3),
        first=nn.Linear(3, 3),
        second=nn.Linear(3, 2, bias=False),
        scale=parameter(3),
    )
    units = {"pos.weight": None, "norm.weight": None, "norm.bias": None, "first.weight": "first.bias"}
    check(ready(model), floats(4, 2), units | {"second.weight": None, "scale": None})


def test_a_single_position_that_is_the_same_for_all_samples():
    """(1, d): whether the axis is that of positions or of samples is for what comes after."""
    model = Calls(lambda m, x: x + m.pos(torch.arange(1)), pos=nn.Embedding(4, 3))
    x, y = floats(3), torch.randn(N).double()
    check(ready(model), x, {"pos.weight": None}, y=y)
    x = floats(1, 3)
    check_gradients(structured(model, uneven, x, y), x, y)


@pytest.mark.parametrize("length", [2, 3, 4])
def test_positions_that_get_another_axis_are_dense(length):
    """Time first: an axis of samples that is put before theirs is not where the model expects it."""
    model = Calls(
        lambda m, x: m.head(torch.tanh(m.tokens(x.T) + m.pos(torch.arange(x.shape[1]))[:, None])).transpose(0, 1),
        tokens=nn.Embedding(6, 3),
        pos=nn.Embedding(5, 3),
        head=nn.Linear(3, 2),
    )
    units = {"tokens.weight": None, "head.weight": "head.bias"}
    check(ready(model), places(6, length), units, {"pos.weight"})


# Parameters that are no layer's


VECTORS = {
    "added": (lambda m, x: (x + m.p).tanh(), (3,)),
    "added first": (lambda m, x: (m.p + x).tanh(), (3,)),
    "torch.add": (lambda m, x: torch.add(x, m.p).tanh(), (3,)),
    "multiplied": (lambda m, x: (x * m.p).tanh(), (3,)),
    "multiplied first": (lambda m, x: (m.p * x).tanh(), (3,)),
    "torch.mul": (lambda m, x: torch.mul(x, m.p).tanh(), (3,)),
    "positions": (lambda m, x: (x + m.p).tanh(), (4, 3)),
    "positions with an axis of samples": (lambda m, x: (x + m.p).tanh(), (1, 4, 3)),
    "of one position": (lambda m, x: (x * m.p).tanh(), (1, 1, 3)),
    "for each position": (lambda m, x: (x * m.p).tanh(), (4, 1)),
    "one number": (lambda m, x: (x * m.p).tanh(), (1,)),
    "a number": (lambda m, x: (x * m.p).tanh(), ()),
    "twice, in two ways": (lambda m, x: ((x * m.p).tanh() + m.p) * m.p, (3,)),
    "broadcasts the input": (lambda m, x: (x[..., :1] * m.p).tanh(), (3,)),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name):
    function, shape = VECTORS[name]
    problem = check(ready(Calls(function, p=parameter(*shape))), floats(4, 3), {"p": None})
    assert problem.structure.units["p"].is_vector


def test_residual_branches_with_a_scale():
    model = Calls(lambda m, x: x + m.scale * m.branch(x), scale=parameter(4), branch=nn.Linear(4, 4))
    check(ready(model), floats(3, 4), {"scale": None, "branch.weight": "branch.bias"})


class Conv1D(nn.Module):
    """As in GPT-2 of HF: the weight is (d_in, d_out)."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight, self.bias = parameter(d_in, d_out), parameter(d_out)

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


MATRICES = {
    "addmm of flattened positions": (lambda m, x: m.layer(x), {"layer": Conv1D(4, 3)}, {"layer.weight": "layer.bias"}),
    "Tensor.addmm": (
        lambda m, x: m.bias.addmm(x.flatten(0, 1), m.weight).view(*x.shape[:2], -1),
        {"weight": parameter(4, 3), "bias": parameter(3)},
        {"weight": "bias"},
    ),
    "@": (lambda m, x: x @ m.weight, {"weight": parameter(4, 3)}, {"weight": None}),
    "torch.matmul": (lambda m, x: torch.matmul(x, m.weight), {"weight": parameter(4, 3)}, {"weight": None}),
    "mm": (lambda m, x: torch.mm(x[:, 0], m.weight), {"weight": parameter(4, 3)}, {"weight": None}),
    "@ and +": (
        lambda m, x: x @ m.weight + m.bias,
        {"weight": parameter(4, 3), "bias": parameter(3)},
        LONE,
    ),
    "in both directions": (
        lambda m, x: torch.tanh(x @ m.weight) + F.linear(x, m.weight),
        {"weight": parameter(4, 4)},
        {"weight": None},
    ),
    "functional": (
        lambda m, x: F.linear(x, weight=m.weight, bias=m.bias),
        {"weight": parameter(3, 4), "bias": parameter(3)},
        {"weight": "bias"},
    ),
}


KEYWORDS = {
    "linear": (
        lambda m, x: F.linear(input=x, weight=m.w, bias=m.b),
        {"w": (3, 4), "b": (3,)},
        {"w": "b"},
    ),
    "addmm": (
        lambda m, x: torch.addmm(input=m.b, mat1=x[:, 0], mat2=m.w),
        {"w": (4, 3), "b": (3,)},
        {"w": "b"},
    ),
    "matmul": (lambda m, x: torch.matmul(input=x, other=m.w), {"w": (4, 3)}, {"w": None}),
    "mm": (lambda m, x: torch.mm(input=x[:, 0], mat2=m.w), {"w": (4, 3)}, {"w": None}),
    "conv": (
        lambda m, x: torch.conv1d(input=x, weight=m.w, bias=m.b, padding="same"),
        {"w": (2, 5, 3), "b": (2,)},
        {"w": "b"},
    ),
    "embedding": (
        lambda m, x: F.embedding(input=(x > 0).long(), weight=m.w),
        {"w": (2, 3)},
        {"w": None},
    ),
    "layer_norm": (
        lambda m, x: F.layer_norm(input=x, normalized_shape=(4,), weight=m.w, bias=m.b),
        {"w": (4,), "b": (4,)},
        {"w": None, "b": None},
    ),
    "group_norm": (
        lambda m, x: F.group_norm(input=x, num_groups=5, weight=m.w, bias=m.b),
        {"w": (5,), "b": (5,)},
        {"w": None, "b": None},
    ),
    "instance_norm": (
        lambda m, x: F.instance_norm(input=x, weight=m.w, bias=m.b),
        {"w": (5,), "b": (5,)},
        {"w": None, "b": None},
    ),
    "mul and add": (
        lambda m, x: torch.add(input=torch.mul(input=x, other=m.w), other=m.b, alpha=1).tanh(),
        {"w": (4,), "b": (4,)},
        {"w": None, "b": None},
    ),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_arguments_by_their_names(name):
    function, shapes, units = KEYWORDS[name]
    check(ready(Calls(function, **{key: parameter(*shape) for key, shape in shapes.items()})), floats(5, 4), units)


FORMS = {
    "out": lambda m, x: torch.mul(m.head(x), m.p, out=None),
    "add a multiple": lambda m, x: torch.add(m.head(x), m.p, alpha=2),
    "addmm a multiple": lambda m, x: torch.addmm(m.p, m.head(x), torch.ones(3, 3).double(), beta=2),
    "add to a product": lambda m, x: torch.baddbmm(m.p, m.head(x)[:, None], torch.ones(len(x), 3, 3).double()),
}


@pytest.mark.parametrize("name", FORMS)
def test_known_functions_in_forms_that_are_not(name):
    model = ready(Calls(FORMS[name], head=nn.Linear(4, 3), p=parameter(3)))
    check(model, floats(4), {"head.weight": "head.bias"}, {"p"})


@pytest.mark.parametrize("name", MATRICES)
def test_matrices(name):
    function, members, units = MATRICES[name]
    check(ready(Calls(function, **copy.deepcopy(members))), floats(5, 4), units)


def test_images_of_each_time_step():
    """(n, T, C, H, W), flattened to (n T, C, H, W) on the way."""
    model = Calls(
        lambda m, x: m.norm(torch.tanh(m.conv(x.flatten(0, 1)))).mean((2, 3)).unflatten(0, (-1, 3)),
        conv=nn.Conv2d(2, 4, 2, groups=2),
        norm=nn.GroupNorm(2, 4),
    )
    units = {"conv.weight": "conv.bias", "norm.weight": None, "norm.bias": None}
    check(ready(model), floats(3, 2, 3, 3), units)


def test_time_before_samples():
    model = Calls(
        lambda m, x: m.second(torch.tanh(m.norm(m.first(x.transpose(0, 1))))).transpose(0, 1),
        first=nn.Linear(4, 3),
        norm=nn.LayerNorm(3),
        second=nn.Linear(3, 2, bias=False),
    )
    units = {"first.weight": "first.bias", "norm.weight": None, "norm.bias": None, "second.weight": None}
    check(ready(model), floats(6, 4), units)


def test_time_flattened_before_samples_is_seen():
    """Rows of (T n, d) are not those of (n T, d), and shapes do not tell."""
    model = Calls(
        lambda m, x: m.head(m.flat(x.transpose(0, 1).reshape(-1, 4)).reshape(-1, len(x), 3).transpose(0, 1)),
        flat=nn.Linear(4, 3),
        head=nn.Linear(3, 2),
    )
    problem = check(ready(model), floats(6, 4), {"head.weight": "head.bias"}, {"flat.weight", "flat.bias"})
    assert problem.structure.dense["flat.weight"] == "used in a way that no layer shows"


# Attention


def attention(**options):
    return nn.MultiheadAttention(4, 2, **({"batch_first": True} | options))


PACKED = {"a.in_proj_weight": "a.in_proj_bias", "a.out_proj.weight": "a.out_proj.bias"}
UNBIASED = {"a.in_proj_weight": None, "a.out_proj.weight": None}
SEPARATE = {
    **{f"a.{name}_proj_weight": None for name in "qkv"},
    "a.in_proj_bias": None,
    "a.out_proj.weight": "a.out_proj.bias",
}
ATTENTIONS = {
    "self": (lambda m, x, z: m.a(x, x, x)[0], {}, PACKED),
    "self, no weights asked for": (lambda m, x, z: m.a(x, x, x, need_weights=False)[0], {}, PACKED),
    "self, with its weights": (lambda m, x, z: torch.cat(m.a(x, x, x), dim=2), {}, PACKED),
    "self, weights of each head": (
        lambda m, x, z: torch.cat(
            [m.a(x, x, x, average_attn_weights=False)[1].transpose(1, 2).flatten(2), m.a(x, x, x)[0]], 2
        ),
        {},
        PACKED,
    ),
    "time first": (
        lambda m, x, z: m.a(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1),
        {"batch_first": False},
        PACKED,
    ),
    "no bias": (lambda m, x, z: m.a(x, x, x)[0], {"bias": False}, UNBIASED),
    "cross": (lambda m, x, z: m.a(x, z, z)[0], {}, PACKED),
    "three inputs": (lambda m, x, z: m.a(x, z, z.tanh())[0], {}, PACKED),
    "cross, no bias": (lambda m, x, z: m.a(x, z, z)[0], {"bias": False}, UNBIASED),
    "cross, time first": (
        lambda m, x, z: m.a(x.mT.permute(2, 0, 1), *[z.transpose(0, 1)] * 2)[0].transpose(0, 1),
        {"batch_first": False},
        PACKED,
    ),
    "causal": (
        lambda m, x, z: m.a(x, x, x, attn_mask=torch.ones(3, 3).triu(1).bool(), need_weights=False)[0],
        {},
        PACKED,
    ),
    "is_causal": (
        lambda m, x, z: m.a(
            x,
            x,
            x,
            attn_mask=nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype),
            is_causal=True,
            need_weights=False,
        )[0],
        {},
        PACKED,
    ),
    "a mask of numbers": (
        lambda m, x, z: m.a(x, z, z, attn_mask=torch.linspace(-1, 1, 15).reshape(3, 5).double())[0],
        {},
        PACKED,
    ),
    "padding of keys": (lambda m, x, z: m.a(x, z, z, key_padding_mask=z[..., 0] > 0.8)[0], {}, PACKED),
    "a zero more": (lambda m, x, z: m.a(x, x, x)[0], {"add_zero_attn": True}, PACKED),
    "other widths": (lambda m, x, z: m.a(x, z[..., :3], z[..., :2])[0], {"kdim": 3, "vdim": 2}, SEPARATE),
    "other widths, no bias": (
        lambda m, x, z: m.a(x, z[..., :3], z)[0],
        {"kdim": 3, "bias": False},
        {**{f"a.{name}_proj_weight": None for name in "qkv"}, "a.out_proj.weight": None},
    ),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name):
    function, options, units = ATTENTIONS[name]
    check(ready(Calls(function, a=attention(**options))), (floats(3, 4), floats(5, 4)), units)


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"])
@pytest.mark.parametrize("cross", [False, True])
def test_attention_partly_frozen(frozen, cross):
    model = ready(Calls(lambda m, x, z: m.a(x, z, z)[0] if cross else m.a(x, x, x)[0], a=attention()))
    model.a.get_parameter(frozen).requires_grad_(False)
    units = {w: b for w, b in PACKED.items() if f"a.{frozen}" not in (w, b)}
    ((weight, bias),) = PACKED.items() - units.items()
    check(model, (floats(3, 4), floats(5, 4)), units | {bias if weight == f"a.{frozen}" else weight: None})


def test_attention_with_more_keys_is_dense():
    model = Calls(
        lambda m, x: m.head(m.a(x, x, x)[0]), a=attention(add_bias_kv=True), head=nn.Linear(4, 2), before=parameter(4)
    )
    model.function = lambda m, x: m.head(m.a(*[x * m.before] * 3)[0])
    dense = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias", "bias_k", "bias_v"}
    units = {"before": None, "head.weight": "head.bias"}
    problem = check(ready(model), floats(3, 4), units, {f"a.{name}" for name in dense})
    assert "multi_head_attention_forward" in problem.structure.dense["a.bias_k"]


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False}], ids=str)
def test_transformers(options, no_grad):
    model = ready(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True, **options))
    names = dict(model.named_parameters())
    matrices = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    biased = options.get("bias", True)
    units = {name: name.replace("weight", "bias") if biased else None for name in matrices}
    units |= {name: None for name in names if name.startswith("norm")}
    x, y = floats(3, 4), torch.randn(N).double()
    with torch.set_grad_enabled(not no_grad):
        problem = structured(model, uneven, x, y)
        rows = problem.gradients(x, y)
    assert {name: unit.bias for name, unit in problem.structure.units.items()} == units
    assert not problem.structure.dense
    check_gradients(problem, x, y, rows)


def test_a_stack_of_transformers_with_masks():
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(4))
    model = Calls(
        lambda m, x, mask: m.encoder(x, mask=torch.ones(3, 3).triu(1).bool(), src_key_padding_mask=mask),
        encoder=encoder,
    )
    mask = torch.zeros(N, 3).bool()
    mask[1:3, 2] = True
    problem = structured(ready(model), uneven, (floats(3, 4), mask), torch.randn(N).double())
    assert not problem.structure.dense
    check(
        model,
        (floats(3, 4), mask),
        {name: unit.bias for name, unit in problem.structure.units.items()},
        y=torch.randn(N).double(),
    )


# Parameters and modules in several places


def test_one_weight_in_two_linear_layers():
    model = Calls(
        lambda m, x: m.second(torch.tanh(m.first(x))), first=nn.Linear(4, 4), second=nn.Linear(4, 4, bias=False)
    )
    model.second.weight = model.first.weight
    check(ready(model), floats(3, 4), {"first.weight": None, "first.bias": None})


def test_one_weight_in_two_linear_layers_with_one_bias():
    model = Calls(lambda m, x: m.second(torch.tanh(m.first(x))), first=nn.Linear(4, 4), second=nn.Linear(4, 4))
    model.second.weight, model.second.bias = model.first.weight, model.first.bias
    check(ready(model), floats(3, 4), {"first.weight": "first.bias"})


def test_one_bias_in_two_linear_layers():
    model = Calls(lambda m, x: m.second(torch.tanh(m.first(x))), first=nn.Linear(4, 4), second=nn.Linear(4, 4))
    model.second.bias = model.first.bias
    check(ready(model), floats(3, 4), {"first.weight": None, "first.bias": None, "second.weight": None})


@pytest.mark.parametrize("vocabulary", [5, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_one_weight_in_an_embedding_and_an_output_layer(bias, vocabulary):
    model = Calls(
        lambda m, x: m.head(torch.tanh(m.embed(x))),
        embed=nn.Embedding(vocabulary, 3, padding_idx=2),
        head=nn.Linear(3, vocabulary, bias=bias),
    )
    model.head.weight = model.embed.weight
    units = {"embed.weight": None} | ({"head.bias": None} if bias else {})
    problem = check(ready(model), places(5, 4), units)
    assert problem.structure.units["embed.weight"].kind == "mixed"


def test_one_weight_in_an_embedding_and_transposed():
    """Both keep the weight as (d_in, d_out)."""
    model = Calls(
        lambda m, x: m.embed(x) + torch.nn.functional.one_hot(x, 6).double() @ m.embed.weight,
        embed=nn.Embedding(6, 3),
    )
    check(ready(model), places(6, 4), {"embed.weight": None})


def test_a_module_called_several_times():
    def forward(m, x):
        h = x
        for _ in range(3):
            h = m.norm(h + torch.tanh(m.layer(h)))
        return torch.cat([h, m.layer(h[:, :1])], dim=1)  # another number of positions

    units = {"layer.weight": "layer.bias", "norm.weight": None, "norm.bias": None}
    check(ready(Calls(forward, layer=nn.Linear(4, 4), norm=nn.LayerNorm(4))), floats(3, 4), units)


def test_convolutions_called_several_times():
    model = Calls(lambda m, x: m.conv(torch.tanh(m.conv(x))), conv=nn.Conv1d(2, 2, 3, groups=2))
    check(ready(model), floats(2, 8), {"conv.weight": "conv.bias"})


@pytest.mark.parametrize(
    "activation", [nn.ReLU(inplace=True), nn.ELU(inplace=True), nn.LeakyReLU(inplace=True), nn.Hardtanh(inplace=True)]
)
def test_activations_in_place(activation):
    model = nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 4), activation, nn.LayerNorm(4), activation)
    units = {"0.weight": "0.bias", "2.weight": "2.bias", "4.weight": None, "4.bias": None}
    check(ready(model), floats(3, 4), units)


def test_a_branch_that_is_added_in_place():
    def forward(m, x):
        h = m.first(x)
        h += m.second(x)
        return h.mul_(2)

    model = Calls(forward, first=nn.Linear(4, 3), second=nn.Linear(4, 3))
    check(ready(model), floats(4), {"first.weight": "first.bias", "second.weight": "second.bias"})


# Inputs, labels and losses


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(5, 3), nn.Linear(6, 3)

    def forward(self, tokens, features):
        return self.linear(torch.cat([self.embed(tokens).mean(1), features], dim=1))


@pytest.mark.parametrize("as_dict", [False, True])
def test_inputs_in_trees(as_dict):
    x = {"features": floats(3), "tokens": places(5, 4)}
    x = x if as_dict else (x["tokens"], x["features"])
    units = {"embed.weight": None, "linear.weight": "linear.bias"}
    check(ready(TwoInputs()), x, units, y=places(3), loss=F.cross_entropy)


def _by_token(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum")


def test_a_label_for_each_token():
    model = Calls(lambda m, x: m.head(torch.tanh(m.embed(x))), embed=nn.Embedding(7, 3), head=nn.Linear(3, 7))
    y = places(7, 4)
    y[:, 0], y[1, 2:] = -100, -100
    check(ready(model), places(7, 4), {"embed.weight": None, "head.weight": "head.bias"}, y=y, loss=_by_token)


def test_outputs_in_trees_and_labels_in_trees():
    model = Calls(lambda m, x: {"a": m.a(x), "b": [m.b(x)]}, a=nn.Linear(4, 3), b=nn.Linear(4, 1))
    y = {"class": places(3), "value": floats(1)}

    def loss(z, y):
        return F.cross_entropy(z["a"], y["class"]) + F.mse_loss(z["b"][0], y["value"])

    check(ready(model), floats(4), {"a.weight": "a.bias", "b.weight": "b.bias"}, y=y, loss=loss)


def test_a_loss_with_no_labels():
    model = ready(nn.Linear(4, 3))
    x = floats(4)
    problem = Problem(model, lambda z, y: z.square().sum()).structured(Batch(x[:3], None))
    assert set(problem.structure.units) == {"weight"}
    expected = reference.gradients(model, problem.loss, x, None)
    assert np.abs(problem.gradients(x, None).dense().values.numpy() - expected).max() < 1e-10


def test_samples_whose_output_is_not_used():
    """A parameter with a gradient of zero, and one that the loss does not reach."""
    model = Calls(lambda m, x: {"a": m.a(x), "b": m.b(x)}, a=nn.Linear(4, 3), b=nn.Linear(4, 1))
    loss = lambda z, y: uneven(z["a"], y)  # noqa: E731
    check(ready(model), floats(4), {"a.weight": "a.bias", "b.weight": "b.bias"}, loss=loss)


# What is not known


class Bilinear(Calls):
    def __init__(self):
        super().__init__(lambda m, x: m.other(m.both(x, m.before(x))), both=nn.Bilinear(4, 4, 3))
        self.before, self.other = nn.Linear(4, 4), nn.Linear(3, 2)


def _lstm():
    """Its first state depends on the sample: with one that is the same for all torch.func.vmap fails."""
    return Calls(
        lambda m, x: m.head(m.lstm(m.before(x), (x[None, :, 0, :2], x[None, :, 0, 2:]))[0]),
        before=nn.Linear(4, 3),
        lstm=nn.LSTM(3, 2, batch_first=True),
        head=nn.Linear(2, 2),
    )


def _gru_cell():
    return Calls(
        lambda m, x: m.head(m.cell(m.before(x[:, 0]), m.before(x[:, 1]))),
        before=nn.Linear(4, 3),
        cell=nn.GRUCell(3, 3),
        head=nn.Linear(3, 2),
    )


def _weight_norm():
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    return Calls(lambda m, x: m.head(torch.tanh(m.layer(x))), layer=layer, head=nn.Linear(3, 2))


def _transpose():
    return Calls(
        lambda m, x: m.deconv(m.conv(x)), conv=nn.Conv1d(5, 3, 2), deconv=nn.ConvTranspose1d(3, 2, 2, groups=1)
    )


def _penalty():
    return Calls(
        lambda m, x: m.head(torch.tanh(m.layer(x))) + m.layer.weight.square().sum(),
        layer=nn.Linear(4, 3),
        head=nn.Linear(3, 2),
    )


def _sliced():
    return Calls(lambda m, x: F.linear(x, m.layer.weight[:2]) + m.layer(x)[..., :2], layer=nn.Linear(4, 3))


def _prelu():
    return nn.Sequential(nn.Linear(4, 3), nn.PReLU(1), nn.Linear(3, 2))


def _one_plus():
    return Calls(
        lambda m, x: m.head(F.rms_norm(x, (4,)) * (1 + m.scale)), scale=parameter(4), head=nn.Linear(4, 2, bias=False)
    )


def _left_side():
    return Calls(lambda m, x: m.head(m.mix @ x), mix=parameter(3, 5), head=nn.Linear(4, 2))


def _unused():
    model = nn.Linear(4, 3)
    model.register_parameter("rest", parameter(2))
    return model


def _hidden():
    """Half of the output takes part twice, by a detour that shapes do not show."""
    return Calls(
        lambda m, x: m.head(m.layer(x).flip(0).flip(0) + F.linear(x.flip(0), m.layer.weight).flip(0)),
        layer=nn.Linear(4, 3),
        head=nn.Linear(3, 2),
    )


UNKNOWN = {
    "bilinear": (
        Bilinear,
        {"before.weight": "before.bias", "other.weight": "other.bias"},
        {"both.weight", "both.bias"},
    ),
    "lstm": (
        _lstm,
        {"before.weight": "before.bias", "head.weight": "head.bias"},
        {f"lstm.{kind}_{side}_l0" for kind in ("weight", "bias") for side in ("ih", "hh")},
    ),
    "gru cell": (
        _gru_cell,
        {"before.weight": "before.bias", "head.weight": "head.bias"},
        {f"cell.{kind}_{side}" for kind in ("weight", "bias") for side in ("ih", "hh")},
    ),
    "weight norm": (
        _weight_norm,
        {"layer.bias": None, "head.weight": "head.bias"},
        {f"layer.parametrizations.weight.original{i}" for i in (0, 1)},
    ),
    "transposed convolution": (_transpose, {"conv.weight": "conv.bias"}, {"deconv.weight", "deconv.bias"}),
    "a penalty": (_penalty, {"layer.bias": None, "head.weight": "head.bias"}, {"layer.weight"}),
    "a slice of a weight": (_sliced, {"layer.bias": None}, {"layer.weight"}),
    "prelu": (_prelu, {"0.weight": "0.bias", "2.weight": "2.bias"}, {"1.weight"}),
    "one plus a scale": (_one_plus, {"head.weight": None}, {"scale"}),
    "a weight from the left": (_left_side, {"head.weight": "head.bias"}, {"mix"}),
    "no use": (_unused, ALONE, {"rest"}),
    "samples in another order": (_hidden, {"layer.bias": None, "head.weight": "head.bias"}, {"layer.weight"}),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_dense(name):
    make, units, dense = UNKNOWN[name]
    problem = check(ready(make()), floats(5, 4), units, dense)
    assert all(problem.structure.dense.values())


def test_reasons_are_given():
    x, y = floats(5, 4), torch.randn(N).double()
    reasons = {name: structured(ready(UNKNOWN[name][0]()), uneven, x, y).structure.dense for name in UNKNOWN}
    assert reasons["bilinear"]["both.weight"] == "given to bilinear"
    assert "square" in reasons["a penalty"]["layer.weight"]
    assert reasons["no use"]["rest"] == "not seen in a forward pass"
    assert reasons["samples in another order"]["layer.weight"] == "used in a way that no layer shows"


def test_a_model_that_calls_other_layers_for_more_samples():
    model = Calls(lambda m, x: m.a(x) if len(x) < 3 else m.b(x) + 0 * m.a(x), a=nn.Linear(4, 2), b=nn.Linear(4, 2))
    x, y = floats(4), torch.randn(N).double()
    problem = structured(ready(model), uneven, x, y)
    assert not problem.structure.units
    assert set(problem.structure.dense) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_a_model_that_calls_other_layers_later_is_refused():
    model = Calls(lambda m, x: m.a(x) if x.sum() > 0 else m.b(m.a(x)), a=nn.Linear(4, 2), b=nn.Linear(2, 2))
    x, y = floats(4).abs(), torch.randn(N).double()
    problem = structured(ready(model), uneven, x, y)
    with pytest.raises(UnsupportedLayerError, match="other layers for these samples"):
        problem.gradients(-x, y)


# Blocks


def _of_many_kinds():
    model = Calls(
        lambda m, x: m.head(m.norm(torch.tanh(m.conv(m.embed(x).mT).mT + m.shift))).mean(1) * (m.rest**2).sum(),
        embed=nn.Embedding(30, 4),
        conv=nn.Conv1d(4, 4, 2, groups=2),
        shift=parameter(4),
        norm=nn.LayerNorm(4),
        rest=parameter(2, 2),
        head=nn.Linear(4, 3),
    )
    return ready(model), places(30, 5)


SCATTERED = {
    "late": ["head.bias", "norm.bias", "rest", "conv.bias"],
    "middle": ["norm.weight", "head.weight", "embed.weight"],
    "early": ["conv.weight", "shift"],
}
BIAS_FIRST = ["head.bias", "rest", "conv.bias", "embed.weight", "head.weight", "shift", "norm.bias"]
BIAS_FIRST += ["norm.weight", "conv.weight"]
WHOLE = {"embed.weight": None, "conv.weight": "conv.bias", "shift": None, "norm.weight": None, "norm.bias": None}
WHOLE |= {"head.weight": "head.bias"}
APART = dict.fromkeys(["conv.weight", "conv.bias", "head.weight", "head.bias"])


@pytest.mark.parametrize(
    ("blocks", "units"),
    [
        ("full", WHOLE),
        ("layer_wise", WHOLE),
        ("parameter_wise", WHOLE | APART),
        (SCATTERED, WHOLE | APART),
        (
            {"all": BIAS_FIRST},
            WHOLE,
        ),
    ],
    ids=["full", "layer_wise", "parameter_wise", "scattered", "bias_first"],
)
def test_blocks(blocks, units):
    model, x = _of_many_kinds()
    problem = check(model, x, units, {"rest"}, y=places(3), loss=F.cross_entropy, blocks=blocks)
    rows = problem.gradients(x, places(3))
    assert {name: unit.matrix.block for name, unit in problem.structure.units.items()}.items() <= {
        name: block for block, names in problem.blocks.items() for name in names
    }.items()
    assert list(rows.by_block()) == list(problem.blocks)


# Nothing of the user's is changed


def test_nothing_is_changed():
    model, x = _of_many_kinds()
    y = places(3)
    model.train()
    model.norm.eval()
    model.embed.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones(3, 4).double()
    before = copy.deepcopy(model.state_dict())
    flags = {name: module.training for name, module in model.named_modules()}
    identities = {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()}
    inputs, random = x.clone(), torch.get_rng_state()

    problem = structured(model, F.cross_entropy, x, y)
    problem.gradients(x, y)
    problem.describe(Batch(x[:1], y[:1]))

    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, inputs)
    assert not x.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()} == identities
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.head.weight.grad, torch.ones(3, 4).double())
    assert all(p.grad is None for name, p in model.named_parameters() if name != "head.weight")
    for module in model.modules():
        hooks = [value for name, value in vars(module).items() if name.endswith("_hooks") and value is not None]
        assert hooks
        assert not any(hooks)


def test_gradients_do_not_depend_on_the_batch():
    model, x = _of_many_kinds()
    y = places(3)
    problem = structured(model, F.cross_entropy, x, y)
    whole = problem.gradients(x, y).dense().values
    parts = [problem.gradients(x[i : i + 1], y[i : i + 1]).dense().values for i in range(N)]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-12, atol=1e-14)
    alone = Problem(model, F.cross_entropy).structured(Batch(x[:1], y[:1]))
    assert alone.structure == problem.structure


def test_float32():
    model, x = _of_many_kinds()
    y = places(3)
    expected = structured(model, F.cross_entropy, x, y).gradients(x, y).dense().values
    got = structured(model.float(), F.cross_entropy, x, y).gradients(x, y).dense().values
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-5)


# Random models


@st.composite
def sequences(draw):
    """Layers of (C, L) or, from some place on, (d,) inputs."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    channels, length = pick(1, 2, 4), pick(3, 5, 6)
    shape, layers, names = (channels, length), [], {}

    def add(layer, units=()):
        names.update({f"{len(layers)}.{w}": b and f"{len(layers)}.{b}" for w, b in dict(units).items()})
        layers.append(layer)

    for _ in range(draw(st.integers(1, 4))):
        kinds = ["linear", "layer_norm", "rms_norm", "activation"]
        kinds += ["conv", "conv", "group_norm", "batch_norm", "instance_norm", "flatten"] * (len(shape) == 2)
        bias = draw(st.booleans())
        biased, lone = {"weight": "bias" if bias else None}, {"weight": None} | ({"bias": None} if bias else {})
        match draw(st.sampled_from(kinds)):
            case "linear":
                width = pick(1, 3, 4)
                add(nn.Linear(shape[-1], width, bias=bias), biased)
                shape = (*shape[:-1], width)
            case "layer_norm":
                if shape[-1] > 1:
                    add(nn.LayerNorm(shape[-pick(1, len(shape)) :], bias=bias, eps=0.1), lone)
            case "rms_norm":
                add(nn.RMSNorm(shape[-1], eps=0.1), {"weight": None})
            case "activation":
                add(pick(nn.Tanh(), nn.ReLU(inplace=True), nn.SiLU()))
            case "conv":
                groups = pick(1, shape[0])
                out, kernel, dilation = groups * pick(1, 2), pick(1, 2, 3), pick(1, 2)
                if dilation * (kernel - 1) < shape[1]:
                    options = pick({"padding": "same"}, {"stride": 2, "padding": 1}, {"padding": 0})
                    mode = pick("zeros", "circular")
                    layer = nn.Conv1d(
                        shape[0], out, kernel, dilation=dilation, groups=groups, bias=bias, padding_mode=mode, **options
                    )
                    add(layer, biased)
                    with torch.no_grad():
                        shape = tuple(layer(torch.zeros(1, *shape)).shape[1:])
            case "group_norm":
                add(nn.GroupNorm(pick(1, shape[0]), shape[0], eps=0.1), LONE)
            case "batch_norm":
                add(nn.BatchNorm1d(shape[0], eps=0.1), LONE)
            case "instance_norm":
                if shape[1] > 1:
                    add(nn.InstanceNorm1d(shape[0], affine=True, eps=0.1), LONE)
            case "flatten":
                add(nn.Flatten())
                shape = (shape[0] * shape[1],)
    add(nn.Linear(shape[-1], 2), {"weight": "bias"})
    return nn.Sequential(*layers), (channels, length), names


@settings(max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate], derandomize=True, deadline=None)
@given(sequences())
def test_random_models(drawn):
    model, shape, units = drawn
    torch.manual_seed(0)
    check(ready(model), floats(*shape), units)


# Products of rows


def _factor(n, t, matrix, one_hot, generator):
    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d = normal(n, t, matrix.groups, matrix.d_out)
    if one_hot:
        index = torch.randint(0, matrix.d_in, (n, t), generator=generator)
        index[:, -1] = index[:, 0]  # repeated, where there is more than one
        return Factor(d, index)
    return Factor(d, normal(n, t, matrix.groups, matrix.d_in))


#: Groups, d_out, d_in, whether there is a bias, whether the weight is transposed, whether inputs are one-hot.
SHAPES = {
    "linear": (1, 6, 8, True, False, False),
    "wide": (1, 40, 30, False, False, False),
    "transposed": (1, 7, 5, True, True, False),
    "groups": (3, 5, 4, True, False, False),
    "bias": (1, 9, 1, False, False, False),
    "tokens": (1, 3, 11, False, True, True),
    "many tokens": (1, 2, 90, False, True, True),
}
BLOCK_OF = {name: "ab"[i % 2] for i, name in enumerate(SHAPES)}


def _matrices():
    matrices, sizes = {}, {"a": 0, "b": 0}
    for name, (groups, d_out, d_in, bias, transposed, _) in SHAPES.items():
        block = BLOCK_OF[name]
        start = sizes[block]
        middle = start + groups * d_out * (d_in - bias)
        stop = middle + groups * d_out * bias
        sizes[block] = stop
        where = slice(middle, stop) if bias else None
        matrices[name] = Matrix(block, groups, d_out, d_in, slice(start, middle), where, transposed)
    return matrices, {"a": slice(0, sizes["a"]), "b": slice(sizes["a"], sizes["a"] + sizes["b"])}


def _laid_out(entries, matrices):
    """Dense vectors by block, in numpy, from ``(n, groups, d_out, d_in)`` by name."""
    blocks = {"a": [], "b": []}
    for name, matrix in matrices.items():
        array, bias = entries[name], matrix.bias is not None
        weight = array[..., :-1] if bias else array
        weight = weight.transpose(0, 1, 3, 2) if matrix.transposed else weight
        blocks[matrix.block] += [weight.reshape(len(array), -1)]
        if bias:
            blocks[matrix.block] += [array[..., -1].reshape(len(array), -1)]
    return {block: np.concatenate(parts, axis=1) for block, parts in blocks.items()}


def _entries(factor, matrix):
    """A position at a time."""
    d, a = factor.gradients.numpy(), factor.inputs.numpy()
    a = np.eye(matrix.d_in)[a][:, :, None] if a.ndim == 2 else a
    total = np.zeros((len(d), matrix.groups, matrix.d_out, matrix.d_in))
    for t in range(d.shape[1]):
        for group in range(matrix.groups):
            for n in range(len(d)):
                total[n, group] += np.outer(d[n, t, group], a[n, t, group])
    return total


def made(n, t, seed, weighted=False):
    """Factored rows, the same as dense vectors by block, and the numbers beside them as such."""
    generator = torch.Generator().manual_seed(seed)
    matrices, sections = _matrices()
    parts, entries, weights = {}, {}, {}
    for name, matrix in matrices.items():
        positions = 1 if name == "bias" else t
        parts[name] = _factor(n, positions, matrix, SHAPES[name][-1], generator)
        entries[name] = _entries(parts[name], matrix)
        if weighted:
            weights[name] = torch.rand(
                matrix.groups, matrix.d_out, matrix.d_in, generator=generator, dtype=torch.float64
            )
            entries[name] = entries[name] * weights[name].numpy()
    rows = FactoredRows.of(parts, matrices, sections, weights)
    return SimpleNamespace(rows=rows, blocks=_laid_out(entries, matrices))


def dense_of(case):
    values = torch.from_numpy(np.concatenate(list(case.blocks.values()), axis=1))
    return DenseRows(values, case.rows.sections)


def check_products(left, right, a, b):
    """`left` and `right` are rows of the vectors ``a`` and ``b`` by block."""
    expected = {block: a[block] @ b[block].T for block in a}
    by_block = left.dot_by_block(right)
    assert list(by_block) == list(expected)
    for block, values in expected.items():
        assert by_block[block].shape == values.shape
        assert np.allclose(by_block[block].numpy(), values, rtol=1e-11, atol=1e-11)
    total = sum(expected.values())
    assert np.allclose(left.dot(right).numpy(), total, rtol=1e-11, atol=1e-11)
    n = min(total.shape)
    left, right = (rows.with_arrays({k: v[:n] for k, v in rows.arrays.items()}) for rows in (left, right))
    assert np.allclose(left.dot_each(right).numpy(), total.diagonal()[:n], rtol=1e-11, atol=1e-11)


WORKSPACES = [1, 700, 20_000, 32 << 20]
POSITIONS = [(1, 1), (3, 2), (2, 60), (12, 9), (60, 60)]


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("weighted", ["none", "left", "right"])
def test_products(positions, weighted, workspace, monkeypatch):
    monkeypatch.setattr(outfluence.rows, "WORKSPACE", workspace)
    left = made(4, positions[0], 1, weighted == "left")
    right = made(5, positions[1], 2, weighted == "right")
    check_products(left.rows, right.rows, left.blocks, right.blocks)
    check_products(dense_of(left), right.rows, left.blocks, right.blocks)
    check_products(left.rows, dense_of(right), left.blocks, right.blocks)
    check_products(dense_of(left), dense_of(right), left.blocks, right.blocks)
    for case in (left, right):
        got = case.rows.dense().by_block()
        assert all(np.allclose(got[name], case.blocks[name], rtol=1e-12, atol=1e-12) for name in got)
        got = case.rows.by_block()
        assert all(np.allclose(got[name], case.blocks[name], rtol=1e-12, atol=1e-12) for name in got)


def test_what_is_factored_here():
    """The products above take all ways: few and many positions, formed and not, and one of each."""
    few, some, many = (made(2, t, 0).rows for t in (1, 4, 60))
    assert set(few.factors) == set(SHAPES) - {"bias"}
    assert set(some.factors) == {"wide", "tokens", "many tokens"}
    assert set(many.factors) == set()
    assert set(few.columns) == {"bias"}
    for rows in (few, some, many):
        assert set(rows.factors) | set(rows.columns) == set(SHAPES)
        assert not set(rows.factors) & set(rows.columns)


@pytest.mark.parametrize(("positions", "by_place"), [((3, 2), set()), ((5, 6), {11}), ((12, 9), {90})])
def test_both_ways_of_tokens(positions, by_place, monkeypatch):
    """Pairs of positions where these are few; else one range of places after the other."""
    seen, at_places = set(), outfluence.rows._at_places

    def spy(factor, where):
        seen.add(11 if factor.gradients.shape[3] == 3 else 90)
        return at_places(factor, where)

    monkeypatch.setattr(outfluence.rows, "_at_places", spy)
    left, right = made(4, positions[0], 1), made(5, positions[1], 2)
    check_products(left.rows, right.rows, left.blocks, right.blocks)
    assert seen == by_place


@pytest.mark.parametrize("count", [1025, 2])
def test_products_of_many_samples(count):
    left, right = made(2, 2, 1), made(count, 3, 2)
    check_products(left.rows, right.rows, left.blocks, right.blocks)
    check_products(right.rows, left.rows, right.blocks, left.blocks)


@pytest.mark.parametrize("t", [1, 60])
@pytest.mark.parametrize("weighted", [False, True])
def test_scaled(t, weighted):
    left, right = made(3, t, 1, weighted), made(4, 2, 2)
    by = {"a": 2.0, "b": -0.5}
    blocks = {block: values * by[block] for block, values in left.blocks.items()}
    before = {name: array.clone() for name, array in left.rows.arrays.items()}
    check_products(left.rows.scaled(by), right.rows, blocks, right.blocks)
    check_products(dense_of(left).scaled(by), right.rows, blocks, right.blocks)
    assert all(torch.equal(array, before[name]) for name, array in left.rows.arrays.items())


@pytest.mark.parametrize("t", [1, 4, 60])
def test_multiplied(t):
    case = made(4, t, 1, weighted=True)
    vectors = {name: torch.randn(3, values.shape[1]).double() for name, values in case.blocks.items()}
    expected = {name: vectors[name].numpy() @ case.blocks[name].T for name in vectors}
    for rows in (case.rows, dense_of(case)):
        got = rows.multiplied_by_block(vectors)
        assert all(np.allclose(got[name], expected[name], rtol=1e-11, atol=1e-11) for name in expected)
    assert np.allclose(case.rows.multiplied(vectors), sum(expected.values()), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("t", [1, 4, 60])
@pytest.mark.parametrize("weighted", [False, True])
def test_arrays_round_trip(t, weighted):
    case, other = made(4, t, 1, weighted), made(7, t, 2)
    arrays = case.rows.arrays
    assert {name: array.ndim for name, array in arrays.items()} == dict.fromkeys(arrays, 2)
    assert {len(array) for array in arrays.values()} == {4}
    again = case.rows.with_arrays({name: array.clone() for name, array in arrays.items()})
    assert torch.equal(again.dense().values, case.rows.dense().values)
    # Of other samples, and of a part of them.
    like = other.rows.with_arrays(dict(other.rows.arrays))
    assert torch.equal(like.dense().values, other.rows.dense().values)
    if not weighted:
        moved = case.rows.with_arrays(other.rows.arrays)
        assert torch.equal(moved.dense().values, other.rows.dense().values)
    for part in (slice(1, 3), slice(0, 0)):
        taken = case.rows.with_arrays({name: array[part] for name, array in arrays.items()})
        assert len(taken) == part.stop - part.start
        assert torch.equal(taken.dense().values, case.rows.dense().values[part])


@pytest.mark.parametrize("positions", [(1, 60), (60, 60), (2, 2)])
def test_products_with_no_samples(positions):
    left, right = made(3, positions[0], 1, weighted=True), made(4, positions[1], 2)
    for case, other in ((left, right), (right, left)):
        none = case.rows.with_arrays({name: array[:0] for name, array in case.rows.arrays.items()})
        empty = {name: values[:0] for name, values in case.blocks.items()}
        check_products(none, other.rows, empty, other.blocks)
        check_products(other.rows, none, other.blocks, empty)
        check_products(none, dense_of(other), empty, other.blocks)


@pytest.mark.parametrize("lengths", [(3, 3), (2, 9), (40, 6)])
@pytest.mark.parametrize("workspace", [1, 32 << 20])
def test_products_of_gradients_with_other_numbers_of_positions(lengths, workspace, monkeypatch):
    monkeypatch.setattr(outfluence.rows, "WORKSPACE", workspace)
    model, _ = _of_many_kinds()
    x, z = (places(30, length) for length in lengths)
    y = places(3)
    problem = structured(model, F.cross_entropy, x, y, "layer_wise")
    left, right = problem.gradients(x, y), problem.gradients(z, y)
    a, b = (reference.gradients(model, F.cross_entropy, t, y, problem.names) for t in (x, z))
    check_products(left, right, *({name: rows[:, s] for name, s in problem.sections.items()} for rows in (a, b)))


# What is said


def test_describe():
    model = Calls(
        lambda m, x: m.head(torch.tanh(m.norm(m.mix(m.embed(x)))).mean(1)) + m.rest.sum(),
        embed=nn.Embedding(50, 8),
        mix=nn.Conv1d(4, 6, 1, groups=2, bias=False),
        norm=nn.LayerNorm(8),
        head=nn.Linear(8, 3),
        rest=parameter(2),
    )
    x, y = places(50, 4), places(3)
    said = Problem(ready(model), F.cross_entropy).describe(Batch(x[:2], y[:2])).splitlines()
    assert said == [
        "embed.weight: 8 x 50, 4 position(s): factored, 36 numbers",
        "mix.weight: 2 x 3 x 2, 8 position(s): multiplied, 12 numbers",
        "norm.weight: 8 numbers",
        "norm.bias: 8 numbers",
        "head.weight and bias: 3 x 9, 1 position(s): factored, 12 numbers",
        "rest: 2 numbers, dense (given to sum)",
        "a gradient: 78 numbers instead of 457",
    ]


class Mixed(nn.Module):
    """Linear layers in bfloat16 whatever the parameters are in."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.last(torch.tanh(self.first(x))).float()


def test_gradients_have_the_type_of_the_parameters():
    model, x, y = Mixed(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    rows = Problem(model, F.cross_entropy).structured(Batch(x[:3], y[:3])).gradients(x, y)
    assert rows.factors
    assert {array.dtype for array in rows.arrays.values()} == {torch.float32}


def test_many_samples_are_taken_in_turns(monkeypatch):
    case = make_case("mlp")
    problem = Problem(case.model, case.loss).structured(Batch(case.train[0][:3], case.train[1][:3]))
    whole = problem.gradients(*case.train)
    sizes = []
    record = Problem.record
    monkeypatch.setattr("outfluence.problem.SAMPLES", 10)
    monkeypatch.setattr(Problem, "record", lambda self, x: sizes.append(len(x)) or record(self, x))
    parts = problem.gradients(*case.train)
    assert sizes == [10, 10, 4]
    assert torch.allclose(parts.dense().values, whole.dense().values, rtol=1e-12)


def test_in_inference_mode():
    case = make_case("mlp")
    model = DirectInfluence(case.model, case.loss, 0.05, second_order_mode="gauss_newton").fit(case.train)
    expected = model.influences(*case.test, *case.train)
    with torch.inference_mode():
        x, y = case.test[0] * 1.0, case.test[1] * 1
        assert torch.allclose(model.influences(x, y, *case.train), expected, rtol=1e-10)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.four, self.eight = nn.Linear(4, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.four(x) if x.shape[1] == 4 else self.eight(x)


def test_a_second_fit_looks_again():
    y, small, large = torch.randint(0, 3, (9,)), torch.randn(9, 4), torch.randn(9, 8)
    first, second = (DirectInfluence(Branches(), F.cross_entropy, 0.1) for _ in range(2))
    second.problem.model.load_state_dict(first.problem.model.state_dict())
    first.fit((small, y)).fit((large, y))
    assert torch.allclose(first.influences(large, y), second.fit((large, y)).influences(large, y), rtol=1e-5)


class Square(nn.Module):
    """One weight in both ways, and one bias."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.addmm(self.b, torch.tanh(F.linear(x, self.w, self.b)), self.w)


def test_a_bias_of_a_weight_that_is_used_in_both_ways():
    model, x, y = Square().double(), torch.randn(6, 4).double(), torch.randint(0, 4, (6,))
    problem = Problem(model, F.cross_entropy).structured(Batch(x[:3], y[:3]))
    assert set(problem.structure.units) == {"w", "b"}
    expected = reference.gradients(model, F.cross_entropy, x, y)
    assert np.abs(problem.gradients(x, y).dense().values.numpy() - expected).max() <= 1e-10 * np.abs(expected).max()


class Sometimes(nn.Linear):
    """Uses its weight in another way for some samples."""

    def forward(self, x):
        output = super().forward(x)
        return output + self.weight.tanh().sum() if x.sum() > 1e6 else output


def test_another_use_for_later_samples_is_refused():
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    problem = Problem(Sometimes(4, 3), F.cross_entropy).structured(Batch(x[:3], y[:3]))
    problem.gradients(x, y)
    with pytest.raises(UnsupportedLayerError, match="calls other layers for these samples"):
        problem.gradients(x + 1e7, y)
