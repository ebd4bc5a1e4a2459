"""What the peers score, for `fidelity.py`: each in a process of its virtual environment (see `peers.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from peers import Stages, python_of, run_kronfluence, warm_up


@dataclass(frozen=True)
class Peer:
    """A peer's name, its environment, its damping in words, and its options."""

    name: str
    environment: str
    damping: str
    options: tuple


#: kronfluence's own are 1e-8, and with None a tenth of the mean eigenvalue of each layer.
KRONFLUENCE = [Peer("kronfluence", "kronfluence", f"{damping:g}", (damping,)) for damping in (1e-8, 1e-4, 1e-3)]
KRONFLUENCE.append(Peer("kronfluence", "kronfluence", "0.1 of each mean", (None,)))
#: TRAK's own is 0; others are relative to the mean eigenvalue of its matrix.
TRAK = [
    Peer(f"TRAK, {size} numbers", "trak", f"{damping:g} of the mean" if damping else "0", (size, damping))
    for size in (512, 2048)
    for damping in (0, 0.1, 1)
]


def peers_of(problem):
    """Those that take a problem: classes, one label a sample; TRAK's matrix has no inverse with fewer samples."""
    if problem.loss is not F.cross_entropy:
        return []
    return KRONFLUENCE + [peer for peer in TRAK if peer.options[0] < problem.n_train]


def scores_of_peer(peer, problem, models):
    """Of one model and of all, with the CPU seconds for one model."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory() as folder:
        data = dict(zip(("x", "y", "x_test", "y_test"), problem.train + problem.test, strict=True))
        torch.save({"data": data, "models": models}, Path(folder) / "given.pt")
        command = [python_of(peer.environment), __file__, peer.environment, json.dumps(peer.options), folder]
        subprocess.run(command, check=True, env=os.environ | threads, stdout=subprocess.DEVNULL)
        one, mean = np.load(Path(folder) / "scores.npy")
        return one, mean, json.loads((Path(folder) / "cpu.json").read_text())


class WithoutSelf(Stages):
    """All stages but the one that is not used here."""

    def __call__(self, name, function):
        return None if name == "self" else super().__call__(name, function)


def kronfluence(data, models, damping):
    """Scores of the first model, their mean over models, CPU seconds for one."""
    scores, cpu = [], []
    for model in models:
        stages = WithoutSelf()
        with tempfile.TemporaryDirectory() as folder:
            scores.append(run_kronfluence("ekfac", Path(folder), data, model, None, damping, stages))
        cpu.append(stages.found["fit"]["cpu"] + stages.found["scores"]["cpu"])
    return scores[0], np.mean(scores, 0), np.mean(cpu[1:])


def trak(data, models, size, damping):
    """With several models TRAK averages by itself."""
    mean, _ = _trak(data, models, size, damping)
    one, cpu = _trak(data, models[:1], size, damping)
    return one, mean, cpu


def _trak(data, models, size, damping):
    from torch.utils.data import DataLoader, TensorDataset
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    start, n_parameters = time.process_time(), sum(p.numel() for p in models[0].parameters())
    projector = BasicProjector(
        grad_dim=n_parameters, proj_dim=size, seed=0, proj_type=ProjectionType.rademacher, device="cpu"
    )
    train, test = (
        DataLoader(TensorDataset(data[f"x{which}"], data[f"y{which}"]), batch_size=500) for which in ("", "_test")
    )
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            models[0], "image_classification", len(data["x"]), save_dir=folder, device="cpu", projector=projector,
            use_half_precision=False,
        )  # fmt: skip
        states = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
        for number, state in enumerate(states):
            traker.load_checkpoint(state, model_id=number)
            for batch in train:
                traker.featurize(batch, num_samples=len(batch[0]))
        if damping:
            squares = np.square(traker.saver.current_store["grads"]).sum()
            traker.score_computer.lambda_reg = damping * float(squares) / size
        traker.finalize_features()
        for number, state in enumerate(states):
            traker.start_scoring_checkpoint("scores", state, number, len(data["x_test"]))
            for batch in test:
                traker.score(batch, num_samples=len(batch[0]))
        scores = np.array(traker.finalize_scores("scores")).T
    return scores, time.process_time() - start


if __name__ == "__main__":
    tool, options, folder = sys.argv[1:]
    torch.set_num_threads(1)
    warm_up()
    given = torch.load(Path(folder) / "given.pt", weights_only=False)
    run = {"kronfluence": kronfluence, "trak": trak}[tool]
    one, mean, cpu = run(given["data"], given["models"], *json.loads(options))
    np.save(Path(folder) / "scores.npy", [one, mean])
    (Path(folder) / "cpu.json").write_text(json.dumps(float(cpu)))
