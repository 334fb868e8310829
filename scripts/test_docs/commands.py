"""Commands of pages: whether what they name exists, and whether programs accept their arguments."""
import os, re, subprocess
from . import links, shell
from .cargo import Fault

# Commands of the system, of whose arguments nothing is known here.
KNOWN = set("[ : . apt-get awk brew c++ cat cc cd clang cmp cp curl cut diff dnf echo env exit export false gcc git grep head "
            "kill ls man mkdir mv pacman pip pip3 pkg-config printf python python3 rm rustup sed set sh sha256sum sleep sort "
            "source sudo tail tar tee test time touch true uname uniq unset vulkaninfo wc xargs zcat".split())
# The commands that blocks do not run: they build or take long.
NOT_RUN = {"cargo", "make", "pip", "pip3"}
# The subcommands of tiebeam-mpi, whose arguments are those of tiebeam. It needs not be built: it needs MPI.
ON_RANKS = {"merge", "predict", "train", "zoo"}
INLINE = re.compile(r"(?:[A-Z]\w*=\S+ )*(?:cargo|make|tiebeam|scripts/[\w./-]+)(?: |$)")
PLACEHOLDER = re.compile(r"(?:^|[ =\[<])[A-Z][A-Z_]*(?:$|[ \]>])|\.\.\.|…|[<\[]")


class Commands:
    def __init__(self, repository, workspace, report):
        self.repository, self.workspace, self.report = repository, workspace, report
        self.makefile = repository.read("Makefile") if "Makefile" in repository.files else ""
        self.answers, self.count = {}, 0

    def check(self, page):
        """Checks a page's commands, in blocks and in backticks. Returns how many there are."""
        before = self.count
        for block in page.blocks:
            if block.info.split(",")[0] == "sh":
                self.text(page, block.text, block.line)
        for line, span in page.spans:
            whole = INLINE.match(span) and not span.endswith(" ") and not PLACEHOLDER.search(span)
            if whole and span not in self.repository.folders:
                self.text(page, span, line, inline=True)
        return self.count - before

    def text(self, page, text, line, inline=False):
        try:
            found = shell.commands(text, line)
        except shell.Unclear as error:
            self.report.fault(page, error.line, str(error))
            return
        for command in found:
            self.count += 1
            try:
                self.one(command.words, inline)
            except Fault as error:
                self.report.fault(page, command.line, f"{' '.join(command.words)}\n    {error}")

    def one(self, words, inline):
        first, rest = words[0], words[1:]
        for word in rest:
            name = word.partition("=")[2] or word
            if links.NAME.fullmatch(name) and not links.exists(self.repository, name):
                raise Fault(f"there is no {name}")
        if first == "cargo":
            program = self.workspace.check(rest)
            if program:
                self.accepts(*program, inline)
        elif first == "make":
            self.make(rest)
        elif first == "tiebeam":
            self.accepts("bin", "tiebeam", rest, inline)
        elif first == "mpirun":
            self.one(started(rest), inline)
        elif first.split("/")[-1] == "tiebeam-mpi":
            if rest and rest[0] not in ON_RANKS | {"help"}:
                raise Fault(f"tiebeam-mpi has no '{rest[0]}'")
            self.accepts("bin", "tiebeam", rest, inline)
        elif first in ("sudo", "env", "time", "xargs", "exec") and rest:
            self.one([w for w in rest if "=" not in w], inline)
        elif first in ("sh", "python3", "python") and rest and rest[0].startswith("scripts/"):
            pass
        elif "/" in first:
            self.file(first)
        elif first not in KNOWN and first != shell.DUMMY:
            raise Fault(f"'{first}' is no command that this check knows")

    def file(self, name):
        path = self.repository.root / name
        if name.startswith("./") or name.split("/")[0] not in self.repository.folders:
            return  # what a command of the page makes
        if name not in self.repository.files:
            raise Fault(f"there is no {name}")
        if not os.access(path, os.X_OK):
            raise Fault(f"{name} cannot be executed")

    def make(self, words):
        for word in words:
            variable = word.partition("=")[0] if "=" in word else None
            if word.startswith("-"):
                continue
            if variable is None and not re.search(rf"^{re.escape(word)}:(?!=)", self.makefile, re.M):
                raise Fault(f"the Makefile has no target {word}")
            if variable and not re.search(rf"\$\(.*\b{variable}\b|^{variable} \?=", self.makefile, re.M):
                raise Fault(f"the Makefile has no variable {variable}")

    def accepts(self, kind, name, arguments, inline):
        """Asks the built program for its help after the arguments. It refuses those that it does not know before that."""
        program = self.workspace.built / ("examples" if kind == "example" else "") / name
        key = (str(program), *arguments)
        if key not in self.answers:
            if not program.exists():
                raise Fault(f"{program} is not built: cargo build --release --bin tiebeam --examples")
            asked = list(arguments) if "help" in arguments[:1] else list(arguments) + ["--help"]
            done = subprocess.run([str(program), *asked], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, timeout=60)
            self.answers[key] = (done.returncode, done.stdout.decode(errors="replace").strip())
        status, said = self.answers[key]
        # In a sentence, an option may be named without its value.
        if status != 0 and not (inline and "a value is required" in said):
            raise Fault(said.split("\n\n")[0].replace("\n", "\n    "))


def started(words):
    """What mpirun starts, by the words after it."""
    while words and words[0].startswith("-"):
        words = words[2 if words[0] in ("-n", "-np", "--bind-to", "--hostfile") else 1 :]
    if not words:
        raise Fault("mpirun needs a program")
    return words
