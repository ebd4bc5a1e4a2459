"""Per-sample gradients as sums of outer products, from one forward and one backward pass of a batch.

The gradient of the weight of a linear layer, a convolution or an embedding is, for one sample, the sum over positions
of the outer product of an output gradient and an input. A `Recorder` sees every function that a trainable parameter is
given to while the model runs, whatever module calls it and however often; of those it knows it keeps the inputs, and
gradients are taken with respect to their outputs only, never the parameters. A parameter that is given to any other
function has no such structure: its gradients are computed as dense rows.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from outfluence.errors import UnsupportedLayerError
from outfluence.factors import Factor, Matrix

#: Most pairs of positions of which attention is computed as matrix products.
_PAIRS = 128**2


@dataclass(frozen=True)
class Use:
    """A parameter given to a function.

    Attributes:
        parameter: its name.
        kind: "matrix" (multiplies the last axis of the inputs), "conv", "one_hot" (an embedding) or "vector"
            (multiplies or is added entry by entry).
        output: which of the recorded outputs.
        bias: name of the vector that the same function adds to the output, if it has an entry for each.
        transposed: whether the parameter is kept as ``(d_in, d_out)``.
        dims: of a vector, the axes of the output that it lies along.
        part: which of the outputs of the parameter these are; None: all.
        groups: of a convolution.
        padding: of an embedding, the place that gets no gradient.
        inputs: what the output gradient is multiplied with, of a convolution with or without a last column of ones;
            None: ones. It is asked for once, after the forward pass.
    """

    parameter: str
    kind: str
    output: int = -1
    bias: str | None = None
    transposed: bool = False
    dims: tuple[int, ...] = ()
    part: slice | None = None
    groups: int = 1
    padding: int | None = None
    inputs: Callable[..., Tensor] | None = field(default=None, compare=False)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be the same in every pass."""
        return (self.parameter, self.kind, self.output, self.bias, self.transposed, len(self.dims), self.groups)


@dataclass(frozen=True)
class Unit:
    """Parameters whose gradient is one `Matrix`: a weight and its bias, a weight, or a vector.

    Attributes:
        parameter: the weight, or the vector.
        bias: in the last column of the matrix; or None.
        matrix: where the entries are.
        kind: of the uses of the parameter; "mixed" where they differ (a weight shared by an embedding and a linear
            layer, or by ``x @ weight`` and ``x @ weight.T``).
    """

    parameter: str
    bias: str | None
    matrix: Matrix
    kind: str

    @property
    def is_vector(self) -> bool:
        """Whether the matrix has one column, and one position."""
        return self.kind == "vector"


@dataclass(frozen=True)
class Structure:
    """How the gradients of a model's parameters are computed.

    Attributes:
        axes: for each recorded output in order its axis of samples, None if it is the same for all samples, or
            "unused".
        signature: of the uses, in order.
        units: what is factored, by name of the parameter.
        dense: the other parameters, and why.
        numbers: of the inputs and outputs of all these functions for one sample, position by position.
    """

    axes: tuple[int | str | None, ...] = ()
    signature: tuple[Any, ...] = ()
    units: Mapping[str, Unit] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)
    numbers: int = 0

    @property
    def matrices(self) -> dict[str, Matrix]:
        """By name."""
        return {name: unit.matrix for name, unit in self.units.items()}

    @property
    def expanded(self) -> set[str]:
        """Parameters of functions whose output is the same for all samples, and is given an axis of samples."""
        uses = [use[:4] for use in self.signature]
        return {name for w, _, output, b in uses if self.axes[output] is None for name in (w, b) if name}


class Recorder(TorchFunctionMode):
    """Sees what parameters are given to, and keeps what per-sample gradients are made of.

    Args:
        parameters: by name; the very tensors that the model is called with.
        n: samples of the batch.
        axes: see `Structure`; None while nothing is known yet: outputs are looked at and left alone.
    """

    def __init__(self, parameters: Mapping[str, Tensor], n: int, axes: tuple[int | str | None, ...] | None) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in parameters.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in parameters.items()}
        self._shapes = {name: tensor.shape for name, tensor in parameters.items()}
        self._n, self._axes = n, axes
        self.uses: list[Use] = []
        self.outputs: list[Tensor | None] = []
        self.shapes: list[tuple[int, ...]] = []
        self.expanded: set[int] = set()
        self.others: dict[str, str] = {}

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        given = {self._names[id(leaf)] for leaf in _tensors((args, kwargs)) if id(leaf) in self._names}
        if not given:
            if func is not F.scaled_dot_product_attention:
                return func(*args, **kwargs)
            query, key = [*args, *(kwargs[name] for name in ("query", "key") if name in kwargs)][:2]
            with _products(query.shape[-2] * key.shape[-2]):
                return func(*args, **kwargs)
        if func is F.multi_head_attention_forward and torch.is_grad_enabled():
            result = self._attention(args, kwargs)
            if result is not None:
                return result
        uses: list[Use] = []
        if func in _KNOWN and torch.is_grad_enabled():
            try:
                uses = _KNOWN[func](self._name, *args, **kwargs)
            except TypeError:  # other arguments than are known here
                uses = []
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and id(result) in self._names:
            return result  # nothing was done to it: weight.to(its own type)
        for name in given - {name for use in uses for name in (use.parameter, use.bias)}:
            if any(leaf.is_floating_point() for leaf in _tensors(result)) and torch.is_grad_enabled():
                self.others[name] = f"given to {getattr(func, '__name__', func)}"
        return self._keep(result, uses) if uses else result

    def _name(self, tensor: Any) -> str | None:
        return self._names.get(id(tensor))

    def _keep(self, output: Tensor, uses: Iterable[Use]) -> Tensor:
        """Record an output, and give it back as a place where a gradient arrives."""
        number = len(self.outputs)
        self.shapes.append(tuple(output.shape))
        self.uses += [_numbered(use, number, self._shapes, output) for use in uses]
        axis = None if self._axes is None or number >= len(self._axes) else self._axes[number]
        if self._axes is None or number >= len(self._axes) or axis == "unused":
            self.outputs.append(None)
            return output
        if axis is None and not output.requires_grad:  # the same for all samples: each has its own from here
            self.expanded.add(number)
            output = _for_all(output, self._n).clone()
        # Nothing below the first trainable parameter requires gradients: start the graph here.
        output = output if output.requires_grad else output.requires_grad_()
        self.outputs.append(output)
        return output.clone()  # what follows may work in place

    def _attention(self, args: Any, kwargs: Any) -> Any:
        """Attention as its linear projections, recorded, around attention with none; None if there is more to it."""
        bound = _ATTENTION.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if any(given[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v")):
            return None
        inputs = [given[name] for name in ("query", "key", "value")]
        width, weight, bias = given["embed_dim_to_check"], given["in_proj_weight"], given["in_proj_bias"]
        if given["use_separate_proj_weight"]:
            weights = [given[f"{name}_proj_weight"] for name in "qkv"]
            projected = [
                self._project(x, w, bias, slice(i * width, (i + 1) * width), whole=True)
                for i, (x, w) in enumerate(zip(inputs, weights, strict=True))
            ]
        elif inputs[0] is inputs[1] is inputs[2]:
            projected = list(self._project(inputs[0], weight, bias, None).chunk(3, dim=-1))
        else:
            parts = [slice(i * width, (i + 1) * width) for i in range(3)]
            projected = [self._project(x, weight, bias, part) for x, part in zip(inputs, parts, strict=True)]
        same = torch.eye(width, dtype=projected[0].dtype, device=projected[0].device)
        kept = given | dict(zip(("query", "key", "value"), projected, strict=True))
        kept |= {"in_proj_weight": None, "in_proj_bias": None, "use_separate_proj_weight": True}
        kept |= {f"{name}_proj_weight": same for name in "qkv"} | {"out_proj_weight": same, "out_proj_bias": None}
        with _products(len(inputs[0]) * len(inputs[1])):
            output, attention = F.multi_head_attention_forward(**kept)
        return self._project(output, given["out_proj_weight"], given["out_proj_bias"], None), attention

    def _project(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, part: slice | None, whole: bool = False
    ) -> Tensor:
        """A linear function of a part of the outputs of a weight (or all: ``whole``) and of a bias."""
        chosen = slice(None) if part is None else part
        uses = _linear(self._name, x, weight, bias)
        uses = [u if part is None or (whole and u.kind == "matrix") else replace(u, part=chosen) for u in uses]
        if whole:
            uses = [replace(u, bias=None) for u in uses]
        output = F.linear(x, weight if whole else weight[chosen], None if bias is None else bias[chosen])
        return self._keep(output, uses) if uses else output


@dataclass
class Recording:
    """One forward pass.

    Attributes:
        output: the model's output.
        n: samples.
        structure: of the gradients.
    """

    output: Any
    n: int
    structure: Structure
    _recorder: Recorder

    def factors(self, loss: Tensor, along: Tensor | None = None) -> dict[str, Factor]:
        """The factors of the gradients of each sample.

        Args:
            loss: a function of `output`, summed over samples.
            along: instead, any function of `output`, and what each of its entries counts.
        """
        kept = {i: output for i, output in enumerate(self._recorder.outputs) if output is not None}
        if not kept:
            return {}
        gradients = torch.autograd.grad(
            loss, list(kept.values()), along, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        by_output = {i: gradient.detach() for i, gradient in zip(kept, gradients, strict=True)}
        dtypes = self._recorder.dtypes
        return {name: self._factor(unit, by_output, dtypes[name]) for name, unit in self.structure.units.items()}

    def _factor(self, unit: Unit, gradients: Mapping[int, Tensor], dtype: torch.dtype) -> Factor:
        uses = [use for use in self._recorder.uses if use.parameter == unit.parameter and use.output in gradients]
        if unit.is_vector:
            total = sum(self._vector(use, gradients[use.output].to(dtype), unit.matrix.size).to(dtype) for use in uses)
            assert isinstance(total, Tensor)
            return Factor(total[:, None, None, :], total.new_ones(self.n, 1, 1, 1))
        parts = [self._sides(use, gradients[use.output].to(dtype), unit) for use in uses]
        d = torch.cat([d for d, _ in parts], dim=1) if len(parts) > 1 else parts[0][0]
        a = torch.cat([a for _, a in parts], dim=1) if len(parts) > 1 else parts[0][1]
        return Factor(d, a)

    def _axis(self, number: int) -> int:
        axis = self.structure.axes[number]
        return axis if isinstance(axis, int) else 0

    def _vector(self, use: Use, gradient: Tensor, size: int) -> Tensor:
        """The gradient of a vector, ``(n, size)``: sums over all axes but that of the samples and its own."""
        if use.inputs is not None:
            gradient = gradient * use.inputs()
        axis = self._axis(use.output)
        dims = [dim % gradient.ndim for dim in use.dims]
        rest = [dim for dim in range(gradient.ndim) if dim != axis and dim not in dims]
        length = math.prod(gradient.shape[dim] for dim in dims)
        total = gradient.permute(axis, *rest, *dims).reshape(self.n, -1, length).sum(1)
        return total if use.part is None else _padded(total, use.part, size)

    def _sides(self, use: Use, gradient: Tensor, unit: Unit) -> tuple[Tensor, Tensor]:
        assert use.inputs is not None
        matrix, axis = unit.matrix, self._axis(use.output)
        if use.kind == "conv":
            d = gradient.flatten(2).mT.reshape(self.n, -1, matrix.groups, matrix.d_out).contiguous()
            # A sample may be several images: frames, which the model has flattened into the first axis.
            a = use.inputs(unit.bias is not None)
            return d, a.to(d.dtype).reshape(self.n, -1, *a.shape[2:])
        inputs = use.inputs()
        d = gradient.movedim(axis, 0).reshape(self.n, -1, gradient.shape[-1]).contiguous()  # products are faster
        if use.output in self._recorder.expanded:
            inputs = _for_all(inputs, self.n)
        if use.kind == "one_hot":
            index = inputs.movedim(axis, 0).reshape(self.n, -1)
            if use.padding is not None:
                d = d * (index != use.padding)[:, :, None]
            if unit.kind == "one_hot":
                return d[:, :, None], index
            return F.one_hot(index, matrix.d_out).to(d.dtype)[:, :, None], d[:, :, None]
        a = inputs.movedim(axis, 0).reshape(self.n, -1, inputs.shape[-1]).to(d.dtype)
        if use.part is not None:
            d = _padded(d, use.part, matrix.d_out)
        d, a = d[:, :, None], a[:, :, None]
        if use.transposed and not matrix.transposed:  # of a weight that is used in both ways
            d, a = a, d
        return d, _with_ones(a, unit.bias)


def record(
    call: Callable[[Mapping[str, Tensor]], Any], parameters: Mapping[str, Tensor], structure: Structure, n: int
) -> Recording:
    """Run a batch of n samples through the model.

    Args:
        call: the model's output as a function of its trainable parameters.
        parameters: detached.
        structure: see `look`.
        n: number of samples.

    Raises:
        UnsupportedLayerError: if the model does something else than when it was looked at.
    """
    recorder = Recorder(parameters, n, structure.axes)
    with torch.enable_grad(), recorder:
        output = call(parameters)
    strange = recorder.others.keys() - structure.dense.keys()
    if strange or tuple(use.signature for use in recorder.uses) != structure.signature:
        raise UnsupportedLayerError(
            "the model calls other layers for these samples than for the first of the data it was fitted on, so that "
            "their gradients have another structure: fit on data like these"
        )
    return Recording(output, n, structure, recorder)


def look(
    call: Callable[[Mapping[str, Tensor], int], Any],
    parameters: Mapping[str, Tensor],
    blocks: Mapping[str, Iterable[str]],
    without: Mapping[str, str],
) -> Structure:
    """Find out which parameters' gradients are factored.

    Args:
        call: the model's output for so many samples, as a function of its trainable parameters.
        parameters: detached.
        blocks: the parameters of each block, in the order of columns.
        without: parameters that are not to be factored, and why.
    """
    seen = []
    for n in (2, 3):
        recorder = Recorder(parameters, n, None)
        with torch.enable_grad(), recorder:
            call(parameters, n)
        seen.append(recorder)
    two, three = seen
    if [use.signature for use in two.uses] != [use.signature for use in three.uses]:
        return Structure(dense=dict.fromkeys(parameters, "the model calls other layers for other samples"))
    axes = [_axis_of(a, b) for a, b in zip(two.shapes, three.shapes, strict=True)]
    reasons = dict(without) | three.others
    for use in three.uses:
        reason = _reason_against(use, axes[use.output], three.shapes[use.output])
        if reason:
            reasons.setdefault(use.parameter, reason)
            if use.bias:
                reasons.setdefault(use.bias, reason)
    found = {use.parameter for use in three.uses}
    for name in parameters:
        if name not in found:
            reasons.setdefault(name, "not seen in a forward pass")
    units = _units(three, blocks, reasons)
    covered = {name for unit in units.values() for name in (unit.parameter, unit.bias)}
    used = {use.output for use in three.uses if use.parameter in covered}
    numbers = [_numbers(three.shapes[use.output], units[use.parameter]) for use in three.uses if use.parameter in units]
    return Structure(
        axes=tuple(axis if i in used else "unused" for i, axis in enumerate(axes)),
        signature=tuple(use.signature for use in three.uses),
        units=units,
        dense={name: reasons[name] for name in parameters if name not in covered},
        numbers=sum(numbers) // 3,
    )


@dataclass(frozen=True)
class Layout:
    """Where parameters are in a row.

    Attributes:
        columns: of each parameter its block, and its columns there.
        sections: for each block, in order, its columns.
    """

    columns: Mapping[str, tuple[str, slice]]
    sections: Mapping[str, slice]


def layout(blocks: Mapping[str, Iterable[str]], sizes: Mapping[str, int]) -> Layout:
    """Columns of parameters, laid out block after block."""
    columns, sections, start = {}, {}, 0
    for block, names in blocks.items():
        first = start
        for name in names:
            columns[name] = (block, slice(start - first, start - first + sizes[name]))
            start += sizes[name]
        sections[block] = slice(first, start)
    return Layout(columns, sections)


def _units(recorder: Recorder, blocks: Mapping[str, Iterable[str]], reasons: Mapping[str, str]) -> dict[str, Unit]:
    sizes = {name: math.prod(shape) for name, shape in recorder._shapes.items()}
    columns = layout(blocks, sizes).columns
    by_parameter: dict[str, list[Use]] = {}
    for use in recorder.uses:
        by_parameter.setdefault(use.parameter, []).append(use)
    units = {}
    biases = set()
    for name in (name for members in blocks.values() for name in members):  # weights before vectors, below
        uses = by_parameter.get(name, [])
        if name in reasons or not uses or uses[0].kind == "vector":
            continue
        bias = uses[0].bias
        if bias is not None and (
            bias in reasons
            or any(use.bias != bias for use in uses)
            or len(by_parameter[bias]) != len(uses)
            or columns[bias][0] != columns[name][0]
        ):
            bias = None
        unit = _matrix_unit(name, bias, uses, recorder, columns)
        if unit is not None:
            units[name] = unit
            biases.add(unit.bias)
    for name, (block, where) in columns.items():
        uses = by_parameter.get(name, [])
        if name in reasons or name in biases or not uses or any(use.kind != "vector" for use in uses):
            continue
        units[name] = Unit(name, None, Matrix(block, 1, sizes[name], 1, where), "vector")
    # In the order of columns.
    return {name: units[name] for name in columns if name in units}


def _matrix_unit(
    name: str, bias: str | None, uses: list[Use], recorder: Recorder, columns: Mapping[str, tuple[str, slice]]
) -> Unit | None:
    kinds, shape = {use.kind for use in uses}, recorder._shapes[name]
    ways = {use.transposed for use in uses}
    kind = uses[0].kind if len(kinds) == len(ways) == 1 else "mixed"
    if kind == "mixed":
        if not kinds <= {"matrix", "one_hot"}:
            return None
        bias = None
    transposed = ways == {True} and kind != "mixed"
    groups, (block, where) = uses[0].groups, columns[name]
    d_out, d_in = shape[0], math.prod(shape[1:])
    if transposed:
        d_out, d_in = d_in, d_out
    matrix = Matrix(
        block,
        groups,
        d_out // groups,
        d_in + (bias is not None),
        where,
        None if bias is None else columns[bias][1],
        transposed,
    )
    return Unit(name, bias, matrix, kind)


def _numbers(output: tuple[int, ...], unit: Unit) -> int:
    """How many numbers go into and out of a function that a unit is given to."""
    size, matrix = math.prod(output), unit.matrix
    if unit.kind in ("vector", "one_hot"):
        return size
    return size + size // max(1, matrix.d_out) * matrix.d_in


def _reason_against(use: Use, axis: Any, shape: tuple[int, ...]) -> str | None:
    if axis == "none":
        return "given to a function whose output has no axis of samples"
    if use.kind == "vector":
        if axis in [dim % len(shape) for dim in use.dims]:
            return "has an entry for each sample"
    elif use.kind == "conv" and axis != 0:
        return "the first axis of the convolution is not that of the samples"
    return None


def _axis_of(two: tuple[int, ...], three: tuple[int, ...]) -> Any:
    """The axis of samples of an output whose shapes for two and for three samples are these."""
    if len(two) != len(three):
        return "none"
    changed = [i for i, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    if not changed:
        return None
    (axis, *more) = changed
    return "none" if more or two[axis] * 3 != three[axis] * 2 else axis


def _numbered(use: Use, number: int, shapes: Mapping[str, tuple[int, ...]], output: Tensor) -> Use:
    shape, dims = shapes[use.parameter], use.dims
    if dims == _BROADCAST:
        dims = tuple(i - len(shape) for i, size in enumerate(shape) if size > 1)
    # Counted from the last: an axis of samples may be put before the first.
    return replace(use, output=number, dims=tuple(dim if dim < 0 else dim - output.ndim for dim in dims))


def _padded(tensor: Tensor, part: slice, size: int) -> Tensor:
    result = tensor.new_zeros(*tensor.shape[:-1], size)
    result[..., part] = tensor
    return result


def _for_all(tensor: Tensor, n: int) -> Tensor:
    """What is the same for all samples, for each of them."""
    if tensor.ndim == 0 or tensor.shape[0] != 1 or tensor.ndim == 1:
        tensor = tensor[None]
    return tensor.expand(n, *tensor.shape[1:])


def _with_ones(inputs: Tensor, bias: str | None) -> Tensor:
    return inputs if bias is None else torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for leaf in tree:
            yield from _tensors(leaf)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


# What is known of functions: the uses of the parameters among their arguments.

_Name = Callable[[Any], str | None]
#: Along which axes of the output a vector lies that is broadcast.
_BROADCAST = (-1_000_000,)


def _products(pairs: int) -> AbstractContextManager[Any]:
    """Compute attention of few pairs of positions as matrix products: its kernel makes many small ones of them.

    Each of these costs some ten microseconds in oneDNN (see `machine`): attention over 64 positions took five times as
    long. Over many the kernel needs less memory.
    """
    return sdpa_kernel(SDPBackend.MATH) if pairs <= _PAIRS else nullcontext()


_ATTENTION = inspect.signature(F.multi_head_attention_forward)


def _linear(name: _Name, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Use]:
    return _affine(name, input, weight, bias, transposed=False)


def _affine(name: _Name, x: Tensor, weight: Tensor, bias: Any, transposed: bool) -> list[Use]:
    uses, b = [], name(bias)
    if (w := name(weight)) is not None:
        uses.append(Use(w, "matrix", bias=b, transposed=transposed, inputs=x.detach))
    if b is not None:
        uses.append(Use(b, "vector", dims=(-1,)))
    return [] if name(x) else uses


def _addmm(name: _Name, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> list[Use]:
    if (beta, alpha) != (1, 1) or input.ndim != 1:
        return []
    return _affine(name, mat1, mat2, input, transposed=True)


def _matmul(name: _Name, input: Tensor, other: Tensor) -> list[Use]:
    return _affine(name, input, other, None, transposed=True) if other.ndim == 2 and input.ndim >= 2 else []


def _mm(name: _Name, input: Tensor, mat2: Tensor) -> list[Use]:
    return _matmul(name, input, mat2)


def _conv(
    name: _Name,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> list[Use]:
    if input.ndim != weight.ndim or name(input):
        return []
    uses, b, fixed = [], name(bias), input.detach()
    if (w := name(weight)) is not None:
        kernel = tuple(weight.shape[2:])

        def inputs(ones: bool = False) -> Tensor:
            return _patches(fixed, kernel, stride, padding, dilation, groups, ones)

        uses.append(Use(w, "conv", bias=b, groups=groups, inputs=inputs))
    if b is not None:
        uses.append(Use(b, "vector", dims=(1,)))
    return uses


def _patches(
    x: Tensor, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int, ones: bool
) -> Tensor:
    """What each position of a convolution's output is made of: ``(n, T, groups, d_in)``, with a last column of ones."""
    n_dims = len(kernel)

    def each(value: Any) -> list[int]:
        values = [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)]
        return values * n_dims if len(values) == 1 else values

    stride, dilation = each(stride), each(dilation)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same":
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        sides = [(0, 0)] * n_dims if padding == "valid" else [(p, p) for p in each(padding)]
    x = F.pad(x, [p for pair in reversed(sides) for p in pair]).movedim(1, -1).contiguous()
    outputs = [(size - r - 1) // s + 1 for size, r, s in zip(x.shape[1:], reach, stride, strict=False)]
    x = x.unflatten(-1, (groups, -1))  # type: ignore[no-untyped-call]
    d_in = x.shape[-1] * math.prod(kernel)
    patches = x.new_empty(len(x), *outputs, groups, d_in + ones)
    if ones:
        patches[..., -1] = 1
    entries = patches[..., :d_in].unflatten(-1, (x.shape[-1], *kernel))  # type: ignore[no-untyped-call]
    for offset in itertools.product(*map(range, kernel)):  # a place of the kernel at a time: whole rows are copied
        window = [
            slice(o * d, o * d + s * (size - 1) + 1, s)
            for o, d, s, size in zip(offset, dilation, stride, outputs, strict=True)
        ]
        entries[(..., *offset)] = x[(slice(None), *window)]
    return patches.flatten(1, n_dims)


def _embedding(
    name: _Name,
    index: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001
    scale_grad_by_freq: bool = False,
    sparse: bool = False,  # noqa: ARG001
) -> list[Use]:
    w = name(weight)
    if w is None or max_norm is not None or scale_grad_by_freq:
        return []
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    return [Use(w, "one_hot", transposed=True, padding=padding, inputs=index.detach)]


def _norm(name: _Name, weight: Any, bias: Any, dims: tuple[int, ...], normalised: Callable[[], Tensor]) -> list[Use]:
    uses = []
    if (w := name(weight)) is not None:
        uses.append(Use(w, "vector", dims=dims, inputs=normalised))
    if (b := name(bias)) is not None:
        uses.append(Use(b, "vector", dims=dims))
    return uses


def _layer_norm(
    name: _Name, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> list[Use]:
    fixed, dims = x.detach(), tuple(range(-len(shape), 0))
    return _norm(name, weight, bias, dims, lambda: F.layer_norm(fixed, shape, None, None, eps))


def _rms_norm(name: _Name, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> list[Use]:
    fixed, dims = x.detach(), tuple(range(-len(shape), 0))
    return _norm(name, weight, None, dims, lambda: F.rms_norm(fixed, shape, None, eps))


def _group_norm(
    name: _Name, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> list[Use]:
    fixed = x.detach()
    return _norm(name, weight, bias, (1,), lambda: F.group_norm(fixed, groups, None, None, eps))


def _batch_norm(
    name: _Name,
    x: Tensor,
    mean: Any,
    var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> list[Use]:
    if training:
        return []
    fixed = x.detach()
    return _norm(name, weight, bias, (1,), lambda: F.batch_norm(fixed, mean, var, None, None, False, 0.0, eps))


def _instance_norm(
    name: _Name,
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> list[Use]:
    fixed = input.detach()
    of_input = (None, None) if use_input_stats else (running_mean, running_var)
    return _norm(
        name,
        weight,
        bias,
        (1,),
        lambda: F.instance_norm(fixed, of_input[0], of_input[1], None, None, use_input_stats, 0.0, eps),
    )


def _mul(name: _Name, input: Any, other: Any) -> list[Use]:
    return _entrywise(name, input, other, multiplied=True)


def _add(name: _Name, input: Any, other: Any, *, alpha: float = 1) -> list[Use]:
    return _entrywise(name, input, other, multiplied=False) if alpha == 1 else []


def _entrywise(name: _Name, a: Any, b: Any, multiplied: bool) -> list[Use]:
    if name(b) is None:
        a, b = b, a
    parameter = name(b)
    if parameter is None or name(a) is not None or not isinstance(a, Tensor) or a.ndim < b.ndim:
        return []
    fixed = a.detach()
    return [Use(parameter, "vector", dims=_BROADCAST, inputs=(lambda: fixed) if multiplied else None)]


_KNOWN: dict[Any, Callable[..., list[Use]]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _mm,
    Tensor.mm: _mm,
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    torch.mul: _mul,
    Tensor.mul: _mul,
    Tensor.__mul__: _mul,
    Tensor.__rmul__: _mul,
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
}
