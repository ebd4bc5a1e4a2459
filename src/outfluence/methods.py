"""The named influence models: what users type. Each builds its solver, and is an `InfluenceModel` otherwise."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outfluence.data import Tree
from outfluence.errors import ProblemError
from outfluence.influence import InfluenceModel, computed
from outfluence.modes import BlockMode, FisherMode, KernelMode, Projection, SecondOrderMode, WeightSharing
from outfluence.preconditioners import EkfacPreconditioner, Preconditioner
from outfluence.problem import Loss, Problem
from outfluence.solvers import Regularization
from outfluence.solvers.direct import DirectSolver
from outfluence.solvers.ensemble import EnsembleProblem, EnsembleSolver
from outfluence.solvers.harmonic import HarmonicSolver
from outfluence.solvers.identity import IdentitySolver
from outfluence.solvers.iterative import CgSolver, LissaSolver
from outfluence.solvers.kronecker import KroneckerInverse, KroneckerSolver
from outfluence.solvers.lowrank import ArnoldiSolver, NystroemSolver
from outfluence.solvers.projected import ProjectedSolver

Blocks = Mapping[str, Iterable[str]]


@final
class DirectInfluence(InfluenceModel):
    """The exact inverse of a dense matrix: for models of up to some ten thousand parameters per block.

    Args:
        model: the trained model.
        loss: see `Problem`.
        regularization: lambda >= 0, one for all blocks or one for each; None: 0.
        block_structure: blocks of parameters between which curvature is ignored.
        second_order_mode: which matrix; see `SecondOrderMode`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        solver = DirectSolver(regularization, SecondOrderMode(second_order_mode))
        super().__init__(Problem(model, loss, block_structure), solver)


@final
class CgInfluence(InfluenceModel):
    """The exact inverse, applied by conjugate gradient: no matrix is built; each product is a pass over the data.

    All test samples share the passes. The matrix plus lambda should be positive definite: with the Hessian of a network
    that takes a regularization, the Gauss-Newton matrix is so for convex losses. Fitting reads the data for the
    preconditioner only; the data is read again whenever factors are computed. Literature: Hestenes & Stiefel 1952;
    Martens 2010; Ji & Li 2017.

    Args:
        model: the trained model.
        loss: see `Problem`.
        regularization: lambda >= 0, one for all blocks or one for each; None: 0.
        rtol: a right-hand side is done when its residual is below ``max(rtol |g|, atol)``.
        atol: see ``rtol``. Gradients smaller than this have factors of zero; with 0 only ``rtol`` counts.
        maxiter: most products; None: 10 P, at most 1,000.
        progress: show a bar over products.
        precompute_grad: keep what does not change between products in memory, for all of the data: faster by the
            forward and the first backward pass, but its memory grows with the data.
        preconditioner: `JacobiPreconditioner`, `NystroemPreconditioner` or `EkfacPreconditioner`.
        solve_simultaneously: block conjugate gradient: fewer products, for more arithmetic between them.
        warn_on_max_iteration: warn, with the residual, if the tolerance was not reached.
        block_structure: blocks of parameters between which curvature is ignored.
        second_order_mode: which matrix; see `SecondOrderMode`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        rtol: float = 1e-4,
        atol: float = 1e-6,
        maxiter: int | None = None,
        progress: bool = False,
        precompute_grad: bool = False,
        preconditioner: Preconditioner | None = None,
        solve_simultaneously: bool = False,
        warn_on_max_iteration: bool = True,
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        solver = CgSolver(
            regularization,
            SecondOrderMode(second_order_mode),
            rtol,
            atol,
            maxiter,
            progress,
            precompute_grad,
            preconditioner,
            solve_simultaneously,
            warn_on_max_iteration,
        )
        super().__init__(Problem(model, loss, block_structure), solver)


@final
class LissaInfluence(InfluenceModel):
    """The exact inverse, applied by a stochastic recursion: a batch a step (LiSSA, Agarwal et al. 2017).

    ``x <- x + (b - (H_batch + lambda) x) / scale``, with reduced variance (Johnson & Zhang 2013): it converges to the
    solution, not to a noisy neighbourhood of it. Batches are those of the training DataLoader. Divergence is an
    error that names the scale that would have worked. The data is read again whenever factors are computed.

    Args:
        model: the trained model.
        loss: see `Problem`.
        regularization: lambda >= 0, one for all blocks or one for each; None: 0.
        maxiter: most steps.
        dampen: d; the matrix becomes ``H + lambda + scale d``, as in the implementation of Koh & Liang 2017.
        scale: what a step is divided by: at least the largest eigenvalue of the matrix (half of it just converges); the
            smaller, the faster.
        rtol: a right-hand side is done when its residual is below ``rtol |g|``.
        progress: show a bar over steps.
        warn_on_max_iteration: warn, with the residual, if the tolerance was not reached.
        block_structure: blocks of parameters between which curvature is ignored.
        second_order_mode: which matrix; see `SecondOrderMode`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        maxiter: int = 1000,
        dampen: float = 0.0,
        scale: float = 10.0,
        rtol: float = 1e-4,
        progress: bool = False,
        warn_on_max_iteration: bool = True,
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        solver = LissaSolver(
            regularization,
            SecondOrderMode(second_order_mode),
            maxiter,
            dampen,
            scale,
            rtol,
            progress,
            warn_on_max_iteration,
        )
        super().__init__(Problem(model, loss, block_structure), solver)


@final
class ArnoldiInfluence(InfluenceModel):
    """A low-rank inverse from the eigenvalues of largest magnitude (Schioppa et al. 2022).

    A sample is encoded to ``rank`` numbers per block; scores are products of these. What the eigenvectors do not span
    is dropped, or with ``use_woodbury`` treated as if the matrix were lambda there, which takes the gradient besides.
    With as high a rank as there are parameters both are exact.

    Args:
        model: the trained model.
        loss: see `Problem`.
        regularization: lambda >= 0, one for all blocks or one for each; None: 0.
        rank: eigenpairs per block.
        krylov_dimension: vectors that the iteration keeps; None: ``4 rank``, at least 20. If the block has no more
            parameters its matrix is built instead.
        tol: residual of the eigenvectors, relative to the eigenvalue; down to rounding errors of the model's type.
        max_iter: most restarts; None: 10 P.
        eigen_computation_on_gpu: iterate on the GPU, with CuPy; the model must be there.
        block_structure: blocks of parameters between which curvature is ignored.
        second_order_mode: which matrix; see `SecondOrderMode`.
        use_woodbury: see above; takes a regularization > 0.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        rank: int = 10,
        krylov_dimension: int | None = None,
        tol: float = 1e-6,
        max_iter: int | None = None,
        eigen_computation_on_gpu: bool = False,
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
        use_woodbury: bool = False,
    ) -> None:
        solver = ArnoldiSolver(
            regularization,
            SecondOrderMode(second_order_mode),
            rank,
            krylov_dimension,
            tol,
            max_iter,
            eigen_computation_on_gpu,
            use_woodbury,
        )
        super().__init__(Problem(model, loss, block_structure), solver)


@final
class NystroemSketchInfluence(InfluenceModel):
    """A low-rank approximation plus lambda, inverted exactly; the approximation takes one pass (Hataya & Yamada 2023).

    Exact if the matrix has no higher rank. A sample is encoded to ``rank`` numbers per block and its gradient.

    Args:
        model: the trained model.
        loss: see `Problem`.
        regularization: lambda > 0, one for all blocks or one for each.
        rank: columns of the random sketch, per block.
        block_structure: blocks of parameters between which curvature is ignored.
        second_order_mode: which matrix; see `SecondOrderMode`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: float | Mapping[str, float],
        rank: int,
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        solver = NystroemSolver(regularization, rank, SecondOrderMode(second_order_mode))
        super().__init__(Problem(model, loss, block_structure), solver)


@final
class EkfacCgInfluence(InfluenceModel):
    """The exact inverse of the Gauss-Newton matrix, by block conjugate gradient with EK-FAC as preconditioner.

    Of all methods here the one that predicts retraining best. For many test samples at once it takes few passes over
    the data: the first search directions are their EK-FAC factors, and each sample uses those of all. `CgInfluence`
    with an `EkfacPreconditioner` is the same with more to choose. EK-FAC helps most for few test samples and rough
    tolerances; for hundreds at once, or a tight tolerance, ``CgInfluence(solve_simultaneously=True)`` without it may
    need fewer products. `ProjectedInfluence` with the exact kernel comes near for less.

    Args:
        model: the trained model.
        loss: see `Problem`; of a known distribution (see `EkfacInfluence`).
        regularization: lambda > 0: the Gauss-Newton matrix of a network is singular.
        rtol: a test sample is done when its residual is below ``rtol |g|``. Scores are off by some tenth of that.
        maxiter: most products.
        progress: show a bar over products.
        seed: of the labels that EK-FAC draws.
        warn_on_max_iteration: warn, with the residual, if the tolerance was not reached.
        block_structure: blocks of parameters between which curvature is ignored.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization,
        rtol: float = 0.1,
        maxiter: int = 100,
        progress: bool = False,
        seed: int = 0,
        warn_on_max_iteration: bool = True,
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
    ) -> None:
        solver = CgSolver(
            regularization,
            SecondOrderMode.GAUSS_NEWTON,
            rtol,
            0.0,
            maxiter,
            progress,
            preconditioner=EkfacPreconditioner(EkfacInfluence(model, True, loss=loss, seed=seed)),
            solve_simultaneously=True,
            warn_on_max_iteration=warn_on_max_iteration,
        )
        super().__init__(Problem(model, loss, block_structure), solver)


@final
class InverseHarmonicMeanInfluence(InfluenceModel):
    """The mean of the inverses ``(g_i g_i^T + lambda)^-1`` of all training samples (DataInf: Kwon et al. 2024).

    Cheap: one pass over the data for all test samples of a chunk. For small lambda a good approximation only where
    gradients are alike. The data is read again whenever factors are computed.

    Args:
        model: the trained model.
        loss: see `Problem`.
        regularization: lambda > 0, one for all blocks or one for each.
        block_structure: blocks of parameters between which curvature is ignored.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: float | Mapping[str, float],
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
    ) -> None:
        super().__init__(Problem(model, loss, block_structure), HarmonicSolver(regularization))


@final
class EkfacInfluence(InfluenceModel):
    """Kronecker-factored inverse of the Fisher (K-FAC), with corrected eigenvalues if asked (EK-FAC).

    For linear layers, convolutions, embeddings, attention and normalisations; other trainable parameters are refused.
    Blocks are layers. Literature: Martens & Grosse 2015; George et al. 2018; Grosse et al. 2023; Eschenhagen et al.
    2023.

    Args:
        model: the trained model.
        update_diagonal: correct the eigenvalues (EK-FAC), at the cost of a second pass over the data.
        hessian_regularization: lambda >= 0, one for all layers or one for each; None: 0.3 of the mean eigenvalue of all
            layers, which `regularization` then tells. The Fisher alone is usually singular; from 0.1 to 1 of the mean
            predicts retraining best (docs/fidelity.md).
        progress: show a bar over the data in `fit`.
        loss: one that a distribution of labels belongs to: cross entropy (classes; also one label for each of many
            positions, some of which may be ignored or masked), squared error (Gaussian) or binary cross entropy with
            logits (Bernoulli), with any reduction or factor; any loss with ``fisher="empirical"``.
        fisher: labels drawn from the model ("sampled"), their expectation ("exact": as many backward passes as
            the model has outputs a sample), or those of the data ("empirical").
        seed: of the sampled labels.
        tolerance: error of scores that is aimed at, relative to their root mean square. A sample is then encoded to the
            entries of the largest eigenvalues: in the eigenbasis the inverse is nearly constant at all others. How many
            that takes follows from the eigenvalues, and is tried on scores of training samples on each other; of
            others it may be a little more. With another regularization it is not tried again. 0: exact.
        rank: instead of a tolerance, how many of these entries there are at most, over all layers: the largest are
            kept, wherever they are. `lost_share` tells what that is expected to lose. A sample is then encoded to so
            many numbers, and to its inputs and output gradients at layers with one position or few.
        weight_sharing: what the covariances take of layers that are applied to several positions.
    """

    def __init__(
        self,
        model: nn.Module,
        update_diagonal: bool = False,
        hessian_regularization: Regularization = 0.0,
        progress: bool = False,
        *,
        loss: Loss = F.cross_entropy,
        fisher: FisherMode | str = FisherMode.SAMPLED,
        seed: int = 0,
        tolerance: float = 0.0,
        rank: int | None = None,
        weight_sharing: WeightSharing | str = WeightSharing.EXPAND,
    ) -> None:
        sharing = WeightSharing(weight_sharing)
        solver = KroneckerSolver(
            hessian_regularization, update_diagonal, FisherMode(fisher), seed, progress, tolerance, sharing, rank
        )
        super().__init__(Problem(model, loss, BlockMode.LAYER_WISE), solver)

    influence_factors_by_layer = InfluenceModel.influence_factors_by_block
    influences_by_layer = InfluenceModel.influences_by_block
    influences_from_factors_by_layer = InfluenceModel.influences_from_factors_by_block

    @property
    def lost_share(self) -> float:
        """What a tolerance or a rank is expected to lose of the scores' mean square; 0: nothing."""
        assert isinstance(self.inverse, KroneckerInverse)
        return self.inverse.lost_share

    @computed
    def explore_hessian_regularization(
        self, x: Tree, y: Tree, values: Iterable[float]
    ) -> dict[float, dict[str, Tensor]]:
        """Influences of samples on each other, by layer, for several regularizations; gradients are computed once.

        Args:
            x: inputs.
            y: labels.
            values: the regularizations to try.

        Returns:
            For each value and layer ``(n, n)``.
        """
        gradients = self.gradient_rows(x, y)
        models = {value: self.with_regularization(value) for value in values}
        return {
            value: model.encode(gradients).dot_by_block(model.right_rows(gradients)) for value, model in models.items()
        }


@final
class ProjectedInfluence(InfluenceModel):
    """Gradients projected to a few numbers, and the inverse of their kernel there.

    TRAK (Park et al. 2023) and LoGra (Choe et al. 2024) are of this kind. A sample is encoded to ``rank`` numbers per
    block at most: the smallest rows to keep (``keep_gradients``) and to score again. With the kernel of the exact
    Fisher, which is the Gauss-Newton matrix, scores come near to the exact ones. With ``kernel="margin"`` they are
    those of TRAK for one model, times ``1 - p`` of the test sample and the number of training samples. (Of several
    models TRAK averages ``1 - p`` of the training samples and the rest each for itself; `EnsembleInfluence` averages
    scores.)

    Args:
        model: the trained model.
        loss: see `Problem`.
        regularization: lambda >= 0, one for all blocks or one for each. If the rank is above the number of training
            samples the kernel is singular without.
        rank: numbers per block, at most.
        projection: how; see `Projection`. "pca" takes a pass over the data more.
        kernel: of which gradients; see `KernelMode`. Labels are drawn ("sampled"), or expected ("exact"), for the
            losses that `EkfacInfluence` takes.
        seed: of the projection, and of the labels that are drawn.
        block_structure: blocks of parameters between which curvature is ignored.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        rank: int = 2048,
        projection: Projection | str = Projection.PCA,
        kernel: KernelMode | str = KernelMode.SAMPLED,
        seed: int = 0,
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
    ) -> None:
        solver = ProjectedSolver(regularization, rank, Projection(projection), KernelMode(kernel), seed)
        super().__init__(Problem(model, loss, block_structure), solver)


@final
class EnsembleInfluence(InfluenceModel):
    """The mean of the scores of several influence models: of the same network trained from different seeds, say.

    It predicts retraining better, as what depends on the seed averages out (docs/fidelity.md). `fit` fits all of them;
    training data is read once for the scores of all, and rows are those of all side by side. Blocks of model i are
    called ``i.BLOCK``; influence factors are those of all, one behind the other, over their number.

    Args:
        models: fitted or not; they stay as they are. They may differ in everything but their floating type and device.

    Raises:
        ProblemError: if there is none, they share trainable parameters, or differ in floating type or device.
    """

    def __init__(self, models: Sequence[InfluenceModel]) -> None:
        models = list(models)
        if not models:
            raise ProblemError("an ensemble needs influence models, there are none")
        for model in models:
            if not isinstance(model, InfluenceModel):
                raise ProblemError(
                    f"an ensemble is of influence models (EkfacInfluence, say), not of {type(model).__name__}"
                )
        problems = [model.problem for model in models]
        weights = [1 / len(models)] * len(models)
        super().__init__(
            EnsembleProblem(problems), EnsembleSolver(tuple(model.solver for model in models), tuple(weights))
        )


@final
class TracInInfluence(InfluenceModel):
    """Products of gradients at checkpoints of one training run, times the learning rates there (Pruthi et al. 2020).

    ``sum_t eta_t g_t(test) . g_t(train)``: how much the steps on a training sample have lowered the loss of a test
    sample. Nothing is inverted, and `fit` only looks at the data. With one checkpoint and a learning rate of one it is
    the plain product of gradients.

    Args:
        model: of the checkpoints; its own weights do not matter.
        loss: see `Problem`.
        checkpoints: state dicts, or files of such (loaded with ``weights_only``).
        learning_rates: of each checkpoint, or of all.
        block_structure: see `Problem`; for scores by block.

    Raises:
        ProblemError: if there is no checkpoint, there are not as many learning rates, or a checkpoint is none of the
            model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        checkpoints: Sequence[Mapping[str, Tensor] | str | os.PathLike[str]],
        learning_rates: float | Sequence[float] = 1.0,
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
    ) -> None:
        if isinstance(checkpoints, (str, os.PathLike, Mapping)):
            raise ProblemError("checkpoints must be several state dicts or paths: put a single one into a list")
        checkpoints, rates = list(checkpoints), torch.as_tensor(learning_rates, dtype=torch.float64)
        rates = rates.expand(len(checkpoints)) if rates.ndim == 0 else rates
        if not checkpoints or rates.shape != (len(checkpoints),) or not rates.isfinite().all():
            raise ProblemError(
                f"there are {len(checkpoints)} checkpoints and {rates.numel()} learning rates: give one or more, and a "
                "finite learning rate for each"
            )
        problems = [
            Problem(_at_checkpoint(model, checkpoint, f"checkpoint {i}"), loss, block_structure)
            for i, checkpoint in enumerate(checkpoints)
        ]
        solvers = (IdentitySolver(),) * len(problems)
        super().__init__(EnsembleProblem(problems), EnsembleSolver(solvers, tuple(rates.tolist())))


def _at_checkpoint(
    model: nn.Module, checkpoint: Mapping[str, Tensor] | str | os.PathLike[str], which: str
) -> nn.Module:
    """A copy of the model with the weights of a checkpoint."""
    if not isinstance(checkpoint, Mapping):
        which += f" ({os.fspath(checkpoint)})"
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ProblemError(f"{which} cannot be read: {type(error).__name__}: {error}") from error
    else:
        state = checkpoint
    there = copy.deepcopy(model)
    try:
        there.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ProblemError(f"{which} is no state dict of this {type(model).__name__}: {error}") from error
    return there
