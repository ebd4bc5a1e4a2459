"""Fingerprints of models and losses: texts that change when what they compute may change, and only then.

Tensors and arrays count by their bytes, functions and classes of the user's by their code, their defaults, what they
close over and the globals they name; library code by its name. A thing has the same fingerprint in every process.
"""

from __future__ import annotations

import dis
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LIBRARIES = tuple({sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")})


def fingerprint(thing: Any, without: Iterable[Any] = ()) -> str:
    """A hash of anything: numbers, containers, tensors, functions, modules, objects.

    Args:
        thing: what to hash.
        without: objects in it that shall not count.
    """
    digest = hashlib.blake2b(digest_size=16)
    _feed(thing, digest, {id(part): part for part in without})
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """The content of a tensor as bytes, row-major."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.stride() != (1,):  # one number is contiguous with any stride, but cannot be viewed as bytes
        flat = flat.clone(memory_format=torch.contiguous_format)
    raw: np.ndarray = flat.view(torch.uint8).numpy()
    return raw


def _feed(thing: Any, digest: Any, seen: dict[int, Any]) -> None:  # noqa: PLR0911, PLR0912 - a branch for each kind of thing
    def write(text: str) -> None:
        digest.update(text.encode())

    def each(things: Iterable[Any]) -> None:
        for part in things:
            _feed(part, digest, seen)

    if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return write(f"{type(thing).__name__} {thing!r};")
    if id(thing) in seen:  # recursion, met before, or not to count
        return write(f"again {type(thing).__name__};")
    seen[id(thing)] = thing  # kept alive: an address that is used again would pass for the same thing
    if isinstance(thing, Tensor):
        write(f"tensor {thing.dtype} {tuple(thing.shape)};")
        if thing.device.type != "meta":
            digest.update(tensor_bytes(thing))
        return None
    if isinstance(thing, np.ndarray) and thing.dtype != object:
        write(f"array {thing.dtype} {thing.shape};")
        digest.update(np.ascontiguousarray(thing).reshape(-1).view(np.uint8))
        return None
    if _is_library(type(thing)):
        write(f"{type(thing).__module__}.{type(thing).__qualname__} ")
    if isinstance(thing, (list, tuple)):
        return each(thing)
    if isinstance(thing, (set, frozenset)):
        return write(str(sorted(fingerprint(part) for part in thing)))
    if isinstance(thing, Mapping):
        return each((key, value) for key, value in thing.items())
    if isinstance(thing, CodeType):
        # Names and constants stand beside the bytes; line numbers and file names do not count.
        write(f"code {thing.co_code.hex()} {thing.co_names} {thing.co_varnames};")
        return each(thing.co_consts)
    if isinstance(thing, partial):
        return each((thing.func, thing.args, thing.keywords))
    if isinstance(thing, MethodType):
        return each((thing.__func__, thing.__self__))
    if isinstance(thing, (ModuleType, BuiltinFunctionType, FunctionType, type)) and _is_library(thing):
        return write(f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing.__name__)};")
    if isinstance(thing, FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        names = [name for name in _global_names(thing.__code__) if name in thing.__globals__]
        named = {name: _used(thing.__globals__[name], _attribute_names(thing.__code__)) for name in names}
        return each((thing.__code__, thing.__defaults__, thing.__kwdefaults__, cells, named))
    if isinstance(thing, ModuleType):
        return write(f"module {thing.__name__};")
    if isinstance(thing, type):
        # By its name alone: __main__.Net in a script is script.Net in a notebook.
        write(f"class {thing.__qualname__};")
        return each((thing.__bases__, {k: v for k, v in vars(thing).items() if _is_content(k, v)}))
    if isinstance(thing, nn.Module):
        own = {k: v for k, v in vars(thing).items() if not k.startswith("_") and k != "training"}
        inside = (dict(thing.named_parameters(recurse=False)), dict(thing.named_buffers(recurse=False)))
        return each((type(thing), own, *inside, dict(thing.named_children())))
    each((type(thing),))
    state = getattr(thing, "__dict__", None)
    return each((state,)) if state is not None else write(re.sub(r" at 0x[0-9a-f]+", "", repr(thing)))


def _is_content(name: str, value: Any) -> bool:
    machinery = (
        "__module__",
        "__dict__",
        "__weakref__",
        "__doc__",
        "__annotations__",
        "__qualname__",
        "__firstlineno__",
    )
    return name not in machinery and isinstance(
        value, (FunctionType, property, classmethod, staticmethod, int, float, str)
    )


def _is_library(thing: Any) -> bool:
    module = getattr(thing, "__name__" if isinstance(thing, ModuleType) else "__module__", None) or "builtins"
    file = getattr(sys.modules.get(module.partition(".")[0]), "__file__", None)
    return module != "__main__" and (file is None or file.startswith(_LIBRARIES))


def _used(value: Any, names: Iterable[str]) -> Any:
    """Of a module of the user's what a function takes from it; anything else as it is."""
    if not isinstance(value, ModuleType) or _is_library(value):
        return value
    inside = vars(value)
    return {name: _used(inside[name], [other for other in names if other != name]) for name in names if name in inside}


def _attribute_names(code: CodeType) -> list[str]:
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _attribute_names(const)]
    return sorted({*code.co_names, *inner})


def _global_names(code: CodeType) -> list[str]:
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _global_names(const)]
    return sorted({*names, *inner})
