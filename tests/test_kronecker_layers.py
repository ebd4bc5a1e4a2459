"""K-FAC and EK-FAC of convolutions, embeddings, attention, norms and tied layers against dense formulas.

Each model is written a second time here, from matrix products: with the inputs of every layer as rows of numbers, and
its outputs where the gradients are taken. The formulas are numpy's.
"""

from __future__ import annotations

import copy
import pickle
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import reference
from outfluence import EkfacInfluence
from outfluence.errors import UnsupportedLayerError
from outfluence.likelihood import uniform_draws

LAMBDA = 0.01
N, CLASSES = 24, 3


def ones_beside(a):
    return torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)


class Images(nn.Module):
    """A convolution with groups, stride, padding and dilation; one without a bias; a norm of groups."""

    units = {"conv.weight": "conv.bias", "norm.weight": None, "norm.bias": None, "wide.weight": None}  # noqa: RUF012
    units |= {"head.weight": "head.bias"}

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
        self.norm = nn.GroupNorm(2, 6)
        self.wide = nn.Conv2d(6, 2, 2, bias=False)
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.wide(self.norm(torch.tanh(self.conv(x))))).mean((2, 3)))

    def by_hand(self, x):
        uses = {}
        a = F.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1))  # (1, 4 * 6, T)
        a = ones_beside(a[0].T.reshape(-1, 2, 12))  # (T, groups, 2 * 6 + 1)
        weight = torch.cat([self.conv.weight.reshape(2, 3, 12), self.conv.bias.reshape(2, 3, 1)], dim=2)
        out = torch.einsum("tgi,goi->tgo", a, weight)
        uses["conv.weight"] = [(a, out)]
        h = self.norm(torch.tanh(out.reshape(-1, 6).T.reshape(1, 6, 2, -1)))
        a = F.unfold(h, 2)[0].T
        out = a @ self.wide.weight.reshape(2, -1).T
        uses["wide.weight"] = [(a[:, None], out)]
        a = ones_beside(torch.tanh(out).mean(0, keepdim=True))
        out = a @ torch.cat([self.head.weight, self.head.bias[:, None]], dim=1).T
        uses["head.weight"] = [(a[:, None], out)]
        return out, uses

    @staticmethod
    def data(n):
        return torch.randn(n, 4, 3, 4).double()


class Tokens(nn.Module):
    """An embedding, of few tokens that come several times in a sample; and one of positions."""

    units = {"embed.weight": None, "pos.weight": None, "head.weight": "head.bias"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.embed, self.pos, self.head = nn.Embedding(9, 3, padding_idx=8), nn.Embedding(6, 3), nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x) + self.pos(torch.arange(x.shape[1]))).sum(1))

    def by_hand(self, x):
        kept = (x[0] != 8)[:, None]
        tokens, places = F.one_hot(x[0], 9).double(), torch.eye(6).double()
        embedded, placed = tokens @ self.embed.weight, places @ self.pos.weight
        h = torch.where(kept, embedded, embedded.detach()) + placed  # the token of the padding gets no gradient
        a = ones_beside(torch.tanh(h).sum(0, keepdim=True))
        out = a @ torch.cat([self.head.weight, self.head.bias[:, None]], dim=1).T
        uses = {
            "embed.weight": [(tokens[:, None], embedded)],
            "pos.weight": [(places[:, None], placed)],
        }
        return out, uses | {"head.weight": [(a[:, None], out)]}

    @staticmethod
    def data(n):
        x = torch.randint(0, 5, (n, 6))
        x[::3, 0], x[1::4, 5] = 8, 7
        return x


class Attention(nn.Module):
    """Two heads of attention after a layer norm, with a branch around them, its scale, and the same layer after it."""

    units = {"attn.in_proj_weight": "attn.in_proj_bias", "attn.out_proj.weight": "attn.out_proj.bias"}  # noqa: RUF012
    units |= {"scale": None, "norm.weight": None, "norm.bias": None, "head.weight": None}

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.norm = nn.LayerNorm(4)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return self.head(torch.tanh(x + self.scale * self.attn(h, h, h, need_weights=False)[0]).mean(1))

    def by_hand(self, x):
        a = ones_beside(self.norm(x)[0])
        joined = a @ torch.cat([self.attn.in_proj_weight, self.attn.in_proj_bias[:, None]], dim=1).T
        heads = []
        for head in (slice(0, 2), slice(2, 4)):
            q, k, v = (part[:, head] for part in joined.split(4, dim=1))
            heads.append(torch.softmax(q @ k.T / 2**0.5, dim=1) @ v)
        b = ones_beside(torch.cat(heads, dim=1))
        mixed = b @ torch.cat([self.attn.out_proj.weight, self.attn.out_proj.bias[:, None]], dim=1).T
        c = torch.tanh(x[0] + self.scale * mixed).mean(0, keepdim=True)
        out = c @ self.head.weight.T
        uses = {"attn.in_proj_weight": (a, joined), "attn.out_proj.weight": (b, mixed), "head.weight": (c, out)}
        return out, {name: [(a[:, None], out)] for name, (a, out) in uses.items()}

    @staticmethod
    def data(n):
        return torch.randn(n, 5, 4).double()


class TiedTwice(nn.Module):
    """One weight and bias in two layers, one of which is called again, for fewer positions."""

    units = {"first.weight": "first.bias", "head.weight": "head.bias"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(torch.tanh(self.first(h.mean(1))))

    def by_hand(self, x):
        weight = torch.cat([self.first.weight, self.first.bias[:, None]], dim=1).T
        a = ones_beside(x[0])
        first = a @ weight
        b = ones_beside(torch.tanh(first))
        second = b @ weight
        c = ones_beside(torch.tanh(second).mean(0, keepdim=True))
        third = c @ weight
        d = ones_beside(torch.tanh(third))
        out = d @ torch.cat([self.head.weight, self.head.bias[:, None]], dim=1).T
        tied = [(a, first), (b, second), (c, third)]
        return out, {
            "first.weight": [(a[:, None], out) for a, out in tied],
            "head.weight": [(d[:, None], out)],
        }

    @staticmethod
    def data(n):
        return torch.randn(n, 3, 4).double()


class TiedEmbedding(nn.Module):
    """The weight of the output layer is that of the embedding: one of its sides is one-hot in each use."""

    units = {"embed.weight": None, "norm.weight": None}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(CLASSES, 4), nn.RMSNorm(4)

    def forward(self, x):
        return F.linear(self.norm(torch.tanh(self.embed(x)).sum(1)), self.embed.weight)

    def by_hand(self, x):
        places = F.one_hot(x[0], CLASSES).double()
        embedded = places @ self.embed.weight
        a = self.norm(torch.tanh(embedded).sum(0, keepdim=True))
        out = a @ self.embed.weight.T
        # As a matrix (vocabulary, width): what goes into the embedding is on the side of output gradients.
        return out, {"embed.weight": [("swap", places[:, None], embedded), (a[:, None], out)]}

    @staticmethod
    def data(n):
        return torch.randint(0, CLASSES, (n, 4))


MODELS = {model.__name__: model for model in (Images, Tokens, Attention, TiedTwice, TiedEmbedding)}


def problem_of(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.6 + (p.ndim == 1))
    return model, *((MODELS[name].data(n), torch.randint(0, CLASSES, (n,))) for n in (N, 7))


def labels_of(model, train, fisher, seed=0, stream=0):
    """The labels that each kind of Fisher takes its gradients at, and what each weighs: ``(n, k)``."""
    x, y = train
    p = model(x).softmax(1).detach()
    if fisher == "exact":
        return torch.arange(CLASSES).expand(len(x), CLASSES), p.numpy()
    if fisher == "sampled":
        y = torch.from_numpy((p.numpy().cumsum(1) < uniform_draws(seed, 0, len(x), stream=stream)).sum(1))
    return y[:, None], np.ones((len(x), 1))


def moments_by_hand(model, train, labels, weights, reduce=False):
    """``A`` and ``G`` by unit, ``(groups, d, d)``: sums over samples, labels, uses and positions, one at a time.

    Of several positions those whose gradients are zero at all labels do not count. Reduced: of the mean of inputs and
    of the sum of output gradients over all uses and positions.
    """
    inputs, outputs, counts = {}, {}, {}
    for i in range(N):
        of_sample = {}
        for label, weight in zip(labels[i], weights[i], strict=True):
            z, uses = model.by_hand(train[0][i : i + 1])
            assert torch.allclose(z, model(train[0][i : i + 1]), rtol=1e-12, atol=1e-12)
            loss = F.cross_entropy(z, label.reshape(1))
            for name, ways in uses.items():
                together = [[], []]
                for *swapped, a, out in ways:
                    (gradient,) = torch.autograd.grad(loss, out, retain_graph=True)
                    sides = a.detach().numpy(), gradient.reshape(*a.shape[:2], -1).numpy()
                    assert not swapped or len(labels[i]) == 1
                    for side, rows in zip(together, reversed(sides) if swapped else sides, strict=True):
                        side += list(rows)
                of_sample.setdefault(name, []).append((*together, weight))
        for name, of_labels in of_sample.items():
            a = np.stack(of_labels[0][0])
            alive = np.any([np.any(np.stack(d), axis=(1, 2)) for _, d, _ in of_labels], axis=0)
            a = a[alive] if len(a) > 1 else a
            if reduce:
                a = a.mean(0, keepdims=True)
            inputs[name] = inputs.get(name, 0) + sum(np.stack([np.outer(v, v) for v in place]) for place in a)
            counts[name] = counts.get(name, 0) + len(a)
            for _, d, weight in of_labels:
                places = [np.sum(d, axis=0)] if reduce else d
                moments = sum(np.stack([np.outer(v, v) for v in place]) for place in places)
                outputs[name] = outputs.get(name, 0) + weight * moments
    if reduce and isinstance(model, Tokens):  # the A of an embedding is taken to be diagonal
        for name in ("embed.weight", "pos.weight"):
            inputs[name] = inputs[name] * np.eye(inputs[name].shape[-1])
    return {name: (inputs[name] / counts[name], outputs[name] / N) for name in inputs}


@cache
def moments_of(name, fisher, reduce=False):
    model, train, _ = problem_of(name)
    return moments_by_hand(model, train, *labels_of(model, train, fisher), reduce)


def unit_rows(model, name, bias, x, y):
    """Gradients as matrices ``(n, groups, d_out, d_in)``, the bias as last column; of an embedding (width, places)."""
    rows = reference.gradients(model, F.cross_entropy, x, y, [name])
    shape = model.get_parameter(name).shape
    if len(shape) == 1:
        return rows.reshape(len(rows), 1, -1, 1)
    module = model.get_submodule(name.rpartition(".")[0])
    groups = getattr(module, "groups", 1)
    matrices = rows.reshape(len(rows), groups, shape[0] // groups, -1)
    if isinstance(module, nn.Embedding) and not isinstance(model, TiedEmbedding):
        matrices = matrices.swapaxes(2, 3)
    if bias is not None:
        column = reference.gradients(model, F.cross_entropy, x, y, [bias])
        matrices = np.concatenate([matrices, column.reshape(len(rows), groups, -1, 1)], axis=3)
    return matrices


def curvature(model, name, bias, train, labels, weights, moments, second=None):
    """One matrix for each group, of the entries of its gradient row by row; corrected at labels `second`, if any."""

    def rows_at(some, group):
        rows = (unit_rows(model, name, bias, train[0], some[:, k])[:, group] for k in range(some.shape[1]))
        return [r.reshape(N, -1) for r in rows]

    def of_vectors(rows):
        return sum((w[:, None] * g).T @ g for g, w in zip(rows, weights.T, strict=True)) / N

    _, n_groups, _, d_in = unit_rows(model, name, bias, train[0], labels[:, 0]).shape
    matrices = []
    for group in range(n_groups):
        if name in moments:
            a, g = (part[group] for part in moments[name])
            # The inputs of an embedding are ones at single places, whose A is diagonal.
            of_inputs = np.eye(d_in) if not (a - np.diag(a.diagonal())).any() else np.linalg.eigh(a)[1]
            matrix, basis = np.kron(g, a), np.kron(np.linalg.eigh(g)[1], of_inputs)
        else:  # a vector
            matrix = of_vectors(rows_at(labels, group))
            basis = np.linalg.eigh(matrix)[1]
        if second is not None:
            diagonal = of_vectors([r @ basis for r in rows_at(second, group)]).diagonal()
            matrix = basis @ np.diag(diagonal) @ basis.T
        matrices.append(matrix)
    return matrices


@cache
def scores_by_hand(name, fisher, update_diagonal, regularization=LAMBDA, reduce=False):
    """By layer ``(n_test, n)``."""
    model, train, test = problem_of(name)
    labels, weights = labels_of(model, train, fisher)
    second = labels_of(model, train, fisher, stream=1)[0] if update_diagonal else None  # drawn anew
    moments, scores = moments_of(name, fisher, reduce), {}
    for unit, bias in model.units.items():
        left, right = (unit_rows(model, unit, bias, *data) for data in (test, train))
        layer = unit.rpartition(".")[0] or "(root)"
        for group, matrix in enumerate(curvature(model, unit, bias, train, labels, weights, moments, second)):
            sides = (rows[:, group].reshape(len(rows), -1) for rows in (left, right))
            scores[layer] = scores.get(layer, 0) + reference.influences(matrix, regularization, *sides)
    return scores


def assert_scores(got, expected):
    assert set(got) == set(expected)
    for layer, values in expected.items():
        assert np.abs(got[layer].numpy() - values).max() <= 1e-8 * np.abs(values).max(), layer


@cache
def fitted(name, fisher=None, update_diagonal=True, size=10, regularization=LAMBDA):
    fisher = fisher or ("sampled" if name == "TiedEmbedding" else "exact")
    model, train, test = problem_of(name)
    influence = EkfacInfluence(model, update_diagonal, regularization, fisher=fisher)
    return influence.fit(DataLoader(TensorDataset(*train), batch_size=size)), train, test


# Sums over positions of Images and Attention have several eigenvalues of zero, without eigenvectors of their own: no
# single values of corrected eigenvalues are right.
@pytest.mark.parametrize(
    ("name", "update_diagonal"),
    [(name, False) for name in MODELS] + [(name, True) for name in ("Tokens", "TiedTwice", "TiedEmbedding")],
)
def test_reduced_positions_equal_the_dense_formulas(name, update_diagonal):
    model, train, test = problem_of(name)
    fisher = "sampled" if name == "TiedEmbedding" else "exact"
    influence = EkfacInfluence(model, update_diagonal, LAMBDA, fisher=fisher, weight_sharing="reduce")
    influence.fit(DataLoader(TensorDataset(*train), batch_size=10))
    expected = scores_by_hand(name, fisher, update_diagonal, reduce=True)
    assert_scores(influence.influences_by_layer(*test, *train), expected)
    expanded = sum(scores_by_hand(name, fisher, update_diagonal).values())
    assert np.abs(sum(expected.values()) - expanded).max() > 1e-3 * np.abs(expanded).max()


@pytest.mark.parametrize("update_diagonal", [False, True], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_formulas(name, fisher, update_diagonal):
    if name == "TiedEmbedding" and fisher == "exact":  # its sides both depend on the label: there is no formula
        with pytest.raises(UnsupportedLayerError, match=r"'embed\.weight' is shared by layers of two kinds"):
            fitted(name, fisher, update_diagonal)
        return
    influence, train, test = fitted(name, fisher, update_diagonal)  # 10 + 10 + 4
    units = {unit: u.bias for unit, u in influence.problem.structure.units.items()}
    assert units == MODELS[name].units
    expected = scores_by_hand(name, fisher, update_diagonal)
    assert_scores(influence.influences_by_layer(*test, *train), expected)
    total = sum(expected.values())
    assert np.abs(influence.influences(*test, *train).numpy() - total).max() <= 1e-8 * np.abs(total).max()


@pytest.mark.parametrize("name", MODELS)
def test_the_inverse_matters_here(name):
    """In every layer: scores are no multiple of the products of gradients."""
    expected, plain = (scores_by_hand(name, "sampled", True, value) for value in (LAMBDA, 1e12))
    for layer, values in expected.items():
        scaled = plain[layer] * (values * plain[layer]).sum() / (plain[layer] ** 2).sum()
        assert np.abs(values - scaled).max() > 0.05 * np.abs(values).max(), layer


@pytest.mark.parametrize("name", MODELS)
def test_corrected_eigenvalues_are_others(name):
    kfac, ekfac = (scores_by_hand(name, "empirical", update_diagonal) for update_diagonal in (False, True))
    different = [layer for layer in kfac if np.abs(kfac[layer] - ekfac[layer]).max() > 0.01 * np.abs(kfac[layer]).max()]
    vectors = {"norm", "(root)"}
    assert set(different) == set(kfac) - vectors


@pytest.mark.parametrize(
    ("name", "fisher"), [(n, f) for n in MODELS for f in ("sampled", "exact") if (n, f) != ("TiedEmbedding", "exact")]
)
def test_batches_do_not_matter(name, fisher):
    influence, train, test = fitted(name, fisher)
    expected = influence.influences(*test, *train)
    for size in (24, 7):
        again = fitted(name, fisher, size=size)[0].influences(*test, *train)
        assert (again - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_self_influences_are_the_diagonal(name):
    influence, train, _ = fitted(name)
    selves, scores = influence.self_influences(*train), influence.influences(*train)
    assert scores.diagonal().min() > 0
    assert torch.allclose(selves, scores.diagonal(), rtol=1e-10, atol=0)
    assert torch.allclose(scores, scores.T, rtol=1e-9, atol=1e-10 * scores.abs().max().item())


@pytest.mark.parametrize("update_diagonal", [False, True], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("name", MODELS)
def test_dense_factors_give_the_same_scores(name, update_diagonal):
    influence, train, test = fitted(name, update_diagonal=update_diagonal)
    expected = influence.influences_by_layer(*test, *train)
    factors = influence.influence_factors(*test)
    assert factors.shape == (7, influence.n_parameters)
    # Factors are vectors over the parameters: their products with gradients are the scores.
    rows = torch.from_numpy(reference.gradients(influence.problem.model, F.cross_entropy, *train))
    total = sum(expected.values())
    for got in (factors @ rows.T, influence.influences_from_factors(factors, *train)):
        assert (got - total).abs().max() <= 1e-9 * total.abs().max()
    by_layer = influence.influence_factors_by_layer(*test)
    assert torch.equal(torch.cat(list(by_layer.values()), dim=1), factors)
    got = influence.influences_from_factors_by_layer(by_layer, *train)
    for layer, values in expected.items():
        assert (got[layer] - values).abs().max() <= 1e-9 * values.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_left_rows_from_a_store(name):
    """Kept as named arrays of two axes, a part of the samples at a time."""
    influence, train, test = fitted(name)
    expected = influence.influences(*test, *train)
    left = influence.left_rows(*test)
    right = influence.right_rows(influence.gradient_rows(*train))
    stored = {key: array.numpy().copy() for key, array in left.arrays.items()}
    parts = []
    for part in (slice(0, 4), slice(4, 7)):
        rows = influence.inverse.left(influence.empty_gradients()).with_arrays(
            {key: torch.from_numpy(a[part]) for key, a in stored.items()}
        )
        parts.append(rows.dot(right))
    assert (torch.cat(parts) - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", ["Images", "Tokens", "Attention"])
def test_with_regularization(name):
    influence, train, test = fitted(name, regularization=1.0)
    before = influence.influences(*test, *train)
    assert_scores(
        influence.with_regularization(LAMBDA).influences_by_layer(*test, *train), scores_by_hand(name, "exact", True)
    )
    assert torch.equal(influence.influences(*test, *train), before)
    by_layer = {layer: LAMBDA * (i + 1) for i, layer in enumerate(influence.problem.blocks)}
    scores = influence.with_regularization(by_layer).influences_by_layer(*test, *train)
    for layer, value in by_layer.items():
        expected = scores_by_hand(name, "exact", True, value)[layer]
        assert np.abs(scores[layer].numpy() - expected).max() <= 1e-8 * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_pickles_and_copies(name):
    influence, train, test = fitted(name)
    expected = influence.influences(*test, *train)
    for other in (pickle.loads(pickle.dumps(influence)), copy.deepcopy(influence)):
        assert torch.equal(other.influences(*test, *train), expected)
        assert torch.equal(other.influence_factors(*test), influence.influence_factors(*test))


@pytest.mark.parametrize("name", MODELS)
def test_restored_from_its_tensors(name):
    influence, train, test = fitted(name)
    tensors = {key: tensor.clone() for key, tensor in influence.inverse.tensors.items()}
    again = influence.unfitted().restore(train, tensors)
    assert torch.equal(again.influences(*test, *train), influence.influences(*test, *train))
    assert torch.equal(again.self_influences(*train), influence.self_influences(*train))


class Padded(nn.Module):
    """Attention among words that are not padding, with scores of the next word at each; the last layer may be tied."""

    def __init__(self, tied):
        super().__init__()
        self.embed, self.attn = nn.Embedding(9, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 9, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, words, padding):
        h = self.embed(words)
        h = h + self.attn(h, h, h, key_padding_mask=padding, need_weights=False)[0]
        return self.head(torch.tanh(self.norm(h))).transpose(1, 2)


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("options", [{}, {"update_diagonal": True}, {"weight_sharing": "reduce"}], ids=str)
def test_padding_changes_nothing(options, tied, fisher):
    if tied and fisher == "exact":
        pytest.skip("a weight that is shared by layers of two kinds has no exact factors, and is refused")
    torch.manual_seed(7)
    model, lengths = Padded(tied).double().eval(), torch.tensor([5, 2, 4, 1, 3, 5, 0])
    words, labels = torch.randint(0, 9, (7, 5)), torch.randint(0, 9, (7, 5))

    def padded_to(length):
        padding = torch.arange(length) >= lengths[:, None]
        padding[:, 0] = False  # something to attend to, also where no label counts
        others = torch.randint(0, 9, (7, length))  # what is in the padding should not matter
        x = torch.where(padding, others, F.pad(words, (0, length - 5)))
        ignored = torch.arange(length) >= lengths[:, None]
        return {"words": x, "padding": padding}, F.pad(labels, (0, length - 5)).masked_fill(ignored, -100)

    loss = nn.CrossEntropyLoss(reduction="sum")
    scores = []
    for length in (5, 5, 8, 20):
        data = padded_to(length)
        influence = EkfacInfluence(model, hessian_regularization=1e-3, loss=loss, fisher=fisher, **options)
        scores.append(influence.fit(data).influences(*data))
    assert not torch.equal(padded_to(5)[0]["words"], padded_to(5)[0]["words"])
    for other in scores[1:]:
        assert torch.allclose(other, scores[0], rtol=1e-9, atol=1e-9 * float(scores[0].abs().max()))
