"""`Store`: one Zarr group on a file system. zarr and xarray read it without our help; `docs/format.md` describes it.

A chunk is written by exactly one task, whole. When a task has written all its chunks and read them back, it leaves a
receipt. What has a receipt is never computed again; what has none is computed as if nothing had happened.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import tempfile
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from outfluence.errors import StoreError, StoreMismatchError

#: Version of the layout, in the attributes of every store.
FORMAT_VERSION = 1

#: The attribute of the root group that says what made the store.
ATTRIBUTE = "outfluence"

_RECEIPTS, _WORK = "receipts", "work"
#: The stage whose only receipt says how far to believe the scores; no run needs it to be finished.
ASSESS = "assess"

#: In the name of a store that is about to be replaced.
_ASIDE = ".replaced-"
#: In the name of the receipt of a task that is done in part.
_PART = ".part."


@dataclass(frozen=True)
class ArraySpec:
    """An array of a store, before it exists.

    Attributes:
        path: its path in the group.
        shape: its shape.
        chunks: shape of its chunks; each is written by one task.
        dtype: numpy name of its type.
        dims: names of its axes, as xarray shows them.
        attributes: what is said about it.
    """

    path: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    attributes: Mapping[str, Any]


class Store:
    """A store that exists. `Store.create` makes one, `Store.find` looks for one.

    Args:
        path: the folder of its root group.

    Raises:
        StoreError: if there is none, or a newer version of this package wrote it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        try:
            if not self.path.is_dir():  # zarr would make the folder
                raise FileNotFoundError(self.path)
            self.group = zarr.open_group(str(self.path), mode="r")
            attributes: dict[str, Any] = dict(self.group.attrs)
            self.about: dict[str, Any] = attributes[ATTRIBUTE]
        except (OSError, KeyError, ValueError, zarr.errors.ContainsArrayError) as error:
            raise StoreError(f"{self.path} is no store of outfluence") from error
        version = self.about.get("format_version", FORMAT_VERSION + 1)
        if version > FORMAT_VERSION:
            raise StoreError(
                f"{self.path} has format {version}, this version of outfluence reads up to {FORMAT_VERSION}: upgrade"
            )

    def __repr__(self) -> str:
        done = ", ".join(f"{name} {n:,} of {total:,}" for name, (n, total) in self.progress().items())
        return f"Store({str(self.path)!r}, tasks done: {done})"

    @classmethod
    def reopened(cls, path: Path | None, store_id: str) -> Store:
        """The store that a job writes to.

        Raises:
            StoreError: if it is no longer there, or another one is.
        """
        assert path is not None
        store = cls(path)
        if store.id != store_id:
            raise StoreError(f"{path} has been replaced by another store")
        return store

    @classmethod
    def find(cls, path: str | os.PathLike[str]) -> Store | None:
        """The store at a path, or None if the path is free.

        Raises:
            StoreMismatchError: if something else is there.
        """
        path = Path(path).absolute()
        if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
            return None
        try:
            return cls(path)
        except StoreError as error:
            raise StoreMismatchError(
                f"{error}, but something is there. Choose another path, or remove it yourself."
            ) from error

    @classmethod
    def recover(cls, path: str | os.PathLike[str]) -> None:
        """Put back a store that was moved aside by a process that was killed before it could replace it."""
        path = Path(path).absolute()
        for aside in path.parent.glob(f".{path.name}{_ASIDE}*"):
            if not os.path.lexists(path):
                aside.rename(path)
            else:  # replaced: only the removal is left to do
                shutil.rmtree(aside, ignore_errors=True)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        specs: Sequence[ArraySpec],
        coordinates: Mapping[str, np.ndarray],
        about: dict[str, Any],
    ) -> Store:
        """Make a store, all its arrays filled with NaN. It appears at its path whole or not at all.

        Args:
            path: where; must be free.
            specs: its arrays.
            coordinates: values of the axes, by the name of the axis.
            about: what made it: "identity", "plan", "tasks" (number by stage), and whatever else is worth keeping.

        Raises:
            StoreError: if the path cannot be written.
        """
        path = Path(path).absolute()
        made: Path | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            made.chmod(0o777 & ~_umask())  # mkdtemp makes it private
            _lay_out(made, specs, coordinates, {"format_version": FORMAT_VERSION, "id": uuid.uuid4().hex, **about})
            if path.is_dir():
                path.rmdir()  # find() said that it is free: an empty folder
            made.rename(path)
        except OSError as error:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            if made is not None and error.errno in (
                errno.ENOTEMPTY,
                errno.EEXIST,
            ):  # another process was faster: the same job, or refused
                return cls(path)
            raise StoreError(
                f"cannot write a store at {path}: {error.strerror or error}. Choose a path that you may write to."
            ) from error
        return cls(path)

    @property
    def id(self) -> str:
        """What tells this store from one that was at its path before."""
        return str(self.about["id"])

    def check_still_there(self) -> None:
        """Refuse to go on if another store has taken the place of this one.

        Raises:
            StoreError: if so.
        """
        if Store(self.path).id != self.id:
            raise StoreError(
                f"{self.path} has been replaced by another store; this run's results are not wanted any more"
            )

    def move_aside(self) -> Path:
        """Free the path, at once; the store is still there under the name that is given back."""
        aside = self.path.with_name(f".{self.path.name}{_ASIDE}{self.id}")
        self.path.rename(aside)
        return aside

    def require(self, identity: Mapping[str, Any]) -> None:
        """Check that this store was made by the same job.

        Raises:
            StoreMismatchError: saying what differs.
        """
        stored, now = _flat(self.about["identity"]), _flat(json.loads(json.dumps(identity)))
        differing = [
            f"{key} (stored: {stored.get(key, 'nothing')}, now: {now.get(key, 'nothing')})"
            for key in dict.fromkeys([*stored, *now])
            if stored.get(key) != now.get(key)
        ]
        if differing:
            raise StoreMismatchError(
                f"{self.path} was made by something else; these differ: {'; '.join(differing)}. Choose another path, "
                "or pass overwrite=True to replace it."
            )

    def read(self, path: str, region: tuple[slice, ...]) -> np.ndarray:
        """A region of an array."""
        return np.asarray(self._array(path, "r")[region])

    def write(self, path: str, region: tuple[slice, ...], block: np.ndarray) -> dict[str, Any]:
        """Write whole chunks of an array, down to the disk, and read them back.

        Returns:
            What a receipt says of it: the array, the region, and a checksum (CRC-32) of the block's bytes.

        Raises:
            StoreError: if what is read back is not what was written, or the disk refuses.
        """
        self.check_still_there()
        array = self._array(path, "r+")
        block = np.ascontiguousarray(block)
        if block.dtype != array.dtype:
            raise StoreError(f"{path} holds {array.dtype}, not {block.dtype}")
        try:
            array[region] = block
            for file in self._chunk_files(path, array, region):
                _sync(file)
        except OSError as error:
            raise StoreError(f"cannot write {path} in {self.path}: {error.strerror or error}") from error
        checksum = _checksum(block)
        if _checksum(np.asarray(array[region])) != checksum:
            raise StoreError(f"{path} in {self.path} reads back differently: the disk or its network is not reliable")
        bounds = [r.indices(n)[:2] for r, n in zip(region, array.shape, strict=False)]  # trailing axes are whole
        return {
            "array": path,
            "start": [start for start, _ in bounds],
            "stop": [stop for _, stop in bounds],
            "bytes": block.nbytes,
            "crc32": checksum,
        }

    def is_sound(self, receipt: Mapping[str, Any], results_only: bool = False) -> bool:
        """Whether all that a task wrote is still there as it was written: reads it, and compares the checksums.

        Args:
            receipt: of the task.
            results_only: never mind what only the run needed.
        """
        for written in receipt["written"]:
            if results_only and written["array"].startswith(f"{_WORK}/"):
                continue
            region = tuple(slice(*bounds) for bounds in zip(written["start"], written["stop"], strict=True))
            try:
                if _checksum(self.read(written["array"], region)) != written["crc32"]:
                    return False
            except Exception:  # truncated, unreadable, or its own checksum (CRC-32C) is wrong
                return False
        return True

    def leave_receipt(self, stage: str, task: int, receipt: Mapping[str, Any]) -> None:
        """Declare a task done; or done in part, if the receipt says that something is ``missing``.

        Call it last: after the data is written.
        """
        self.check_still_there()
        whole, part = self._receipt_file(stage, task), self._receipt_file(stage, task, _PART)
        _write_whole(part if receipt.get("missing") else whole, json.dumps(receipt).encode())
        if not receipt.get("missing"):
            part.unlink(missing_ok=True)

    def withdraw_receipt(self, stage: str, task: int) -> None:
        """Declare that a task is to be done again."""
        for kind in (".", _PART):
            self._receipt_file(stage, task, kind).unlink(missing_ok=True)
        _sync(self.path / _RECEIPTS)

    def withdraw_stages(self, prefix: str) -> None:
        """Declare that all tasks of some stages are to be done again."""
        for stage in self.stages:
            if stage.startswith(prefix):
                for task in self.done(stage, or_in_part=True):
                    self.withdraw_receipt(stage, task)

    def done(self, stage: str, or_in_part: bool = False) -> set[int]:
        """The tasks of a stage that are done; one directory listing."""
        names = os.listdir(self.path / _RECEIPTS) if (self.path / _RECEIPTS).exists() else []
        if or_in_part:
            names = [name.replace(_PART, ".") for name in names]
        numbers = (name.removeprefix(f"{stage}-").removesuffix(".json") for name in names if name.startswith(stage))
        return {int(number) for number in numbers if number.isdecimal()}

    def done_in_part(self, stage: str, missing: set[int]) -> set[int]:
        """The tasks of a stage that are done but for what is still missing: nothing can be added to them now."""
        parts = self.done(stage, or_in_part=True) - self.done(stage)
        receipts = {task: _read_json(self._receipt_file(stage, task, _PART)) for task in parts}
        return {task for task, r in receipts.items() if r and {start for start, _ in r["missing"]} <= missing}

    def receipt(self, stage: str, task: int, or_in_part: bool = False) -> dict[str, Any] | None:
        """The receipt of a task, or None if it is not done."""
        receipt = _read_json(self._receipt_file(stage, task))
        if receipt is None and or_in_part:
            receipt = _read_json(self._receipt_file(stage, task, _PART))
        return receipt

    @property
    def stages(self) -> list[str]:
        """The stages that some task is done of, or is to be."""
        names = [file.name for file in (self.path / _RECEIPTS).glob("[!.]*.json")]
        return list(dict.fromkeys([*self.about["tasks"], *sorted(name.rpartition("-")[0] for name in names)]))

    def any_receipt(self) -> dict[str, Any] | None:
        """The receipt of some task that is done; None if there is none."""
        files = (self.path / _RECEIPTS).glob("[!.]*.json")
        return next((receipt for receipt in map(_read_json, files) if receipt is not None), None)

    def _receipt_file(self, stage: str, task: int, kind: str = ".") -> Path:
        return self.path / _RECEIPTS / f"{stage}-{task:08d}{kind}json"

    def receipts(self, stage: str) -> list[dict[str, Any]]:
        """The receipts of a stage, in order of its tasks."""
        receipts = (self.receipt(stage, task) for task in sorted(self.done(stage)))
        return [receipt for receipt in receipts if receipt is not None]

    def progress(self) -> dict[str, tuple[int, int]]:
        """For each stage the number of tasks done, and of all."""
        return {stage: (len(self.done(stage)), total) for stage, total in self.about["tasks"].items()}

    @property
    def is_complete(self) -> bool:
        """Whether every task has left its receipt."""
        return all(done >= total for done, total in self.progress().values())

    # What a run keeps beside the results while it lasts.

    def put_input(self, content: str, name: str, n_rows: int, blocks: Iterator[np.ndarray]) -> zarr.Array[Any]:
        """Write an input that lived in memory, so that workers, also restarted ones, find it.

        It appears whole or not at all. What is there already is compared with its checksums, and kept: tasks of a
        killed client may still be reading it.

        Args:
            content: the fingerprint of the data that it is a part of.
            name: which part.
            n_rows: number of samples.
            blocks: consecutive ranges of them.
        """
        folder = self.work_file(content)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / name).exists() and not _is_sound_input(folder / name):
            shutil.rmtree(folder / name)
        if not (folder / name).exists():
            first = next(blocks)
            made = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder))
            try:
                _write_input(made, n_rows, itertools.chain([first], blocks), first)
                made.rename(folder / name)
                _sync(folder)
            except OSError as error:
                shutil.rmtree(made, ignore_errors=True)
                if not (folder / name).exists():  # else another process was faster
                    raise StoreError(f"cannot write {folder / name}: {error.strerror or error}") from error
        return zarr.open_array(str(folder / name), mode="r")

    def work_file(self, name: str) -> Path:
        """Where a file that the run needs is, or would be."""
        return self.path / _WORK / name

    def put_file(self, name: str, content: bytes, once: bool = False) -> Path:
        """Write a file that the run needs; with ``once``, only if there is none."""
        file = self.work_file(name)
        _write_whole(file, content, once)
        return file

    def put_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write plain values that the run needs."""
        self.put_file(name, json.dumps(values).encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read them; None if they were never written."""
        return _read_json(self.work_file(name))

    def drop_files(self, folder: str, keep: str) -> None:
        """Remove the files of a folder that the run has no use for any more, all but one."""
        for file in self.work_file(folder).iterdir():
            if file.name != keep:
                file.unlink(missing_ok=True)

    def add(self, specs: Sequence[ArraySpec]) -> None:
        """Make arrays that could not be foreseen when the store was made."""
        group = zarr.open_group(str(self.path), mode="r+", use_consolidated=False)
        for spec in specs:
            if not (self.path / spec.path / "zarr.json").exists():
                _add(group, spec)

    def restore_work(self, specs: Sequence[ArraySpec]) -> None:
        """Make the arrays again that only the run needs, if they are gone: a finished store is to be mended."""
        self.add([spec for spec in specs if spec.path.startswith(f"{_WORK}/")])

    def drop_work(self) -> None:
        """Forget what only the run needed: the results are complete."""
        shutil.rmtree(self.path / _WORK, ignore_errors=True)

    def _array(self, path: str, mode: Literal["r", "r+"]) -> zarr.Array[Any]:
        # A chunk that is all fill value (a part that is missing, say) is a chunk like any other. (open_array takes a
        # config, and ignores it.)
        return zarr.open_array(str(self.path / path), mode=mode).with_config({"write_empty_chunks": True})

    def _chunk_files(self, path: str, array: zarr.Array[Any], region: tuple[slice, ...]) -> Iterator[Path]:
        ranges = []
        for axis, size in enumerate(array.shape):
            start, stop, _ = (region[axis] if axis < len(region) else slice(None)).indices(size)
            chunk = array.chunks[axis]
            if start % chunk or (stop % chunk and stop != size):
                raise StoreError(f"{path}: {region} is not made of whole chunks of {array.chunks}")
            ranges.append(range(start // chunk, -(-stop // chunk)))
        for index in itertools.product(*ranges):
            yield self.path.joinpath(path, "c", *map(str, index))


def _write_input(folder: Path, n_rows: int, blocks: Iterator[np.ndarray], first: np.ndarray) -> None:
    array = zarr.create_array(
        str(folder),
        shape=(n_rows, *first.shape[1:]),
        chunks=(min(len(first), 1024), *first.shape[1:]),
        dtype=first.dtype,
        compressors=[Crc32cCodec()],
        overwrite=True,
        fill_value=_strange(first.dtype),
        config={"write_empty_chunks": True},  # zeros are data, and a chunk that is not there is none
    )
    start = 0
    for block in blocks:
        array[start : start + len(block)] = block
        start += len(block)
    for file in [f for f in folder.rglob("*") if f.is_file()]:
        _sync(file)


def _strange(dtype: np.dtype[Any]) -> Any:
    """What a chunk that was lost reads as: nothing that a model or a loss takes, where the type has such a number."""
    if dtype.kind == "f":
        return dtype.type("nan")
    return np.iinfo(dtype).min if dtype.kind == "i" else np.zeros((), dtype).item()


def _is_sound_input(folder: Path) -> bool:
    """Whether all chunks are there, and as they were written."""
    try:
        array = zarr.open_array(str(folder), mode="r")
        rows = array.chunks[0]
        for start in range(0, array.shape[0], rows):
            _ = array[start : start + rows]
    except Exception:  # its own checksum (CRC-32C) is wrong, or it is truncated
        return False
    return sum(1 for file in (folder / "c").rglob("*") if file.is_file()) == array.nchunks


def _lay_out(
    folder: Path, specs: Sequence[ArraySpec], coordinates: Mapping[str, np.ndarray], about: dict[str, Any]
) -> None:
    group = zarr.create_group(str(folder), zarr_format=3, overwrite=True, attributes={ATTRIBUTE: about})
    for dim, values in coordinates.items():
        index = group.create_array(
            dim,
            shape=values.shape,
            chunks=(min(len(values), 1 << 20),),
            dtype=values.dtype.name if values.dtype.kind in "iuf" else str,
            dimension_names=(dim,),
            compressors=None,
        )
        index[:] = values
    passing = [spec for spec in specs if spec.path.startswith(f"{_WORK}/")]
    for spec in specs:
        if spec not in passing:
            _add(group, spec)
    with warnings.catch_warnings():
        # Consolidated metadata is an extension of the Zarr 3 specification; xarray looks for it and warns without.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(str(folder))
    for spec in passing:  # nobody shall look for them later
        _add(group, spec)


def _add(group: zarr.Group, spec: ArraySpec) -> None:
    group.create_array(
        spec.path,
        shape=spec.shape,
        chunks=spec.chunks,
        dtype=spec.dtype,
        fill_value=float("nan") if spec.dtype.startswith("f") else -1,  # not computed yet; no chunk equals it
        filters=None,
        compressors=[Crc32cCodec()],  # scores do not compress, but a flipped bit must not be read in silence
        dimension_names=spec.dims,
        attributes=dict(spec.attributes),
    )


def _write_whole(file: Path, content: bytes, once: bool = False) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut.

    Args:
        file: where.
        content: what.
        once: leave what is there already, also if another process is writing it now.

    Raises:
        StoreError: if the disk refuses.
    """
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if once:
            with suppress(FileExistsError):
                os.link(temporary, file)
            os.unlink(temporary)
        else:
            os.replace(temporary, file)
        _sync(file.parent)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise StoreError(f"cannot write {file}: {error.strerror or error}") from error


def _read_json(file: Path) -> dict[str, Any] | None:
    """Plain values; None if they are not there, or not readable (a file system may lose what was written last)."""
    try:
        values: dict[str, Any] = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return values


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(block: np.ndarray) -> int:
    raw: Any = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
    return zlib.crc32(raw)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}
