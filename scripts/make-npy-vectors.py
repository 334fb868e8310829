#!/usr/bin/env python3
"""Makes the arrays of tests/vectors/npy with NumPy.

    pip install numpy        # in a scratch environment
    scripts/make-npy-vectors.py

The tests know what the arrays hold. Equal versions of NumPy give equal files, except for the times in archives.
"""
from pathlib import Path

import numpy as np

OUT = Path(__file__).resolve().parent.parent / "tests/vectors/npy"
OUT.mkdir(parents=True, exist_ok=True)
F32 = np.array([[1.5, -0.0, 3e38], [np.inf, 1e-45, -2]], dtype="<f4")
CUBE = np.arange(24, dtype="<f4").reshape(2, 3, 4)

ARRAYS = {
    "f32": F32,
    "f16": np.array([1.5, -65504, 6e-8], dtype="<f2"),
    "f64": np.array([0.1, -1e-300, np.inf], dtype="<f8"),
    "i8": np.array([-128, 127], dtype="i1"),
    "i16": np.array([-32768, 32767], dtype="<i2"),
    "i32": np.array([[-2147483648], [2147483647]], dtype="<i4"),
    "i64": np.array([-2147483648, 2147483647], dtype="<i8"),
    "bool": np.array([True, False, True]),
    "u8": np.array([0, 255], dtype="u1"),
    "u16": np.array([65535], dtype="<u2"),
    "u32": np.array([4294967295, 7], dtype="<u4"),
    "u64": np.array([4294967295], dtype="<u8"),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 4), dtype="<f4"),
    "fortran": np.asfortranarray(CUBE),
    "big": np.array([1.5, -2], dtype=">f4"),
    "big_fortran": np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3)),
    # What is refused.
    "f64_large": np.array([1, 1e39], dtype="<f8"),
    "i64_large": np.array([0, 2147483648], dtype="<i8"),
    "u64_large": np.array([4294967296], dtype="<u8"),
    "complex": np.array([1j], dtype="<c8"),
    "text": np.array(["abc"]),
    "records": np.array([(1, 2)], dtype=[("a", "<i4"), ("b", "<f4")]),
    "void": np.array([0x3F80], dtype="<u2").view("V2"),
    "axes": np.zeros((1,) * 7, dtype="<f4"),
}
for name, array in ARRAYS.items():
    np.save(OUT / f"{name}.npy", array)
np.save(OUT / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
for version in (2, 3):
    with open(OUT / f"version{version}.npy", "wb") as file:
        np.lib.format.write_array(file, F32, version=(version, 0))

members = {"layer.weight": F32, "folder/labels": np.array([3, -1], dtype="<i8"), "fortran": np.asfortranarray(CUBE)}
np.savez(OUT / "stored.npz", **members)
np.savez_compressed(OUT / "compressed.npz", **members)
