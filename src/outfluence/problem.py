"""`Problem`: a model, its loss, and its trainable parameters in blocks.

Everything is a pure function of the parameters (`torch.func`), so that nothing of the user's is changed: no ``.grad``,
no train/eval switch, no device. Vectors over the parameters are laid out block after block, in the order of `names`.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree

from outfluence.data import Batch, Tree, describe, tree_leaves, tree_map
from outfluence.errors import OutfluenceError, ProblemError
from outfluence.factors import Factor, Matrix
from outfluence.fingerprint import fingerprint
from outfluence.layers import Layout, Recording, Structure, layout, look, record
from outfluence.machine import KEPT_BYTES, batched_products, new_memory
from outfluence.modes import BlockMode
from outfluence.rows import DenseRows, FactoredRows, GradientRows, check_finite, joined

#: Maps the model's output and the labels, both with one sample (first axis 1), to a scalar.
Loss = Callable[[Any, Any], Tensor]

#: The block of parameters held by the model itself rather than by one of its layers.
ROOT = "(root)"

#: Bytes of the largest model that is copied to float64 to compare gradients there.
_LARGEST_COPY = 64 << 20
#: Most samples, and most directions, that are computed at once; more are taken in turns. Of samples so few that what
#: is kept of them (inputs and outputs of the layers, dense gradients) is about so many numbers: more would not stay
#: near the processor, and take new memory each time.
SAMPLES, _NUMBERS, _FEWEST = 256, 1 << 23, 8
DIRECTIONS = 16


@dataclass(frozen=True, eq=False)
class Problem:
    """A model and a loss, and which parameters count.

    Trainable parameters (``requires_grad``) take part; frozen ones are constants. A weight shared by several layers
    is one parameter.

    Args:
        model: called as ``model(x)``, ``model(*x)`` for a tuple and ``model(**x)`` for a dict. Of a model or layers
            that are compiled (`torch.compile`) the originals are run: compiled code cannot be looked into.
        loss: called as ``loss(output, y)`` with a batch of one sample; gives a scalar. A mean
            and a sum over samples are the same, as there is one.
        block_structure: a `BlockMode`, or an ordered mapping of block names to parameter names.

    Raises:
        ProblemError: if there is no trainable parameter, or a parameter is in two blocks or in none.
    """

    model: nn.Module
    loss: Loss
    block_structure: BlockMode | str | Mapping[str, Iterable[str]] = BlockMode.FULL
    blocks: dict[str, tuple[str, ...]] = field(init=False, repr=False)
    structure: Structure = field(init=False, repr=False, default=Structure())

    def __post_init__(self) -> None:
        original = self.model._modules.get("_orig_mod")  # of torch.compile
        if original is not None:
            object.__setattr__(self, "model", original)
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        if not names:
            raise ProblemError(
                f"{type(self.model).__name__} has no trainable parameters: influence is a matter of gradients. "
                "Call requires_grad_(True) on those that should count."
            )
        object.__setattr__(self, "blocks", _blocks(self.block_structure, names))

    @property
    def names(self) -> list[str]:
        """Names of the trainable parameters, in the order of the columns of a row."""
        return [name for block in self.blocks.values() for name in block]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trainable parameters, detached, in the order of `names`."""
        current = dict(self.model.named_parameters())
        return {name: current[name].detach() for name in self.names}

    @property
    def n_parameters(self) -> int:
        """P, the number of trainable parameters."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def sections(self) -> dict[str, slice]:
        """For each block, in order, its columns in a row."""
        return dict(self._layout.sections)

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the parameters, and so of gradients and scores."""
        dtypes = {p.dtype for p in self.parameters.values()}
        return max(dtypes, key=lambda d: torch.finfo(d).bits)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    def to(self, device: torch.device | str) -> Problem:
        """This problem on a device; the user's model stays where it is."""
        if self.device == torch.device(device):
            return self
        moved = replace(self, model=copy.deepcopy(self.model).to(device), block_structure=self.blocks)
        return moved._with(self.structure)

    def flatten(self, tensors: Mapping[str, Tensor], names: Iterable[str] | None = None) -> Tensor:
        """Tensors by parameter, with equal leading axes ``(n,)``, as rows ``(n, sum of sizes)``."""
        parts = [tensors[name] for name in (self.names if names is None else names)]
        return torch.cat([part.reshape(part.shape[0], math.prod(part.shape[1:])) for part in parts], dim=1)

    def unflatten(self, rows: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Rows ``(n, sum of sizes)`` as tensors ``(n, *shape)`` by parameter: the inverse of `flatten`."""
        parameters = self.parameters
        chosen = list(parameters if names is None else names)
        parts = torch.split(rows, [parameters[name].numel() for name in chosen], dim=1)
        n = rows.shape[0]
        return {name: part.reshape(n, *parameters[name].shape) for name, part in zip(chosen, parts, strict=True)}

    def output(self, parameters: Mapping[str, Tensor], x: Tree) -> Any:
        """The model's output for a batch, as a function of (some of) its parameters, which can be differentiated twice.

        So attention is computed as matrix products: its kernels have one derivative only, and of one sample at a time.
        """
        with sdpa_kernel(SDPBackend.MATH):
            return self._run(parameters, x)

    def _run(self, parameters: Mapping[str, Tensor], x: Tree) -> Any:
        args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else (x if isinstance(x, tuple) else (x,), {})
        with _uncompiled():
            return functional_call(self.model, dict(parameters), args, kwargs)

    def sample_loss(self, parameters: Mapping[str, Tensor], x: Tree, y: Tree) -> Tensor:
        """The loss of one sample (no batch axis), as a function of the parameters: a scalar."""
        one = partial(tree_map, lambda t: t.unsqueeze(0))
        return self.output_loss(self.output(parameters, one(x)), one(y))

    def output_loss(self, output: Any, y: Tree) -> Tensor:
        """The loss of one sample (batch axis of one) from the model's output: a scalar.

        Raises:
            ProblemError: if the loss gives anything else.
        """
        value = self.loss(output, y)
        if not isinstance(value, Tensor) or value.ndim != 0:
            raise ProblemError(
                f"the loss of one sample must be a scalar tensor, but {_name_of(self.loss)} gives "
                f"{describe(value)}; use reduction='mean' or 'sum'"
            )
        return value

    def sum_loss(self, parameters: Mapping[str, Tensor], x: Tree, y: Tree) -> Tensor:
        """The sum of the losses of a batch's samples: a scalar."""
        losses: Tensor = self._per_sample(self.sample_loss, x, y)(dict(parameters), x, y)
        return losses.sum()

    def losses(self, x: Tree, y: Tree) -> Tensor:
        """The loss of each sample: ``(n,)``."""
        x, y = self.on_device(x), self.on_device(y)
        losses: Tensor = self._per_sample(self.sample_loss, x, y)(self.parameters, x, y)
        return losses

    def sum_of_losses(self, output: Any, y: Tree) -> Tensor:
        """The sum over samples of the loss, from the model's output for a batch: a scalar."""

        def one(tree: Any) -> Any:  # torch's own trees: a model's output may be a class registered there
            return _pytree.tree_map(lambda t: t.unsqueeze(0), tree)

        def loss(z: Any, label: Tree) -> Tensor:
            return self.output_loss(one(z), None if label is None else one(label))

        with torch.enable_grad():
            losses: Tensor = vmap(loss, in_dims=(0, None if y is None else 0))(output, y)
            return losses.sum()

    def gradients(self, x: Tree, y: Tree, compact: bool = True, into: Tensor | None = None) -> GradientRows:
        """Gradients of each sample's loss, factored as far as is known how (`structured`).

        Args:
            x: inputs.
            y: labels.
            compact: form those that take fewer numbers when they are formed.
            into: where they are written if none is factored, ``(n, P)``; None: new memory.
        """
        if not self.structure.units:
            with batched_products():  # as which functions that are not known to be layers are mapped over samples
                return DenseRows(self.block_gradients(x, y, self.names, into), self.sections)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self.gradients(_plain(x), _plain(y), compact)
        if tree_leaves(x)[0].shape[0] > self.batch_size:
            return joined([self.gradients(*part, compact) for part in self.in_batches(Batch(x, y))])
        recording = self.record(x)
        factors = recording.factors(self.sum_of_losses(recording.output, self.on_device(y)))
        parts, matrices, columns = dict[str, Factor | Tensor](factors), self.structure.matrices, self.columns
        if self.structure.dense:
            dense = self.unflatten(self.block_gradients(x, y, self.structure.dense), self.structure.dense)
            for name, values in dense.items():
                block, where = columns[name]
                matrices[name] = Matrix(block, 1, math.prod(values.shape[1:]), 1, where)
                parts[name] = values.flatten(1)[:, None, :, None] if values.ndim > 1 else values[:, None, None, None]
        rows = FactoredRows.of(parts, matrices, self.sections, form=False)
        return rows.compact() if compact else rows

    @property
    def batch_size(self) -> int:
        """How many samples go through the model at once."""
        parameters = self.parameters
        return _at_once([parameters[name] for name in self.structure.dense], self.structure.numbers)

    def in_batches(self, batch: Batch) -> list[Batch]:
        """Samples in batches of that size."""
        n, size = tree_leaves(batch.x)[0].shape[0], self.batch_size
        parts = [partial(_at, slice(start, start + size)) for start in range(0, n, size)]
        return [Batch(tree_map(part, batch.x), tree_map(part, batch.y)) for part in parts]

    def record(self, x: Tree) -> Recording:
        """Run a batch through the model, and keep what gradients are made of; see `layers`.

        Raises:
            UnsupportedLayerError: if the model does something else than when it was looked at by `structured`.
        """
        x = self.on_device(x)
        return record(partial(self._run, x=x), self.parameters, self.structure, tree_leaves(x)[0].shape[0])

    def structured(self, batch: Batch) -> Problem:
        """This problem, knowing which of its gradients are sums of outer products; see `layers`.

        What the model does with its parameters is looked at on a few samples, and the gradients found in this way are
        compared with those of automatic differentiation: parameters for which they differ stay dense.

        Args:
            batch: one to three samples.
        """
        n = tree_leaves(batch.x)[0].shape[0]
        three = Batch(*(tree_map(lambda t: t[[i % n for i in range(3)]], part) for part in batch))
        x, parameters = self.on_device(three.x), self.parameters

        def call(given: Mapping[str, Tensor], n: int) -> Any:
            return self.output(given, tree_map(lambda t: t[:n], x))

        without: dict[str, str] = {}
        while True:
            problem = self._with(look(call, parameters, self.blocks, without))
            wrong = problem.differing(three)
            if not wrong:
                return problem
            without |= wrong

    def differing(self, batch: Batch) -> dict[str, str]:
        """The parameters whose recorded gradients are not those of automatic differentiation, and what to say of them.

        Args:
            batch: a few samples.
        """
        if not self.structure.units:
            return {}
        try:
            differences, tolerance = self._differences(batch)
        except OutfluenceError:
            raise
        except Exception as error:
            why = f"gradients of a batch fail: {type(error).__name__}: {error}"
            return dict.fromkeys(self.structure.expanded or self.names, why)
        largest = max(scale for _, scale in differences.values())
        wrong: dict[str, str] = {}
        for name, (difference, scale) in differences.items():
            if not difference <= tolerance[0] * scale + tolerance[1] * largest + 1e-30:
                bias = self.structure.units[name].bias
                wrong |= dict.fromkeys((name,) if bias is None else (name, bias), "used in a way that no layer shows")
        # An axis of samples where the model does not expect one makes the gradients of other parameters wrong, too.
        first = self.structure.expanded
        return {name: why for name, why in wrong.items() if name in first} or wrong

    def _differences(self, batch: Batch) -> tuple[dict[str, tuple[float, float]], tuple[float, float]]:
        """See the function of that name; and how much of each entry, and of the largest of all, is rounding.

        In float64, where a difference is a difference, if the model is not large, and works in that type.
        """
        if sum(p.nbytes for p in self.model.parameters()) <= _LARGEST_COPY:
            with suppress(Exception):
                exact = replace(self, model=copy.deepcopy(self.model).double(), block_structure=self.blocks)
                x, y = (tree_map(lambda t: t.double() if t.is_floating_point() else t, part) for part in batch)
                return _differences(exact._with(self.structure), Batch(x, y)), (1e-9, 1e-13)
        return _differences(self, batch), (1e-3, 1e-6)

    def factor_bytes(self, sample: Batch) -> int:
        """Bytes of the inputs and output gradients of one sample's layers, before any are multiplied."""
        if not self.structure.units:
            return 0
        recording = self.record(sample.x)
        loss = self.sum_of_losses(recording.output, self.on_device(sample.y))
        return sum(f.inputs.nbytes + f.gradients.nbytes for f in recording.factors(loss).values())

    def describe(self, batch: Batch) -> str:
        """Which parameters' gradients are factored, and what they cost.

        Args:
            batch: one to three samples.
        """
        problem = self.structured(batch)
        parts = problem.record(batch.x)
        factors = parts.factors(problem.sum_of_losses(parts.output, problem.on_device(batch.y)))
        sizes, lines = {name: p.numel() for name, p in self.parameters.items()}, []
        for name, unit in problem.structure.units.items():
            factor, matrix = factors[name], unit.matrix
            both = name if unit.bias is None else f"{name} and bias"
            if unit.is_vector:
                lines.append(f"{both}: {matrix.size:,} numbers")
                continue
            taken = factor.gradients[0].numel() + factor.inputs[0].numel()
            shape = f"{matrix.groups} x " * (matrix.groups > 1) + f"{matrix.d_out:,} x {matrix.d_in:,}"
            how, taken = ("factored", taken) if factor.is_smaller(matrix) else ("multiplied", matrix.size)
            lines.append(f"{both}: {shape}, {factor.positions:,} position(s): {how}, {taken:,} numbers")
        lines += [f"{name}: {sizes[name]:,} numbers, dense ({why})" for name, why in problem.structure.dense.items()]
        rows = problem.gradients(*batch)
        total = sum(array.shape[1] for array in rows.arrays.values())
        return "\n".join([*lines, f"a gradient: {total:,} numbers instead of {self.n_parameters:,}"])

    def block_gradients(self, x: Tree, y: Tree, names: Iterable[str], into: Tensor | None = None) -> Tensor:
        """Gradients of each sample's loss with respect to some of the parameters, ``(n, sum of their sizes)``.

        Args:
            x: inputs.
            y: labels.
            names: of the parameters.
            into: where they are written; None: new memory.
        """
        x, y = self.on_device(x), self.on_device(y)
        parameters = self.parameters
        chosen = {name: parameters[name] for name in names}

        def loss(block: Mapping[str, Tensor], one_x: Tree, one_y: Tree) -> Tensor:
            return self.sample_loss(parameters | dict(block), one_x, one_y)

        of_batch = self._per_sample(grad(loss), x, y, at_once=None)
        n, size = len(tree_leaves((x, y))[0]), sum(p.numel() for p in chosen.values())
        rows = new_memory(next(iter(chosen.values())), n, size) if into is None else into
        step = _at_once(chosen.values())
        for start in range(0, n, step):
            part = partial(_at, slice(start, start + step))
            gradients = of_batch(chosen, tree_map(part, x), tree_map(part, y))
            parts = [gradients[name].detach().reshape(-1, p.numel()) for name, p in chosen.items()]
            torch.cat(parts, dim=1, out=rows[start : start + step])
        return rows

    def mixed_derivatives(self, directions: Tensor, x: Tree, y: Tree) -> Tensor:
        """Derivatives with respect to the features of directional derivatives with respect to the parameters.

        For a direction s and a sample j: ``d/dx (s . grad loss(x_j, y_j))``, by one reverse-over-reverse product per
        direction and batch; the mixed second derivative itself, (features, P), never exists.

        Args:
            directions: ``(m, P)``.
            x: inputs, with exactly one floating-point array.
            y: labels.

        Returns:
            ``(m, n, *features)``.

        Raises:
            ProblemError: if x has no, or more than one, floating-point array.
        """
        x, y = self.on_device(x), self.on_device(y)
        n_float = sum(leaf.is_floating_point() for leaf in tree_leaves(x))
        if n_float != 1:
            raise ProblemError(
                f"perturbation mode differentiates by the features, so x must hold exactly one floating-point array; "
                f"it holds {n_float} ({describe(x, batched=True)})"
            )
        (features,) = (leaf for leaf in tree_leaves(x) if leaf.is_floating_point())

        parameters = self.parameters

        def summed_gradient(values: Tensor) -> dict[str, Tensor]:
            inputs = tree_map(lambda leaf: values if leaf.is_floating_point() else leaf, x)
            gradient: dict[str, Tensor] = grad(self.sum_loss)(parameters, inputs, y)
            return gradient

        # The derivative of s . (sum of gradients) by the features of sample j is that of its own gradient. The graph of
        # the gradient is built once; a direction costs one pass backward through it.
        pull = vjp(summed_gradient, features)[1]
        derivatives: Tensor = vmap(lambda s: pull(s)[0], chunk_size=DIRECTIONS)(self.unflatten(directions))
        return derivatives

    def on_device(self, tree: Tree) -> Tree:
        """A tree of tensors where the parameters are."""
        device = self.device
        return tree_map(lambda t: t.to(device), tree)

    def check(self, batch: Batch, whose: str) -> Problem:
        """Try a few samples before any work.

        Args:
            batch: one or a few samples, the first of the data.
            whose: which data they come from, for messages: "training", "test".

        Returns:
            This problem, with its structure; see `structured`.

        Raises:
            ProblemError: if the model's output for a sample depends on the other samples, on those before, or on
                chance; or if it cannot be run.
            NonFiniteError: if a gradient is not finite.
        """
        check_deterministic(self.model)
        dtypes = {p.dtype for p in self.parameters.values()}
        if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
            raise ProblemError(
                f"the trainable parameters are {', '.join(sorted(map(str, dtypes)))}: factors and scores need all of "
                "them in float32, or all in float64. Convert with model.float()."
            )
        try:
            self._check_samples_apart(batch)  # first: it works on copies of the buffers
            problem = self if self.structure.axes else self.structured(batch)
            gradients = problem.gradients(*batch)
        except OutfluenceError:
            raise
        except Exception as error:
            raise ProblemError(
                f"the model or the loss fails on {whose} sample 0 ({describe(batch, batched=True)}): "
                f"{type(error).__name__}: {error}"
            ) from error
        for array in gradients.arrays.values():
            check_finite(array, "gradients", whose)
        return problem

    def _check_samples_apart(self, batch: Batch) -> None:
        """Run samples together and alone, on copies of the buffers: outputs and buffers must not change."""
        x = self.on_device(batch.x)
        before = dict(self.model.named_buffers())

        def run(inputs: Tree) -> list[Tensor]:
            after = {name: buffer.clone() for name, buffer in before.items()}
            output = self.output(self.parameters | after, inputs)
            moved = [name for name, buffer in after.items() if not torch.equal(buffer, before[name])]
            if moved:
                raise ProblemError(f"a forward pass changes the buffer {moved[0]!r}: call model.eval() first")
            return [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.ndim]

        with torch.no_grad():
            together = run(x)
            n = tree_leaves(x)[0].shape[0]
            for i in range(n):
                alone = run(tree_map(partial(_at, slice(i, i + 1)), x))
                pairs = [(whole, part) for whole, part in zip(together, alone, strict=True) if len(part) == 1]
                # An output without an axis of samples says nothing here; methods that need the axis refuse it.
                if not all(_agree(whole[i], part[0]) for whole, part in pairs if len(whole) == n):
                    raise ProblemError(
                        f"the model gives another output for sample {i} alone than among others: it mixes the samples "
                        "of a batch. Influence is of single samples"
                    )

    def activation_bytes(self, sample: Batch, twice: bool = True) -> int:
        """Bytes that one sample keeps for its backward pass, measured on one forward pass.

        And what goes into and out of the largest frozen module, of which nothing is kept.

        Args:
            sample: one.
            twice: differentiated twice, or for dense gradients; else for factors, if all gradients are such.
        """
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.data_ptr()] = max(tensor.nbytes, kept.get(tensor.data_ptr(), 0))
            return tensor

        passing = [0]

        def pass_by(_module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [t for t in _pytree.tree_leaves((inputs, output)) if isinstance(t, Tensor)]
            if not any(t.requires_grad for t in tensors):
                passing.append(sum(t.nbytes for t in tensors))

        leaves = [module for module in self.model.modules() if next(module.children(), None) is None]
        with ExitStack() as stack:
            for module in leaves:
                stack.callback(module.register_forward_hook(pass_by).remove)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t))
            # Held until the count is done, so that no address is used twice.
            if twice or not self.structure.units or self.structure.dense:
                variables = {name: p.requires_grad_() for name, p in self.parameters.items()}
                output = self.output(variables, self.on_device(sample.x))
                loss = self.output_loss(output, self.on_device(sample.y))
            else:
                recording = self.record(sample.x)
                loss = self.sum_of_losses(recording.output, self.on_device(sample.y))
        del loss
        return sum(kept.values()) + max(passing) // 2  # there are fewer copies than of what is kept

    def fingerprint(self) -> dict[str, str]:
        """What identifies this problem in a store: the architecture and its code, the weights, the loss, the blocks."""
        parameters, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        structure = fingerprint(self.model, without=[*parameters.values(), *buffers.values()])
        return {
            "model": f"{type(self.model).__qualname__} {structure}",
            "weights": fingerprint((parameters, buffers)),
            "loss": f"{_name_of(self.loss)} {fingerprint(self.loss)}",
            "blocks": fingerprint(self.blocks),
        }

    @property
    def members(self) -> tuple[Problem, ...]:
        """The problems of single models that this one is made of: itself."""
        return (self,)

    def unstructured(self) -> Problem:
        """This problem before `structured`."""
        return self._with(Structure())

    def with_loss(self, loss: Loss) -> Problem:
        """This problem with another loss of the same outputs; what is known of the layers still holds."""
        return replace(self, loss=loss, block_structure=self.blocks)._with(self.structure)

    @property
    def columns(self) -> Mapping[str, tuple[str, slice]]:
        """For each parameter its block, and its columns among those of the block."""
        return self._layout.columns

    @property
    def _layout(self) -> Layout:
        return layout(self.blocks, {name: p.numel() for name, p in self.parameters.items()})

    def _with(self, structure: Structure) -> Problem:
        other = copy.copy(self)
        object.__setattr__(other, "structure", structure)
        return other

    def _per_sample(
        self, function: Callable[..., Any], x: Tree, y: Tree, at_once: int | None = SAMPLES
    ) -> Callable[..., Any]:
        # Mapped over the samples of x and y; a missing y stays None. Results of so many at once are joined: copied.
        dims = (None, None if x is None else 0, None if y is None else 0)
        mapped: Callable[..., Any] = vmap(function, in_dims=dims, chunk_size=at_once)
        return mapped


def _blocks(structure: BlockMode | str | Mapping[str, Iterable[str]], names: list[str]) -> dict[str, tuple[str, ...]]:
    if isinstance(structure, Mapping):
        return _own_blocks(structure, names)
    match BlockMode(structure):
        case BlockMode.FULL:
            return {"all": tuple(names)}
        case BlockMode.PARAMETER_WISE:
            return {name: (name,) for name in names}
        case BlockMode.LAYER_WISE:
            layers: dict[str, tuple[str, ...]] = {}
            for name in names:
                layer = name.rpartition(".")[0] or ROOT
                layers[layer] = (*layers.get(layer, ()), name)
            return layers


def _own_blocks(structure: Mapping[str, Iterable[str]], names: list[str]) -> dict[str, tuple[str, ...]]:
    blocks = {
        str(block): tuple(
            name.removeprefix("_orig_mod.") for name in ((members,) if isinstance(members, str) else members)
        )
        for block, members in structure.items()
    }
    listed = [name for members in blocks.values() for name in members]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    unknown = [name for name in listed if name not in names]
    missing = [name for name in names if name not in listed]
    empty = [block for block, members in blocks.items() if not members]
    for wrong, what in (
        (twice, "in more than one block"),
        (unknown, "no trainable parameter of the model (shared weights go by their first name)"),
        (missing, "in no block; freeze parameters that should not count with requires_grad_(False)"),
        (empty, "a block without parameters"),
    ):
        if wrong:
            raise ProblemError(f"block_structure: {', '.join(wrong)}: {what}")
    return blocks


def check_deterministic(model: nn.Module) -> None:
    """Refuse layers whose output depends on chance, or on the other samples of a batch.

    Raises:
        ProblemError: naming the layer.
    """
    for name, module in model.named_modules():
        where = f"layer {name!r} ({type(module).__name__})"
        of_batch = isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        if of_batch or (isinstance(module, _NormBase) and module.training and module.track_running_stats):
            raise ProblemError(
                f"{where} normalises over the batch or updates its statistics: a sample's gradient would depend on the "
                "samples before and beside it. Call model.eval() (and keep track_running_stats=True) first."
            )
        dropout = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0)
        if module.training and isinstance(dropout, (int, float)) and dropout > 0:
            raise ProblemError(f"{where} drops out at random: call model.eval() first, or set its rate to 0.")


def _differences(problem: Problem, batch: Batch) -> dict[str, tuple[float, float]]:
    """For each unit the largest difference of an entry, and the largest entry."""
    recording = problem.record(batch.x)
    factors = recording.factors(problem.sum_of_losses(recording.output, problem.on_device(batch.y)))
    units, found = problem.structure.units, dict.fromkeys(problem.structure.units, (0.0, 0.0))
    for i in range(recording.n):
        x, y = (problem.on_device(tree_map(lambda t: t[i], part)) for part in batch)  # noqa: B023 - used at once
        with torch.enable_grad():
            variables = {name: p.requires_grad_() for name, p in problem.parameters.items()}
            loss = problem.sample_loss(variables, x, y)
        expected = torch.autograd.grad(loss, [*variables.values()], allow_unused=True, materialize_grads=True)
        row = problem.flatten({name: g[None] for name, g in zip(variables, expected, strict=True)})
        for name, unit in units.items():
            whole = unit.matrix.take(row[:, problem.sections[unit.matrix.block]])
            got = factors[name][slice(i, i + 1)].formed(unit.matrix.d_in)
            difference, scale = float((got - whole).abs().amax()), float(whole.abs().amax())
            found[name] = max(found[name][0], difference), max(found[name][1], scale)
    return found


def _uncompiled() -> AbstractContextManager[Any]:
    """Run what is compiled as it was written; nothing is, unless the compiler has been imported."""
    is_there = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if is_there else nullcontext()


def _at_once(dense: Collection[Tensor], numbers: int = 0) -> int:
    """How many samples are computed at once.

    Args:
        dense: parameters whose gradients are computed as dense rows. Those of the largest of a batch, and what autodiff
            makes on the way, is to be memory that the process keeps: new memory costs more than the gradients.
        numbers: that are kept of one sample besides.
    """
    numbers += 2 * sum(p.numel() for p in dense)
    largest = max((p.nbytes for p in dense), default=1)
    return max(_FEWEST, min(SAMPLES, _NUMBERS // max(1, numbers), KEPT_BYTES // max(1, largest)))


def _plain(tree: Tree) -> Tree:
    """Tensors that may take part in a graph, also those made in inference mode."""
    return tree_map(lambda t: t.clone() if t.is_inference() else t, tree)


def _at(index: slice, leaf: Tensor) -> Tensor:
    return leaf[index]


def _agree(a: Tensor, b: Tensor) -> bool:
    # Loosely: a sum in another order is no mixing of samples.
    scale = float(a.abs().nan_to_num(posinf=0.0).amax()) if a.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


def _name_of(thing: Any) -> str:
    return str(getattr(thing, "__qualname__", type(thing).__qualname__))
