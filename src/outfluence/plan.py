"""`Plan`: how a run is cut into tasks, and what each needs. Integers only, made before any work.

The order of work: the factors of each test chunk, once, into the store; then one *strip* per training chunk: its
gradients, computed once, against all test chunks, whose factors are read back one tile at a time. The number of strips
grows with the training set only. All results are made from the same blocks of scores, in the same pass. Where only the
strongest scores are wanted, a strip leaves its candidates, and a third stage merges those of all strips.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import dask.utils
from dask.utils import format_bytes, format_time

from outfluence.errors import PlanError

MIB = 1 << 20

#: What a process grows by beyond its arrays once it computes: thread buffers, code loaded late, allocator slack.
RUNTIME_BYTES = 160 * MIB
#: Copies of a batch's gradients while they are made, checked and laid out; and while an inverse is applied to them.
_GRADIENT_COPIES, _INVERSE_COPIES = 3, 4
#: Copies of the inputs and output gradients of layers while gradients are made of them, which count besides.
_FACTOR_COPIES = 2
#: Vectors that an iteration keeps for each right-hand side: solution, residual, directions, their images, and copies.
_SOLVE_COPIES = 14
#: Activations of a batch, forward and backward, as multiples of what one sample keeps for its backward pass.
ACTIVATION_COPIES = 4
#: A block of results: computed, checked, encoded, read back.
_BLOCK_COPIES = 4
#: A tile of factors: read, decoded and aligned.
_TILE_COPIES = 3
#: Chunks no larger than this: enough for matrix products to be fast, and for chunk files of some 16 MiB.
_MAX_TEST, _MAX_TRAIN, _MAX_BATCH = 1024, 4096, 256
#: Small jobs are cut at least so often, to share the work and to lose little; but not into chunks smaller than this:
#: so many samples, or fewer whose gradients would take so many bytes, but never fewer than that.
_MIN_TEST_TASKS, _MIN_TRAIN_TASKS, _MIN_CHUNK, _MIN_CHUNK_BYTES, _LEAST_CHUNK = 4, 16, 512, 256 * MIB, 64
#: More strips than this are joined, several chunks a task: a scheduler has better things to do.
_MAX_STRIPS = 20_000
#: Bytes of a score's position among the training samples.
_INDEX_BYTES = 8
#: Candidates of a strip: kept, and written; those of a merge: so far, a strip's, joined and sorted.
_CANDIDATE_COPIES, _MERGE_COPIES = 2, 8
#: Bytes of candidates of a strip in one file, about.
_CANDIDATE_FILE_BYTES = 4 * MIB


@dataclass(frozen=True)
class Work:
    """What is to be computed, in numbers.

    Attributes:
        n_test: test samples; 0 if only self-influences are wanted.
        n_train: training samples; 0 if only factors are wanted.
        arrays: what a left row is stored as: the width of each array, by name.
        itemsize: bytes of one number.
        n_parameters: numbers of an influence factor, or of a dense gradient.
        right_numbers: numbers of a right row; 0: as many as of a left row.
        gradient_numbers: numbers of a gradient as it is computed; 0: as many as there are parameters.
        factor_bytes: of the inputs and output gradients of the layers for one sample, where gradients are made of them.
        workspace_bytes: what is formed at a time while rows are multiplied.
        features: shape of a training sample's features in perturbation mode, else empty.
        directions: in perturbation mode how many factors are differentiated at once; else 0.
        self_influences: whether the influence of each training sample on itself is wanted.
        matrix: whether all scores are wanted.
        top: how many of the highest scores of each test sample are wanted.
        bottom: how many of the lowest.
        groups: for how many groups of test samples the mean score is wanted.
        keeps_gradients: whether the rows of the training samples are kept.
        reads_gradients: whether they are read from another store, instead of being computed.
        source_rows: training samples that are decoded together, however few are read.
        read_copies: of training samples while they are read.
        test_bytes: bytes of one test sample, or of its given factors, as it is read.
        test_rows: test samples that are decoded together.
        test_copies: of test samples while they are read.
        fit_bytes: bytes of what is decoded together of the data of the fit, if it is read again.
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
    right_numbers: int = 0
    gradient_numbers: int = 0
    factor_bytes: int = 0
    workspace_bytes: int = 0
    features: tuple[int, ...] = ()
    directions: int = 0
    self_influences: bool = False
    matrix: bool = True
    top: int = 0
    bottom: int = 0
    groups: int = 0
    keeps_gradients: bool = False
    reads_gradients: bool = False
    source_rows: int = 1
    read_copies: int = 2
    test_bytes: int = 0
    test_rows: int = 1
    test_copies: int = 2
    fit_bytes: int = 0
    model_bytes: int = 0
    activation_bytes: int = 0
    batch_size: int | None = None
    sample_bytes: int = 0
    solves: bool = False
    vectors: int = 0
    kept_bytes: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one left row."""
        return sum(self.arrays.values()) * self.itemsize

    @property
    def right_bytes(self) -> int:
        """Bytes of one right row."""
        return self.right_numbers * self.itemsize or self.row_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one gradient, as it is computed."""
        return self.gradient_numbers * self.itemsize or self.dense_bytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of one influence factor, or of a gradient that is not factored."""
        return self.n_parameters * self.itemsize

    @property
    def score_bytes(self) -> int:
        """Bytes of the score of one test and one training sample: one number, or one for each feature."""
        return self.itemsize * math.prod(self.features)

    @property
    def strongest_bytes(self) -> int:
        """Bytes of the strongest scores of one test sample."""
        return (self.top + self.bottom) * (self.itemsize + _INDEX_BYTES)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each result in the store."""
        sizes = {
            "factors": self.n_test * self.row_bytes,
            "scores": self.n_test * self.n_train * self.score_bytes if self.matrix else 0,
            "strongest scores": self.n_test * self.strongest_bytes,
            "means of groups": self.groups * self.n_train * self.score_bytes,
            "self-influences": self.n_train * self.itemsize if self.self_influences else 0,
            "gradients": self.n_train * self.right_bytes if self.keeps_gradients else 0,
        }
        return {name: size for name, size in sizes.items() if size}


@dataclass(frozen=True)
class Stage:
    """Tasks of one kind, each a range of samples.

    Attributes:
        name: "factors" (ranges of test samples), "scores" (of training samples) or "strongest" (of test samples).
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
class Costs:
    """What a short calibration measured on one process of this machine; estimates, for times and advice only.

    Attributes:
        factor_flops: floating-point operations of the factor of one test sample; 0 where they depend on iterations.
        factor_seconds: and the time; likewise.
        gradient_flops: of the rows of one training sample.
        gradient_seconds: and the time.
        self_seconds: time of one self-influence.
        dot_flops: of the dot product of one left and one right row.
        dot_seconds: and the time.
        bytes_per_second: written to a file system, and synced.
        n_workers: processes that share the work.
    """

    factor_flops: int
    factor_seconds: float
    gradient_flops: int
    gradient_seconds: float
    self_seconds: float
    dot_flops: int
    dot_seconds: float
    bytes_per_second: float
    n_workers: int = 1


@dataclass(frozen=True)
class Plan:
    """Chunk sizes, order of work, and projected memory. Prints as a table, in a notebook too.

    Attributes:
        work: what is computed.
        test_chunk: test samples per task of the factors, and per tile of a strip.
        train_chunk: training samples per chunk of the results; a strip is one of them, or several, one after another.
        batch_size: samples at once through the model.
        memory_limit: bytes above what a worker takes after importing torch.
        holds_factors: whether a worker keeps all factors between strips; else it reads them again for each.
        costs: what a calibration measured, if there was one.
    """

    work: Work
    test_chunk: int
    train_chunk: int
    batch_size: int
    memory_limit: int
    holds_factors: bool = False
    costs: Costs | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, in order."""
        work = self.work
        stages = (
            Stage("factors", work.n_test, self.test_chunk),
            Stage("scores", work.n_train, self.train_chunk * max(1, -(-self.n_chunks // _MAX_STRIPS))),
            Stage("strongest", work.n_test if work.strongest_bytes else 0, self.candidate_chunk),
        )
        return tuple(stage for stage in stages if stage.n_samples)

    @property
    def n_tasks(self) -> int:
        """Tasks of all stages."""
        return sum(stage.n_tasks for stage in self.stages)

    @property
    def test_tiles(self) -> list[slice]:
        """The test samples of each tile of a strip."""
        stage = Stage("factors", self.work.n_test, self.test_chunk)
        return [stage.samples(i) for i in range(stage.n_tasks)]

    @property
    def n_chunks(self) -> int:
        """Chunks of training samples."""
        return -(-self.work.n_train // self.train_chunk)

    @property
    def train_chunks(self) -> list[slice]:
        """The training samples of each chunk."""
        stage = Stage("scores", self.work.n_train, self.train_chunk)
        return [stage.samples(i) for i in range(stage.n_tasks)]

    @property
    def candidate_chunk(self) -> int:
        """Test samples whose strongest scores are merged, and kept by a strip, together: whole tiles."""
        work = self.work
        per_file = _CANDIDATE_FILE_BYTES // max(1, self.kept_bytes)
        shared = max(_MAX_TEST, -(-work.n_test // _MIN_TEST_TASKS))
        return max(1, min(per_file, shared, work.n_test) // self.test_chunk) * self.test_chunk

    @property
    def kept_bytes(self) -> int:
        """Bytes of the strongest scores that a chunk of training samples keeps for one test sample."""
        work = self.work
        kept = min(work.top, self.train_chunk) + min(work.bottom, self.train_chunk)
        return kept * (work.itemsize + _INDEX_BYTES)

    def memory(self, stage: str) -> dict[str, int]:
        """Projected peak of a task, in bytes above the import baseline, by part."""
        work = self.work
        per_sample = _GRADIENT_COPIES * work.gradient_bytes + ACTIVATION_COPIES * work.activation_bytes
        per_sample += _FACTOR_COPIES * work.factor_bytes
        parts = {"runtime": RUNTIME_BYTES, "model and inverse": work.model_bytes}
        if work.workspace_bytes:
            parts["workspace"] = work.workspace_bytes
        if stage == "factors":
            return parts | {
                "batch": self.batch_size * per_sample,
                "inverse": self._inverse_bytes(self.test_chunk if work.solves else self.batch_size),
                "samples of a chunk": (work.test_copies * self.test_chunk + 3 * (work.test_rows - 1)) * work.test_bytes,
                "factors of a chunk": 2 * self.test_chunk * work.row_bytes,
            }
        if stage == "strongest":
            merged = work.strongest_bytes + self.kept_bytes
            # What was held for the strips is let go, but the process need not have given it back.
            before = work.n_test * work.row_bytes if self.holds_factors else 0
            return parts | {"factors": before, "candidates": _MERGE_COPIES * self.candidate_chunk * merged}
        held = max(0, work.n_test - self.test_chunk) if self.holds_factors else 0
        factors = (_TILE_COPIES * self.test_chunk + held) * work.row_bytes if work.n_test else 0
        samples = work.read_copies * self.train_chunk * work.sample_bytes
        if work.source_rows > 1:  # whole chunks of the source, decoded and cut
            samples += 2 * (self.train_chunk + 2 * work.source_rows) * work.sample_bytes
        block = _BLOCK_COPIES * self.test_chunk * self.train_chunk * work.score_bytes if work.n_test else 0
        results = {
            "samples of a chunk": samples,
            "factors": factors,
            "score block": block,
            "candidates": _CANDIDATE_COPIES * self.candidate_chunk * self.kept_bytes,
            # Sums are in double precision; they become means in the type of the scores, and are written.
            "means of groups": work.groups * self.train_chunk * work.score_bytes * (8 // work.itemsize + _BLOCK_COPIES),
        }
        selves = self._inverse_bytes(self.batch_size) if work.self_influences else 0
        if work.directions:
            derivatives = ACTIVATION_COPIES * work.activation_bytes + 3 * work.score_bytes
            batch = self.batch_size * min(self.test_chunk, work.directions) * derivatives
            batch += work.directions * work.dense_bytes
            if work.row_bytes != work.dense_bytes:  # as influence factors
                results["factors"] += 2 * self.test_chunk * work.dense_bytes
            return parts | {"batch": max(batch, self.batch_size * per_sample + selves if selves else 0)} | results
        keeps_rows = work.n_test or work.keeps_gradients
        if work.reads_gradients:
            batch = 0
        else:
            rows = 0 if work.right_bytes == work.dense_bytes else 2 * self.batch_size * work.right_bytes
            batch = self.batch_size * per_sample + rows + selves
        copies = (
            3 if work.keeps_gradients or work.reads_gradients else 1
        )  # written or decoded, and read back or laid out
        gradients = {"gradients of a chunk": copies * self.train_chunk * work.right_bytes if keeps_rows else 0}
        return {part: size for part, size in (parts | {"batch": batch} | gradients | results).items() if size}

    def _inverse_bytes(self, n: int) -> int:
        """What applying the inverse to n gradients takes."""
        work = self.work
        if not work.solves:
            is_dense = work.row_bytes == work.dense_bytes
            return _INVERSE_COPIES * n * (work.dense_bytes if is_dense else max(work.row_bytes, work.gradient_bytes))
        products = self.batch_size * work.vectors * ACTIVATION_COPIES * work.activation_bytes
        pass_ = max(products, self.batch_size * _GRADIENT_COPIES * work.dense_bytes)
        return _SOLVE_COPIES * n * work.dense_bytes + pass_ + work.kept_bytes + 3 * work.fit_bytes

    @property
    def peak(self) -> int:
        """The largest projected peak of any task, in bytes; or of a worker that reads the model and the inverse."""
        loading = RUNTIME_BYTES + 2 * self.work.model_bytes
        return max(loading, *(sum(self.memory(stage.name).values()) for stage in self.stages))

    @property
    def candidate_bytes(self) -> int:
        """What strips leave for the merge of the strongest scores; it is removed when the run ends."""
        return self.n_chunks * self.work.n_test * self.kept_bytes

    @property
    def n_files(self) -> int:
        """Files of scores and of candidates in the store."""
        work, tiles = self.work, len(self.test_tiles)
        of_a_chunk = tiles * work.matrix + 2 * bool(work.top) * -(-work.n_test // self.candidate_chunk)
        of_a_chunk += 2 * bool(work.bottom) * -(-work.n_test // self.candidate_chunk)
        return self.n_chunks * of_a_chunk

    @property
    def bytes_written(self) -> int:
        """All that goes into the store; all of it is read back once, to be sure."""
        return sum(self.work.sizes.values()) + self.candidate_bytes

    @property
    def bytes_read(self) -> int:
        """Factors, once for each chunk of training samples or each worker that holds them; gradients; candidates."""
        work = self.work
        often = min(self.n_chunks, 1) if self.holds_factors else self.n_chunks
        gradients = work.n_train * work.right_bytes if work.reads_gradients else 0
        return work.n_test * work.row_bytes * often + gradients + self.candidate_bytes

    @property
    def flops(self) -> dict[str, int]:
        """Floating-point operations of each stage; without a calibration those of dot products only."""
        work, costs = self.work, self.costs
        per_pair = costs.dot_flops if costs else 2 * sum(work.arrays.values())
        products = work.n_test * work.n_train * per_pair
        if work.directions or not costs:  # derivatives by features: about two passes through the model for each score
            gradients = 2 * work.n_test * work.n_train * costs.gradient_flops if costs else 0
        else:
            gradients = 0 if work.reads_gradients else work.n_train * costs.gradient_flops
        flops = {"factors": work.n_test * costs.factor_flops if costs else 0, "scores": products + gradients}
        return {name: n for name, n in flops.items() if n}

    @property
    def seconds(self) -> dict[str, float]:
        """About how long each stage takes; empty without a calibration."""
        work, costs = self.work, self.costs
        if costs is None:
            return {}
        sizes, rate = work.sizes, costs.bytes_per_second
        written = sum(size for name, size in sizes.items() if name not in ("factors", "strongest scores"))
        per_train = (0.0 if work.reads_gradients else costs.gradient_seconds) + (
            costs.self_seconds if work.self_influences else 0.0
        )
        if work.directions:
            per_train += 2 * work.n_test * costs.gradient_seconds
        products = work.n_test * work.n_train * costs.dot_seconds
        scores = work.n_train * per_train + products + (written + self.bytes_read + self.candidate_bytes) / rate
        seconds = {
            "factors": work.n_test * costs.factor_seconds + sizes.get("factors", 0) / rate,
            "scores": scores if work.n_train else 0.0,
            "strongest": 2 * self.candidate_bytes / rate,
        }
        return {stage.name: seconds[stage.name] / min(costs.n_workers, stage.n_tasks) for stage in self.stages}

    @property
    def seconds_of_gradients(self) -> tuple[float, float] | None:
        """To compute the rows of all training samples, and to read them back had they been kept; None if not known."""
        work, costs = self.work, self.costs
        if costs is None or not work.n_train or work.reads_gradients or work.directions:
            return None
        reading = work.n_train * work.right_bytes / costs.bytes_per_second
        return work.n_train * costs.gradient_seconds / costs.n_workers, reading / costs.n_workers

    def to_json(self) -> dict[str, Any]:
        """As plain values; `Plan.from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """A plan written by `to_json`.

        Raises:
            PlanError: if another version of this package wrote it.
        """
        work = values["work"] | {"features": tuple(values["work"]["features"])}
        try:
            costs = Costs(**values["costs"]) if values["costs"] else None
            return cls(**(values | {"work": Work(**work), "costs": costs}))
        except TypeError as error:
            raise PlanError(f"this plan was made by another version of outfluence ({error}): start again") from error

    def _lines(self) -> list[tuple[str, str]]:
        """What there is to say, as pairs of what and how much; a heading has no second part."""
        work = self.work
        lines = [
            (
                f"Plan: {work.n_test:,} test x {work.n_train:,} training samples, rows of "
                f"{format_bytes(work.row_bytes)}",
                "",
            )
        ]
        for stage in self.stages:
            memory = self.memory(stage.name)
            lines.append(
                (
                    f"{stage.name}: {stage.n_tasks:,} tasks of {stage.chunk:,} samples, projected peak "
                    f"{format_bytes(sum(memory.values()))} a worker",
                    "",
                )
            )
            lines += [(part, format_bytes(size)) for part, size in memory.items()]
        often = "once a worker" if self.holds_factors else f"{self.n_chunks:,} times"
        lines += [
            ("in all", ""),
            ("limit a worker", f"{format_bytes(self.memory_limit)} above its imports"),
            ("through the model", f"batches of {self.batch_size:,}"),
            ("a training gradient", "read from a store" if work.reads_gradients else "computed once"),
        ]
        if work.n_test and work.n_train:
            lines.append(("factor tiles", f"of {self.test_chunk:,} test samples, each read {often}"))
        lines += [(name, format_bytes(size)) for name, size in work.sizes.items()]
        lines.append(("written", f"{format_bytes(self.bytes_written)}, {self.n_files:,} files"))
        lines.append(("read back", format_bytes(self.bytes_read)))
        lines += [(f"FLOPs of {name}", f"{n:.1e}") for name, n in self.flops.items()]
        for name, seconds in self.seconds.items():
            known = name != "factors" or not work.solves
            lines.append((f"time of {name}", f"about {format_time(seconds)}" if known else "as iterations take"))
        if self.seconds_of_gradients and not work.keeps_gradients:
            compute, read = self.seconds_of_gradients
            size = format_bytes(work.n_train * work.right_bytes)
            lines.append(
                (
                    "keep the gradients?",
                    f"{size} would save later runs {format_time(compute)} and take {format_time(read)} to read",
                )
            )
        return lines

    def __str__(self) -> str:
        return "\n".join(
            f"    {what:<22}{how_much:>12}" if how_much else f"{'' if i == 0 else '  '}{what}"
            for i, (what, how_much) in enumerate(self._lines())
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(what)}</td><td>{html.escape(how_much)}</td></tr>"
            if how_much
            else f'<tr><th colspan="2" style="text-align:left">{html.escape(what)}</th></tr>'
            for what, how_much in self._lines()
        )
        return f"<table>{rows}</table>"


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
        if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__") or value < 1):
            raise PlanError(f"{name} must be a whole number, at least 1, not {value!r}")
    test_chunk, train_chunk = (None if n is None else int(n) for n in (test_chunk, train_chunk))
    given = {"test_chunk": test_chunk, "train_chunk": train_chunk}
    sizes: dict[str, Any] = {
        "test_chunk": test_chunk or _first_size(work.n_test, _MIN_TEST_TASKS, _MAX_TEST, work.dense_bytes),
        "train_chunk": train_chunk or _first_size(work.n_train, _MIN_TRAIN_TASKS, _MAX_TRAIN, work.dense_bytes),
        "batch_size": min(work.batch_size or _MAX_BATCH, _MAX_BATCH),
    }

    sizes["test_chunk"] = min(sizes["test_chunk"], max(work.n_test, 1))
    sizes["train_chunk"] = min(sizes["train_chunk"], max(work.n_train, 1))
    if not work.solves:  # there are passes over the data of the fit, too
        sizes["batch_size"] = min(sizes["batch_size"], max(sizes["test_chunk"], sizes["train_chunk"]))

    def plan() -> Plan:
        return Plan(work, memory_limit=memory_limit, **sizes)

    # Halve what frees most, until it fits. Test tiles go before training chunks of the same weight: a smaller strip
    # means that all factors are read once more.
    while plan().peak > memory_limit:
        shrinkable = [name for name, size in sizes.items() if size > 1 and given.get(name) is None]
        if not shrinkable:
            raise PlanError(_refusal(plan(), given))
        sizes = min((_halved(sizes, name) for name in shrinkable), key=_peak_of(work, memory_limit))
    if train_chunk is None and sizes["train_chunk"] > work.source_rows:  # decode each chunk of the source once
        sizes["train_chunk"] -= sizes["train_chunk"] % work.source_rows
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


def _first_size(n: int, min_tasks: int, largest: int, dense_bytes: int) -> int:
    least = max(_LEAST_CHUNK, min(_MIN_CHUNK, _MIN_CHUNK_BYTES // max(1, dense_bytes)))
    return max(1, min(largest, max(-(-n // min_tasks), least)))


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
