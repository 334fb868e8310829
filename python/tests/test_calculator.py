"""Tests of the installed package. Run by `make test-python`, which sets

TIEBEAM_TEST_DATA   a folder with model.safetensors and morse.xyz, as the example `potential` writes them with --radius
TIEBEAM_COMMAND     the command `tiebeam`
"""

import ctypes
import gc
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path

import numpy as np
from ase import units
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.io import read, write
from ase.md.verlet import VelocityVerlet

import tiebeam
from tiebeam import Calculator, Tiebeam

DATA = Path(os.environ["TIEBEAM_TEST_DATA"])
COMMAND = os.environ["TIEBEAM_COMMAND"]
MODEL = DATA / "model.safetensors"
HEADER = Path(__file__).resolve().parents[2] / "include" / "tiebeam.h"


def cluster():
    atoms = read(DATA / "morse.xyz", index=0)
    atoms.calc = None
    return atoms


def crystal(seed=1):
    """Copper in a sheared cell, away from its minimum."""
    atoms = bulk("Cu", "fcc", a=3.7, cubic=True)
    atoms.set_cell(atoms.cell.array + [[0.0, 0.1, 0.0], [0.0, 0.0, -0.2], [0.15, 0.0, 0.0]], scale_atoms=True)
    atoms.rattle(0.1, seed=seed)
    return atoms


def place(atoms):
    """The arguments of Calculator.compute."""
    cell = (atoms.cell.array, atoms.pbc) if atoms.pbc.any() else (None, None)
    return (atoms.positions, atoms.numbers, *cell)


class Values(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.calculator = Calculator(MODEL)
        cls.ase = Tiebeam(MODEL)

    @classmethod
    def tearDownClass(cls):
        cls.calculator.close()
        cls.ase.close()

    def test_ase_gets_what_the_plain_class_gets(self):
        for atoms in (cluster(), crystal()):
            plain = self.calculator.compute(*place(atoms))
            atoms.calc = self.ase
            self.assertEqual(atoms.get_potential_energy(), plain.energy)
            self.assertEqual(atoms.get_potential_energy(force_consistent=True), plain.energy)
            np.testing.assert_array_equal(atoms.get_forces(), plain.forces)
            np.testing.assert_array_equal(atoms.get_potential_energies(), plain.atom_energies)
            self.assertAlmostEqual(plain.atom_energies.sum(), plain.energy, delta=1e-9 * abs(plain.energy))
            self.assertGreater(np.abs(plain.forces).max(), 0.01)
            if plain.stress is not None:
                np.testing.assert_array_equal(atoms.get_stress(voigt=False), plain.stress)

    def test_the_command_gets_the_same(self):
        frames = [cluster(), crystal(), crystal(seed=2)]
        for rotations in (1, 3):
            self.calculator.rotations = rotations
            with tempfile.TemporaryDirectory() as folder:
                given, predicted = Path(folder, "in.xyz"), Path(folder, "out.xyz")
                write(given, frames, format="extxyz")
                command = [COMMAND, "predict", str(MODEL), str(given), str(predicted), "--rotations", str(rotations)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                # As rounded by the file, so that both see the same atoms.
                pairs = list(zip(read(given, index=":"), read(predicted, index=":")))
            self.assertEqual(len(pairs), len(frames))
            for atoms, answer in pairs:
                found = self.calculator.compute(*place(atoms))
                self.assertAlmostEqual(found.energy, answer.get_potential_energy(), delta=1e-5)
                np.testing.assert_allclose(found.forces, answer.get_forces(), rtol=0, atol=1e-5)
                if found.stress is not None:
                    np.testing.assert_allclose(found.stress, answer.get_stress(voigt=False), rtol=0, atol=1e-5)
        self.calculator.rotations = 1

    def test_forces_are_minus_the_gradient(self):
        step = 0.01
        for atoms in (cluster(), crystal()):
            forces = self.calculator.compute(*place(atoms)).forces
            scale = np.abs(forces).max()
            for atom, axis in [(0, 0), (1, 1), (2, 2), (3, 0)]:
                energies = []
                for sign in (1, -1):
                    moved = atoms.copy()
                    moved.positions[atom, axis] += sign * step
                    energies.append(self.calculator.compute(*place(moved)).energy)
                slope = (energies[0] - energies[1]) / (2 * step)
                self.assertAlmostEqual(forces[atom, axis], -slope, delta=0.01 * scale)
            np.testing.assert_allclose(forces.sum(axis=0), 0, atol=1e-5 * scale)

    def test_stress_is_that_of_strained_cells(self):
        atoms = crystal()
        atoms.calc = self.ase
        stress, numerical = atoms.get_stress(), numerical_stress(atoms)
        self.assertGreater(np.abs(stress).max(), 1e-3)
        np.testing.assert_allclose(stress, numerical, rtol=0, atol=0.003 * np.abs(stress).max())

    def test_dynamics_keep_energy(self):
        atoms = cluster()
        atoms.calc = self.ase
        spread = np.sqrt(units.kB * 300 / atoms.get_masses())[:, None]
        atoms.set_velocities(spread * np.random.default_rng(1).standard_normal((len(atoms), 3)))
        totals, kinetic = [], []

        def note():
            totals.append(atoms.get_total_energy() / len(atoms))
            kinetic.append(atoms.get_kinetic_energy() / len(atoms))

        dynamics = VelocityVerlet(atoms, timestep=units.fs)
        dynamics.attach(note)
        dynamics.run(20)
        self.assertEqual(len(totals), 21)
        self.assertGreater(np.ptp(kinetic), 1e-4)
        self.assertLess(np.ptp(totals), 0.02 * np.ptp(kinetic))

    def test_rotations_average(self):
        atoms = crystal()
        first = self.calculator.compute(*place(atoms))
        self.assertEqual(self.calculator.rotations, 1)
        self.calculator.rotations = 4
        average = self.calculator.compute(*place(atoms))
        self.calculator.rotations = 1
        self.assertNotEqual(average.energy, first.energy)
        with Calculator(str(MODEL), rotations=4) as calculator:
            again = calculator.compute(*place(atoms))
        self.assertEqual(again.energy, average.energy)
        np.testing.assert_array_equal(again.forces, average.forces)
        self.assertEqual(self.calculator.compute(*place(atoms)).energy, first.energy)

    def test_rotations_through_ase_are_not_cached(self):
        atoms = crystal()
        with Tiebeam(MODEL) as ase:
            atoms.calc = ase
            first = atoms.get_potential_energy()
            self.assertEqual(ase.rotations, 1)
            ase.rotations = 4
            self.assertEqual((ase.rotations, ase.calculator.rotations), (4, 4))
            average = atoms.get_potential_energy()
            self.assertNotEqual(average, first)
            with self.assertRaises(ValueError):
                ase.rotations = 0
            self.assertEqual(ase.rotations, 4)
            ase.rotations = 1
            self.assertEqual(atoms.get_potential_energy(), first)
        with Calculator(MODEL, rotations=4) as calculator:
            self.assertEqual(calculator.compute(*place(atoms)).energy, average)

    def test_slabs_and_free_atoms_have_no_stress(self):
        atoms = crystal()
        atoms.pbc = [True, True, False]
        atoms.calc = self.ase
        self.assertTrue(np.isfinite(atoms.get_potential_energy()))
        self.assertIsNone(self.calculator.compute(*place(atoms)).stress)
        with self.assertRaises(PropertyNotImplementedError):
            atoms.get_stress()
        positions, numbers, cell, _ = place(crystal())
        whole = self.calculator.compute(positions, numbers, cell)
        np.testing.assert_array_equal(whole.forces, self.calculator.compute(positions, numbers, cell, [1, 1, 1]).forces)
        self.assertEqual(whole.stress.shape, (3, 3))

    def test_inputs_of_every_kind(self):
        atoms = cluster()
        want = self.calculator.compute(atoms.positions, atoms.numbers)
        strided = np.asfortranarray(np.repeat(atoms.positions, 2, axis=0))[::2]
        for positions, numbers in [
            (atoms.positions.tolist(), atoms.numbers.tolist()),
            (strided, atoms.numbers.astype(np.uint8)),
        ]:
            found = self.calculator.compute(positions, numbers)
            self.assertEqual(found.energy, want.energy)
            np.testing.assert_array_equal(found.forces, want.forces)
        nothing = self.calculator.compute([], [])
        self.assertEqual((nothing.energy, nothing.forces.shape), (0.0, (0, 3)))

    def test_the_network_is_described(self):
        self.assertEqual(self.calculator.radius, 5.0)
        self.assertEqual(self.calculator.layers, 2)


def numerical_stress(atoms):
    """ASE's, under its name of each version."""
    try:
        from ase.calculators.fd import calculate_numerical_stress
    except ImportError:
        return atoms.calc.calculate_numerical_stress(atoms, d=1e-3)
    return calculate_numerical_stress(atoms, eps=1e-3)


class Refused(unittest.TestCase):
    def test_files(self):
        for model in ("/nowhere/model.safetensors", DATA / "morse.xyz", HEADER.parent):
            for kind in (Calculator, Tiebeam):
                with self.subTest(model=model, kind=kind), self.assertRaises(tiebeam.Error) as caught:
                    kind(model)
                self.assertIn(str(model), str(caught.exception))

    def test_paths(self):
        """Bytes are a path, characters that no file system can hold are refused, and no path ends at a NUL."""
        for kind in (Calculator, Tiebeam):
            kind(os.fsencode(MODEL)).close()
            for end in ("\0", "\0.old"):
                for path in (str(MODEL) + end, os.fsencode(MODEL) + end.encode()):
                    with self.subTest(path=path, kind=kind), self.assertRaisesRegex(ValueError, "model: .* NUL"):
                        kind(path)
            with self.assertRaisesRegex(ValueError, "library: .* NUL"):
                kind(MODEL, library="/nowhere\0")
        # On Windows such a name cannot be made, and on other systems the library reads names in UTF-8 only.
        with self.assertRaises(tiebeam.Error):
            Calculator("/nowhere/\udcff.safetensors")

    def test_atoms(self):
        with Calculator(MODEL) as calculator:
            positions, numbers = cluster().positions, cluster().numbers
            want = calculator.compute(positions, numbers)
            wrong, infinite = positions.copy(), positions.copy()
            wrong[1, 2], infinite[0, 0] = np.nan, np.inf
            for arguments, kind, words in [
                ((positions, numbers + 1), tiebeam.Error, "was trained on Cu"),
                ((positions, numbers + 100000), tiebeam.Error, "number 100029"),
                ((wrong, numbers), tiebeam.Error, "position of node"),
                ((infinite, numbers), tiebeam.Error, "position of node"),
                ((positions, numbers, np.zeros((3, 3))), tiebeam.Error, "cell"),
                ((positions, numbers[1:]), ValueError, "positions: shape (13, 3); (12, 3)"),
                ((positions.ravel(), numbers), ValueError, "positions: shape (39,)"),
                ((positions[:, :2], numbers), ValueError, "positions: shape (13, 2)"),
                ((positions, numbers[:, None]), ValueError, "numbers: shape (13, 1)"),
                ((positions, numbers + 0.5), ValueError, "numbers: whole"),
                ((positions, numbers + 2**40), ValueError, "numbers: whole"),
                ((positions, numbers, np.eye(2)), ValueError, "cell: shape (2, 2)"),
                ((positions, numbers, np.eye(3), [True]), ValueError, "periodic: shape (1,)"),
                ((positions, numbers, None, [True] * 3), ValueError, "periodic"),
            ]:
                with self.subTest(words=words), self.assertRaises(kind) as caught:
                    calculator.compute(*arguments)
                self.assertIn(words, str(caught.exception))
            # An error leaves nothing behind.
            self.assertEqual(calculator.compute(positions, numbers).energy, want.energy)

    def test_ase_atoms(self):
        atoms = cluster()
        atoms.calc = Tiebeam(MODEL)
        atoms.positions[3] = np.nan
        with self.assertRaisesRegex(tiebeam.Error, "position of node"):
            atoms.get_forces()
        atoms = cluster()
        atoms.calc = Tiebeam(MODEL)
        atoms.numbers[3] = 79
        with self.assertRaisesRegex(tiebeam.Error, "was trained on Cu"):
            atoms.get_potential_energy()

    def test_rotations(self):
        for count, kind in [(0, ValueError), (-1, ValueError), (2**32, ValueError), (1.5, TypeError)]:
            for make in (Calculator, Tiebeam):
                with self.subTest(count=count), self.assertRaises(kind):
                    make(MODEL, rotations=count)

    def test_libraries(self):
        with self.assertRaisesRegex(tiebeam.Error, "no library"):
            Calculator(MODEL, library="/nowhere/libtiebeam.so")
        with self.assertRaisesRegex(tiebeam.Error, "cannot be used"):
            Calculator(MODEL, library=MODEL)
        # Another library, which is one, without the functions.
        other = next((Path(x) for x in sorted(map_of_process()) if "libm.so" in x or "libm-" in x), None)
        if other is not None:
            with self.assertRaisesRegex(tiebeam.Error, "cannot be used.*tiebeam_abi"):
                Calculator(MODEL, library=other)

    def test_a_closed_calculator(self):
        calculator = Calculator(MODEL)
        calculator.close()
        calculator.close()
        with self.assertRaisesRegex(tiebeam.Error, "closed"):
            calculator.compute([], [])
        with self.assertRaisesRegex(tiebeam.Error, "closed"):
            calculator.rotations = 2
        with self.assertRaisesRegex(tiebeam.Error, "closed"):
            calculator.radius
        with Tiebeam(MODEL) as ase:
            pass
        with self.assertRaisesRegex(tiebeam.Error, "closed"):
            ase.calculate(cluster())


def map_of_process():
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return {line.split(maxsplit=5)[5] for line in lines if "/" in line}


class Life(unittest.TestCase):
    def test_calculators_in_threads(self):
        """Two calculators, and one that two threads share, get what one thread gets."""
        frames = [crystal(seed) for seed in range(4)]
        calculators = [Calculator(MODEL), Calculator(MODEL, rotations=2)]
        want = [[c.compute(*place(atoms)) for atoms in frames] for c in calculators]
        wrong = []

        def work(which):
            try:
                for _ in range(3):
                    for atoms, answer in zip(frames, want[which]):
                        found = calculators[which].compute(*place(atoms))
                        if found.energy != answer.energy or not np.array_equal(found.forces, answer.forces):
                            wrong.append((which, found.energy, answer.energy))
                    # Errors are of the thread that asked.
                    with self.assertRaisesRegex(tiebeam.Error, f"number {1000 + which}"):
                        calculators[which].compute([[0.0, 0.0, 0.0]], [1000 + which])
            except BaseException as error:  # noqa: BLE001
                wrong.append((which, repr(error)))

        threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])
        for calculator in calculators:
            calculator.close()

    def test_closing_waits_for_other_threads(self):
        calculator = Calculator(MODEL, rotations=20)
        results = []
        began = threading.Event()

        def work():
            try:
                while True:
                    began.set()
                    results.append(calculator.compute(*place(crystal())).energy)
            except tiebeam.Error as error:
                results.append(str(error))

        thread = threading.Thread(target=work)
        thread.start()
        began.wait()
        calculator.close()
        thread.join()
        self.assertEqual(results[-1], "the calculator is closed")

    def test_garbage_is_closed(self):
        closed = []

        class Watched(Calculator):
            def close(self):
                closed.append(self._handle is not None)
                super().close()

        atoms = cluster()
        calculator = Watched(MODEL)
        calculator.compute(*place(atoms))
        del calculator
        gc.collect()
        self.assertEqual(closed, [True])

    def test_copies_are_refused(self):
        with Calculator(MODEL) as calculator, self.assertRaisesRegex(TypeError, "one in each process"):
            pickle.dumps(calculator)

    @unittest.skipUnless(hasattr(os, "fork"), "this system has no fork")
    def test_forked_processes_are_refused(self):
        code = """if True:
            import os, sys, tiebeam
            calculator = tiebeam.Calculator(sys.argv[1])
            child = os.fork()
            if child == 0:
                try:
                    calculator.compute([], [])
                except tiebeam.Error as error:
                    print(error, flush=True)
                calculator.close()
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            print(calculator.compute([], []).energy)
        """
        out = subprocess.run([sys.executable, "-c", code, str(MODEL)], check=True, text=True, capture_output=True)
        self.assertIn("opened before this process was forked", out.stdout)
        self.assertTrue(out.stdout.endswith("0.0\n"), out.stdout)

    @unittest.skipUnless(hasattr(os, "fork"), "this system has no fork")
    def test_forked_while_another_thread_has_the_lock(self):
        code = """if True:
            import os, sys, threading, tiebeam
            calculator = tiebeam.Calculator(sys.argv[1])
            held, done = threading.Event(), threading.Event()

            def hold():
                with calculator._turn:
                    held.set()
                    done.wait()

            thread = threading.Thread(target=hold)
            thread.start()
            held.wait()
            child = os.fork()
            if child == 0:
                for work in (
                    lambda: calculator.compute([], []),
                    lambda: calculator.radius,
                    lambda: setattr(calculator, "rotations", 2),
                ):
                    try:
                        work()
                    except tiebeam.Error as error:
                        print(error, flush=True)
                calculator.close()
                os._exit(7)
            # A child that waits for the lock would do so for ever.
            timer = threading.Timer(30, lambda: os.kill(child, 9))
            timer.start()
            status = os.waitpid(child, 0)[1]
            timer.cancel()
            done.set()
            thread.join()
            print(os.waitstatus_to_exitcode(status), calculator.compute([], []).energy)
        """
        out = subprocess.run([sys.executable, "-c", code, str(MODEL)], check=True, text=True, capture_output=True).stdout
        *errors, last = out.splitlines()
        self.assertEqual(last, "7 0.0")
        self.assertEqual(len(errors), 3)
        for error in errors:
            self.assertIn("opened before this process was forked", error)

    def test_without_ase(self):
        """The module works where ASE cannot be imported, and says what its ASE calculator needs."""
        code = """if True:
            import sys
            sys.modules["ase"] = None
            import tiebeam
            from tiebeam import Calculator, Tiebeam
            with Calculator(sys.argv[1]) as calculator:
                print(calculator.compute([[0, 0, 0], [0, 0, 2.5]], [29, 29]).energy)
            try:
                Tiebeam(sys.argv[1])
            except ImportError as error:
                print(error)
        """
        out = subprocess.run([sys.executable, "-c", code, str(MODEL)], check=True, text=True, capture_output=True).stdout
        energy, words = out.splitlines()
        with Calculator(MODEL) as calculator:
            self.assertEqual(float(energy), calculator.compute([[0, 0, 0], [0, 0, 2.5]], [29, 29]).energy)
        self.assertIn("pip install", words)

    def test_importing_does_not_import_ase(self):
        code = "import sys, tiebeam; print('ase' in sys.modules, 'Tiebeam' in tiebeam.__all__)"
        out = subprocess.run([sys.executable, "-c", code], check=True, text=True, capture_output=True).stdout
        self.assertEqual(out.split(), ["False", "True"])

    def test_the_library_of_the_package_is_used(self):
        """Not one of the clone or of the system."""
        package = Path(tiebeam.__file__).parent
        self.assertIn("site-packages", package.parts)
        (path,) = [file for file in package.iterdir() if file.suffix in (".so", ".dylib", ".dll")]
        with Calculator(MODEL, library=path) as named, Calculator(MODEL) as own:
            self.assertEqual(Path(own._library._name), path.resolve())
            self.assertEqual(named.layers, own.layers)
        self.assertIsInstance(own._library, ctypes.CDLL)


if __name__ == "__main__":
    unittest.main()
