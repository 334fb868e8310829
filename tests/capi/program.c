/* Calls every function of tiebeam.h as a simulation would, and prints what it got for the test to compare.
 * Arguments: a potential that knows species 8 and 29. */
#include <stdio.h>
#include <string.h>

#include "tiebeam.h"

#define ATOMS 3

static void show(const char *name, const double *x, size_t count) {
    printf("%s", name);
    for (size_t i = 0; i < count; i++) printf(" %.17g", x[i]);
    printf("\n");
}

/* An error must have words, and must have written nothing. */
static int refused(const char *name, int status, const double *energy) {
    const char *words = tiebeam_error();
    if (status == 0 || strlen(words) == 0 || *energy != 7.0) {
        fprintf(stderr, "%s: status %d, energy %g, error '%s'\n", name, status, *energy, words);
        return 1;
    }
    printf("%s: %s\n", name, words);
    return 0;
}

int main(int count, char **arguments) {
    const double positions[3 * ATOMS] = {0.1, 0.2, 0.3, 1.9, 1.7, 2.2, 3.0, 0.4, -0.5};
    const double cell[9] = {4.6, 0, 0, 0.7, 5.1, 0, -0.4, 0.5, 5.4};
    const int32_t numbers[ATOMS] = {8, 29, 29}, unknown[ATOMS] = {8, 29, 1}, wild[ATOMS] = {8, 29, 100000};
    const uint8_t slab[3] = {1, 1, 0};
    double energy, energies[ATOMS], forces[3 * ATOMS], stress[9], kept = 7.0;
    int wrong = 0;
    if (count != 2 || tiebeam_abi() != TIEBEAM_ABI) return 2;

    if (tiebeam_open(NULL) || tiebeam_open("/nowhere/model.safetensors")) return 3;
    printf("open: %s\n", tiebeam_error());
    tiebeam_close(NULL);
    tiebeam_calculator *calculator = tiebeam_open(arguments[1]);
    if (!calculator) {
        fprintf(stderr, "open: %s\n", tiebeam_error());
        return 4;
    }
    double radius = tiebeam_radius(calculator);
    show("radius", &radius, 1);
    printf("layers %u\n", (unsigned)tiebeam_layers(calculator));

    if (tiebeam_compute(calculator, ATOMS, positions, numbers, NULL, NULL, &energy, energies, forces, NULL)) {
        fprintf(stderr, "free: %s\n", tiebeam_error());
        return 5;
    }
    show("energy", &energy, 1);
    show("energies", energies, ATOMS);
    show("forces", forces, 3 * ATOMS);
    if (tiebeam_compute(calculator, ATOMS, positions, numbers, cell, NULL, &energy, NULL, NULL, stress)) {
        fprintf(stderr, "periodic: %s\n", tiebeam_error());
        return 6;
    }
    show("periodic", &energy, 1);
    show("stress", stress, 9);
    if (!tiebeam_set_rotations(NULL, 2) || !tiebeam_set_rotations(calculator, 0)) return 8;
    printf("rotations: %s\n", tiebeam_error());
    if (tiebeam_set_rotations(calculator, 3) ||
        tiebeam_compute(calculator, ATOMS, positions, numbers, cell, NULL, &energy, energies, forces, stress)) {
        fprintf(stderr, "rotations: %s\n", tiebeam_error());
        return 9;
    }
    show("average", &energy, 1);
    show("average_forces", forces, 3 * ATOMS);
    show("average_stress", stress, 9);
    if (tiebeam_compute(calculator, 0, NULL, NULL, NULL, NULL, &energy, NULL, NULL, NULL) || energy != 0.0) return 7;

    wrong += refused("null", tiebeam_compute(NULL, ATOMS, positions, numbers, NULL, NULL, &kept, NULL, NULL, NULL), &kept);
    wrong += refused("positions", tiebeam_compute(calculator, ATOMS, NULL, numbers, NULL, NULL, &kept, NULL, NULL, NULL), &kept);
    wrong += refused("unknown", tiebeam_compute(calculator, ATOMS, positions, unknown, NULL, NULL, &kept, NULL, NULL, NULL), &kept);
    wrong += refused("wild", tiebeam_compute(calculator, ATOMS, positions, wild, NULL, NULL, &kept, NULL, NULL, NULL), &kept);
    wrong += refused("huge", tiebeam_compute(calculator, SIZE_MAX, positions, numbers, NULL, NULL, &kept, NULL, NULL, NULL), &kept);
    wrong += refused("slab", tiebeam_compute(calculator, ATOMS, positions, numbers, cell, slab, &kept, NULL, NULL, stress), &kept);
    tiebeam_close(calculator);
    return wrong;
}
