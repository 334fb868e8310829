"""Builds the C library with cargo and puts it into the wheel. Everything else is in pyproject.toml.

    TIEBEAM_LIBRARY=FILE    take this library, which is already built, and run no cargo
    TIEBEAM_ROOT=FOLDER     the clone of Tiebeam, if it is not the folder above this one
"""

import atexit
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
NAME = {"win32": "tiebeam.dll", "darwin": "libtiebeam.dylib"}.get(sys.platform, "libtiebeam.so")


def fail(reason):
    raise SystemExit(f"tiebeam: {reason}")


def clone():
    """The clone of Tiebeam, or None if only this folder was copied."""
    places = [os.environ.get("TIEBEAM_ROOT"), HERE.parent]
    return next((Path(x) for x in places if x and (Path(x) / "include/tiebeam.h").is_file()), None)


def library():
    """The shared library that goes into the wheel."""
    ready = os.environ.get("TIEBEAM_LIBRARY")
    if ready:
        if not Path(ready).is_file():
            fail(f"TIEBEAM_LIBRARY is {ready}, which is no file")
        return Path(ready)
    root = clone()
    if root is None:
        fail(
            f"the Rust sources are not in {HERE.parent}. Install from a clone (pip install ./python), or set TIEBEAM_ROOT to "
            f"the clone, or TIEBEAM_LIBRARY to a {NAME} that is already built"
        )
    # pip runs with the PATH of its shell, where a fresh Rust may not be yet.
    cargo = os.environ.get("CARGO") or shutil.which("cargo") or shutil.which("cargo", path=str(Path.home() / ".cargo/bin"))
    if cargo is None:
        fail(
            "cargo is missing, which builds the C library. Install Rust (https://rustup.rs), or set TIEBEAM_LIBRARY to a "
            f"{NAME} that is already built"
        )
    command = [cargo, "rustc", "--manifest-path", str(root / "Cargo.toml"), "--release", "-p", "tiebeam", "--lib"]
    command += ["--crate-type", "cdylib", "--features", "capi", "--message-format", "json-render-diagnostics"]
    # A toolchain file of the clone is found from its own folder.
    build = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if build.returncode != 0:
        fail(f"cargo failed with status {build.returncode}; its messages are above: {' '.join(command)}")
    messages = [json.loads(line) for line in build.stdout.splitlines() if line.startswith("{")]
    files = [Path(file) for message in messages for file in message.get("filenames", [])]
    found = [file for file in files if file.name == NAME]
    if not found:
        fail(f"cargo built no {NAME}: {' '.join(command)}")
    return found[-1]


class Build(build_py):
    """Copies the modules, with the library and its licences beside them."""

    def run(self):
        if self.editable_mode:
            # Nothing is put among the sources; the module then says how to name a library.
            return super().run()
        # setuptools packs what lies in this folder, leftovers of earlier builds included.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        package = Path(self.build_lib) / "tiebeam"
        shutil.copyfile(library(), package / NAME)
        # They must go with every copy of the library.
        for licence in sorted((clone() or HERE).glob("LICENSE-*")):
            shutil.copyfile(licence, package / licence.name)


class Binary(Distribution):
    """A distribution for one platform, although no module of it is compiled."""

    def has_ext_modules(self):
        return True


class Wheel(bdist_wheel):
    """Any Python 3 can load the library, since ctypes does it."""

    def get_tag(self):
        system = super().get_tag()[2]
        # Python may hold the code of two processors; the library is for the one that cargo built it on.
        return "py3", "none", system.replace("universal2", platform.machine())


class NoSource(sdist):
    def run(self):
        fail("a source distribution would lack the Rust sources: build a wheel from a clone (pip wheel ./python)")


def workplace():
    """The folder for files of the build: below cargo's target folder, so that the clone stays clean, or else a temporary one."""
    folder = HERE.parent / (os.environ.get("CARGO_TARGET_DIR") or "target") / "python"
    try:
        for place in (folder / "build", folder / "tiebeam.egg-info"):
            place.mkdir(parents=True, exist_ok=True)
            # Permissions do not tell whether a file system is read-only, so it is tried.
            tempfile.TemporaryFile(dir=place).close()
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="tiebeam-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        # For cargo, which could not write there either.
        os.environ.setdefault("CARGO_TARGET_DIR", str(folder / "target"))
    return folder


options = {}
if clone() == HERE.parent:
    folder = workplace()
    options = {"build": {"build_base": str(folder / "build")}, "egg_info": {"egg_base": str(folder)}}

setup(
    cmdclass={"build_py": Build, "bdist_wheel": Wheel, "sdist": NoSource},
    distclass=Binary,
    options=options,
)
