#!/usr/bin/env python3
"""On which rung (ranks as threads, as MPI processes, on the stand-ins of CUDA and NCCL) each part of the conformance suite passed.

usage: rungs.py FOLDER..    prints one table of the folders' RUNG.json, RUNG_RANKS.json, as GoogleTest writes them
"""
import json
import pathlib
import re
import sys

RUNGS = {"threads": "threads", "mpi": "MPI", "cuda": "CUDA st.-in", "nccl": "NCCL st.-in"}
SUITES = {"Invariant": "invariant", "InvariantStrides": "invariant", "Repeatable": "repeatable", "ConformanceRandom": "random",
          "Bytes": "bytes", "Refusal": "refusal"}


def feature_of(suite, test):
    """A strategy of the sweep, or what another suite is about."""
    suite = suite.split("/")[-1]
    return re.sub(r"^.*/|_\d+_ranks$", "", test) if suite == "Conformance" else SUITES.get(suite)


def column_of(path):
    """The rung's title and ranks: halves of one run on threads have one column."""
    name, _, ranks = path.stem.partition("_")
    return (name, 0) if name == "threads" else (name, int(ranks or 0))


def read(folders):
    """{column: {feature: [cases passed, tests failed]}}, and when each column's last file was written."""
    columns, times = {}, {}
    for path in sorted(path for folder in folders for path in pathlib.Path(folder).glob("*.json") if column_of(path)[0] in RUNGS):
        report = json.loads(path.read_text())
        cells = columns.setdefault(column_of(path), {})
        times[column_of(path)] = report["timestamp"][11:16]
        for suite in report["testsuites"]:
            for test in suite["testsuite"]:
                feature = feature_of(suite["name"], test["name"])
                if feature is None or test["result"] != "COMPLETED":
                    continue
                cell = cells.setdefault(feature, [0, 0])
                cell[0] += int(test.get("cases", 1)) if "failures" not in test else 0
                cell[1] += "failures" in test
    return columns, times


def table(columns, times):
    order = sorted(columns, key=lambda column: (list(RUNGS).index(column[0]), column[1]))
    titles = [RUNGS[name] + (f" {ranks}" if ranks else "") for name, ranks in order] + ["real NCCL"]
    features = sorted({feature for cells in columns.values() for feature in cells}, key=lambda name: (name in SUITES.values(), name))

    def text(cell):
        return "-" if cell is None else f"{cell[1]} FAILED" if cell[1] else str(cell[0])

    rows = [["cases passed", *titles]]
    rows += [[feature, *(text(columns[column].get(feature)) for column in order), "a GPU"] for feature in features]
    rows.append(["at (UTC)", *(times[column] for column in order), ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))) for row in rows]
    return "\n".join([*lines, "-: not run, or it asks for more ranks; real NCCL needs a GPU: launch/gpu_check.sh"])


if __name__ == "__main__":
    print(table(*read(sys.argv[1:])))
