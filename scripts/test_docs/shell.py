"""Takes shell text apart into simple commands: enough of the language for what stands in pages."""
import re
from typing import List, NamedTuple

# What a `$(...)` is replaced by: its value is not known.
DUMMY = "/substituted"
OPERATOR = re.compile(r"\|\||&&|;;|[;&|\n(){}]")
REDIRECTION = re.compile(r"\d*(?:<<-?|>>|>&|<&|>\||[<>])(?:&\d)?")
KEYWORDS = {"if", "then", "elif", "else", "while", "until", "do", "!", "time", "{", "("}
ENDS = {"fi", "done", "esac", "}", ")"}


class Command(NamedTuple):
    words: List[str]  # without redirections, and without variables set in front
    line: int  # of its first word, the text's first line being 0
    start: int  # where it begins and ends in the text; -1 inside of $(...)
    end: int
    files: List[str]  # what it reads by `<`


class Unclear(Exception):
    """A quotation or substitution that does not end."""

    def __init__(self, line, text):
        super().__init__(text)
        self.line = line


def closing(text, at, first_line):
    """Where the `$(` ends whose contents begin at `at`."""
    depth, quote = 1, ""
    for i in range(at, len(text)):
        c = text[i]
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        else:
            depth += (c == "(") - (c == ")")
            if depth == 0:
                return i
    raise Unclear(first_line, "$( without its )")


def commands(text, first=0, nested=False):
    """The commands of a text in order, those inside of `$(...)` before the one around."""
    found, words, files, start, line = [], [], [], None, 0
    i, here, waiting = 0, [], None  # `here`: the words that end documents; `waiting`: the redirection whose file comes next

    def end(at):
        nonlocal words, files, start
        while words and (words[0] in KEYWORDS or words[0] in ENDS or re.match(r"[A-Za-z_]\w*=", words[0])):
            words = words[1:]
        if words and words[0] in ("for", "case"):
            words = []
        if words:
            a, b = (-1, -1) if nested else (start, at)
            found.append(Command(words, line, a, b, files))
        words, files, start = [], [], None

    while i < len(text):
        c = text[i]
        if text.startswith("\\\n", i):
            i += 2
        elif c in " \t":
            i += 1
        elif c == "#":
            i = (text + "\n").index("\n", i)
        elif redirection := REDIRECTION.match(text, i):
            i, waiting = redirection.end(), redirection[0].lstrip("0123456789")
            waiting = None if "&" in waiting and waiting[-1].isdigit() else waiting
        elif (operator := OPERATOR.match(text, i)) and not (c == "{" and not text[i + 1 : i + 2].isspace()):
            end(i)
            i = operator.end()
            while c == "\n" and here:
                word = here.pop(0)
                close = re.compile(rf"^\t*{re.escape(word)}$", re.M).search(text, i)
                if not close:
                    raise Unclear(first + text.count("\n", 0, i), f"a document without its {word}")
                i = close.end()
        else:
            begin, word = i, ""
            at = first + text.count("\n", 0, i)
            while i < len(text) and not (text[i] in " \t\n;&|()<>"):
                c = text[i]
                if text.startswith("\\\n", i):
                    i += 2
                elif c == "\\":
                    word, i = word + text[i + 1 : i + 2], i + 2
                elif c == "'" or c == '"':
                    close = i + 1
                    inside = ""
                    while close < len(text) and text[close] != c:
                        if c == '"' and text.startswith("$(", close):
                            stop = closing(text, close + 2, at)
                            found += commands(text[close + 2 : stop], at, True)
                            inside, close = inside + DUMMY, stop + 1
                        else:
                            step = 2 if c == '"' and text[close] == "\\" else 1
                            inside, close = inside + text[close + step - 1 : close + step], close + step
                    if close >= len(text):
                        raise Unclear(at, f"a quotation without its second {c}")
                    word, i = word + (re.sub(r"\$\{?\w+\}?", DUMMY, inside) if c == '"' else inside), close + 1
                elif text.startswith("$(", i):
                    stop = closing(text, i + 2, at)
                    found += commands(text[i + 2 : stop], at, True)
                    word, i = word + DUMMY, stop + 1
                elif variable := re.compile(r"\$\{?[\w?#@*]+\}?").match(text, i):
                    word, i = word + DUMMY, variable.end()
                else:
                    word, i = word + c, i + 1
            if waiting is not None:
                here += [word] if waiting.startswith("<<") else []
                files += [word] if waiting == "<" else []
                waiting = None
            else:
                if not words:
                    start, line = (begin if start is None else start), at
                words.append(word)
    end(len(text))
    return found
