"""`Plan`: how a run is cut into tasks, and what each needs. Integers only, made before any work.

The order of work: the factors of each test chunk, once, into the store; then one *strip* per training chunk: its
gradients, computed once, against all test chunks, whose factors are read back one tile at a time. The number of strips
grows with the training set only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import dask.utils
from dask.utils import format_bytes

from outfluence.errors import PlanError

MIB = 1 << 20

#: What a process grows by beyond its arrays once it computes: thread buffers, code loaded late, allocator slack.
_RUNTIME_BYTES = 160 * MIB
#: Copies of a batch's gradients while they are made, checked and laid out; and while an inverse is applied to them.
_GRADIENT_COPIES, _INVERSE_COPIES = 3, 4
#: Vectors that an iteration keeps for each right-hand side: solution, residual, directions, their images, and copies.
_SOLVE_COPIES = 14
#: Activations of a batch, forward and backward, as multiples of what one sample keeps for its backward pass.
ACTIVATION_COPIES = 4
#: A block of results: computed, checked, encoded, read back.
_BLOCK_COPIES = 4
#: The samples of a strip: read, and made tensors.
_SAMPLE_COPIES = 2
#: A tile of factors: read, decoded and aligned.
_TILE_COPIES = 3
#: Chunks no larger than this: enough for matrix products to be fast, and for chunk files of some 16 MiB.
_MAX_TEST, _MAX_TRAIN, _MAX_BATCH = 1024, 4096, 256
#: Small jobs are cut at least so often, to share the work and to lose little.
_MIN_TEST_TASKS, _MIN_TRAIN_TASKS = 4, 16


@dataclass(frozen=True)
class Work:
    """What is to be computed, in numbers.

    Attributes:
        n_test: test samples; 0 if only self-influences are wanted.
        n_train: training samples; 0 if only factors are wanted.
        arrays: what a row is stored as: the width of each array, by name.
        itemsize: bytes of one number.
        n_parameters: numbers of one gradient.
        features: shape of a training sample's features in perturbation mode, else empty.
        directions: in perturbation mode how many factors are differentiated at once; else 0.
        self_influences: whether the influence of each training sample on itself is wanted.
        model_bytes: what a worker holds all the time: model and inverse.
        activation_bytes: what one sample keeps for its backward pass.
        batch_size: samples at once through the model, if the user has an opinion.
        sample_bytes: bytes of one training sample as it is read.
        solves: whether factors are computed by passes over the data of the fit, for all samples of a chunk at once.
        vectors: with how many vectors a batch of such a pass is multiplied at once.
        kept_bytes: what is kept between such passes.
    """

    n_test: int
    n_train: int
    arrays: Mapping[str, int]
    itemsize: int
    n_parameters: int
    features: tuple[int, ...] = ()
    directions: int = 0
    self_influences: bool = False
    model_bytes: int = 0
    activation_bytes: int = 0
    batch_size: int | None = None
    sample_bytes: int = 0
    solves: bool = False
    vectors: int = 0
    kept_bytes: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return sum(self.arrays.values()) * self.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one gradient."""
        return self.n_parameters * self.itemsize


@dataclass(frozen=True)
class Stage:
    """Tasks of one kind, each a range of samples.

    Attributes:
        name: "factors" (ranges of test samples) or "scores" (ranges of training samples).
        n_samples: samples in all.
        chunk: samples per task; the last may have fewer.
    """

    name: str
    n_samples: int
    chunk: int

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return -(-self.n_samples // self.chunk)

    def samples(self, task: int) -> slice:
        """The samples of a task."""
        return slice(task * self.chunk, min((task + 1) * self.chunk, self.n_samples))


@dataclass(frozen=True)
class Plan:
    """Chunk sizes, order of work, and projected memory.

    Attributes:
        work: what is computed.
        test_chunk: test samples per task of the factors, and per tile of a strip.
        train_chunk: training samples per strip.
        batch_size: samples at once through the model.
        memory_limit: bytes above what a worker takes after importing torch.
        holds_factors: whether a worker keeps all factors between strips; else it reads them again for each.
    """

    work: Work
    test_chunk: int
    train_chunk: int
    batch_size: int
    memory_limit: int
    holds_factors: bool = False

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, in order."""
        work = self.work
        factors = Stage("factors", work.n_test, self.test_chunk)
        scores = Stage("scores", work.n_train, self.train_chunk)
        return tuple(stage for stage in (factors, scores) if stage.n_samples)

    @property
    def test_tiles(self) -> list[slice]:
        """The test samples of each tile of a strip."""
        stage = Stage("factors", self.work.n_test, self.test_chunk)
        return [stage.samples(i) for i in range(stage.n_tasks)]

    def memory(self, stage: str) -> dict[str, int]:
        """Projected peak of a task, in bytes above the import baseline, by part."""
        work = self.work
        per_sample = _GRADIENT_COPIES * work.gradient_bytes + ACTIVATION_COPIES * work.activation_bytes
        parts = {"runtime": _RUNTIME_BYTES, "model and inverse": work.model_bytes}
        if stage == "factors":
            return parts | {
                "batch": self.batch_size * per_sample,
                "inverse": self._inverse_bytes(self.test_chunk if work.solves else self.batch_size),
                "factors of a chunk": 2 * self.test_chunk * work.row_bytes,
            }
        held = max(0, work.n_test - self.test_chunk) if self.holds_factors else 0
        factors = (_TILE_COPIES * self.test_chunk + held) * work.row_bytes if work.n_test else 0
        samples = _SAMPLE_COPIES * self.train_chunk * work.sample_bytes
        block = _BLOCK_COPIES * self.test_chunk * self.train_chunk * self.score_bytes if work.n_test else 0
        selves = self._inverse_bytes(self.batch_size) if work.self_influences else 0
        if work.directions:
            derivatives = ACTIVATION_COPIES * work.activation_bytes + 3 * self.score_bytes
            batch = self.batch_size * min(self.test_chunk, work.directions) * derivatives
            batch += work.directions * work.gradient_bytes
            if work.row_bytes != work.gradient_bytes:  # as influence factors
                factors += 2 * self.test_chunk * work.gradient_bytes
            return parts | {
                "batch": max(batch, self.batch_size * per_sample + selves if selves else 0),
                "samples of a chunk": samples,
                "factors": factors,
                "score block": block,
            }
        rows = 0 if work.row_bytes == work.gradient_bytes else 2 * self.batch_size * work.row_bytes
        return parts | {
            "batch": self.batch_size * per_sample + rows + selves,
            "samples of a chunk": samples,
            "gradients of a chunk": self.train_chunk * work.row_bytes if work.n_test else 0,
            "factors": factors,
            "score block": block,
        }

    def _inverse_bytes(self, n: int) -> int:
        """What applying the inverse to n gradients takes."""
        work = self.work
        if not work.solves:
            return _INVERSE_COPIES * n * work.gradient_bytes
        products = self.batch_size * work.vectors * ACTIVATION_COPIES * work.activation_bytes
        pass_ = max(products, self.batch_size * _GRADIENT_COPIES * work.gradient_bytes)
        return _SOLVE_COPIES * n * work.gradient_bytes + pass_ + work.kept_bytes

    @property
    def score_bytes(self) -> int:
        """Bytes of the score of one test and one training sample: one number, or one for each feature."""
        size = self.work.itemsize
        for n in self.work.features:
            size *= n
        return size

    @property
    def peak(self) -> int:
        """The largest projected peak of any task, in bytes."""
        return max(sum(self.memory(stage.name).values()) for stage in self.stages)

    @property
    def bytes_written(self) -> int:
        """Factors, scores and self-influences in the store."""
        work = self.work
        selves = work.n_train * work.itemsize if work.self_influences else 0
        return work.n_test * work.row_bytes + work.n_test * work.n_train * self.score_bytes + selves

    @property
    def bytes_read(self) -> int:
        """Factors read back: once for each strip, or once for each worker that holds them."""
        work = self.work
        strips = -(-work.n_train // self.train_chunk) if work.n_train else 0
        return work.n_test * work.row_bytes * (min(strips, 1) if self.holds_factors else strips)

    def to_json(self) -> dict[str, Any]:
        """As plain values; `Plan.from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """A plan written by `to_json`."""
        work = values["work"] | {"features": tuple(values["work"]["features"])}
        return cls(**(values | {"work": Work(**work)}))

    def __str__(self) -> str:
        work = self.work
        lines = [
            f"Plan: {work.n_test:,} test x {work.n_train:,} training samples, rows of {format_bytes(work.row_bytes)}"
        ]
        for stage in self.stages:
            memory = self.memory(stage.name)
            lines.append(
                f"  {stage.name}: {stage.n_tasks:,} tasks of {stage.chunk:,} samples, "
                f"projected peak {format_bytes(sum(memory.values()))} a worker"
            )
            lines += [f"    {part:<22}{format_bytes(size):>10}" for part, size in memory.items()]
        lines.append(
            f"  limit {format_bytes(self.memory_limit)} a worker above its imports; batches of {self.batch_size}; "
            f"factor tiles of {self.test_chunk:,}"
        )
        often = " a worker" if self.holds_factors else ""
        lines.append(
            f"  writes {format_bytes(self.bytes_written)}, reads back {format_bytes(self.bytes_read)} of factors{often}"
            "; each gradient is computed once"
        )
        return "\n".join(lines)


def make_plan(work: Work, memory_limit: int, *, test_chunk: int | None = None, train_chunk: int | None = None) -> Plan:
    """Choose chunk sizes for a memory limit.

    Args:
        work: what is to be computed.
        memory_limit: bytes a worker may take above its imports.
        test_chunk: test samples per tile; None: chosen.
        train_chunk: training samples per strip; None: chosen.

    Raises:
        PlanError: if not even single samples fit, or the given chunks do not; it names the smallest limit that works.
    """
    for name, value in (("memory_limit", memory_limit), ("test_chunk", test_chunk), ("train_chunk", train_chunk)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise PlanError(f"{name} must be a whole number, at least 1, not {value!r}")
    given = {"test_chunk": test_chunk, "train_chunk": train_chunk}
    sizes: dict[str, Any] = {
        "test_chunk": test_chunk or _first_size(work.n_test, _MIN_TEST_TASKS, _MAX_TEST),
        "train_chunk": train_chunk or _first_size(work.n_train, _MIN_TRAIN_TASKS, _MAX_TRAIN),
        "batch_size": min(work.batch_size or _MAX_BATCH, _MAX_BATCH, max(work.n_test, work.n_train)),
    }
    sizes["test_chunk"] = min(sizes["test_chunk"], max(work.n_test, 1))
    sizes["train_chunk"] = min(sizes["train_chunk"], max(work.n_train, 1))

    def plan() -> Plan:
        return Plan(work, memory_limit=memory_limit, **sizes)

    # Halve what frees most, until it fits. Test tiles go before training chunks of the same weight: a smaller strip
    # means that all factors are read once more.
    while plan().peak > memory_limit:
        shrinkable = [name for name, size in sizes.items() if size > 1 and given.get(name) is None]
        if not shrinkable:
            raise PlanError(_refusal(plan(), given))
        sizes = min((_halved(sizes, name) for name in shrinkable), key=_peak_of(work, memory_limit))
    holding = replace(plan(), holds_factors=True)
    return holding if holding.peak <= memory_limit else plan()


def parse_bytes(text: str | int) -> int:
    """A number of bytes from "4GiB", "500MB", or a number.

    Raises:
        PlanError: if it is neither.
    """
    try:
        return int(dask.utils.parse_bytes(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise PlanError(f"memory_limit={text!r} is no size; write it like '4GiB' or '500MB'") from error


def _first_size(n: int, min_tasks: int, largest: int) -> int:
    return max(1, min(largest, max(-(-n // min_tasks), 64)))


def _halved(sizes: dict[str, Any], name: str) -> dict[str, Any]:
    return sizes | {name: -(-sizes[name] // 2)}


def _peak_of(work: Work, memory_limit: int) -> Callable[[dict[str, Any]], int]:
    return lambda sizes: Plan(work, memory_limit=memory_limit, **sizes).peak


def _refusal(plan: Plan, given: dict[str, int | None]) -> str:
    stage = max(plan.stages, key=lambda s: sum(plan.memory(s.name).values()))
    memory = plan.memory(stage.name)
    largest = max(memory, key=lambda part: memory[part])
    pinned = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
    knob = f"leave {pinned} to the plan" if pinned else "use fewer trainable parameters or smaller blocks"
    return (
        f"this does not fit into memory_limit {format_bytes(plan.memory_limit)}: a task of {stage.name!r} needs "
        f"{format_bytes(plan.peak)} at least, {format_bytes(memory[largest])} of it for {largest}. Set memory_limit to "
        f"{-(-plan.peak // MIB)}MiB or more, or {knob}."
    )
