"""What Dask costs a task when there is nothing to compute: python benchmarks/overhead.py [TASKS].

One line of JSON for each way: `DaskExecutor.run`, and plain `client.map` and gather, with the same tasks, which return
a receipt of the usual size and do nothing else. The scheduler runs in this process, as `LocalCluster` has it, so that
`cpu_ms_a_task` is the CPU of client and scheduler together; the two worker processes are not in it, but they share the
machine, and `wall_ms_a_task` is with them. `cpu_ratio` and `wall_ratio` are the one over the other. Both ways are run
once before with fewer tasks, to warm up.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time

from dask.distributed import Client, LocalCluster

from outfluence.executors import DaskExecutor

WARM_UP = 200


def nothing(task, attempt):
    return {"task": task, "seconds": 0.0, "worker": "host:0", "checksums": {"scores 0": task, "scores 1": attempt}}


def by_executor(client, n):
    outcomes = list(DaskExecutor(client).run(nothing, range(n), "scores"))
    assert sorted(outcome.task for outcome in outcomes) == list(range(n))
    assert all(outcome.error is None for outcome in outcomes)


def by_map(client, n):
    futures = client.map(nothing, range(n), [0] * n, pure=False)
    assert [receipt["task"] for receipt in client.gather(futures)] == list(range(n))


def measure(way, client, n):
    wall, cpu = time.perf_counter(), time.process_time()
    way(client, n)
    return {
        "wall_ms_a_task": round(1e3 * (time.perf_counter() - wall) / n, 4),
        "cpu_ms_a_task": round(1e3 * (time.process_time() - cpu) / n, 4),
    }


def main():
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: importlib.metadata.version(name) for name in ("outfluence", "dask", "distributed")},
        "python": platform.python_version(),
    }
    ways = {"client.map and gather": by_map, "DaskExecutor.run": by_executor}
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        for way in ways.values():
            way(client, WARM_UP)
        plain = None
        for name, way in ways.items():
            result = measure(way, client, n)
            plain = plain or result
            ratios = {f"{what}_ratio": round(result[key] / plain[key], 2) for what, key in KEYS.items()}
            print(json.dumps({"case": f"{name}, tasks that do nothing", "tasks": n, **result, **ratios, **about}))


KEYS = {"wall": "wall_ms_a_task", "cpu": "cpu_ms_a_task"}

if __name__ == "__main__":
    main()
