"""Links, pictures, anchors, code fences, the list of pages, and names of files in backticks."""
import fnmatch, os, re
from urllib.parse import unquote

LANGUAGES = {"sh", "text", "rust", "json", "yaml", "python", "c", "cpp", "toml", "wgsl", "make", "xml", "diff", "powershell"}
# Words after the language, by commas: those of rustdoc, and `no_run` for commands that are parsed only.
WORDS = {"no_run", "ignore", "should_panic", "compile_fail"}
MOST_LINES = {"README.md": 150}
# Pages of docs/ that are no part of the guide: the list itself, and the page of crates.io.
NOT_LISTED = {"docs/SUMMARY.md", "docs/crate.md"}
# Words that stand for any name.
ANY = "NAME|FILE|KIND|OP|N|X"
# The file of a program that a reader writes.
THEIRS = {"src/main.rs"}
INLINE = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\]|!\[[^\]]*\]\([^)]*\))*\]\(\s*<?([^\s)>]*)>?(?:\s+[\"'(][^)]*)?\)", re.S)
NAME = re.compile(r"(?:src|tests|docs|scripts|examples|benches|shaders|cli|python|include|\.github)/[\w./*?{},+-]*")


def check(repository, pages, report):
    """Checks what needs no command. Returns the numbers of links and of names for each page."""
    by_name = {page.name: page for page in pages}
    counts = {}
    for page in pages:
        fences(page, report)
        links = list(targets(page))
        for line, target in links:
            link(repository, by_name, page, line, target, report)
        names = list(named(page))
        for line, name in names:
            if name not in THEIRS and not exists(repository, name):
                report.fault(page, line, f"`{name}` is no file of the repository")
        counts[page.name] = (len(links), len(names))
    summary(by_name, report)
    return counts


def fences(page, report):
    if page.unclosed:
        report.fault(page, page.unclosed, "this block of code is not closed")
    for block in page.blocks:
        language, *words = block.info.split(",")
        if language not in LANGUAGES or not set(words) <= WORDS:
            report.fault(page, block.line - 1, f"a block of an unknown language: {block.info or 'none is given'}")
    if len(page.lines) > MOST_LINES.get(page.name, len(page.lines)):
        report.fault(page, len(page.lines), f"the page has more than {MOST_LINES[page.name]} lines")


def targets(page):
    """Lines and targets of links and pictures: those written inline, and those of definitions."""
    text = page.prose
    for mark in re.finditer(r"!\[[^\]]*\]\(\s*([^\s)]*)[^)]*\)", text):
        yield text.count("\n", 0, mark.start()) + 1, mark[1]
    for mark in INLINE.finditer(text):
        if not text[: mark.start()].endswith("!"):
            yield text.count("\n", 0, mark.start()) + 1, mark[1]
    defined = {m[1].lower(): m for m in re.finditer(r"^ {0,3}\[([^\]]+)\]:\s+<?([^\s>]+)", text, re.M)}
    for mark in defined.values():
        yield text.count("\n", 0, mark.start()) + 1, mark[2]
    for mark in re.finditer(r"(?<!\])\[[^\[\]]+\]\[([^\[\]]{2,})\]", text):
        if mark[1].lower() not in defined:
            yield text.count("\n", 0, mark.start()) + 1, f"[{mark[1]}]"


def link(repository, by_name, page, line, target, report):
    if re.match(r"[a-z][a-z0-9+.-]*:", target, re.I):
        return
    path, _, anchor = unquote(target).partition("#")
    name = os.path.normpath(os.path.join(os.path.dirname(page.name), path)) if path else page.name
    if target.startswith("["):
        report.fault(page, line, f"the reference {target} is not defined")
    elif not target or path.startswith("/") or name.startswith(".."):
        report.fault(page, line, f"the link '{target}' does not lead to a place in the repository")
    elif not repository.has(name):
        there = "is ignored by git" if (repository.root / name).exists() else "does not exist"
        report.fault(page, line, f"the link '{target}': {name} {there}")
    elif anchor and name in by_name and anchor not in by_name[name].anchors():
        report.fault(page, line, f"the link '{target}': {name} has no such heading")
    elif anchor and name not in by_name:
        number = re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor)
        if name in repository.folders or not number or int(number[2] or number[1]) > repository.read(name).count("\n"):
            report.fault(page, line, f"the link '{target}': {name} has no such place")


def summary(by_name, report):
    listed = by_name.get("docs/SUMMARY.md")
    if listed is None:
        return
    wanted = {n for n in by_name if n.startswith("docs/")} - NOT_LISTED
    found = {}
    for line, target in targets(listed):
        name = os.path.normpath(os.path.join("docs", target.partition("#")[0]))
        if name in found:
            report.fault(listed, line, f"{target} is listed twice, first in line {found[name]}")
        found[name] = line
    for name in sorted(wanted - set(found)):
        report.fault(listed, 1, f"{name} is not listed here")


def named(page):
    """Lines and names of spans of code that look like files of the repository."""
    for line, span in page.spans:
        for word in span.split():
            word = re.sub(r"(:\d+)?[,.;:)]*$", "", word.strip("'\"(").partition("::")[0])
            if NAME.fullmatch(word):
                yield line, word


def exists(repository, name):
    """Whether a name, perhaps with braces, stars, or a word of `ANY`, is there."""
    if brace := re.search(r"\{([^{}]*)\}", name):
        parts = brace[1].split(",")
        return all(exists(repository, name[: brace.start()] + part + name[brace.end() :]) for part in parts)
    name = name.rstrip("/")
    if repository.has(name):
        return True
    glob = re.sub(r"\.\.\.$", "*", re.sub(rf"\b(?:{ANY})\b", "*", name))
    return "*" in glob and any(fnmatch.fnmatchcase(file, glob) for file in repository.files | repository.folders)
