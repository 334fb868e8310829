"""Shows the results: a table, on the terminal and in Markdown, and a list of the kernels that were refused."""
import datetime
from collections import Counter
from typing import NamedTuple

HEAD = ["Stands for", "Compiler", "ok", "not for this target", "refused", "crashed"]
STATES = ["ok", "not for", "refused", "crashed"]
BEGIN, END = "<!-- check-shaders: begin -->", "<!-- check-shaders: end -->"


class Row(NamedTuple):
    compiler: str
    target: str
    results: list

    def cells(self):
        counts = Counter(result.state for result in self.results)
        return [self.target, self.compiler, *(str(counts[state]) for state in STATES)]

    def bad(self):
        return [result for result in self.results if result.state in ("refused", "crashed")]

    def notes(self):
        """Returns the reasons why kernels are not for the target, and faults that were ignored in kernels that are ok, the most
        frequent first."""
        words = {"not for": "not for this target", "ok": "ok apart from"}
        said = Counter((words[r.state], r.said) for r in self.results if r.state in words and r.said)
        return [f"{self.target}: {count} {state}: {what}" for (state, what), count in said.most_common()]


def show(rows):
    table = [HEAD, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    print()
    for line in table:
        print("  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip())
    for row in rows:
        print(*row.notes(), sep="\n", end="\n" if row.notes() else "")
    for row in rows:
        for state, record, said in ((r.state, r.record, r.said) for r in row.bad()):
            where = f"{record.get('file', record['kernel'])} {record['point']}"
            print(f"\n{row.target}: {state}: {where}\n    {record['variant'][:300]}\n    {said}")


def write(rows, path):
    """Writes the table between the two marks of a Markdown file."""
    lines = [f"Of {datetime.date.today()}, in kernels (entry points of all variants):", ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in [HEAD, ["---"] * 2 + ["---:"] * 4, *(row.cells() for row in rows)]]
    notes = [f"- {note}" for row in rows for note in row.notes()]
    lines += ["", *notes] if notes else []
    text = path.read_text()
    if BEGIN not in text or END not in text.split(BEGIN, 1)[1]:
        raise SystemExit(f"check-shaders: {path} has no lines {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    path.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + rest.split(END, 1)[1])
