"""Naive dense reference: autograd a sample at a time, whole matrices, numpy for the rest.

Written from the formulas, sharing nothing with the package: no torch.func, no vmap, no hooks.
"""

from __future__ import annotations

import copy

import numpy as np
import torch


def call(model, x):
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def take(tree, i):
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: value[i : i + 1] for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(value[i : i + 1] for value in tree)
    return tree[i : i + 1]


def n_samples(x):
    if isinstance(x, dict):
        return len(next(iter(x.values())))
    return len(x[0]) if isinstance(x, tuple) else len(x)


def trainable(model, names=None):
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return list(chosen.values()) if names is None else [chosen[name] for name in names]


def flat(tensors, parameters, create=False):
    parts = [torch.zeros_like(p) if t is None else t for t, p in zip(tensors, parameters, strict=True)]
    vector = torch.cat([part.reshape(-1) for part in parts])
    return vector if create else vector.detach()


def gradients(model, loss, x, y, names=None):
    """(n, P): one backward pass a sample."""
    parameters, rows = trainable(model, names), []
    for i in range(n_samples(x)):
        value = loss(call(model, take(x, i)), take(y, i))
        rows.append(flat(torch.autograd.grad(value, parameters, allow_unused=True), parameters))
    return torch.stack(rows).numpy()


def hessian(model, loss, x, y, names=None):
    """(P, P): the mean over samples of each sample's Hessian, a row at a time."""
    parameters = trainable(model, names)
    size = sum(p.numel() for p in parameters)
    total = torch.zeros(size, size, dtype=parameters[0].dtype)
    for i in range(n_samples(x)):
        value = loss(call(model, take(x, i)), take(y, i))
        first = flat(torch.autograd.grad(value, parameters, create_graph=True), parameters, create=True)
        for row in range(size):
            second = torch.autograd.grad(first[row], parameters, retain_graph=True, allow_unused=True)
            total[row] += flat(second, parameters)
    return (total / n_samples(x)).numpy()


def gauss_newton(model, loss, x, y, names=None):
    """(P, P): the mean of J^T H_L J, with the Jacobian of the outputs and the Hessian of the loss in them."""
    parameters = trainable(model, names)
    size = sum(p.numel() for p in parameters)
    total = np.zeros((size, size))
    for i in range(n_samples(x)):
        output = call(model, take(x, i))
        entries = output.reshape(-1)
        jacobian = torch.stack(
            [flat(torch.autograd.grad(e, parameters, retain_graph=True), parameters) for e in entries]
        )
        curvature = torch.autograd.functional.hessian(
            lambda z, shape=output.shape, i=i: loss(z.reshape(shape), take(y, i)), entries.detach()
        )
        total += (jacobian.T @ curvature @ jacobian).numpy()
    return total / n_samples(x)


def fisher(model, loss, x, labels, names=None, factor=1.0):
    """(P, P): the mean outer product of gradients at given labels: of the data (empirical), or drawn from the model."""
    rows = gradients(model, loss, x, labels, names)
    return factor * rows.T @ rows / len(rows)


def harmonic(model, loss, x, y, regularization, names=None):
    """(P, P): the mean of the inverses of damped rank-one terms."""
    rows = gradients(model, loss, x, y, names)
    eye = regularization * np.eye(rows.shape[1])
    return sum(np.linalg.inv(np.outer(g, g) + eye) for g in rows) / len(rows)


def influences(matrix, regularization, left, right):
    """(n_left, n_right): build, invert, multiply."""
    return left @ np.linalg.inv(matrix + regularization * np.eye(len(matrix))) @ right.T


def perturbations(model, loss, matrix, regularization, left, x, y):
    """(n_left, n, *features): d/dx of factor . gradient, a factor and a sample at a time."""
    parameters = trainable(model)
    factors = torch.from_numpy(left @ np.linalg.inv(matrix + regularization * np.eye(len(matrix))))
    result = np.zeros((len(factors), *x.shape))
    for i, factor in enumerate(factors):
        for j in range(len(x)):
            sample = x[j : j + 1].clone().requires_grad_()
            value = loss(model(sample), y[j : j + 1])
            g = flat(torch.autograd.grad(value, parameters, create_graph=True), parameters, create=True)
            result[i, j] = torch.autograd.grad(factor @ g, sample)[0][0].numpy()
    return result


# Kronecker factors, from the papers.


def layer_moments(model, layer, x, labels, weights):
    """For each sample and label: inputs (T, d_in), a one appended for a bias; output gradients (T, d_out); weight.

    `labels` is (n, k): k labels for each sample, each weighing `weights` (n, k).
    """
    seen = {}

    def keep(_module, args, output):
        output.retain_grad()
        seen["a"], seen["out"] = args[0].detach(), output

    handle = layer.register_forward_hook(keep)
    rows = []
    for i in range(len(x)):
        for label, weight in zip(labels[i], weights[i], strict=True):
            work = torch.nn.functional.cross_entropy(model(x[i : i + 1]), label.reshape(1))
            work.backward()
            a, d = (
                seen["a"].reshape(-1, seen["a"].shape[-1]),
                seen["out"].grad.reshape(-1, seen["out"].shape[-1]),
            )
            if layer.bias is not None:
                a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], dim=1)
            rows.append((a.numpy(), d.numpy(), float(weight)))
    handle.remove()
    return rows


def kronecker_matrix(model, layer, x, labels, weights, second=None):
    """(P_layer, P_layer) in the order of vec(W) row by row, bias as last column: K-FAC or EK-FAC, dense.

    K-FAC: G (x) A, G = sum_nt d d^T / N, A = sum_nt a a^T / (N T). EK-FAC (George et al. 2018): its Kronecker
    eigenbasis U, and the diagonal E[(U^T vec(D^T A))^2] at the labels `second`.
    """
    model = copy.deepcopy(model) if layer is model else model
    rows, n = layer_moments(model, layer, x, labels, weights), len(x)
    per_label = labels.shape[1]
    a_cov = sum(a.T @ a / len(a) for a, _, _ in rows) / (n * per_label)
    g_cov = sum(w * d.T @ d for _, d, w in rows) / n
    kfac = np.kron(g_cov, a_cov)
    if second is None:
        return kfac
    rows = layer_moments(model, layer, x, second, weights)
    basis = np.kron(np.linalg.eigh(g_cov)[1], np.linalg.eigh(a_cov)[1])
    diagonal = sum(w * (basis.T @ (d.T @ a).reshape(-1)) ** 2 for a, d, w in rows) / n
    return basis @ np.diag(diagonal) @ basis.T


def bias_last(rows, d_out, d_in):
    """Gradient rows in the order of the package (weight, then bias) as vec of [W | b]."""
    n = len(rows)
    weight, bias = (
        rows[:, : d_out * d_in].reshape(n, d_out, d_in),
        rows[:, d_out * d_in :].reshape(n, d_out, -1),
    )
    return np.concatenate([weight, bias], axis=2).reshape(n, -1)
