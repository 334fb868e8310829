"""Energies, forces and stress of atoms from potentials that Tiebeam has trained, on any GPU.

With ASE (``pip install './python[ase]'``)::

    from ase.io import read
    from tiebeam import Tiebeam

    atoms = read("frames.xyz")
    atoms.calc = Tiebeam("model.safetensors")
    atoms.get_potential_energy()

Without ASE::

    from tiebeam import Calculator

    with Calculator("model.safetensors") as calculator:
        energy, atom_energies, forces, stress = calculator.compute(positions, numbers)

Units are eV and angstrom, and eV per cubic angstrom for stress. The variable ``TIEBEAM_ADAPTER`` chooses a device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._calculator import Calculator, Error, Results

if TYPE_CHECKING:
    from ._ase import Tiebeam

__all__ = ["Calculator", "Error", "Results", "Tiebeam"]


def __getattr__(name: str) -> object:
    # ASE takes a second to import, and may be missing, so it waits until somebody asks.
    if name == "Tiebeam":
        from ._ase import Tiebeam

        globals()[name] = Tiebeam
        return Tiebeam
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
