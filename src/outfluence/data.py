"""`Data`: samples that can be read by range, any number of times, anywhere.

Influence needs the same samples again and again: to fit, for gradients, on other machines, after a crash. So a
`Data` is a handle with random access, not an iterator. It is made from a DataLoader, a Dataset or arrays, and it
pickles as a recipe: what lives only in memory must be stored first (`Data.stored`), which the calculators do.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cloudpickle
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset
from torch.utils.data import default_collate as torch_collate
from tqdm.auto import tqdm

from outfluence.errors import DataError
from outfluence.fingerprint import tensor_bytes

#: A tensor, or a tuple or dict of such; None where there are no labels.
Tree = Any
#: What `Data.of` understands: a `Data`, a DataLoader, a map-style Dataset, or a pair of arrays ``(x, y)``.
DataLike = Any

#: A sum over samples: given a batch and the index of its first sample, named tensors, to be added up over batches.
Statistic = Callable[["Batch", int], dict[str, Tensor]]

#: Samples at a time where the data has no opinion.
BATCH_SIZE = 256

_RECIPE_LIMIT = 1 << 20  # bytes: what pickles smaller is a recipe, not data
_READ_BYTES = 32 << 20  # bytes read at a time where a whole data set is walked


class Batch(NamedTuple):
    """Some consecutive samples: inputs and labels, first axis samples."""

    x: Tree
    y: Tree


class _Source(Protocol):
    """Where rows come from. Pickles small if it ``travels``; the user may change it in place if it is ``mutable``."""

    @property
    def travels(self) -> bool: ...
    @property
    def mutable(self) -> bool: ...
    def __len__(self) -> int: ...
    def read(self, start: int, stop: int) -> Batch: ...


class Data:
    """A handle on samples ``(x, y)``: ``len``, `rows`, `batches`, `fingerprint`.

    Args:
        source: where the rows come from; use the ``from_*`` constructors or `of`.
        batch_size: how many samples the user thinks fit through the model at once; None: no opinion.
        fingerprint: a text that identifies the content. By default the content is hashed, which costs one pass.
            Give your own (a version, a checksum you keep) where reading everything once more is too slow.
    """

    #: Whether sums over these samples are added up somewhere else, where nothing can be kept between them.
    sums_elsewhere = False

    def __init__(self, source: _Source, *, batch_size: int | None = None, fingerprint: str | None = None) -> None:
        if len(source) == 0:
            raise DataError("the data has no samples")
        self._source = source
        self.batch_size = batch_size
        self._given_fingerprint = fingerprint
        self._fingerprint: str | None = None

    @classmethod
    def of(cls, data: DataLike) -> Data:
        """Make a `Data` of whatever users hold: a `Data`, a DataLoader, a Dataset, or arrays ``(x, y)``.

        Raises:
            DataError: if it is none of these, or cannot be read by index.
        """
        if isinstance(data, Data):
            return data
        if isinstance(data, DataLoader):
            return cls.from_loader(data)
        if isinstance(data, Dataset):
            return cls.from_dataset(data)
        if isinstance(data, (tuple, list)) and len(data) == 2:
            return cls.from_arrays(data[0], data[1])
        raise DataError(
            f"cannot read samples from a {type(data).__name__}; pass a DataLoader, a map-style Dataset, "
            "or a pair of arrays (x, y)"
        )

    @classmethod
    def from_arrays(cls, x: Tree, y: Tree = None, *, fingerprint: str | None = None) -> Data:
        """Samples from arrays whose first axis counts samples.

        Args:
            x: inputs: a torch, numpy, zarr or dask array, a memory map, or a tuple or dict of them.
            y: labels, likewise; None for losses that need none.
            fingerprint: see `Data`.

        Raises:
            DataError: if lengths differ or an array holds no numbers.
        """
        return cls(_Arrays(_as_arrays(x, "x"), _as_arrays(y, "y")), fingerprint=fingerprint)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset[Any],
        *,
        collate: Callable[[list[Any]], Any] = torch_collate,
        batch_size: int | None = None,
        fingerprint: str | None = None,
    ) -> Data:
        """Samples of a map-style Dataset whose items, collated, are pairs ``(x, y)``.

        Raises:
            DataError: if the dataset is iterable only, or gives a sample differently the second time.
        """
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise DataError(
                f"{type(dataset).__name__} can only be iterated, and may never end: influence needs samples by "
                "index, again and again. Use a map-style Dataset (__getitem__ and __len__), or arrays."
            )
        source: _Source
        if isinstance(dataset, TensorDataset) and collate is torch_collate and len(dataset.tensors) == 2:
            source = _Arrays(*(_as_arrays(t, name) for t, name in zip(dataset.tensors, "xy", strict=True)))
        else:
            source = _Samples(dataset, collate, len(dataset))
            _check_repeatable(source)
        return cls(source, batch_size=batch_size, fingerprint=fingerprint)

    @classmethod
    def from_loader(cls, loader: DataLoader[Any]) -> Data:
        """The samples of a DataLoader, in its order; its batch size is kept as a hint.

        Raises:
            DataError: if the loader shuffles, samples, or can only be iterated.
        """
        if isinstance(loader.dataset, IterableDataset):
            return cls.from_dataset(loader.dataset)
        batches: Any = loader.batch_sampler  # None for a loader that does not batch
        sampler = batches.sampler if type(batches) is BatchSampler else batches or loader.sampler
        if type(sampler) is not SequentialSampler:
            raise DataError(
                f"the DataLoader draws its samples with {type(sampler).__name__}: scores could not be matched to "
                "samples. Make it with shuffle=False and no sampler (choose samples with torch.utils.data.Subset)."
            )
        if len(sampler) != len(loader.dataset):  # type: ignore[arg-type]
            raise DataError(f"the DataLoader's sampler gives {len(sampler)} of its samples only; use Subset instead")
        if batches is None:  # its collate_fn converts single samples
            return cls.from_dataset(loader.dataset)
        data = cls.from_dataset(loader.dataset, collate=loader.collate_fn, batch_size=batches.batch_size)
        if batches.drop_last and len(data) % batches.batch_size:
            raise DataError(
                f"the DataLoader drops its last {len(data) % batches.batch_size} samples (drop_last=True); "
                "they would have no score. Make it with drop_last=False."
            )
        return data

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return f"Data({len(self):,} samples, {describe(self.rows(slice(0, 1)), batched=True)})"

    def rows(self, index: slice) -> Batch:
        """The samples of a slice (step 1), as tensors on the CPU."""
        start, stop, step = index.indices(len(self))
        if step != 1 or stop <= start:
            raise DataError(f"rows takes a non-empty slice with step 1, not {index} of {len(self)} samples")
        return self._source.read(start, stop)

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in order, ``size`` at a time; the last batch may be smaller.

        A pass that runs to its end leaves the fingerprint behind, so that it need not read the data again.
        """
        hashes = _Hashes() if self._given_fingerprint is None and self._fingerprint is None else None
        for _, batch in self.enumerate(size, slice(0, len(self))):
            if hashes is not None:
                hashes.update(batch)
            yield batch
        if hashes is not None:
            self._fingerprint = hashes.digest()

    def enumerate(self, size: int, samples: slice) -> Iterator[tuple[int, Batch]]:
        """The batches of a range of samples, with the index of the first; what is decoded together is read once."""
        reads = size * -(-self.source_rows // size)
        for start in range(samples.start, samples.stop, reads):
            stop = min(start + reads, samples.stop)
            rows = self.rows(slice(start, stop))
            for first in range(start, stop, size):
                yield first, rows if reads == size else _part_of(rows, first - start, min(first + size, stop) - start)

    def total(self, statistic: Statistic, progress: str | None = None) -> dict[str, Tensor]:
        """The sum of a statistic over all samples, in one pass.

        Everything that is fitted is fitted by such sums; a handle that adds them up elsewhere fits elsewhere.

        Args:
            statistic: of a batch; must not depend on the other batches, nor keep the tensors it gives.
            progress: a text for a bar over batches; None: no bar.
        """
        size, sums = self.batch_size or BATCH_SIZE, dict[str, Tensor]()
        steps = tqdm(range(0, len(self), size), progress, disable=progress is None)
        for start, batch in zip(steps, self.batches(size), strict=True):
            add_to(sums, statistic(batch, start))
        return sums

    @property
    def fingerprint(self) -> str:
        """A text that changes when any number, type or shape in the data changes. Costs one pass, once."""
        if self._given_fingerprint is not None:
            return self._given_fingerprint
        if self._fingerprint is None or self._source.mutable:
            self._fingerprint = None
            for _ in self.batches(self._rows_per_read()):
                pass
        assert self._fingerprint is not None
        return self._fingerprint

    def content_now(self) -> str:
        """The fingerprint of the content, read again whatever is known of it already."""
        return self._given_fingerprint or Data(self._source).fingerprint

    @property
    def source_rows(self) -> int:
        """How many samples are decoded together, however few are read: those of a chunk of a zarr or dask array."""
        return self._source.source_rows if isinstance(self._source, _Arrays) else 1

    @property
    def read_copies(self) -> int:
        """How many copies of the samples there are while they are read: of items also those that are collated."""
        return 2 if isinstance(self._source, _Arrays) else 4

    @property
    def portable(self) -> bool:
        """Whether this handle can be re-opened elsewhere: it holds no data, only where the data is."""
        return self._source.travels and not self._source.mutable

    def stored(self, write: Callable[[str, int, Iterator[np.ndarray]], Any]) -> Data:
        """A portable handle on the same samples, written out once.

        Args:
            write: called for each array with a name, the number of rows and an iterator over blocks of rows; gives
                back an array that pickles as a recipe (a zarr array, say).

        Returns:
            This very handle if it is portable already, else one on what was written, with the same fingerprint.
        """
        if self.portable:
            return self
        fingerprint = self.fingerprint
        step, total = self._rows_per_read(), len(self)

        def blocks(part: int, leaf: int) -> Iterator[np.ndarray]:
            for start in range(0, total, step):
                yield to_numpy(tree_leaves(self.rows(slice(start, start + step))[part])[leaf])

        first = self.rows(slice(0, 1))
        parts = []
        for part, name in enumerate("xy"):
            arrays = (write(f"{name}{i}", total, blocks(part, i)) for i in range(len(tree_leaves(first[part]))))
            parts.append(_as_arrays(tree_map(partial(_next_of, arrays), first[part]), name))
        return Data(_Arrays(*parts), batch_size=self.batch_size, fingerprint=fingerprint)

    def _rows_per_read(self) -> int:
        first = self.rows(slice(0, 1))
        size = sum(t.nbytes for t in tree_leaves(first.x) + tree_leaves(first.y))
        return int(max(1, min(_READ_BYTES // max(size, 1), 65536)))

    def in_batches(self, size: int) -> Data:
        """This handle with another opinion on how many samples fit through the model at once."""
        other = Data(self._source, batch_size=size, fingerprint=self._given_fingerprint)
        other._fingerprint = self._fingerprint
        return other

    def saved(self, folder: str | os.PathLike[str]) -> Data:
        """A handle on the same samples that pickles: on ``.npy`` files, which are written unless it pickles already.

        Args:
            folder: where to; made if it is not there. Whoever loads the handle must see the same path.

        Raises:
            DataError: if there are such files already.
        """
        path = Path(folder).absolute()

        def write(name: str, n: int, blocks: Iterator[np.ndarray]) -> np.ndarray:
            path.mkdir(parents=True, exist_ok=True)
            file, array, start = path / f"{name}.npy", None, 0
            if file.exists():
                raise DataError(f"{file} is there already: choose another folder")
            for block in blocks:
                if array is None:
                    array = np.lib.format.open_memmap(file, "w+", block.dtype, (n, *block.shape[1:]))
                array[start : start + len(block)] = block
                start += len(block)
            assert array is not None
            array.flush()
            return np.load(file, mmap_mode="r")  # type: ignore[no-any-return]

        return self.stored(write)

    def __getstate__(self) -> dict[str, Any]:
        # Little data travels along, as it is now; it is smaller than most models.
        if not self._source.travels:
            raise DataError(
                "this Data lives in memory and pickles only as a recipe. Give fit() what lives in files: "
                "Data.of(...).saved(folder), a numpy.memmap, a zarr array; or let a calculator store it."
            )
        return self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> Data:
        return self  # a handle; there is nothing to change in it


@dataclass(frozen=True)
class _Arrays:
    """Rows of arrays: anything with ``shape``, ``dtype`` and slices."""

    x: Tree
    y: Tree

    def __post_init__(self) -> None:
        lengths = {int(a.shape[0]) for a in tree_leaves(self.x) + tree_leaves(self.y)}
        if not tree_leaves(self.x):
            raise DataError("x holds no arrays")
        if len(lengths) != 1:
            x, y = ([int(a.shape[0]) for a in tree_leaves(part)] for part in (self.x, self.y))
            raise DataError(f"x and y differ in their number of samples: x has {x}, y has {y}")

    def __len__(self) -> int:
        return int(tree_leaves(self.x)[0].shape[0])

    @property
    def travels(self) -> bool:
        leaves = tree_leaves(self.x) + tree_leaves(self.y)
        on_cluster = any(isinstance(a, _DaskArray) and a.on_cluster for a in leaves)
        return not on_cluster and _pickles_small(leaves)

    @property
    def mutable(self) -> bool:
        return any(isinstance(a, (Tensor, np.ndarray)) for a in tree_leaves(self.x) + tree_leaves(self.y))

    @property
    def source_rows(self) -> int:
        return max(_rows_together(array) for array in tree_leaves(self.x) + tree_leaves(self.y))

    def read(self, start: int, stop: int) -> Batch:
        def part(array: Any) -> Tensor:
            return _as_tensor(array[start:stop])

        return Batch(tree_map(part, self.x), tree_map(part, self.y))


@dataclass(frozen=True)
class _Samples:
    """Items of a map-style Dataset, collated."""

    dataset: Any
    collate: Callable[[list[Any]], Any]
    length: int
    mutable = False

    def __len__(self) -> int:
        return self.length

    @property
    def travels(self) -> bool:
        return _pickles_small((self.dataset, self.collate))

    def read(self, start: int, stop: int) -> Batch:
        index = list(range(start, stop))
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(index) if fetch else [self.dataset[i] for i in index]
        collated = self.collate(items)
        if not isinstance(collated, (tuple, list)) or len(collated) != 2:
            raise DataError(
                f"a sample must be a pair (x, y), but {type(self.dataset).__name__} gives {describe(collated)}; "
                "wrap the Dataset, or give the DataLoader a collate_fn that returns (x, y)"
            )
        batch = Batch(*(tree_map(_as_tensor, part) for part in collated))
        if any(t.shape[:1] != (stop - start,) for t in tree_leaves(batch.x) + tree_leaves(batch.y)):
            raise DataError(
                f"samples {start} to {stop - 1} collate to {describe(batch, batched=True)}: x and y must both have "
                f"{stop - start} rows"
            )
        return batch


@dataclass(frozen=True)
class _MappedFile:
    """A numpy memory map, by file name: numpy itself would pickle its content."""

    path: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]

    def __getitem__(self, index: slice) -> np.ndarray:
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)[index]


@dataclass(frozen=True)
class _DaskArray:
    """A lazy array, read with the synchronous scheduler: inside a worker another one would start a second torch thread.

    Attributes:
        array: the dask array.
        on_cluster: whether parts of it live in the memory of workers, where only a client reaches them.
    """

    array: Any
    on_cluster: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def __getitem__(self, index: slice) -> np.ndarray:
        rows = self.array[index]
        return np.asarray(rows.compute() if self.on_cluster else rows.compute(scheduler="synchronous"))


def add_to(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add named tensors to others, in place; names that are not there yet are taken over."""
    for name, tensor in more.items():
        if name in sums:
            sums[name] += tensor
        else:
            sums[name] = tensor


def tree_map(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """Apply a function to each array of a tree: a leaf, or tuples, lists and dicts of leaves. None stays None."""
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {key: tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(tree_map(function, value) for value in tree)
    return function(tree)


def tree_leaves(tree: Tree) -> list[Any]:
    """The arrays of a tree, in order."""
    leaves: list[Any] = []
    tree_map(leaves.append, tree)
    return leaves


def describe(tree: Tree, batched: bool = False) -> str:
    """Types and shapes of a tree in a few words, for messages; of one sample if ``batched``."""
    if isinstance(tree, Batch):
        return f"x: {describe(tree.x, batched)}, y: {describe(tree.y, batched)}"
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{k}: {describe(v, batched)}" for k, v in tree.items()) + "}"
    if isinstance(tree, (tuple, list)):
        return "(" + ", ".join(describe(v, batched) for v in tree) + ")"
    if not hasattr(tree, "shape"):
        return type(tree).__name__
    return f"{str(tree.dtype).removeprefix('torch.')} {tuple(tree.shape[1:] if batched else tree.shape)}"


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as a numpy array on the CPU.

    Raises:
        DataError: if numpy has no such type (bfloat16).
    """
    try:
        return np.asarray(tensor.detach().cpu().numpy())
    except TypeError as error:
        raise DataError(f"{tensor.dtype} cannot be stored: {error}. Convert the data to float32.") from error


def _part_of(rows: Batch, start: int, stop: int) -> Batch:
    return Batch(*(tree_map(lambda tensor: tensor[start:stop].clone(), part) for part in rows))  # aligned, see below


def _next_of(things: Iterator[Any], _: Any) -> Any:
    return next(things)


class _Hashes:
    """One running hash per array, so that the result does not depend on how rows were batched."""

    def __init__(self) -> None:
        self._parts: dict[str, Any] = {}

    def update(self, batch: Batch) -> None:
        for key, tensor in _with_paths(batch._asdict()):
            key_and_type = f"{key} {describe(tensor, batched=True)}"
            self._parts.setdefault(key_and_type, hashlib.blake2b(digest_size=16)).update(tensor_bytes(tensor))

    def digest(self) -> str:
        text = ";".join(f"{key} {part.hexdigest()}" for key, part in sorted(self._parts.items()))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _with_paths(tree: Tree, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, (Mapping, tuple)):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _with_paths(value, f"{path}.{key}")
    elif tree is not None:
        yield path, tree


def _as_arrays(tree: Tree, name: str) -> Tree:
    def array(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) and not all(hasattr(leaf, a) for a in ("shape", "dtype", "__getitem__")):
            leaf = np.asarray(leaf)
        if hasattr(leaf, "iloc"):  # pandas: rows by position need numpy
            leaf = leaf.to_numpy()
        kind = "f" if isinstance(leaf, Tensor) else np.dtype(leaf.dtype).kind
        if kind not in "biuf" or len(leaf.shape) == 0:
            raise DataError(f"{name} must be an array of numbers, first axis samples; got {describe(leaf)}")
        whole_file = isinstance(leaf, np.memmap) and isinstance(leaf.base, mmap.mmap) and leaf.flags.c_contiguous
        if whole_file and leaf.mode != "c":  # edits of a copy-on-write map are in memory only
            return _MappedFile(str(leaf.filename), leaf.dtype, leaf.offset, leaf.shape)
        if hasattr(leaf, "__dask_graph__"):
            return _DaskArray(leaf, on_cluster=any(type(v).__name__ == "Future" for v in _graph_values(leaf)))
        return leaf.detach() if isinstance(leaf, Tensor) else leaf

    return tree_map(array, _as_tree(tree))


def _as_tree(tree: Tree) -> Tree:
    # A list of numbers is an array; a list of arrays is a tuple of inputs.
    if isinstance(tree, list) and not any(hasattr(value, "shape") for value in tree):
        return np.asarray(tree)
    return tree


def _as_tensor(array: Any) -> Tensor:
    # In torch's own memory: numpy aligns less, differently each time, and then matrix products differ in the last bits.
    return array.clone() if isinstance(array, Tensor) else torch.tensor(np.ascontiguousarray(array))


def _rows_together(array: Any) -> int:
    if isinstance(array, _DaskArray):
        return int(max(array.array.chunks[0]))
    together = getattr(array, "shards", None) or getattr(array, "chunks", None)  # zarr, h5py
    return min(int(together[0]), int(array.shape[0])) if together else 1


def _graph_values(array: Any) -> Iterator[Any]:
    for value in array.__dask_graph__().values():
        yield getattr(value, "value", value)  # a data node holds its value


def _pickles_small(thing: Any) -> bool:
    try:
        cloudpickle.dump(thing, _Short())
    except Exception:  # whatever a user's object raises, it cannot travel
        return False
    return True


class _Short:
    """A file that refuses to grow beyond a recipe."""

    def __init__(self) -> None:
        self._size = 0

    def write(self, content: Any) -> None:
        self._size += memoryview(content).nbytes
        if self._size > _RECIPE_LIMIT:
            raise OverflowError


def _check_repeatable(source: _Source) -> None:
    n, digests = min(len(source), 8), set()
    with _rng_untouched():
        for size in (n, n, 1):  # together, again, and one by one
            hashes = _Hashes()
            for start in range(0, n, size):
                hashes.update(source.read(start, start + size))
            digests.add(hashes.digest())
    if len(digests) > 1:
        raise DataError(
            f"the first {n} samples read differently the second time, or one by one: the Dataset transforms at random, "
            "or batches are padded to their longest sample. Influence is of fixed samples: remove the random "
            "augmentation, pad to one length."
        )


@contextmanager
def _rng_untouched() -> Iterator[None]:
    states: Sequence[Any] = (random.getstate(), np.random.get_state())
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
