"""Compares what Tiebeam reads from extended XYZ with what ASE reads. Run by `make test-ase`, which sets

TIEBEAM_LABELS   the compiled example `labels`, which prints every frame that it read as JSON and writes it again

Where both read a text, they must read the same atoms, cell and results, and what Tiebeam writes again must be what ASE had read,
with all keys and columns. Where they differ, the case says so by a word of the sentence in which Tiebeam says it.
"""

import json
import os
import re
import subprocess
import tempfile
import unittest
import warnings
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

LABELS = os.environ["TIEBEAM_LABELS"]
ROWS = "Cu 0 0 0\nCu 0 0 2.5\n"
P = "Properties=species:S:1:pos:R:3"
L = 'Lattice="8 0 0 0 8 0 0 0 8"'
SHEARED = 'Lattice="8 0.5 0 1 9 0.25 -1 2 7"'


def frame(keys, rows=ROWS):
    return f"{rows.count(chr(10))}\n{keys}\n{rows}"


# Both read these, and read the same.
SAME = {
    "plain": frame(""),
    "cell": frame(f"{SHEARED} {P}"),
    "mixed periods": frame(f'{SHEARED} pbc="T F T" {P}'),
    "periods as numbers": frame(f'{L} pbc="1 0 1" {P}'),
    "periods as words": frame(f'{L} pbc="True False TRUE" {P}'),
    "one period": frame(f"{L} pbc=T {P}"),
    "single quotes": frame(f"Lattice='8 0 0 0 8 0 0 0 8' {P}"),
    "braces": frame("Lattice={8 0 0 0 8 0 0 0 8} " + P),
    "brackets": frame(f"Lattice=[8 0 0 0 8 0 0 0 8] {P}"),
    "commas": frame(f'Lattice="8,0,0,0,8,0,0,0,8" {P}'),
    "json energy": frame(f'{P} energy="_JSON 1.5"'),
    "energy": frame(f"{P} energy=-1.5e0"),
    "energy of whole numbers": frame(f"{P} energy=-2"),
    "blanks around the sign": frame(f"{P} energy = -3.1"),
    "blank after the sign": frame(f"energy= -3.1 {P}"),
    "free energy too": frame(f"{P} energy=-1 free_energy=-1.5"),
    "labels of MACE too": frame(f"{P}:forces:R:3:REF_forces:R:3 energy=-1 REF_energy=-2", "Cu 0 0 0 1 2 3 4 5 6\n"),
    "stress": frame(f'{SHEARED} {P} stress="1 2 3 2 5 6 3 6 9"'),
    "stress that is not symmetric": frame(f'{SHEARED} {P} stress="1 2 3 4 5 6 7 8 9"'),
    "virial too": frame(f'{L} {P} stress="1 2 3 2 5 6 3 6 9" virial="1 2 3 2 5 6 3 6 9"'),
    "forces": frame(f"{P}:forces:R:3", "Cu 0 0 0 1 2 3\nO 0 0 2.5 4e-1 5 6\n"),
    "columns of all kinds": frame(
        "Properties=id:I:1:species:S:1:pos:R:3:tag:L:1:name:S:1:momenta:R:3:pair:I:2",
        "1 Cu 0 0 0 T a 1 2 3 4 5\n2 O 0 0 2.5 F b 1.5 2 3 6 7\n",
    ),
    "numbers alone": frame("Properties=Z:I:1:pos:R:3", "29 0 0 0\n8 0 0 2.5\n"),
    "numbers and symbols": frame(P + ":Z:I:1", "Cu 0 0 0 29\nO 0 0 2.5 8\n"),
    "unknown atoms": frame(P, "X 0 0 0\nCu 0 0 2.5\n"),
    "small and capital letters": frame(P, "cu 0 0 0\nCU 0 0 2.5\no 1 1 1\n"),
    "tabs and blanks": frame(P, "  Cu\t0 0  0 \n Cu 0 0 2.5\t\n"),
    "words and flags": frame(f"{P} config_type=bulk converged name='two words' n=5 x=1.5 flags=\"T F T\" is=F list=[1,2,3] words=[a,b] quoted=\"5\""),
    "nothing but keys": frame("config_type=bulk weight=2"),
    "escapes": frame(P + r' note="say \"hi\" \\ and more" path=a=b "two words"=3'),
    "json values": frame(P + r' a="_JSON {\"b\": [1, {\"c\": null}]}" m="_JSON [[1, 2], [3, 4]]"'),
    "no atoms": "0\n" + P + "\n",
    "several": frame(f"{P} energy=1") + frame(f"{L} {P} energy=2") + frame(""),
    "blank lines at the end": frame(P) + "\n\n \n",
    "no line end": frame(P).rstrip("\n"),
    "line ends of Windows": frame(P + " energy=1").replace("\n", "\r\n"),
}

# Both read these. Tiebeam reads something else, and says so, or it reads other keys.
DIFFERENT = {
    "a plain comment": (frame("made by hand, with E = -3.1 eV"), ""),
    "a plain comment with quotes": (frame("Peter's 'frame"), ""),
    "capital energy": (frame(f"{P} Energy=-1"), "`Energy` used"),
    "energy of MACE": (frame(f"{P} REF_energy=-1"), "`REF_energy` used"),
    "forces of MACE": (frame(f"{P}:REF_forces:R:3", "Cu 0 0 0 1 2 3\n"), "`REF_forces` used"),
    "force": (frame(f"{P}:force:R:3", "Cu 0 0 0 1 2 3\n"), "`force` used"),
    "energy of GAP": (frame(f"{P} dft_energy=-1"), "`dft_energy` used"),
    "energy that is not finite": (frame(f"{P} energy=nan"), "no finite number"),
    "forces that are not finite": (frame(f"{P}:forces:R:3", "Cu 0 0 0 nan 2 3\n"), "`forces` is not finite"),
    "forces of whole numbers": (frame(f"{P}:forces:I:3", "Cu 0 0 0 1 2 3\n"), "not used as forces"),
    "a plain comment with an open quote": (frame('d=1.5" by hand'), ""),
    "virial": (frame(f'{L} {P} virial="1 2 3 2 5 6 3 6 9"'), "`virial` became a stress"),
    "small properties": (frame(f"p{P[1:]} {L}"), "`properties` was read as `Properties`"),
    "small lattice": (frame(f"l{L[1:]} {P}"), "`lattice` was read as `Lattice`"),
    "capital periods": (frame(f'{L} PBC="T F T" {P}'), "`PBC` was read as `pbc`"),
    "blank line between frames": (frame(P) + "\n" + frame(P), "is blank"),
    "more columns": (frame(P, "Cu 0 0 0 1 2\nCu 0 0 2.5 3 4\n"), "2 words after the 4"),
    "more columns in plain XYZ": (frame("", "Cu 0 0 0 0.1\nCu 0 0 2.5 0.2\n"), "1 words after the 4"),
}

# ASE refuses these, and Tiebeam reads them.
OURS = {
    "new style": frame(f"Lattice=[[8,0,0],[0,8,0],[0,0,8]] {P}"),
    "byte order mark": "\ufeff" + frame(P),
    "stress of six numbers": frame(f'{L} {P} stress="1 2 3 4 5 6"'),
    "Fortran's exponent": frame(P, "Cu 0 0 0\nCu 0 0 0.25d1\n"),
}

# Tiebeam refuses these by a sentence with these words, whatever ASE does.
REFUSED = {
    "species and numbers that differ": (frame(P + ":Z:I:1", "Cu 0 0 0 1\nCu 0 0 2.5 1\n"), "atom 0 is Cu by `species`"),
    "a misspelt key": (frame(f'Latice="8 0 0 0 8 0 0 0 8" {P}'), "nearly `Lattice`"),
    "misspelt periods": (frame(f'{L} pcb="T T F" {P}'), "nearly `pbc`"),
    "periods of another name": (frame(f'{L} periodic="T T F" {P}'), "nearly `pbc`"),
    "a colon for the sign": (frame(f'Lattice: "8 0 0 0 8 0 0 0 8" {P}'), "`Lattice:` has no value"),
    "periods without a cell": (frame(f'{P} pbc="T T T"'), "`pbc` without `Lattice`"),
    "a key twice": (frame(f"{P} a=1 a=2"), "comes twice"),
    "no number": (frame(f"{P} energy=low"), "no finite number"),
    "not finite": (frame(P, "Cu 0 0 nan\n"), "no finite number"),
    "two energies": (frame(f'{P} energy="1 2"'), "no finite number"),
    "a short line": (frame(P, "Cu 0 0\n"), "3 columns"),
    "a short file": ("3\n" + frame(P).split("\n", 1)[1], "ends after 2 of 3 atoms"),
    "no element": (frame(P, "Qq 0 0 0\n"), "no element"),
    "cells after the atoms": (frame("", "Cu 0 0 0\n") + "VEC1 5 0 0\nVEC2 0 5 0\nVEC3 0 0 5\n", "give the cell as `Lattice`"),
    "an open quote": (frame(f'{P} note="a'), "no closing"),
}


def ours(text, rewritten=None):
    """Returns the frames that Tiebeam reads, or None, and all that it says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.xyz")
        path.write_bytes(text.encode())
        command = [LABELS, str(path), "--json"] + (["--rewrite", str(rewritten)] if rewritten else [])
        run = subprocess.run(command, text=True, capture_output=True, timeout=60)
    if run.returncode:
        assert run.returncode == 1 and "panicked" not in run.stderr, run.stderr
        return None, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()], run.stderr


def theirs(text):
    """Returns the frames that ASE reads, or None."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.xyz")
        path.write_bytes(text.encode())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return read(path, index=":", format="extxyz")
        except Exception:
            return None


def plain(value):
    """A value of ASE in lists and numbers, which can be compared."""
    return json.loads(json.dumps(value, default=lambda x: np.asarray(x).tolist()))


class Extxyz(unittest.TestCase):
    def atoms(self, got, want, labels=True):
        """Compares a frame of Tiebeam with one of ASE."""
        self.assertEqual(got["numbers"], want.numbers.tolist())
        np.testing.assert_array_equal(np.reshape(got["positions"], (-1, 3)), want.positions)
        cell = got["cell"] or np.zeros((3, 3))
        np.testing.assert_array_equal(cell, want.cell.array)
        self.assertEqual(got["pbc"] or [False] * 3, want.pbc.tolist())
        results = want.calc.results if want.calc else {}
        if not labels:
            return
        self.assertEqual(got["energy"], results.get("energy"))
        for name in ("forces", "stress"):
            self.assertEqual(got[name] is None, name not in results)
        if "forces" in results:
            np.testing.assert_array_equal(got["forces"], results["forces"])
        if "stress" in results:
            s = np.asarray(got["stress"])
            np.testing.assert_array_equal([s[0, 0], s[1, 1], s[2, 2], s[1, 2], s[0, 2], s[0, 1]], results["stress"])

    def again(self, want, rewritten, skip=()):
        """Compares what Tiebeam wrote with what ASE had read."""
        again = read(rewritten, index=":", format="extxyz") if want else []
        self.assertEqual(len(again), len(want))
        for a, b in zip(want, again):
            self.assertEqual(plain(a.info), plain({k: v for k, v in b.info.items() if k not in skip}))
            self.assertEqual(plain(a.arrays), plain(b.arrays))
            np.testing.assert_array_equal(a.cell.array, b.cell.array)
            self.assertEqual(a.pbc.tolist(), b.pbc.tolist())
            self.assertEqual(plain(a.calc.results if a.calc else {}), plain(b.calc.results if b.calc else {}))

    def same(self, text):
        with tempfile.TemporaryDirectory() as folder:
            rewritten = Path(folder, "out.xyz")
            (got, said), want = ours(text, rewritten), theirs(text)
            self.assertIsNotNone(want, "ASE refuses it")
            self.assertIsNotNone(got, said)
            self.assertEqual(len(got), len(want))
            for a, b in zip(got, want):
                self.atoms(a, b)
            self.again(want, rewritten)

    def test_what_both_read_is_the_same(self):
        for name, text in SAME.items():
            with self.subTest(name):
                self.same(text)

    def test_what_differs_is_said(self):
        for name, (text, words) in DIFFERENT.items():
            with self.subTest(name):
                (got, said), want = ours(text), theirs(text)
                self.assertIsNotNone(want, "ASE refuses it")
                self.assertIsNotNone(got, said)
                self.assertIn(words, said)
                for a, b in zip(got, want):
                    self.assertEqual(a["numbers"], b.numbers.tolist())
                    np.testing.assert_array_equal(a["positions"], b.positions)
                    self.assertEqual(a["energy"] is None or "used" in said, True)

    def test_what_ase_refuses(self):
        for name, text in OURS.items():
            with self.subTest(name):
                got, said = ours(text)
                self.assertIsNone(theirs(text), "ASE reads it")
                self.assertEqual(got[0]["numbers"], [29, 29], said)
                self.assertEqual(got[0]["positions"][1], [0.0, 0.0, 2.5])

    def test_what_is_refused_is_named(self):
        for name, (text, words) in REFUSED.items():
            with self.subTest(name):
                got, said = ours(text)
                self.assertIsNone(got)
                self.assertIn(words, said)
                self.assertRegex(said, r"line \d+: ")

    def test_what_ase_writes(self):
        """Random atoms with keys and columns of every type, and with results."""
        rng = np.random.default_rng(1)
        texts = ["a", "two words", 'say "hi"', "it's", "{x}", "[1, 2]", "a=b", "back\\slash", "é", "1.5 x", "T F x"]
        values = [
            lambda: int(rng.integers(-5, 5)),
            lambda: float(rng.normal()),
            lambda: bool(rng.integers(2)),
            lambda: str(rng.choice(texts)),
            lambda: rng.normal(size=3),
            lambda: rng.integers(5, size=4),
            lambda: rng.normal(size=(2, 3)),
            lambda: rng.integers(2, size=3).astype(bool),
            lambda: {"a": [1, {"b": None}]},
            lambda: [1, "x", 2.5],
        ]
        for i in range(150):
            n = int(rng.integers(1, 6))
            atoms = Atoms(rng.choice(["H", "O", "Cu", "X"], n), rng.normal(size=(n, 3)))
            if i % 3:
                atoms.cell = rng.normal(size=(3, 3)) + 5 * np.eye(3)
                atoms.pbc = rng.integers(2, size=3).astype(bool)
            for k in range(int(rng.integers(5))):
                atoms.info[str(rng.choice(["key", "Key_2", "k-3", "two words", "x:y"])) + str(k)] = values[rng.integers(len(values))]()
            for k, make in enumerate([
                lambda: rng.normal(size=n),
                lambda: rng.normal(size=(n, 3)),
                lambda: rng.integers(9, size=(n, 2)),
                lambda: rng.integers(2, size=n).astype(bool),
                lambda: rng.choice(["a", "bc", 'd"'], n),
            ]):
                if rng.integers(2):
                    atoms.new_array(f"array{k}", make())
            if i % 2:
                stress = {"stress": rng.normal(size=6)} if i % 3 else {}
                atoms.calc = SinglePointCalculator(
                    atoms, energy=float(rng.normal()), free_energy=float(rng.normal()), forces=rng.normal(size=(n, 3)), **stress
                )
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                path = Path(folder, "ase.xyz")
                write(path, atoms, format="extxyz")
                text = path.read_text()
            with self.subTest(i, text=text):
                self.same(text)

    def test_no_text_is_read_silently_otherwise(self):
        """Random changes of texts: where both read one, they read the same, or Tiebeam says what is odd."""
        rng = np.random.default_rng(2)
        base = [text for text in SAME.values() if text.strip()]
        pieces = list("\"'{}[]=\\,: \t") + ["T", "1", "energy", "Lattice", "pbc=", "_JSON ", "\n", "nan", "-"]
        both = 0
        for _ in range(2000):
            text = base[rng.integers(len(base))]
            at = int(rng.integers(len(text)))
            if rng.integers(2):
                text = text[:at] + pieces[rng.integers(len(pieces))] + text[at:]
            else:
                text = text[:at] + text[at + 1 :]
            (got, said), want = ours(text), theirs(text)
            if got is None or want is None:
                continue
            both += 1
            odd = [line for line in said.splitlines() if re.match(r"line \d+", line)]
            used = re.findall(r"`(\w+)` used", said)
            if odd or any(name not in ("energy", "forces", "stress") for name in used):
                continue
            with self.subTest(text=text):
                self.assertEqual(len(got), len(want))
                for a, b in zip(got, want):
                    # ASE keeps an energy that is a word, a flag or a list.
                    energy = np.asarray(b.calc.results.get("energy", 0) if b.calc else 0)
                    if energy.ndim == 0 and energy.dtype.kind in "if":
                        self.atoms(a, b)
        self.assertGreater(both, 400)


if __name__ == "__main__":
    unittest.main()
