#!/bin/sh
# Installs what tiebeam-mpi is built with and runs on, unless it is there: an MPI library with its compiler wrapper and mpirun, and
# libclang, which reads MPI's headers.
# Usage: scripts/ensure-mpi.sh
set -eu

# shellcheck source=scripts/packages.sh
. "$(dirname "$0")/packages.sh"

fail() {
    echo "ensure-mpi: $missing is not here and $1: install MPI and libclang (Debian, Ubuntu: libopenmpi-dev openmpi-bin" \
        "libclang-dev, or libmpich-dev mpich; Fedora: openmpi-devel clang-devel, then \`module load mpi\`; Arch: openmpi clang;" \
        "Alpine: openmpi-dev clang-dev; macOS: brew install open-mpi llvm), or load your cluster's modules, and run this again." >&2
    exit 1
}

# Whether clang's own headers, such as stddef.h, are near a libclang in this folder. Without them it reads none of MPI's. Debian has them
# in a package of their own.
has_headers() {
    for header in "$1"/clang/*/include/stddef.h "$1"/../lib/clang/*/include/stddef.h /usr/lib/clang/*/include/stddef.h \
        /usr/lib/llvm*/lib/clang/*/include/stddef.h; do
        if [ -f "$header" ]; then return 0; fi
    done
    return 1
}

# Whether libclang is where the build looks: LIBCLANG_PATH, what llvm-config says, or a folder of libraries.
has_libclang() {
    for folder in "${LIBCLANG_PATH:-}" "$(llvm-config --libdir 2>/dev/null || true)" /usr/lib/llvm*/lib /usr/lib64/llvm*/lib \
        /usr/lib /usr/lib64 /usr/lib/*-linux-gnu /usr/local/lib /usr/local/opt/llvm/lib /opt/homebrew/opt/llvm/lib \
        /Library/Developer/CommandLineTools/usr/lib; do
        [ -n "$folder" ] || continue
        if [ -f "$folder" ]; then return 0; fi
        for file in "$folder"/libclang.so "$folder"/libclang.so.* "$folder"/libclang-[0-9]*.so* "$folder"/libclang.dylib; do
            if [ -e "$file" ] && has_headers "$folder"; then return 0; fi
        done
    done
    return 1
}

# Fedora's MPI is in no folder of PATH before `module load mpi`, which a script cannot do for its caller.
check_path() {
    if ! has "${MPICC:-mpicc}" && [ -x /usr/lib64/openmpi/bin/mpicc ]; then
        echo "ensure-mpi: MPI is in /usr/lib64/openmpi/bin and not in PATH: \`module load mpi\` in this shell, or" \
            "\`export PATH=/usr/lib64/openmpi/bin:\$PATH\`, and run this again." >&2
        exit 1
    fi
}

# Sets $missing to what is not here.
look() {
    missing=
    has "${MPICC:-mpicc}" || missing="MPI's compiler wrapper (mpicc)"
    has mpirun || missing="${missing:+$missing, }mpirun"
    has_libclang || missing="${missing:+$missing, }libclang"
    [ -z "$missing" ]
}

if look; then exit 0; fi
check_path
choose_packages 'libopenmpi-dev openmpi-bin libclang-dev' 'openmpi-devel clang-devel' 'openmpi clang' 'openmpi-dev clang-dev' ||
    fail "$packages_why"
echo "ensure-mpi: $missing not found; installing by $manager: $packages" >&2
install_packages || fail "$manager could not install it"
check_path
look || fail "$manager installed none that can be found"
echo "ensure-mpi: installed" >&2
