#!/bin/sh
# Builds the C library and installs it with its header and its pkg-config file.
# Usage: [VARIABLE=VALUE ...] scripts/install-capi.sh [install|uninstall|build]
#   PREFIX       where the files will be used (/usr/local)
#   DESTDIR      folder before PREFIX into which they are put, for makers of packages (none)
#   LIBDIR       folder of libraries below PREFIX (lib)
#   LIBRARY      the library, already built by the task `build`, which prints its path; cargo is not run then
#   CARGO        the cargo command (cargo)
#   PROFILE      the profile of cargo (release). Libraries of other profiles may read kernels from this repository.
# cargo's own variables, such as CARGO_TARGET_DIR and CARGO_BUILD_TARGET, are obeyed.
# `build` and LIBRARY are for folders that only root may write: nothing of cargo's then belongs to root.
set -eu

fail() {
    echo "install-capi: $1" >&2
    exit 1
}

# Without slashes at the end, so that / is nothing: what follows begins with one.
folder() {
    printf '%s\n' "$1" | sed 's|/*$||'
}

root=$(cd "$(dirname "$0")/.." && pwd)
cargo=${CARGO:-cargo}
task=${1:-install}
prefix=${PREFIX:-/usr/local}
libdir=$(folder "${LIBDIR:-lib}")
profile=${PROFILE:-release}
destdir=$(folder "${DESTDIR:-}")

case $task in
install | uninstall | build) ;;
*) fail "'$task': give install, uninstall or build" ;;
esac
case $prefix in
/*) prefix=$(folder "$prefix") ;;
*) fail "PREFIX is '$prefix'; give a path from the root, such as \$HOME/.local" ;;
esac
# The file for pkg-config counts these folders, and names them without quotes.
case /$libdir/ in
// | *//* | */./* | */../*) fail "LIBDIR is '$libdir'; give a folder below PREFIX, such as lib64, without . and .." ;;
*[!A-Za-z0-9._+/-]*) fail "LIBDIR is '$libdir'; give a name of letters, digits and . _ + - only" ;;
esac

version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/Cargo.toml" | head -n 1)
[ -n "$version" ] || fail "there is no version in $root/Cargo.toml"
# The part of the version within which programs need not be linked anew: 0.1 of 0.1.2, 1 of 1.2.3.
major=${version%%.*}
rest=${version#*.}
abi=$major
[ "$major" != 0 ] || abi=$major.${rest%%.*}

system=$(uname -s)
# Names from the most to the least exact. Programs ask for the middle one, and the linker for the last.
case $system in
Darwin)
    built=libtiebeam.dylib
    before=libtiebeam. after=.dylib
    argument=-Wl,-install_name,@rpath/$before$abi$after
    others='*-linux-* *-windows-* *bsd* wasm*'
    ;;
MINGW* | MSYS* | CYGWIN*)
    cat >&2 <<END
install-capi: nothing is installed on Windows. Build the library by
    cargo rustc --release -p tiebeam --lib --crate-type cdylib --features capi
and copy target\\release\\tiebeam.dll beside your program. Compile with include\\tiebeam.h, and link with
target\\release\\tiebeam.dll.lib (MSVC) or libtiebeam.dll.a (GNU).
END
    exit 1
    ;;
*)
    built=libtiebeam.so
    before=libtiebeam.so. after=
    argument=-Wl,-soname,$before$abi
    others='*-apple-* *-windows-* wasm*'
    ;;
esac
full=$before$version$after soname=$before$abi$after

# Files are named, and the linker is spoken to, as on this system.
set -f
for other in $others; do
    # shellcheck disable=SC2254 # It is a pattern.
    case ${CARGO_BUILD_TARGET:-} in
    $other) fail "CARGO_BUILD_TARGET is $CARGO_BUILD_TARGET: install from a machine of that system, or unset it" ;;
    esac
done
set +f

lib=$destdir$prefix/$libdir
include=$destdir$prefix/include

# Removes the libraries of other versions in place of which programs run with this one.
remove_others() {
    for file in "$lib/$before$abi".[0-9]*"$after"; do
        if [ -f "$file" ] && [ "$file" != "$lib/$full" ]; then rm -f "$file"; fi
    done
}

if [ "$task" = uninstall ]; then
    remove_others
    rm -f "$lib/$full" "$lib/$soname" "$lib/$built" "$lib/pkgconfig/tiebeam.pc" "$include/tiebeam.h"
    exit
fi

# Made below a temporary folder, so that a failure leaves nothing half installed.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [ "$task" = install ] && [ -n "${LIBRARY:-}" ]; then
    library=$LIBRARY
    [ -f "$library" ] || fail "LIBRARY is $library, which is no file"
    LC_ALL=C grep -qF "$soname" "$library" ||
        fail "LIBRARY is $library, which does not call itself $soname: build it by $0 build"
else
    command -v "$cargo" >/dev/null 2>&1 ||
        fail "'$cargo' is missing: install Rust (https://rustup.rs), or set CARGO to the command. As root, set LIBRARY to what
    $0 build
prints for a user who has Rust"
    # cargo says where the library lies, whatever its settings are. Its own messages still go to the terminal.
    "$cargo" rustc --manifest-path "$root/Cargo.toml" --profile "$profile" -p tiebeam --lib --crate-type cdylib \
        --features capi --message-format json-render-diagnostics -- -C "link-arg=$argument" >"$work/messages"
    library=$(sed -n "s/.*\"filenames\":\[\"\([^\"]*$built\)\".*/\1/p" "$work/messages" | tail -n 1)
    [ -f "$library" ] || fail "cargo built no $built"
fi
if [ "$task" = build ]; then
    printf '%s\n' "$library"
    exit
fi

# The file finds its own folder, so that the whole prefix can be moved.
up=$(printf '%s\n' "$libdir/pkgconfig" | sed 's|[^/][^/]*|..|g')
cat >"$work/tiebeam.pc" <<END
prefix=\${pcfiledir}/$up
libdir=\${prefix}/$libdir
includedir=\${prefix}/include

Name: tiebeam
Description: Energies, forces and stress of trained interatomic potentials
Version: $version
Cflags: -I\${includedir}
Libs: -L\${libdir} -ltiebeam
END

mkdir -p "$lib/pkgconfig" "$include"
install -m 755 "$library" "$lib/$full"
ln -sf "$full" "$lib/$soname"
ln -sf "$soname" "$lib/$built"
remove_others
install -m 644 "$work/tiebeam.pc" "$lib/pkgconfig/tiebeam.pc"
install -m 644 "$root/include/tiebeam.h" "$include/tiebeam.h"

echo "installed $lib/$full, its links $soname and $built,"
echo "          $include/tiebeam.h and $lib/pkgconfig/tiebeam.pc"

# Linux's loader knows the files of its folders from a list, which ldconfig makes.
if [ -n "$destdir" ] || [ "$system" != Linux ]; then exit; fi
PATH=$PATH:/usr/sbin:/sbin
real=$(cd "$lib" && pwd -P)
searched() {
    ldconfig -v -N -X 2>/dev/null | sed -n 's|^\(/[^:]*\):.*|\1|p' | grep -Fxq -e "$lib" -e "$real"
}
listed() {
    ldconfig -p 2>/dev/null | sed -n 's/.* => //p' | grep -Fxq -e "$lib/$soname" -e "$real/$soname"
}
if ! command -v ldconfig >/dev/null 2>&1; then
    # Loaders without a list, such as musl's.
    case $lib in /lib | /usr/lib | /usr/local/lib) exit ;; esac
elif searched; then
    if [ "$(id -u)" = 0 ]; then ldconfig || true; fi
    if listed; then exit; fi
    if [ "$(id -u)" != 0 ]; then
        echo "run ldconfig as root, so that programs find $soname"
        exit
    fi
elif listed; then
    exit
fi
echo "programs find $soname if linked with -Wl,-rpath,$lib, or run with LD_LIBRARY_PATH=$lib"
