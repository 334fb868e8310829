"""The table, on the terminal and in Markdown, and the list of what was refused."""
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

    def reasons(self):
        """Why kernels are not for the target, the most frequent first."""
        return Counter(result.said for result in self.results if result.state == "not for").most_common()


def show(rows):
    table = [HEAD, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    print()
    for line in table:
        print("  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip())
    for row in rows:
        for reason, count in row.reasons():
            print(f"{row.target}: {count} not for this target: {reason}")
    for row in rows:
        for state, record, said in ((r.state, r.record, r.said) for r in row.bad()):
            where = f"{record.get('file', record['kernel'])} {record['point']}"
            print(f"\n{row.target}: {state}: {where}\n    {record['variant'][:300]}\n    {said}")


def write(rows, path):
    """Puts the table between the two marks of a Markdown file."""
    lines = [f"Of {datetime.date.today()}, in kernels (entry points of all variants):", ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in [HEAD, ["---"] * 2 + ["---:"] * 4, *(row.cells() for row in rows)]]
    lines += [""] if any(row.reasons() for row in rows) else []
    lines += [f"- {row.target}, not for this target: {count} for {reason}" for row in rows for reason, count in row.reasons()]
    text = path.read_text()
    if BEGIN not in text or END not in text.split(BEGIN, 1)[1]:
        raise SystemExit(f"check-shaders: {path} has no lines {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    path.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + rest.split(END, 1)[1])
