"""The code that all compilers share: results, progress, and running many checks at once."""
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple


class Result(NamedTuple):
    record: dict  # a line of the manifest
    state: str  # "ok", "not for", "refused" or "crashed"
    said: str = ""  # the reason, or the compiler's first line about the error


class Missing(Exception):
    """A tool that is not installed: its name, and the command that installs it."""

    def __init__(self, what, command):
        super().__init__(what)
        self.command = command


class Progress:
    """Shows on standard error how many kernels are done.

    On a terminal, it updates one line with the time left. Elsewhere, it prints a line after each quarter."""

    def __init__(self, name, total):
        self.name, self.total, self.done, self.began = name, total, 0, time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.show()

    def step(self, count=1):
        before, self.done = self.done, min(self.done + count, self.total)
        if self.terminal or self.done * 4 // self.total > before * 4 // self.total:
            self.show()

    def show(self):
        spent = time.monotonic() - self.began
        line = f"{self.name}: {self.done} of {self.total} kernels"
        if self.done == self.total:
            line += f" in {spent:.0f} s"
        elif self.done:
            line += f", about {spent / self.done * (self.total - self.done):.0f} s left"
        if self.terminal:
            print(f"\r\x1b[K{line}", end="\n" if self.done == self.total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(check, records, progress):
    """Calls `check` for every record, with one thread per core. Returns the results in the order of the records."""
    results = []
    with ThreadPoolExecutor(cores()) as pool:
        for result in pool.map(check, records):
            results.append(result)
            progress.step()
    return results


def first_error(text, marks=("error",)):
    """Returns the first line that contains a mark, or else the first that is not empty."""
    lines = [line.strip() for line in text.replace("\0", "").splitlines() if line.strip()]
    marked = [line for line in lines if any(mark in line.lower() for mark in marks)]
    return (marked or lines or ["it says nothing"])[0][:300]
