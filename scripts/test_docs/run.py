"""Runs the blocks of a page, in their order, in the repository's root."""
import hashlib, os, signal, subprocess
from . import shell
from .commands import NOT_RUN

LIMIT = 120  # seconds for a block


def runnable(text):
    """The text with `:` in the place of the commands that only are checked, and how many commands are left."""
    count, found = 0, shell.commands(text)
    for command in reversed(found):
        if command.words[0] not in NOT_RUN:
            count += 1
        elif command.start < 0:
            raise shell.Unclear(command.line, f"{command.words[0]} inside of $(...) is not run here: mark the block no_run")
        else:
            text = text[: command.start] + ":" + text[command.end :]
    return text, count


def page(repository, built, page, report):
    """Runs the blocks that are marked `sh` and nothing more. Returns how many commands they had."""
    total = 0
    for block in page.blocks:
        if block.info != "sh":
            continue
        try:
            text, count = runnable(block.text)
        except shell.Unclear as error:
            report.fault(page, block.line + error.line, str(error))
            continue
        total += count
        if count and not run(repository, built, page, block, text, report):
            break  # what comes after may need what this block was to make
    return total


def run(repository, built, page, block, text, report):
    environment = dict(os.environ, PATH=str(built) + os.pathsep + os.environ.get("PATH", ""))
    process = subprocess.Popen(["sh", "-eu", "-c", text], cwd=repository.root, env=environment, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=LIMIT)
        reason = f"the block ended with status {process.returncode}" if process.returncode else None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        reason = f"the block took more than {LIMIT} s: mark it no_run"
    if reason:
        lines = said.decode(errors="replace").strip().splitlines()
        report.fault(page, block.line, "\n    ".join([reason] + lines[-20:]))
    return not reason


def state(repository):
    """What git sees as changed, with the contents of those files."""
    changed = {}
    for entry in (repository.git("status", "--porcelain", "-z", "--untracked-files=all", "--no-renames") or "").split("\0"):
        path = repository.root / entry[3:]
        if entry:
            changed[entry[3:]] = entry[:2] + (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
    return changed
