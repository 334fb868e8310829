#!/usr/bin/env python3
"""Checks the pages of this repository: links, names of files, commands. `make test-docs` builds the programs and runs it.

    cargo build --release --bin tiebeam --examples
    scripts/test-docs.py [--links-only | --no-run] [PAGE ...]
    scripts/test-docs.py --self-test

Every link, picture and heading that a page names must exist, and so must the files that it names in backticks. Commands, in blocks
of `sh` and in backticks, must name targets, programs, features, tests, scripts and options that there are. Whether a
required argument is missing is not seen. Blocks marked `sh` are then run in the repository's root, page by page, without their lines of
cargo, make and pip; blocks marked `sh,no_run` are not run.

Exits with 1 if there are faults.
"""
import argparse, sys, time
from pathlib import Path
from test_docs import links, run, self_test
from test_docs.cargo import Workspace
from test_docs.commands import Commands
from test_docs.pages import Report, Repository


def arguments():
    parser = argparse.ArgumentParser(description="Checks links, names of files, and commands of the repository's pages.")
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="check these pages only (default: all)")
    parser.add_argument("--links-only", action="store_true", help="check no commands")
    parser.add_argument("--no-run", action="store_true", help="run no blocks")
    parser.add_argument("--self-test", action="store_true", help="check that each kind of fault is found")
    return parser.parse_args()


def check(repository, workspace, wanted, running, report):
    """Checks everything that is asked for. Returns the numbers of commands that were checked and run."""
    pages = repository.pages()
    counts = links.check(repository, pages, report)
    commands = Commands(repository, workspace, report) if workspace else None
    checked = ran = 0
    before = run.state(repository) if running else {}
    for page in pages:
        if wanted and page.name not in wanted:
            continue
        began, here = time.monotonic(), commands.check(page) if commands else 0
        blocks = run.page(repository, workspace.built, page, report) if running else 0
        checked, ran = checked + here, ran + blocks
        faults = sum(name == page.name for name, *_ in report.faults)
        shown = [f"{n} {what}" for n, what in zip(counts[page.name] + (here, blocks), ("links", "names", "commands", "run")) if n]
        print(f"{page.name}: {', '.join(shown) or 'nothing to check'}, {time.monotonic() - began:.1f} s"
              + (f", {faults} FAULTS" if faults else ""), flush=True)
    after = run.state(repository) if running else {}
    for name in sorted(set(before.items()) ^ set(after.items())):
        report.faults.append((name[0], 0, "running the pages has changed this file"))
    return checked, ran


def main():
    given = arguments()
    if given.self_test:
        sys.exit(self_test.main(check))
    repository, report = Repository(Path(__file__).resolve().parent.parent), Report()
    missing = [page for page in given.pages if page not in repository.files]
    if missing:
        sys.exit(f"test-docs: there is no page {', '.join(missing)}")
    workspace = None if given.links_only else Workspace(repository)
    checked, ran = check(repository, workspace, given.pages, workspace is not None and not given.no_run, report)
    faults = [fault for fault in report.faults if not given.pages or fault[0] in given.pages or not fault[1]]
    for name, line, text in dict.fromkeys(faults):
        print(f"{name}:{line}: {text}", file=sys.stderr)
    print(f"{checked} commands checked, {ran} run, {len(set(faults))} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
