/* Tiebeam: energies, forces and stress of a trained interatomic potential, for programs in C and other languages
 * that can call C.
 *
 * `make install-capi PREFIX=/usr/local` in Tiebeam's repository builds and installs the library, this header and a file for
 * pkg-config. A program is then compiled by
 *     cc program.c $(pkg-config --cflags --libs tiebeam)
 * If PREFIX is no folder of the system, PKG_CONFIG_PATH=PREFIX/lib/pkgconfig finds the file, and -Wl,-rpath,PREFIX/lib lets the
 * program find the library. On Windows, build it by
 *     cargo rustc --release -p tiebeam --lib --crate-type cdylib --features capi
 * and copy target/release/tiebeam.dll beside the program.
 *
 * The functions are those of C. They can be called from C++, where this header compiles too, and from every language that can
 * call C.
 *
 * Units are those of the potential: eV and angstrom, and eV per cubic angstrom for stress, which is positive under
 * tension. Functions that can fail return 0 or a pointer on success. After a failure, tiebeam_error() returns the
 * reason. A calculator may be used from any thread, also from several at once. No function changes its inputs. */
#ifndef TIEBEAM_H
#define TIEBEAM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of these functions. It is increased when one of them changes. */
#define TIEBEAM_ABI 1
uint32_t tiebeam_abi(void);

/* A potential on a device. */
typedef struct tiebeam_calculator tiebeam_calculator;

/* Reads a potential from a safetensors file (path in UTF-8) and opens the device (TIEBEAM_ADAPTER chooses one).
 * Returns NULL after an error. */
tiebeam_calculator *tiebeam_open(const char *path);

/* Frees a calculator. NULL is ignored. */
void tiebeam_close(tiebeam_calculator *calculator);

/* The cutoff radius in angstrom, and the number of layers. The radius is 0 if all atoms interact, or for NULL. Messages
 * travel one radius per layer. A domain therefore needs neighbours within tiebeam_layers() radii of its own atoms for
 * their energies, and within twice that distance for their forces, which are gradients of the neighbours' energies too. */
double tiebeam_radius(const tiebeam_calculator *calculator);
uint32_t tiebeam_layers(const tiebeam_calculator *calculator);

/* Sets the number of orientations over which results are averaged. The first is that of the input; the others are random
 * rotations of the atoms and their cell, the same ones every time. The work grows with the number, and the effect of a
 * rotation of the input on the results falls. A calculator starts with 1. Must not be called while another thread uses
 * the calculator. Returns 0, or 1 after an error. */
int tiebeam_set_rotations(tiebeam_calculator *calculator, uint32_t count);

/* Computes energy, forces and stress of atoms.
 *   positions      3 numbers per atom
 *   numbers        atomic number of each atom
 *   cell           9 numbers, the three vectors one after the other, or NULL for free space
 *   periodic       3 flags, one per vector, or NULL for a cell that is periodic along all vectors
 * Outputs, each of which may be NULL:
 *   energy         1 number
 *   atom_energies  1 number per atom; their sum is the energy
 *   forces         3 numbers per atom
 *   stress         9 numbers, a symmetric matrix; an error if the cell is not periodic along all vectors
 * Returns 0, or 1 after an error. After an error, nothing has been written. */
int tiebeam_compute(const tiebeam_calculator *calculator, size_t atoms, const double *positions,
                    const int32_t *numbers, const double *cell, const uint8_t *periodic, double *energy,
                    double *atom_energies, double *forces, double *stress);

/* The message of the last call on this thread that failed, in UTF-8. Valid until the next call on this thread. Never
 * NULL. */
const char *tiebeam_error(void);

#ifdef __cplusplus
}
#endif

#endif
