#!/usr/bin/env python3
"""Times scipy's linear_sum_assignment on the instances that `cargo bench --bench assignment -- --write DIR` wrote.

    pip install scipy numpy safetensors
    scripts/peer-assignment.py DIR [--ours FILE] [--json FILE]

Each FAMILY-N.safetensors is solved several times, as f64 in memory order, which scipy solves without a conversion. The least thread
time counts. `--ours` reads the lines of the benchmark, checks that the values agree, and prints a table.
"""

import argparse
import json
import pathlib
import sys
import time

import numpy as np
import scipy
from safetensors import safe_open
from scipy.optimize import linear_sum_assignment


def least(cost, maximize):
    """Returns the least thread time in ms of up to 20 runs within three seconds, and the value."""
    best, started = float("inf"), time.monotonic()
    for turn in range(20):
        if turn > 0 and time.monotonic() - started > 3:
            break
        before = time.thread_time()
        rows, columns = linear_sum_assignment(cost, maximize=maximize)
        best = min(best, (time.thread_time() - before) * 1e3)
    return best, float(cost[rows, columns].sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--ours", type=pathlib.Path, help="lines of the bench's --json")
    parser.add_argument("--json", type=pathlib.Path, help="adds one line for each instance to this file")
    args = parser.parse_args()
    ours = {}
    if args.ours:
        lines = [json.loads(line) for line in args.ours.read_text().splitlines()]
        ours = {(line["family"], line["n"]): line for line in lines}
    files = sorted(args.folder.glob("*-*.safetensors"), key=lambda p: (p.stem.split("-")[0], int(p.stem.split("-")[1])))
    if not files:
        sys.exit(f"no FAMILY-N.safetensors in {args.folder}; write them with the bench's --write")
    wrong = 0
    for path in files:
        family, n = path.stem.split("-")[0], int(path.stem.split("-")[1])
        with safe_open(path, "np") as file:
            maximize = file.metadata()["maximize"] == "true"
            cost = file.get_tensor("cost").astype(np.float64)
        ms, value = least(cost, maximize)
        line = {"family": family, "n": n, "peer": f"scipy {scipy.__version__}", "cpu_ms": ms, "value": value}
        text = f"{family} {n}: scipy {ms:.1f} ms"
        if (own := ours.get((family, n))) is not None:
            agree = abs(own["value"] - value) <= 1e-9 * abs(value)
            wrong += not agree
            text += f", ours {own['host_cpu_ms']:.1f} ms: {ms / own['host_cpu_ms']:.1f} times"
            text += "" if agree else f"; VALUES DIFFER: {own['value']} and {value}"
        print(text, flush=True)
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps(line) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
