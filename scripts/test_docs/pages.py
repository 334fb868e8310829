"""The repository, its pages, and the faults that are found in them."""
import os, re, subprocess
from pathlib import Path

SKIPPED = {".git", "target", "out", "node_modules", "__pycache__"}
FENCE = re.compile(r"\s*(?:[-*+>]\s+)?(`{3,}|~{3,})\s*([^`]*)$")


class Report:
    """Faults, in the order in which they are found."""

    def __init__(self):
        self.faults = []

    def fault(self, page, line, text):
        self.faults.append((page.name, line, text))


class Repository:
    """A folder and those of its files that a fresh clone would have."""

    def __init__(self, root):
        self.root = Path(root).resolve()
        listed = self.git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
        names = listed.split("\0") if listed is not None else list(self.walk())
        self.files = {name for name in names if name and (self.root / name).is_file()}
        self.folders = {str(parent) for name in self.files for parent in Path(name).parents}

    def git(self, *arguments):
        """What git prints, or None where there is no git or no repository."""
        try:
            done = subprocess.run(["git", *arguments], cwd=self.root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except FileNotFoundError:
            return None
        return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else None

    def walk(self):
        for folder, below, names in os.walk(self.root):
            below[:] = [name for name in below if name not in SKIPPED]
            yield from (os.path.relpath(os.path.join(folder, name), self.root) for name in names)

    def has(self, name):
        return name in self.files or name in self.folders

    def read(self, name):
        return (self.root / name).read_text(encoding="utf-8", errors="replace")

    def pages(self):
        return [Page(self, name) for name in sorted(self.files, key=lambda n: (n.count("/"), n)) if name.endswith(".md")]


class Block:
    """A fenced block: its info string, such as `sh,no_run`, and its text, which begins in line `line`."""

    def __init__(self, info, line):
        self.info, self.line, self.lines = info, line, []

    @property
    def text(self):
        return "".join(line + "\n" for line in self.lines)


class Page:
    """A page of Markdown, taken apart into blocks, spans of code, and prose."""

    def __init__(self, repository, name):
        self.name, self.blocks, self.unclosed = name, [], None
        self.lines = repository.read(name).splitlines()
        prose, fence, block = [], None, None
        for number, line in enumerate(self.lines, 1):
            mark = FENCE.match(line)
            if fence is None and mark:
                fence, block = mark[1], Block(mark[2].strip(), number + 1)
            elif fence is not None and mark and mark[1].startswith(fence) and not mark[2]:
                self.blocks.append(block)
                fence = None
            elif fence is not None:
                block.lines.append(line)
            prose.append("" if fence is not None or mark else line)
        if fence is not None:
            self.unclosed = block.line - 1
        text = "\n".join(prose) + "\n"
        # Code may go on in the next line, but not in the next paragraph.
        spans = list(re.finditer(r"(?<!`)(`+)(?!`)((?:(?!\n\s*\n).)+?)(?<!`)\1(?!`)", text, re.S))
        self.spans = [(text.count("\n", 0, s.start()) + 1, re.sub(r"\s+", " ", s[2]).replace("\\|", "|")) for s in spans]
        self.headings = list(headings(prose))
        for span in spans:
            blank = re.sub(r"[^\n]", " ", span[0])
            text = text[: span.start()] + blank + text[span.end() :]
        self.prose = text

    def anchors(self):
        """The anchors that GitHub gives to the headings."""
        seen, all_slugs = {}, set()
        for heading in self.headings:
            slug = slug_of(heading)
            count = seen.get(slug, 0)
            seen[slug] = count + 1
            all_slugs.add(f"{slug}-{count}" if count else slug)
        return all_slugs


def headings(prose):
    for line in prose:
        if mark := re.match(r" {0,3}#{1,6}\s+(.*?)\s*#*\s*$", line):
            yield mark[1]


def slug_of(heading):
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
