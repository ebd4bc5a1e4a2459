"""Data: every source reads the same, travels as a recipe, and refuses what cannot be read twice."""

from __future__ import annotations

import pickle
import random

import dask.array as da
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from outfluence import Data
from outfluence.data import tree_leaves
from outfluence.errors import DataError

X = torch.arange(24 * 3, dtype=torch.float32).reshape(24, 3)
Y = torch.arange(24) % 5


class Squares(Dataset):
    """A dataset that travels as a recipe."""

    def __init__(self, n=24):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.full((3,), float(i)) ** 2, i % 5


@pytest.fixture
def sources(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    np.save(tmp_path / "y.npy", Y.numpy())
    stored = [zarr.create_array(str(tmp_path / f"{n}.zarr"), data=t.numpy()) for n, t in (("x", X), ("y", Y))]
    return {
        "tensors": Data.of((X, Y)),
        "numpy": Data.of((X.numpy(), Y.numpy())),
        "lists": Data.from_arrays(X.numpy().astype("f4"), Y.tolist()),
        "maps": Data.of((np.load(tmp_path / "x.npy", mmap_mode="r"), np.load(tmp_path / "y.npy", mmap_mode="r"))),
        "zarr": Data.of(stored),
        "dask": Data.of((da.from_zarr(stored[0]), da.from_zarr(stored[1]))),
        "dataset": Data.of(TensorDataset(X, Y)),
        "subset": Data.of(Subset(TensorDataset(X, Y), range(24))),
        "loader": Data.of(DataLoader(TensorDataset(X, Y), batch_size=7)),
        "unbatched loader": Data.of(DataLoader(TensorDataset(X, Y), batch_size=None)),
    }


def test_all_sources_read_the_same(sources):
    prints = set()
    for name, data in sources.items():
        assert len(data) == 24, name
        x, y = data.rows(slice(5, 12))
        assert torch.equal(x, X[5:12]), name
        assert torch.equal(y, Y[5:12]), name
        assert [len(batch.x) for batch in data.batches(10)] == [10, 10, 4], name
        prints.add(data.fingerprint)
    assert len(prints) == 1
    assert sources["loader"].batch_size == 7


def test_handles_on_files_travel_and_others_refuse_to(sources):
    for name in ("maps", "zarr", "dask"):
        assert sources[name].portable
        pickled = pickle.dumps(sources[name])
        assert len(pickled) < 5000
        assert torch.equal(pickle.loads(pickled).rows(slice(5, 12)).x, X[5:12])
    for name in ("tensors", "numpy", "dataset", "loader"):
        assert not sources[name].portable  # it may change in place; but little of it travels as it is
        assert torch.equal(pickle.loads(pickle.dumps(sources[name])).rows(slice(5, 12)).x, X[5:12])
    with pytest.raises(DataError, match="lives in memory and pickles only as a recipe"):
        pickle.dumps(Data.from_arrays(torch.zeros(300_000, 1)))


def test_data_in_memory_is_saved_to_files(tmp_path):
    inputs = {"a": torch.randn(70_000, 3), "b": torch.arange(70_000)}
    data = Data.from_arrays(inputs, torch.ones(70_000)).in_batches(10)
    saved = data.saved(tmp_path / "train")
    assert saved.portable
    assert saved.fingerprint == data.fingerprint
    assert saved.batch_size == 10
    again = pickle.loads(pickle.dumps(saved)).rows(slice(69_990, 70_000))
    assert torch.equal(again.x["a"], inputs["a"][-10:])
    assert torch.equal(again.x["b"], inputs["b"][-10:])
    assert saved.saved(tmp_path / "elsewhere") is saved
    with pytest.raises(DataError, match="is there already"):
        data.saved(tmp_path / "train")


def test_a_dataset_travels_if_it_is_small():
    data = Data.of(DataLoader(Squares(), batch_size=5))
    assert torch.equal(pickle.loads(pickle.dumps(data)).rows(slice(2, 4)).x, torch.tensor([[4.0] * 3, [9.0] * 3]))


def test_stored_data_is_the_same_data(sources, tmp_path):
    def write(name, n_rows, blocks):
        whole = np.concatenate(list(blocks))
        assert len(whole) == n_rows
        return zarr.create_array(str(tmp_path / f"stored-{name}"), data=whole)

    stored = sources["loader"].stored(write)
    assert stored.portable
    assert stored.batch_size == 7
    assert Data.of((stored._source.x, stored._source.y)).fingerprint == sources["loader"].fingerprint
    assert sources["zarr"].stored(write) is sources["zarr"]


def test_trees_of_arrays():
    data = Data.of(({"a": X, "b": (Y, X)}, Y))
    x, _ = data.rows(slice(1, 3))
    assert torch.equal(x["b"][1], X[1:3])
    assert len(tree_leaves(x)) == 3
    assert Data.from_arrays(X).rows(slice(0, 2)).y is None


def test_a_slice_of_a_memory_map_is_not_taken_for_the_file(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    part = np.load(tmp_path / "x.npy", mmap_mode="r")[4:]
    data = Data.from_arrays(part)
    assert torch.equal(data.rows(slice(0, 2)).x, X[4:6])
    assert not data.portable


@given(start=st.integers(0, 23), length=st.integers(1, 24), size=st.integers(1, 30))
def test_slices_and_batches(start, length, size):
    data = Data.of((X, Y))
    assert torch.equal(data.rows(slice(start, start + length)).x, X[start : start + length])
    assert torch.equal(torch.cat([batch.y for batch in data.batches(size)]), Y)


@given(size=st.integers(1, 30))
def test_a_whole_pass_leaves_the_fingerprint(size):
    data, expected = Data.of(Squares()), Data.of(Squares()).fingerprint
    for _ in data.batches(size):
        pass
    data._rows_per_read = None  # cannot be read any more
    assert data.fingerprint == expected


def test_edits_of_a_copy_on_write_map_count(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    edited = np.load(tmp_path / "x.npy", mmap_mode="c")
    edited /= 10
    assert torch.equal(Data.from_arrays(edited).rows(slice(0, 24)).x, torch.tensor(edited))


def test_fingerprints_follow_arrays_that_are_edited_in_place():
    x = X.clone()
    data = Data.of((x, Y))
    before = data.fingerprint
    x[5] += 1
    assert data.fingerprint == data.content_now() != before


def test_fingerprints_tell_names_apart():
    other = X.flip(0)
    assert Data.of(({"a": X, "b": other}, Y)).fingerprint != Data.of(({"b": X, "a": other}, Y)).fingerprint


def test_fingerprints_see_every_number_type_and_shape():
    first = Data.of((X, Y)).fingerprint
    changed = Y.clone()
    changed[17] += 1
    others = [(X, changed), (X.double(), Y), (X.reshape(24, 3, 1), Y), (X, Y.float()), (X[:-1], Y[:-1]), (X.flip(0), Y)]
    prints = {Data.of(other).fingerprint for other in others}
    assert len(prints | {first}) == 7
    assert Data.from_arrays(X, Y, fingerprint="v1").fingerprint == "v1"


# Bad input


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield X[0], Y[0]


class Noisy(Squares):
    def __getitem__(self, i):
        return torch.randn(3) + random.random() + np.random.rand(), i


class Growing(Squares):
    def __getitem__(self, i):
        return torch.ones(i + 1), i


def padded(items):
    return nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True), torch.tensor([y for _, y in items])


def loader(**options):
    return DataLoader(TensorDataset(X, Y), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: loader(shuffle=True, batch_size=4), "draws its samples with RandomSampler.*shuffle=False"),
        (lambda: loader(sampler=WeightedRandomSampler([1.0] * 24, 24)), "WeightedRandomSampler"),
        (lambda: loader(batch_sampler=[[1, 2], [3]]), "draws its samples with list"),
        (lambda: loader(sampler=RandomSampler(range(24)), batch_size=None), "RandomSampler"),
        (lambda: loader(batch_size=7, drop_last=True), "drops its last 3 samples.*drop_last=False"),
        (lambda: DataLoader(Endless()), "Endless can only be iterated, and may never end"),
        (Endless, "Endless can only be iterated"),
        (lambda: loader(sampler=SequentialSampler(range(2)), batch_size=2), "sampler gives 2 of its samples only"),
        (lambda: DataLoader(Growing(), batch_size=4, collate_fn=padded), "batches are padded to their longest sample"),
        (lambda: (X, Y[:-1]), r"x and y differ in their number of samples: x has \[24\], y has \[23\]"),
        (lambda: ((X, X[:3]), Y), r"x has \[24, 3\], y has \[24\]"),
        (Noisy, "the first 8 samples read differently the second time"),
        (lambda: (np.array(["a", "b"]), np.zeros(2)), "x must be an array of numbers"),
        (lambda: (X, np.array([None] * 24)), "y must be an array of numbers"),
        (lambda: (torch.tensor(1.0), Y), "x must be an array of numbers, first axis samples"),
        (lambda: (X[:0], Y[:0]), "the data has no samples"),
        (lambda: TensorDataset(X), "a sample must be a pair"),
        (lambda: DataLoader(Squares(), collate_fn=lambda items: (X, Y)), "x and y must both have 8 rows"),
        (lambda: iter([(X, Y)]), "cannot read samples from a list_iterator; pass a DataLoader"),
    ],
)
def test_what_cannot_be_read_by_index_is_refused(make, message):
    with pytest.raises(DataError, match=message):
        Data.of(make())


def test_checking_a_dataset_moves_no_random_state():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with pytest.raises(DataError):
        Data.of(Noisy())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_drop_last_that_drops_nothing_is_fine():
    assert len(Data.of(loader(batch_size=6, drop_last=True))) == 24


@pytest.mark.parametrize("index", [slice(3, 3), slice(0, 10, 2), slice(30, 40)])
def test_slices_that_select_nothing_are_refused(index):
    with pytest.raises(DataError, match="rows takes a non-empty slice with step 1"):
        Data.of((X, Y)).rows(index)
