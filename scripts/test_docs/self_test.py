"""A small repository whose pages have every kind of fault. Each must be found, and nothing else."""
import contextlib, io, tempfile
from pathlib import Path
from .cargo import Workspace
from .pages import Report, Repository

CLAP = '#!/bin/sh\nfor a in "$@"; do case $a in --help) exit;; --out|adapters|*/*|3) ;; *) echo no $a; exit 2; esac; done\n'
FILES = {
    "Makefile": "demo: ## train\n\techo $(PREFIX)\n", "Cargo.toml": "", "src/lib.rs": "fn adds() {}\n", "scripts/plain": "", ".gitignore": "target",
    "tests/ops.rs": "#[test]\nfn products_are_exact() {}\n", "docs/SUMMARY.md": "[A](a.md)\n[Again](a.md)\n",
    "docs/a.md": "# Cats & dogs\n\n## Same\n\n## Same\n", "docs/unlisted.md": "```text\n```\n", "README.md": "x\n" * 151,
    "target/release/tiebeam": CLAP, "target/release/examples/charlm": CLAP,
}
TARGETS = [("bin", "tiebeam"), ("example", "charlm"), ("test", "ops"), ("bench", "kernels")]
METADATA = {"packages": [{"name": "tiebeam", "features": {"plot": []}, "targets": [
    {"kind": [kind], "name": name, "required-features": ["plot"] if kind == "bench" else []} for kind, name in TARGETS]}]}
# Lines with faults, each with words of its message.
PROSE = [("[x](docs/none.md)", "none.md does not exist"), ("![x](docs/none.svg)", "none.svg does not exist"),
         ("[x](docs/a.md#birds)", "no such heading"), ("[x][lost]", "[lost] is not defined"), ("[x](../above.md)", "does not lead"),
         ("[x](src/lib.rs#L9)", "no such place"), ("`src/none.rs`", "no file"), ("`tests/*.py`", "no file"),
         ("`make nothing`", "no target nothing"), ("`target/../scripts/plain`, `tests/{ops,none}.rs`", "no file")]
SHELL = [("make demo OTHER=1", "no variable OTHER"), ("cargo jump", "has no 'jump'"), ("cargo run --bin none", "no bin none"),
         ("cargo test --test none", "no test none"), ("cargo doc --features none", "no feature none"), ("cargo doc --none", "no option"),
         ("cargo bench --bench kernels", "needs --features plot"), ("cargo test -p none", "no package none"),
         ("cargo install --path none", "there is no none"), ("cargo test --test ops -- none::", "no test or row"),
         ("cargo run --example charlm -- --none", "no --none"), ("tiebeam adapters --none | cat", "no --none"),
         ('echo "$(tiebeam none)"', "no none"), ("scripts/none", "no scripts/none"), ("scripts/plain", "cannot be executed"),
         ("cat <docs/a.md && cat src/none.rs", "there is no src/none.rs"), ("nothing 1", "is no command"),
         ("mpirun -n 2 tiebeam-mpi adapters", "has no 'adapters'"), ("mpirun -n 2 sh && mpirun -n 2", "needs a program"), ("mpirun -n 2 nothing", "is no command")]
GOOD = ("[x](docs/a.md#cats--dogs) [y](docs/a.md#same-1) [z]( https://x.y ) `a[0](b)` `docs/*.md` `docs/NAME.md` [s](src/lib.rs#L1)\n"
        "```sh\nmake demo PREFIX=1\nX=1 tiebeam adapters --out \"$(cat /dev/null)/x\" >/dev/null # '\ncat <<'END' | grep -q not\n"
        "not ' a $(word\nEND\ncargo test --test ops \\\n  exact\ncargo run --example charlm -- --out 3\nfor x in 1; do echo $x; done\n```\n"
        "```sh,no_run\nfalse\n```")
RUN = [("```sh\necho here; false\n```\n", "status 1\n    here"), ("```sh\necho $(make demo)\n```\n", "mark the block no_run"),
       ("```sh\nprintf x >>docs/unlisted.md; exit 1\n```\n", "status 1"), ("```sh\necho 'x\n```\n", "without its second"),
       ("```\n```\n", "unknown language"), ("```sh,never\n```\n", "unknown language"), ("```text\n", "not closed")]


def main(check):
    pages = {f"docs/r{i}.md": text for i, (text, _) in enumerate(RUN)}
    pages["prose.md"] = "\n\n".join(line for line, _ in PROSE)
    pages["shell.md"] = "```sh,no_run\n" + "\n".join(line for line, _ in SHELL) + "\n```\n"
    wanted = [("prose.md", 2 * i + 1, words) for i, (_, words) in enumerate(PROSE)]
    wanted += [("shell.md", i + 2, words) for i, (_, words) in enumerate(SHELL)]
    wanted += [(f"docs/r{i}.md", None, words) for i, (_, words) in enumerate(RUN)] + [("docs/unlisted.md", 0, "has changed")]
    listed = "".join(f"[r](r{i}.md)\n" for i in range(len(RUN)))
    wanted += [("docs/SUMMARY.md", 2, "twice"), ("docs/SUMMARY.md", 1, "unlisted.md is not"), ("README.md", 151, "more than 150")]
    with tempfile.TemporaryDirectory() as folder:
        for name, text in {**FILES, **pages, "good.md": GOOD}.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + (listed if name == "docs/SUMMARY.md" else ""))
            path.chmod(0o755 if "target/" in name else 0o644)
        repository, report = Repository(folder), Report()
        repository.git("init", "-q")
        with contextlib.redirect_stdout(io.StringIO()):
            check(repository, Workspace(repository, {**METADATA, "target_directory": f"{folder}/target"}), [], True, report)
    missed, found = [], list(dict.fromkeys(report.faults))
    for page, line, words in wanted:
        match = next((f for f in found if f[0] == page and line in (None, f[1]) and words in f[2]), None)
        found.remove(match) if match else missed.append(f"not found: {page}:{line}: {words}")
    errors = missed + [f"found without reason: {fault}" for fault in found]
    print(*errors, f"self-test: {len(wanted)} faults to find, {len(errors)} errors", sep="\n")
    return 1 if errors else 0
