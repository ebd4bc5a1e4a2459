"""Which method predicts retraining, and what it costs: python benchmarks/fidelity.py [PROBLEM ...] [--store FOLDER].

For each problem (see `fidelity_problems.py`) models are trained on random halves of the training data, with several
seeds (`outfluence.fidelity.retrain`; kept in ``--store``, so that a second run trains nothing). For each method one
line of JSON: the linear datamodeling score (Park et al. 2023), which is the mean over test samples of the rank
correlation, over the halves, of the sum of the scores of a half's samples with the loss of the models trained on it;
with its 95% bootstrap interval. ``one``: of the scores of one model trained on all data; ``mean``: of their mean over
`MODELS` models of other seeds. `damping` is the regularization: a number; or a multiple of the mean eigenvalue of
EK-FAC, of all layers together or of each. `cpu` are CPU seconds for one model, from data in memory to scores in memory;
the first model is not counted (torch loads what it needs). `numbers` are those that a training sample is encoded to:
what a store that keeps gradients holds. `ceiling` is about what perfect scores would reach: models
of the same half differ, too. ``--peers``: those of kronfluence and TRAK besides, in virtual environments as `peers.py`
makes them.

Of images there is a second measurement: a tenth of the training labels is wrong, and lines tell how well the
self-influence of a training sample finds them (`auc`, the area under the ROC curve), and how many of them are among the
tenth and the fifth of the samples that rank highest (`tenth`, `fifth`). `learned` is how many of the wrong labels the
model gives itself.

``--table FILE`` turns lines that were kept into tables in Markdown, ``--picture FILE LINES`` into a picture.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from scipy.stats import rankdata

from fidelity_peers import peers_of, scores_of_peer
from fidelity_problems import PROBLEMS, MnistMlp
from outfluence import (
    ArnoldiInfluence,
    DirectInfluence,
    EkfacCgInfluence,
    EkfacInfluence,
    Problem,
    ProjectedInfluence,
    TracInInfluence,
)
from outfluence.analysis import detection_curve
from outfluence.fidelity import linear_datamodeling_score, mislabel_detection, random_subsets, retrain

MODELS = 5
#: Methods whose dampings are compared.
SWEPT = ("EK-FAC", "projected, PCA, 512, exact", "EK-FAC CG, rtol 0.3", "Gauss-Newton")


@dataclass(frozen=True)
class Damping:
    """A regularization: a number, or as many times the mean eigenvalue of all layers ("all"), or of each ("layer")."""

    factor: float
    of: str = ""

    def __call__(self, eigenvalues):
        """For a model with these eigenvalues: by layer, ``(P_layer,)``."""
        if self.of == "layer":
            return {layer: self.factor * values.mean().item() for layer, values in eigenvalues.items()}
        return self.factor * (torch.cat(list(eigenvalues.values())).mean().item() if self.of == "all" else 1)

    def __str__(self):
        return f"{self.factor:g}" + {"": "", "all": " of the mean", "layer": " of each mean"}[self.of]


@dataclass(frozen=True)
class Method:
    """What makes an influence model of a trained model, and the dampings to try."""

    name: str
    make: Callable
    dampings: Sequence[Damping]


def methods(problem, model):
    """Those that are not too expensive."""
    loss, gauss_newton = problem.loss, {"second_order_mode": "gauss_newton"}

    def projected(m, rank, projection, kernel):
        return ProjectedInfluence(m, loss, 1.0, rank, projection, kernel)

    n_parameters, outputs = sum(p.numel() for p in model.parameters()), model(problem.test[0][:1]).numel()
    absolute = [Damping(factor) for factor in (1e-4, 1e-3, 1e-2)]
    of_all = [Damping(factor, "all") for factor in (1e-3, 1e-2, 0.1, 1, 10)]
    of_few = [Damping(factor, "all") for factor in (1, 10, 100, 1000)]
    of_each = [Damping(factor, "layer") for factor in (1e-3, 1e-2, 0.1, 1, 10)]
    yield Method("gradients alone", lambda m: TracInInfluence(m, loss, [m.state_dict()]), [None])
    yield Method("K-FAC", lambda m: EkfacInfluence(m, False, 1.0, loss=loss), of_all[1:])
    some = [Damping(0.3, "all")]
    yield Method("EK-FAC", lambda m: EkfacInfluence(m, True, 1.0, loss=loss), absolute + of_all + some + of_each)
    if outputs <= 10:
        exact = {"loss": loss, "fisher": "exact"}
        yield Method("EK-FAC, exact Fisher", lambda m: EkfacInfluence(m, True, 1.0, **exact), of_all[1:4])
        for part in (10, 20):
            yield Method(
                f"EK-FAC, exact Fisher, rank P/{part}",
                lambda m, rank=n_parameters // part: EkfacInfluence(m, True, 1.0, **exact, rank=rank),
                of_all[1:4],
            )
        dampings = [*absolute[2:], *of_all[2:], Damping(100, "all")]
        for rank in (512, 2048):
            yield Method(f"projected, PCA, {rank}, exact", lambda m, k=rank: projected(m, k, "pca", "exact"), dampings)
        yield Method("projected, two-sided, 2048, exact", lambda m: projected(m, 2048, "two_sided", "exact"), of_few)
    yield Method("projected, PCA, 2048", lambda m: projected(m, 2048, "pca", "sampled"), of_all[2:] + of_few[2:])
    yield Method("projected, sparse, 2048", lambda m: projected(m, 2048, "sjlt", "sampled"), of_few)
    if problem.loss is F.cross_entropy:
        yield Method("projected, Gaussian, 512, of TRAK", lambda m: projected(m, 512, "gaussian", "margin"), of_few)
    yield Method(
        "EK-FAC, tolerance 0.1", lambda m: EkfacInfluence(m, True, 1e-4, loss=loss, tolerance=0.1), of_all[2:3]
    )
    small, is_direct_cheap = n_parameters * problem.n_train < 1e7, n_parameters < 6000
    more = [*absolute[1:], *of_all, Damping(100, "all")]
    if small or (not is_direct_cheap and outputs <= 10):
        cg = more if small else of_all[3:]
        yield Method("EK-FAC CG, rtol 0.3", lambda m: EkfacCgInfluence(m, loss, 1.0, rtol=0.3), cg)
    if is_direct_cheap:
        yield Method("Gauss-Newton", lambda m: DirectInfluence(m, loss, 1.0, **gauss_newton), more)
    if small:
        yield Method("EK-FAC CG, rtol 0.1", lambda m: EkfacCgInfluence(m, loss, 1.0, rtol=0.1), of_all[2:])
        yield Method(
            "Arnoldi, rank 100",
            lambda m: ArnoldiInfluence(m, loss, 1.0, rank=100, tol=1e-2, **gauss_newton),
            absolute[1:] + of_all[2:],
        )


def eigenvalues_of(model, problem):
    """Those of EK-FAC, by layer."""
    inverse = EkfacInfluence(model, True, 1.0, loss=problem.loss).fit(problem.train).inverse
    found = {layer: [] for layer in inverse.sections}
    for name, values in inverse.eigenvalues.items():
        found[inverse.units[name].matrix.block].append(values.flatten())
    return {layer: torch.cat(values) for layer, values in found.items()}


def scores_of(method, problem, model, eigenvalues):
    """For each damping the scores, the CPU seconds that they take, and the numbers that a training sample takes."""
    start = time.process_time()
    fitted = method.make(model).fit(problem.train)
    fit = time.process_time() - start
    one = [part[:1] for part in problem.train]
    for damping in method.dampings:
        start = time.process_time()
        damped = fitted if damping is None else fitted.with_regularization(damping(eigenvalues))
        scores = damped.influences(*problem.test, *problem.train)
        cpu = fit + time.process_time() - start
        rows = damped.right_rows(damped.gradient_rows(*one))
        yield scores.numpy(), cpu, sum(array.shape[1] for array in rows.arrays.values())


def ceiling(losses):
    """The correlation of the mean over seeds with that over infinitely many, from pairs of seeds (Spearman, Brown)."""
    n_seeds, ranks = losses.shape[1], rankdata(losses, axis=0)
    pairs = [np.corrcoef(of_one.T)[np.triu_indices(n_seeds, 1)] for of_one in np.moveaxis(ranks, 2, 0)]
    between = np.mean(pairs)
    return round(float(np.sqrt(n_seeds * between / (1 + (n_seeds - 1) * between))), 3)


def predictions(problem, losses, with_peers):
    """A line for each method and damping."""
    subsets = random_subsets(problem.n_train, problem.n_subsets)
    models = [problem(np.arange(problem.n_train), seed) for seed in range(MODELS)]
    eigenvalues = [eigenvalues_of(model, problem) for model in models]

    def line(method, damping, one, mean, cpu, numbers=None):
        scores = {"one": one, "mean": mean}
        found = {name: str(linear_datamodeling_score(s, subsets, losses)) for name, s in scores.items()}
        found |= {"cpu": round(float(cpu), 3), "numbers": numbers}
        return {"method": method, "damping": str(damping or ""), **found}

    for method in methods(problem, models[0]):
        of_models = [scores_of(method, problem, *of_model) for of_model in zip(models, eigenvalues, strict=True)]
        for damping, *found in zip(method.dampings, *of_models, strict=True):
            scores, cpu, numbers = zip(*found, strict=True)
            yield line(method.name, damping, scores[0], np.mean(scores, 0), np.mean(cpu[1:]), numbers[0])
    for peer in peers_of(problem) if with_peers else ():
        yield line(peer.name, peer.damping, *scores_of_peer(peer, problem, models))


#: How models are trained on wrong labels.
TRAININGS = {"as above": {}, "5 epochs": {"epochs": 5}, "decay 0.01": {"decay": 1e-2}}


def detections(problem, training):
    """With a tenth of the labels wrong, a line for each way to suspect samples."""
    (x, y), generator = problem.train, np.random.default_rng(0)
    is_wrong = np.zeros(problem.n_train, dtype=bool)
    is_wrong[generator.choice(problem.n_train, problem.n_train // 10, replace=False)] = True
    others = torch.from_numpy(generator.integers(1, 10, problem.n_train))
    noisy = copy.copy(problem)
    noisy.train = x, torch.where(torch.from_numpy(is_wrong), (y + others) % 10, y)
    vars(noisy).update(TRAININGS[training])
    models = [noisy(np.arange(problem.n_train), seed) for seed in range(MODELS)]
    learned = np.mean([(m(x).argmax(1) == noisy.train[1]).numpy()[is_wrong].mean() for m in models])

    def line(method, damping, suspicions):
        found = {"method": method, "damping": str(damping or ""), "training": training}
        for name, suspicion in {"one": suspicions[0], "mean": np.mean(suspicions, 0)}.items():
            curve = detection_curve(suspicion, is_wrong)
            found[f"auc_{name}"] = str(mislabel_detection(suspicion, is_wrong))
            found |= {
                f"{part}_{name}": round(float(curve[problem.n_train // n - 1]), 3)
                for part, n in (("tenth", 10), ("fifth", 5))
            }
        return found | {"learned": round(float(learned), 3)}

    problems = [Problem(model, problem.loss) for model in models]
    yield line("loss", None, [p.losses(*noisy.train).numpy() for p in problems])
    rows = [p.gradients(*noisy.train) for p in problems]
    yield line("gradient norm", None, [r.dot_each(r).numpy() for r in rows])
    eigenvalues = [eigenvalues_of(model, noisy) for model in models]
    fitted = [EkfacInfluence(model, True, 1.0, loss=problem.loss).fit(noisy.train) for model in models]
    for damping in (Damping(factor, of) for of in ("all", "layer") for factor in (1e-3, 1e-2, 0.1, 1, 10)):
        damped = [f.with_regularization(damping(e)) for f, e in zip(fitted, eigenvalues, strict=True)]
        yield line("EK-FAC", damping, [d.self_influences(*noisy.train).numpy() for d in damped])


def read(path):
    """Lines that were kept: those of predictions, those of detections."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [line for line in lines if "cpu" in line], [line for line in lines if "learned" in line]


def value(estimate):
    """An estimate without its interval."""
    return float(str(estimate).split()[0])


def best(lines, number, *keys):
    """Of the lines that agree in the keys the one with the highest number: that of the best damping."""
    found = {}
    for line in lines:
        key = tuple(line[name] for name in keys)
        if key not in found or value(line[number]) > value(found[key][number]):
            found[key] = line
    return list(found.values())


def markdown(head, rows):
    rows = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)


def tables(predicted, detected):
    """The best damping of each method; how much the damping matters; and what finds wrong labels."""
    columns = ["problem", "method", "damping", "one", "mean", "cpu", "numbers"]
    head = ["problem", "method", "damping", "one model", "mean of five", "CPU s", "numbers a sample"]
    rows = best(predicted, "one", *columns[:2])
    yield markdown(head, [[line.get(name) or "" for name in columns] for line in rows])
    problems, sweeps = {line["problem"]: line["ceiling"] for line in predicted}, {}
    for line in predicted:
        if line["method"] in SWEPT:
            row = sweeps.setdefault((line["method"], line["damping"]), {})
            row[line["problem"]] = f"{value(line['one']):.2f} / {value(line['mean']):.2f}"
    yield markdown(
        ["method", "damping", *(f"{problem} (at most {most})" for problem, most in problems.items())],
        [[*key, *(row.get(problem, "") for problem in problems)] for key, row in sweeps.items()],
    )
    columns = ["problem", "training", "learned", "method", "damping"]
    detected = best(detected, "tenth_one", *columns[:4])
    numbers = [f"{name}_{which}" for which in ("one", "mean") for name in ("auc", "tenth", "fifth")]
    head = ["ROC AUC", "in the first tenth", "in the first fifth"]
    yield markdown(
        [*columns, *head, *(f"{name}, mean of five" for name in head)],
        [[line[name] for name in columns + numbers] for line in detected],
    )


def picture(predicted):
    """Fidelity against cost, a panel for each problem; each method at its best damping."""
    problems = list(dict.fromkeys(line["problem"] for line in predicted))
    predicted = best(predicted, "one", "problem", "method")
    names = list(dict.fromkeys(line["method"] for line in predicted))
    rows = len(problems) // 3 + 1  # the last panel is for the names
    figure = Figure(figsize=(11, 3.6 * rows), layout="constrained")
    *panels, last = figure.subplots(rows, 3).flat
    for axes, problem in zip(panels, problems, strict=False):
        for line in predicted:
            if line["problem"] == problem:
                number = names.index(line["method"])
                style = {"color": f"C{number % 10}", "marker": "os^D"[number // 10]}
                one, mean = value(line["one"]), value(line["mean"])
                axes.plot([line["cpu"]] * 2, [one, mean], color=style["color"], linewidth=1)
                axes.plot(line["cpu"], one, markerfacecolor="white", **style)
                axes.plot(line["cpu"], mean, **style)
        axes.set(title=problem, xscale="log", xlabel="CPU seconds for one model", ylim=(0, 1))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    for axes in [*panels[len(problems) :], last]:
        axes.axis("off")
    shown = [
        Line2D([], [], color=f"C{i % 10}", marker="os^D"[i // 10], linestyle="", label=name)
        for i, name in enumerate(names)
    ]
    last.legend(handles=shown, loc="center", frameon=False, fontsize=8, title="hollow: one model\nfull: mean of five")
    figure.supylabel("linear datamodeling score")
    return figure


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("problems", nargs="*")
    parser.add_argument("--store")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--table")
    parser.add_argument("--picture", nargs=2)
    arguments = parser.parse_args()
    if arguments.table:
        print("\n\n".join(tables(*read(arguments.table))))
        return
    if arguments.picture:
        picture(read(arguments.picture[1])[0]).savefig(arguments.picture[0], dpi=110)
        return
    torch.set_num_threads(1)
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: importlib.metadata.version(name) for name in ("outfluence", "torch")},
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory() as own:
        for name in arguments.problems or PROBLEMS:
            problem = PROBLEMS[name]()
            subsets = random_subsets(problem.n_train, problem.n_subsets)
            path = Path(arguments.store or own) / f"{name}.zarr"
            found = retrain(problem, subsets, problem.test, path, loss=problem.loss, seeds=problem.seeds)
            sizes = {"n_train": problem.n_train, "n_test": problem.n_test, "models": MODELS}
            losses = found.losses.values
            halves = {"subsets": problem.n_subsets, "seeds": problem.seeds, "ceiling": ceiling(losses)}
            for line in predictions(problem, losses, arguments.peers):
                print(json.dumps({"problem": name, **line, **sizes, **halves, **about}), flush=True)
            for training in TRAININGS if isinstance(problem, MnistMlp) else ():
                for line in detections(problem, training):
                    print(json.dumps({"problem": name, **line, **sizes, **about}), flush=True)


if __name__ == "__main__":
    main()
