"""Linear algebra of symmetric matrices that are known by their products only: ``matmat`` maps ``(P, k)`` to ``(P, k)``.

A product costs a pass over the data, whatever k is (nearly), so everything here multiplies as many vectors at once as
it can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from outfluence.errors import ConvergenceError, ProblemError

Matmat = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """Solutions of ``A x = b``, one a column.

    Attributes:
        x: ``(P, k)``.
        iterations: per column, int ``(k,)``.
        residual: ``|b - A x| / |b|`` per column, computed from x at the end, ``(k,)``; 0 where b is 0.
        converged: whether ``|b - A x| <= max(rtol |b|, atol)``, per column, ``(k,)``.
        negative_curvature: whether some ``p^T A p < 0`` was met: the matrix is not positive definite.
    """

    x: Tensor
    iterations: Tensor
    residual: Tensor
    converged: Tensor
    negative_curvature: bool


def conjugate_gradient(
    matmat: Matmat,
    b: Tensor,
    *,
    rtol: float,
    atol: float,
    maxiter: int,
    precondition: Matmat | None = None,
    block: bool = False,
    on_step: Callable[[], Any] = lambda: None,
) -> Solution:
    """Solve ``A x = b`` for all columns of b, which share each product.

    Conjugate gradient (Hestenes & Stiefel 1952) for each column on its own, or for all in one growing space: the
    breakdown-free block method (Ji & Li 2017), which needs fewer products and stays sound when right-hand sides are
    dependent, or more than unknowns. The residual is computed afresh at the end; if rounding errors had hidden that a
    column is not there yet, it goes on from where it is.

    Args:
        matmat: products with A.
        b: ``(P, k)``.
        rtol: of the residual, relative to b.
        atol: of the residual; either tolerance suffices.
        maxiter: most products for a column.
        precondition: products with an approximation of the inverse of A, symmetric and positive definite.
        block: search in the space of all columns.
        on_step: called after each product.
    """
    norms = torch.linalg.vector_norm(b, dim=0)
    goal = (rtol * norms).clamp(min=atol)
    x, residual = torch.zeros_like(b), b.clone()
    iterations = torch.zeros(b.shape[1], dtype=torch.long, device=b.device)
    negative, used = False, 0
    search = _block_search if block else _search
    while used < maxiter:
        size = torch.linalg.vector_norm(residual, dim=0)
        open_ = torch.nonzero(size > goal)[:, 0]
        if len(open_) == 0:
            break
        step = search(
            matmat, residual[:, open_], goal[open_], maxiter - used, precondition or (lambda vectors: vectors), on_step
        )
        negative |= step.negative_curvature
        used += int(step.iterations.max())
        iterations[open_] += step.iterations
        moved = x[:, open_] + step.x
        after = b[:, open_] - matmat(moved)
        better = torch.linalg.vector_norm(after, dim=0) < size[open_]  # NaN is not
        if not step.negative_curvature:  # residuals may rise while the error falls: 1/2 x^T A x - b^T x says so
            energy = -((b + residual) * x)[:, open_].sum(0) / 2
            better |= -((b[:, open_] + after) * moved).sum(0) / 2 < energy
        x[:, open_[better]], residual[:, open_[better]] = moved[:, better], after[:, better]
        if not (torch.linalg.vector_norm(residual[:, open_], dim=0) < size[open_] / 2).any():
            break  # as far as this precision goes
    size = torch.linalg.vector_norm(residual, dim=0)
    relative = torch.where(norms > 0, size / norms.clamp(min=torch.finfo(b.dtype).tiny), torch.zeros_like(size))
    return Solution(x, iterations, relative, size <= goal, negative)


def _search(
    matmat: Matmat, b: Tensor, goal: Tensor, maxiter: int, precondition: Matmat, on_step: Callable[[], Any]
) -> Solution:
    """Each column on its own; columns that are done leave the product."""
    k = b.shape[1]
    x = torch.zeros_like(b)
    iterations = torch.zeros(k, dtype=torch.long, device=b.device)
    residuals = torch.linalg.vector_norm(b, dim=0)
    negative, open_ = False, torch.arange(k, device=b.device)
    r = b.clone()
    z = precondition(r)
    p, rz = z.clone(), (r * z).sum(0)
    for _ in range(maxiter):
        q = matmat(p)
        curvature = (p * q).sum(0)
        negative |= bool((curvature < 0).any())
        alpha = rz / curvature
        sound = alpha.isfinite()
        alpha = torch.where(sound, alpha, torch.zeros_like(alpha))
        x[:, open_] += alpha * p
        r = r - alpha * q
        iterations[open_] += 1
        residuals[open_] = torch.linalg.vector_norm(r, dim=0)
        on_step()
        z = precondition(r)
        rz, before = (r * z).sum(0), rz
        going = (residuals[open_] > goal[open_]) & sound & rz.isfinite()
        if not going.any():
            break
        p = (z + (rz / before) * p)[:, going]
        r, rz, open_ = r[:, going], rz[going], open_[going]
    return Solution(x, iterations, residuals, residuals <= goal, negative)


def _block_search(
    matmat: Matmat, b: Tensor, goal: Tensor, maxiter: int, precondition: Matmat, on_step: Callable[[], Any]
) -> Solution:
    """All columns in one space; its basis is orthonormal, and no wider than the residuals are independent."""
    x, r = torch.zeros_like(b), b.clone()
    iterations = torch.zeros(b.shape[1], dtype=torch.long, device=b.device)
    residuals = torch.linalg.vector_norm(b, dim=0)
    negative, going = False, residuals > goal
    p = _basis(precondition(r))
    for _ in range(maxiter):
        if p.shape[1] == 0:
            break
        q = matmat(p)
        small = p.T @ q
        small = (small + small.T) / 2
        negative |= bool((torch.linalg.eigvalsh(small) < 0).any())
        inverse = torch.linalg.pinv(small, hermitian=True, rtol=p.shape[1] * torch.finfo(b.dtype).eps)
        alpha = inverse @ (p.T @ r)
        x += p @ alpha
        r = r - q @ alpha
        iterations[going] += 1
        residuals = torch.linalg.vector_norm(r, dim=0)
        going = residuals > goal
        on_step()
        if not going.any() or not r.isfinite().all():
            break
        z = precondition(r)
        p = _basis(z - p @ (inverse @ (q.T @ z)))
    return Solution(x, iterations, residuals, ~going, negative)


def _basis(vectors: Tensor) -> Tensor:
    """An orthonormal basis of the space of the columns, whatever their lengths."""
    lengths = torch.linalg.vector_norm(vectors, dim=0)
    vectors = vectors[:, lengths > 0] / lengths[lengths > 0]
    q, small = torch.linalg.qr(vectors)
    u, singular, _ = torch.linalg.svd(small, full_matrices=False)
    if len(singular) == 0:
        return vectors
    wide = singular > singular[0] * math.sqrt(vectors.shape[1]) * torch.finfo(vectors.dtype).eps
    basis: Tensor = q @ u[:, wide]
    return basis


def eigenpairs(
    matmat: Matmat,
    size: int,
    rank: int,
    *,
    like: Tensor,
    krylov_dimension: int | None = None,
    tol: float = 1e-6,
    maxiter: int | None = None,
    on_gpu: bool = False,
) -> tuple[Tensor, Tensor]:
    """The eigenvalues of largest magnitude and their eigenvectors: ``(k,)`` and ``(P, k)``, the largest first.

    By a block Lanczos method with thick restarts (Golub & Underwood 1977; Wu & Simon 2000), where `rank` vectors share
    each product, so that it takes few, and eigenvalues that are there several times are found as often (as those of
    squared errors of several outputs are); where its space would be the whole one, by building the matrix.

    Args:
        matmat: products with the matrix.
        size: P.
        rank: how many; as many as there are, if fewer.
        like: gives type and device.
        krylov_dimension: vectors kept, with their images; None: four times the rank, at least 20.
        tol: of the residuals ``|A v - mu v|``, relative to the eigenvalue.
        maxiter: most restarts; None: 10 P.
        on_gpu: iterate on the GPU, with CuPy, a vector at a time.

    Raises:
        ConvergenceError: if not all were found.
        ProblemError: if ``on_gpu`` is asked for without a GPU or without CuPy.
    """
    dimension = max(krylov_dimension or max(4 * rank, 20), rank + 1)
    if on_gpu and like.device.type != "cuda":
        raise ProblemError("eigen_computation_on_gpu=True needs the model on a GPU: call .to('cuda') first")
    if dimension >= size:
        matrix = matmat(torch.eye(size, dtype=like.dtype, device=like.device))
        values, vectors = torch.linalg.eigh((matrix + matrix.T).double() / 2)
        values, vectors = values.to(like.dtype), vectors.to(like.dtype)
    elif on_gpu:
        values, vectors = _lanczos_on_gpu(
            matmat, size, like, {"k": rank, "ncv": dimension, "tol": tol, "maxiter": maxiter}
        )
    else:
        values, vectors = _block_lanczos(matmat, size, rank, dimension, like, tol, maxiter or 10 * size)
    order = values.abs().argsort(descending=True, stable=True)[:rank]
    return values[order], vectors[:, order].contiguous()


def _block_lanczos(
    matmat: Matmat, size: int, rank: int, dimension: int, like: Tensor, tol: float, maxiter: int
) -> tuple[Tensor, Tensor]:
    """In double precision but for the products.

    Images are kept, so that Ritz values and residuals are those of the products as they are, rounding errors and all.
    """

    def multiply(vectors: Tensor) -> Tensor:
        return matmat(vectors.to(like.dtype)).double()

    generator = torch.Generator().manual_seed(0)

    def random(n: int) -> Tensor:
        return torch.randn(size, n, generator=generator, dtype=torch.float64).to(like.device)

    spaces = [torch.empty(dimension, size, dtype=torch.float64, device=like.device) for _ in range(2)]

    def with_columns(start: int, *columns: Tensor) -> Iterator[Tensor]:
        for space, new in zip(spaces, columns, strict=True):
            space[start : start + new.shape[1]] = new.T
            yield space[: start + new.shape[1]].T

    rounding = 10 * torch.finfo(like.dtype).eps
    width = min(rank, dimension - rank)
    new = torch.linalg.qr(random(width))[0]
    (basis, images), restarts, found = with_columns(0, new, multiply(new)), 0, 0
    while True:
        small = basis.T @ images
        values, rotation = torch.linalg.eigh((small + small.T) / 2)
        order = values.abs().argsort(descending=True, stable=True)
        values, rotation = values[order], rotation[:, order]
        residuals = images @ rotation[:, :rank] - (basis @ rotation[:, :rank]) * values[:rank]
        goal = (tol * values[:rank].abs()).clamp(min=rounding * float(values[0].abs()))
        done = torch.linalg.vector_norm(residuals, dim=0) <= goal
        found = max(found, int(done.sum()))
        if basis.shape[1] >= rank and bool(done.all()):
            return values[:rank].to(like.dtype), (basis @ rotation[:, :rank]).to(like.dtype)
        if basis.shape[1] + 1 > dimension:
            restarts += 1
            if restarts > maxiter:
                raise ConvergenceError(
                    f"only {found} of {rank} eigenvalues were found: raise max_iter or krylov_dimension, or lower tol "
                    "or rank"
                )
            kept = min(dimension - 1, rank + (dimension - rank) // 3)
            basis, images = with_columns(0, basis @ rotation[:, :kept], images @ rotation[:, :kept])
        # The directions in which the vectors are not yet eigenvectors; at random where there are none left.
        new = residuals[:, ~done]
        if basis.shape[1] < rank:
            new = torch.cat([new, random(width)], 1)
        new = new[:, : min(width, dimension - basis.shape[1])]
        new = new / torch.linalg.vector_norm(new, dim=0).clamp(min=torch.finfo(torch.float64).tiny)
        for _ in range(2):  # orthogonal to the basis, twice: once leaves rounding errors
            new = _basis(new - basis @ (basis.T @ new))
        if new.shape[1] == 0:
            new = random(1)
            for _ in range(2):
                new = new - basis @ (basis.T @ new)
                new = new / new.norm()
        basis, images = with_columns(basis.shape[1], new, multiply(new))


def _lanczos_on_gpu(matmat: Matmat, size: int, like: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    try:
        import cupy  # noqa: PLC0415 - an extra
        import cupyx.scipy.sparse.linalg  # noqa: PLC0415
    except ImportError as error:
        raise ProblemError("eigen_computation_on_gpu=True needs CuPy: pip install 'outfluence[gpu]'") from error

    def matvec(vector: Any) -> Any:
        column = torch.utils.dlpack.from_dlpack(cupy.ascontiguousarray(vector.reshape(-1, 1))).to(like.dtype)
        return cupy.from_dlpack(matmat(column)[:, 0].double().contiguous())

    with cupy.cuda.Device(like.device.index or 0):
        operator = cupyx.scipy.sparse.linalg.LinearOperator((size, size), matvec=matvec, dtype=np.float64)
        start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        values, vectors = cupyx.scipy.sparse.linalg.eigsh(operator, v0=cupy.asarray(start.numpy()), **options)
        return torch.utils.dlpack.from_dlpack(values).to(like), torch.utils.dlpack.from_dlpack(
            cupy.ascontiguousarray(vectors)
        ).to(like)


def extreme_eigenvalues(matmat: Matmat, size: int, like: Tensor) -> tuple[float, float]:
    """The smallest and the largest eigenvalue, to a few percent of the largest; a diagnosis, in some dozen products."""
    steps = min(size, 40)
    vector = torch.randn(size, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    basis = [vector / vector.norm()]
    for _ in range(steps - 1):  # Rayleigh-Ritz in a Krylov space, orthogonalised twice
        image = matmat(basis[-1])
        known = torch.cat(basis, 1)
        for _ in range(2):
            image = image - known @ (known.T @ image)
        norm = image.norm()
        if norm <= torch.finfo(like.dtype).eps:
            break
        basis.append(image / norm)
    known = torch.cat(basis, 1)
    small = known.T @ matmat(known)
    values = torch.linalg.eigvalsh((small + small.T) / 2)
    return float(values[0]), float(values[-1])


def nystroem(matmat: Matmat, size: int, rank: int, *, like: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Eigenpairs of a randomised Nystroem approximation: ``(k,)`` and ``(P, k)``, k <= rank, the largest first.

    ``A S (S^T A S)^+ S^T A`` with S a random orthonormal basis of `rank` vectors, all in one product. Exact if the rank
    of A is no larger. (Frangella et al. 2023 for positive, Hataya & Yamada 2023 for any symmetric matrices.)

    Args:
        matmat: products with A.
        size: P.
        rank: columns of the sketch.
        like: gives type and device.
        seed: of the sketch, which is drawn on the CPU: all devices get the same.
    """
    gaussian = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sketch = torch.linalg.qr(gaussian)[0].to(like)
    image = matmat(sketch).double()
    core = sketch.double().T @ image
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    if float(values.abs().amax()) == 0:
        return like.new_zeros(1), sketch[:, :1]
    kept = values.abs() > 10 * rank * torch.finfo(like.dtype).eps * values.abs().amax()
    half = image @ (vectors[:, kept] / values[kept].abs().sqrt())  # A is about half diag(sign) half^T
    q, r = torch.linalg.qr(half)
    small = (r * values[kept].sign()) @ r.T
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    order = values.abs().argsort(descending=True, stable=True)
    return values[order].to(like), (q @ vectors[:, order]).to(like)
