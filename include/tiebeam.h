/* Tiebeam: energies, forces and stress of a trained interatomic potential, for programs in C and all that can
 * call C.
 *
 * The library is built by
 *     cargo rustc --release --lib --crate-type cdylib --features capi
 * and lies in target/release (libtiebeam.so, libtiebeam.dylib or tiebeam.dll).
 *
 * Units are those of the potential: eV and angstrom, eV per cubic angstrom for stress, which is positive under
 * tension. Functions that can fail return 0 or a pointer on success; after a failure tiebeam_error() has the
 * reason. A calculator may be used from any thread, by one at a time or by several. No function changes its
 * inputs. */
#ifndef TIEBEAM_H
#define TIEBEAM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of these functions; it rises when one of them changes. */
#define TIEBEAM_ABI 1
uint32_t tiebeam_abi(void);

/* A potential on a device. */
typedef struct tiebeam_calculator tiebeam_calculator;

/* Reads a potential from a safetensors file, path in UTF-8, and opens the device (TIEBEAM_ADAPTER chooses
 * one). NULL when that fails. */
tiebeam_calculator *tiebeam_open(const char *path);

/* Ends a calculator. NULL is left alone. */
void tiebeam_close(tiebeam_calculator *calculator);

/* How far atoms see, in angstrom; 0 where all see all, or for NULL. Messages travel one radius a layer: a domain
 * needs tiebeam_layers() radii of neighbours around its own atoms for their energies, and twice that for the forces
 * on them, which are slopes of their neighbours' energies too. */
double tiebeam_radius(const tiebeam_calculator *calculator);
uint32_t tiebeam_layers(const tiebeam_calculator *calculator);

/* From now on results are averages over this many rotations of the atoms and their cell, the first of them none, the
 * others random and the same every time. It takes so many times the work; the more there are, the less a rotation of the input
 * changes the results.
 * A calculator starts with 1. Not while another thread uses the calculator. Returns 0, or 1 after an error. */
int tiebeam_set_rotations(tiebeam_calculator *calculator, uint32_t count);

/* Energy, forces and stress of atoms.
 *   positions      3 numbers an atom
 *   numbers        atomic number of each atom
 *   cell           9 numbers, the three vectors one after the other, or NULL for free space
 *   periodic       3 flags, one a vector, or NULL for periodic along all vectors of a cell
 * Written, where not NULL:
 *   energy         1 number
 *   atom_energies  1 number an atom; they sum to the energy
 *   forces         3 numbers an atom
 *   stress         9 numbers, a symmetric matrix; an error where the cell is not periodic along all vectors
 * Returns 0, or 1 after an error; nothing is written then. */
int tiebeam_compute(const tiebeam_calculator *calculator, size_t atoms, const double *positions,
                    const int32_t *numbers, const double *cell, const uint8_t *periodic, double *energy,
                    double *atom_energies, double *forces, double *stress);

/* What the last failing call on this thread says, in UTF-8; valid until the next call on this thread. Never
 * NULL. */
const char *tiebeam_error(void);

#ifdef __cplusplus
}
#endif

#endif
