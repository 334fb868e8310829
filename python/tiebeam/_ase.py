"""The calculator of ASE."""

from __future__ import annotations

from typing import Any, Sequence

from ._calculator import Calculator, _Path

try:
    from ase import Atoms
    from ase.calculators.calculator import Calculator as Base
    from ase.calculators.calculator import all_changes
    from ase.stress import full_3x3_to_voigt_6_stress
except ImportError as error:
    _missing = error

    class Tiebeam:
        """Stands for the calculator where ASE cannot be imported."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise ImportError(
                f"tiebeam.Tiebeam needs ASE (pip install ase, or pip install './python[ase]'): {_missing}. "
                "tiebeam.Calculator works without it"
            ) from _missing

else:

    class Tiebeam(Base):
        """A calculator of ASE that runs a potential of Tiebeam.

        It gives ``energy``, ``free_energy`` (the same), ``energies`` (of each atom), ``forces`` and, if the cell is periodic
        along all three vectors, ``stress``, each in ASE's units. ASE's own parameters follow as keywords.
        """

        implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]

        def __init__(
            self,
            model: _Path,
            rotations: int = 1,
            library: _Path | None = None,
            **kwargs: Any,
        ) -> None:
            """Opens the potential in the file ``model``. The arguments are those of :class:`tiebeam.Calculator`."""
            super().__init__(**kwargs)
            self.calculator = Calculator(model, rotations, library=library)

        def calculate(
            self,
            atoms: Atoms | None = None,
            properties: Sequence[str] = ("energy",),
            system_changes: Sequence[str] = all_changes,
        ) -> None:
            """Computes everything at once, whichever properties are asked."""
            super().calculate(atoms, properties, system_changes)
            atoms, periodic = self.atoms, self.atoms.pbc
            place = (atoms.cell.array, periodic) if periodic.any() else (None, None)
            found = self.calculator.compute(atoms.positions, atoms.numbers, *place)
            self.results = {
                "energy": found.energy,
                "free_energy": found.energy,
                "energies": found.atom_energies,
                "forces": found.forces,
            }
            if found.stress is not None:
                self.results["stress"] = full_3x3_to_voigt_6_stress(found.stress)

        @property
        def rotations(self) -> int:
            """That of :attr:`tiebeam.Calculator.rotations`. Set here, it makes ASE forget the results of another number."""
            return self.calculator.rotations

        @rotations.setter
        def rotations(self, count: int) -> None:
            self.calculator.rotations = count
            self.reset()

        def close(self) -> None:
            """Frees the device. Without it, that happens when the calculator is no longer used."""
            self.calculator.close()

        def __enter__(self) -> Tiebeam:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()
