"""Inputs and output gradients of linear layers, recorded in one forward and one backward pass.

The gradient of a linear layer's weight is, for one sample, the sum over positions of the outer product of the output
gradient and the input. Methods that use this structure read it here. Gradients are taken with respect to the layers'
outputs only, never the parameters, and nothing is left behind on the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from outfluence.data import Batch, Tree, tree_leaves, tree_map
from outfluence.errors import UnsupportedLayerError
from outfluence.problem import ROOT, Problem


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer with at least one trainable parameter.

    Attributes:
        name: path of the module.
        d_out: number of outputs.
        weight: name of the weight if it is trainable, else None.
        bias: name of the bias if it is trainable, else None.
        d_weight: number of inputs that the trainable weight multiplies; 0 if it is frozen.
    """

    name: str
    d_out: int
    d_weight: int
    weight: str | None
    bias: str | None

    @property
    def d_in(self) -> int:
        """Columns of the gradient matrix: the inputs, then the constant one of the bias."""
        return self.d_weight + (self.bias is not None)

    def to_matrix(self, rows: Tensor) -> Tensor:
        """Rows ``(n, P_layer)`` as gradient matrices ``(n, d_out, d_in)``, the bias in the last column."""
        weights = self.d_out * self.d_weight
        weight, bias = torch.split(rows, [weights, rows.shape[1] - weights], dim=1)
        parts = [weight.reshape(len(rows), self.d_out, self.d_weight)]
        if self.bias is not None:
            parts.append(bias.unsqueeze(2))
        return torch.cat(parts, dim=2)

    def to_rows(self, matrices: Tensor) -> Tensor:
        """Gradient matrices ``(n, d_out, d_in)`` as rows ``(n, P_layer)``: the inverse of `to_matrix`."""
        weight, bias = torch.split(matrices, [self.d_weight, self.d_in - self.d_weight], dim=2)
        return torch.cat([weight.flatten(1), bias.flatten(1)], dim=1)


def linear_layers(problem: Problem) -> dict[str, LinearLayer]:
    """All layers with trainable parameters, by the name of their block.

    Raises:
        UnsupportedLayerError: naming the first layer that is not linear, or shares a parameter with another.
    """
    trainable = {name for name, p in problem.model.named_parameters() if p.requires_grad}
    owners: dict[int, str] = {}
    layers: dict[str, LinearLayer] = {}
    for name, module in problem.model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        paths = {key: f"{name}.{key}" if name else key for key, p in own.items() if p.requires_grad}
        if not paths:
            continue
        where = f"layer {name or ROOT!r} ({type(module).__name__})"
        advice = "freeze it with requires_grad_(False), or use another method (DirectInfluence takes any layer)"
        if type(module).forward is not nn.Linear.forward:
            raise UnsupportedLayerError(f"{where} is not a linear layer, and has trainable parameters: {advice}")
        for key, path in paths.items():
            first = owners.setdefault(id(own[key]), name)
            if first != name or path not in trainable:
                raise UnsupportedLayerError(f"{where} shares its {key} with layer {first!r}: {advice}")
        layers[name or ROOT] = LinearLayer(
            name=name,
            d_out=int(module.out_features),
            d_weight=int(module.in_features) if "weight" in paths else 0,
            weight=paths.get("weight"),
            bias=paths.get("bias"),
        )
    return layers


@dataclass
class Recording:
    """One forward pass.

    Attributes:
        output: the model's output.
        inputs: per block ``(n, T, d_in)``: the inputs at each position, with a column of ones where there is a bias.
    """

    output: Any
    inputs: dict[str, Tensor]
    _outputs: dict[str, Tensor]

    def output_gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Gradients of a scalar with respect to each layer's outputs: per block ``(n, T, d_out)``.

        Args:
            loss: a function of `output`, summed over samples.
        """
        grads = torch.autograd.grad(
            loss, list(self._outputs.values()), retain_graph=True, materialize_grads=True, allow_unused=True
        )
        return {name: _positions(g.detach()) for name, g in zip(self._outputs, grads, strict=True)}


def record(problem: Problem, layers: Mapping[str, LinearLayer], x: Tree) -> Recording:
    """Run a batch through the model and record its linear layers.

    Raises:
        UnsupportedLayerError: if a layer is called more than once, or its parameters are used without calling it.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    n = tree_leaves(x)[0].shape[0]

    def hook(block: str) -> Callable[..., Tensor]:
        def keep(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not args or output.shape[0] != n or output.ndim < 2:
                raise UnsupportedLayerError(
                    f"layer {block!r} must be called with one positional argument, first axis the {n} samples; "
                    f"it gives {tuple(output.shape)}. Freeze it, or use another method (DirectInfluence)"
                )
            if block in inputs:
                raise UnsupportedLayerError(
                    f"layer {block!r} is called more than once in a forward pass: freeze it with "
                    "requires_grad_(False), or use another method (DirectInfluence takes any model)"
                )
            inputs[block] = _augmented(layers[block], _positions(args[0].detach()))
            # Nothing below the first trainable layer requires gradients: start the graph at its output.
            outputs[block] = output if output.requires_grad else output.requires_grad_()
            return outputs[block].clone()  # what follows may work in place

        return keep

    with torch.enable_grad(), _hooks(problem.model, {layer.name: hook(block) for block, layer in layers.items()}):
        output = problem.output(problem.parameters, problem.on_device(x))
    for block in layers:
        if block not in inputs:
            raise UnsupportedLayerError(
                f"layer {block!r} is never called, though its parameters may be used (as nn.MultiheadAttention does): "
                "freeze it with requires_grad_(False), or use another method (DirectInfluence takes any model)"
            )
    return Recording(output, inputs, outputs)


def check_layers(problem: Problem, layers: dict[str, LinearLayer], batch: Batch) -> None:
    """Compare recorded gradients with those of `Problem.gradients` on a few samples.

    A parameter that is used outside its layer (in the loss, say) has a gradient that the layer does not see.

    Raises:
        UnsupportedLayerError: naming the layer whose gradients differ.
    """
    # In float64, where a difference is a difference.
    problem = replace(problem, model=copy.deepcopy(problem.model).double(), block_structure=problem.blocks)
    batch = Batch(*(tree_map(lambda t: t.double() if t.is_floating_point() else t, part) for part in batch))
    y = problem.on_device(batch.y)
    recording = record(problem, layers, batch.x)
    output_gradients = recording.output_gradients(sum_of_losses(problem, recording.output, y))
    for block, rows in problem.gradients(*batch).by_block().items():
        recorded = output_gradients[block].mT @ recording.inputs[block]
        expected = layers[block].to_matrix(rows)
        scale = expected.abs().amax()
        if (recorded - expected).abs().amax() > 1e-9 * scale + 1e-30:
            raise UnsupportedLayerError(
                f"layer {block!r}: its parameters' gradients are not those of a linear layer (are they used "
                "elsewhere, in the loss or in another layer?): freeze them, or use another method (DirectInfluence "
                "takes any model)"
            )


def sum_of_losses(problem: Problem, output: Any, y: Tree) -> Tensor:
    """The sum over samples of the loss, from the model's output for a batch: a scalar."""

    def one(tree: Any) -> Any:  # torch's own trees: a model's output may be a class registered there
        return _pytree.tree_map(lambda t: t.unsqueeze(0), tree)

    def loss(z: Any, label: Tree) -> Tensor:
        return problem.output_loss(one(z), None if label is None else one(label))

    return torch.func.vmap(loss, in_dims=(0, None if y is None else 0))(output, y).sum()


def _positions(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def _augmented(layer: LinearLayer, inputs: Tensor) -> Tensor:
    parts = [inputs[..., : layer.d_weight]]
    if layer.bias is not None:
        parts.append(inputs.new_ones(*inputs.shape[:-1], 1))
    return torch.cat(parts, dim=-1)


@contextmanager
def _hooks(model: nn.Module, hooks: dict[str, Callable[..., Tensor]]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
