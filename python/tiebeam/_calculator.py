"""The functions of include/tiebeam.h, by ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import operator
import os
import sys
import threading
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: The version of the C functions that this module calls, TIEBEAM_ABI in the header.
ABI = 1

_NAME = {"win32": "tiebeam.dll", "darwin": "libtiebeam.dylib"}.get(sys.platform, "libtiebeam.so")
_POINTER = ctypes.c_void_p
_Path = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]
#: Result and arguments of each function.
_FUNCTIONS = {
    "tiebeam_abi": (ctypes.c_uint32, []),
    "tiebeam_open": (_POINTER, [ctypes.c_char_p]),
    "tiebeam_close": (None, [_POINTER]),
    "tiebeam_radius": (ctypes.c_double, [_POINTER]),
    "tiebeam_layers": (ctypes.c_uint32, [_POINTER]),
    "tiebeam_set_rotations": (ctypes.c_int, [_POINTER, ctypes.c_uint32]),
    "tiebeam_compute": (ctypes.c_int, [_POINTER, ctypes.c_size_t] + [_POINTER] * 8),
    "tiebeam_error": (ctypes.c_char_p, []),
}


class Error(RuntimeError):
    """The library refused or failed; the message is its own."""


class Results(NamedTuple):
    """What :meth:`Calculator.compute` found."""

    #: The total energy, in eV.
    energy: float
    #: The energy of each atom, in eV. Their sum is the total energy.
    atom_energies: NDArray[np.float64]
    #: The force on each atom, ``[atoms, 3]``, in eV per angstrom.
    forces: NDArray[np.float64]
    #: A symmetric matrix, ``[3, 3]``, in eV per cubic angstrom, positive under tension. ``None`` unless the cell is periodic
    #: along all three vectors.
    stress: NDArray[np.float64] | None


def _load(named: _Path | None) -> ctypes.CDLL:
    """Loads the library: the named one, else that of TIEBEAM_LIBRARY, else the one beside this file."""
    named = named or os.environ.get("TIEBEAM_LIBRARY")
    path = Path(os.fsdecode(_encoded("library", named))) if named else Path(__file__).with_name(_NAME)
    if not path.is_file():
        advice = "" if named else "; install tiebeam by pip, or name a library by `library=` or TIEBEAM_LIBRARY"
        raise Error(f"{path}: there is no library{advice}")
    try:
        # An absolute path, because loaders search others in folders of their own.
        library = ctypes.CDLL(str(path.resolve()))
        functions = {name: getattr(library, name) for name in _FUNCTIONS}
    except (OSError, AttributeError) as error:
        raise Error(f"{path}: this library cannot be used: {error}") from error
    for name, (result, arguments) in _FUNCTIONS.items():
        functions[name].restype, functions[name].argtypes = result, arguments
    if library.tiebeam_abi() != ABI:
        raise Error(f"{path}: its functions have version {library.tiebeam_abi()}, and this module calls version {ABI}")
    return library


def _encoded(name: str, path: _Path) -> bytes:
    """Returns a path as C reads it, which is up to the first NUL."""
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError(f"{name}: {path!r} is no path, because a character of it is NUL")
    return encoded


def _array(name: str, values: ArrayLike, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Returns values as an array that C can read, of exactly this shape."""
    array = np.asarray(values)
    if array.shape != shape and not (array.size == 0 and 0 in shape):
        raise ValueError(f"{name}: shape {array.shape}; {shape} is needed")
    exact = np.ascontiguousarray(array, dtype).reshape(shape)
    # Fractions and numbers of more than 32 bits would become other elements.
    if exact.dtype.kind == "i" and not np.array_equal(exact, array.reshape(shape)):
        raise ValueError(f"{name}: whole numbers of at most 32 bits are needed")
    return exact


class Calculator:
    """Computes energies, forces and stress of atoms with a potential.

    Several threads may use one calculator; Python's lock is released while the device works. A calculator cannot be taken into
    a forked process: open one in each.
    """

    _handle: int | None = None

    def __init__(
        self,
        model: _Path,
        rotations: int = 1,
        *,
        library: _Path | None = None,
    ) -> None:
        """Reads a potential and opens the device.

        :param model: a safetensors file, as the example ``potential`` saves it
        :param rotations: results are averages over this many orientations of the atoms; see :attr:`rotations`
        :param library: a shared library to use in place of the package's own; without it, ``TIEBEAM_LIBRARY`` may name one
        :raises ValueError: if a path contains NUL, or rotations are not 1 or more
        :raises Error: if the file, the device or the library cannot be used
        """
        self._rotations = _count(rotations)
        path = _encoded("model", model)
        self._library = _load(library)
        # Counts the computations in progress: the handle must neither change nor be freed meanwhile.
        self._running = 0
        self._turn = threading.Condition()
        self._process = os.getpid()
        self._handle = self._library.tiebeam_open(path)
        if not self._handle:
            self._fail()
        if self._library.tiebeam_set_rotations(self._handle, self._rotations):
            self._fail()

    def compute(
        self,
        positions: ArrayLike,
        numbers: ArrayLike,
        cell: ArrayLike | None = None,
        periodic: ArrayLike | None = None,
    ) -> Results:
        """Computes energy, forces and, if possible, stress.

        :param positions: ``[atoms, 3]``, in angstrom
        :param numbers: the atomic number of each atom
        :param cell: ``[3, 3]``, the three lattice vectors as rows; without it, the atoms are in free space
        :param periodic: three flags that say along which vectors space repeats; all, unless given
        :raises ValueError: if a shape or a type is wrong
        :raises Error: if the library refuses the atoms or the device fails
        """
        atoms = len(np.atleast_1d(numbers))
        inputs: list[NDArray[Any] | None] = [
            _array("positions", positions, (atoms, 3), np.float64),
            _array("numbers", numbers, (atoms,), np.int32),
            None,
            None,
        ]
        flags = np.full(3, cell is not None)
        if cell is not None:
            if periodic is not None:
                flags = np.ascontiguousarray(_array("periodic", periodic, (3,), np.bool_))
            inputs[2:] = [_array("cell", cell, (3, 3), np.float64), flags.astype(np.uint8)]
        elif periodic is not None and np.any(periodic):
            raise ValueError("periodic: space can only repeat along the vectors of a cell, and none is given")
        energy, energies, forces = np.zeros(1), np.zeros(atoms), np.zeros((atoms, 3))
        stress = np.zeros((3, 3)) if flags.all() else None
        places = [None if x is None else x.ctypes.data for x in (*inputs, energy, energies, forces, stress)]
        with self._using() as handle:
            if self._library.tiebeam_compute(handle, atoms, *places):
                self._fail()
        return Results(float(energy[0]), energies, forces, stress)

    @property
    def radius(self) -> float | None:
        """The cutoff radius in angstrom. ``None`` if all atoms interact."""
        with self._using() as handle:
            return self._library.tiebeam_radius(handle) or None

    @property
    def layers(self) -> int:
        """The number of layers, which is the number of radii that a message travels."""
        with self._using() as handle:
            return self._library.tiebeam_layers(handle)

    @property
    def rotations(self) -> int:
        """The number of orientations over which results are averaged: that of the input, and random ones, the same every time.

        The work grows with it, and the effect of a rotation of the input on the results falls. It can be set at any time.
        """
        return self._rotations

    @rotations.setter
    def rotations(self, count: int) -> None:
        count = _count(count)
        with self._alone() as handle:
            if self._library.tiebeam_set_rotations(self._opened(handle), count):
                self._fail()
            self._rotations = count

    def close(self) -> None:
        """Frees the potential and the device, after the computations of other threads. A closed calculator stays closed."""
        if self._handle is None:
            return
        if self._process != os.getpid():
            # It is the other process's to free, and another thread of that may have held the lock.
            self._handle = None
            return
        with self._alone() as handle:
            self._handle = None
            if handle is not None:
                self._library.tiebeam_close(handle)

    def __enter__(self) -> Calculator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # It may never have been opened.
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a calculator holds a device and cannot be pickled or copied; open one in each process")

    def _fail(self) -> None:
        raise Error(self._library.tiebeam_error().decode(errors="replace"))

    def _opened(self, handle: int | None) -> int:
        if handle is None:
            raise Error("the calculator is closed")
        return handle

    def _check_process(self) -> None:
        """Comes before the lock: if another thread held it when this process was forked, nobody gives it back here."""
        if self._process != os.getpid():
            raise Error("the calculator was opened before this process was forked; open one in each process")

    @contextlib.contextmanager
    def _using(self) -> Iterator[int]:
        """Keeps the calculator as it is, beside other computations."""
        self._check_process()
        with self._turn:
            handle = self._opened(self._handle)
            self._running += 1
        try:
            yield handle
        finally:
            with self._turn:
                self._running -= 1
                self._turn.notify_all()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int | None]:
        """Waits for the computations in progress, and lets none begin."""
        self._check_process()
        with self._turn:
            self._turn.wait_for(lambda: self._running == 0)
            yield self._handle


def _count(rotations: int) -> int:
    count = operator.index(rotations)
    if not 1 <= count < 2**32:
        raise ValueError(f"rotations: {count}; use 1 or more")
    return count
