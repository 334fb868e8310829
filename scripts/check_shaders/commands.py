"""Compilers that are a command: spirv-val and glslang, a process for each kernel."""
import subprocess
from .common import Result, each, first_error

# A kernel that takes longer than this counts as crashed.
MOST_SECONDS = 120


def run(*command):
    """The exit code, None for one that took too long, and all that it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"took more than {MOST_SECONDS} s"
    return done.returncode, done.stdout + done.stderr


def judged(record, code, said):
    if code is None or code < 0:
        return Result(record, "crashed", said if code is None else f"signal {-code}")
    return Result(record, "ok") if code == 0 else Result(record, "refused", first_error(said))


def glslang(program, folder, records, progress):
    return each(lambda r: judged(r, *run(program, "-S", "comp", str(folder / r["file"]))), records, progress)
