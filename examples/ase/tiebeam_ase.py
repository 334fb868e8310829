"""Tiebeam's potentials as a calculator of ASE, by the C interface (include/tiebeam.h).

    cargo rustc --release --lib --crate-type cdylib --features capi
    atoms.calc = Tiebeam("model.safetensors", "target/release/libtiebeam.so")
"""

import ctypes

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

ABI = 1


class Tiebeam(Calculator):
    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]

    def __init__(self, model, library, rotations=1, **kwargs):
        super().__init__(**kwargs)
        if not 1 <= rotations < 2**32:
            raise ValueError(f"rotations: {rotations}; use 1 or more")
        self.library = ctypes.CDLL(library)
        self.library.tiebeam_open.restype = ctypes.c_void_p
        self.library.tiebeam_error.restype = ctypes.c_char_p
        if self.library.tiebeam_abi() != ABI:
            raise RuntimeError(f"{library}: its functions are of another version, {self.library.tiebeam_abi()}")
        self.handle = ctypes.c_void_p(self.library.tiebeam_open(str(model).encode()))
        self.check(not self.handle)
        self.check(self.library.tiebeam_set_rotations(self.handle, ctypes.c_uint32(rotations)))

    def check(self, failed):
        if failed:
            raise RuntimeError(self.library.tiebeam_error().decode())

    def __del__(self):
        if getattr(self, "handle", None):
            self.library.tiebeam_close(self.handle)

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        count, periodic = len(self.atoms), self.atoms.pbc
        inputs = [np.ascontiguousarray(self.atoms.positions, np.float64), self.atoms.numbers.astype(np.int32)]
        inputs += [np.array(self.atoms.cell, np.float64), periodic.astype(np.uint8)] if periodic.any() else [None] * 2
        outputs = [np.zeros(shape) for shape in (1, count, (count, 3))]
        outputs.append(np.zeros((3, 3)) if periodic.all() else None)
        places = [x if x is None else x.ctypes.data_as(ctypes.c_void_p) for x in inputs + outputs]
        self.check(self.library.tiebeam_compute(self.handle, ctypes.c_size_t(count), *places))
        energy, energies, forces, stress = outputs
        self.results = {"energy": energy[0], "free_energy": energy[0], "energies": energies, "forces": forces}
        if stress is not None:
            self.results["stress"] = full_3x3_to_voigt_6_stress(stress)
