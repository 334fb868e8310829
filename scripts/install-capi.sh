#!/bin/sh
# Builds the C library and installs it with its header and its pkg-config file.
# Usage: [VARIABLE=VALUE ...] scripts/install-capi.sh [install|uninstall]
#   PREFIX       where the files will be used (/usr/local)
#   DESTDIR      folder before PREFIX into which they are put, for makers of packages (none)
#   LIBDIR       folder of libraries below PREFIX (lib)
#   CARGO        the cargo command (cargo)
#   PROFILE      the profile of cargo (release). Libraries of other profiles may read kernels from this repository.
# cargo's own variables, such as CARGO_TARGET_DIR and CARGO_BUILD_TARGET, are obeyed.
set -eu

fail() {
    echo "install-capi: $1" >&2
    exit 1
}

root=$(cd "$(dirname "$0")/.." && pwd)
cargo=${CARGO:-cargo}
prefix=${PREFIX:-/usr/local}
libdir=${LIBDIR:-lib}
profile=${PROFILE:-release}

case $prefix in
/*) ;;
*) fail "PREFIX is '$prefix'; give a path from the root, such as \$HOME/.local" ;;
esac
case $libdir in
'' | /* | .. | ../* | */.. | */../*) fail "LIBDIR is '$libdir'; give a folder below PREFIX, such as lib64" ;;
esac
command -v "$cargo" >/dev/null 2>&1 ||
    fail "'$cargo' is missing: install Rust (https://rustup.rs), or set CARGO to the command"

# path+file:///folder#0.1.0, or ...#tiebeam@0.1.0
id=$("$cargo" pkgid --manifest-path "$root/Cargo.toml" -p tiebeam)
version=${id##*[#@]}
# The part of the version within which programs need not be linked anew: 0.1 of 0.1.2, 1 of 1.2.3.
major=${version%%.*}
rest=${version#*.}
abi=$major
[ "$major" != 0 ] || abi=$major.${rest%%.*}

# Names from the most to the least exact. Programs ask for the middle one, and the linker for the last.
case $(uname -s) in
Darwin)
    built=libtiebeam.dylib
    full=libtiebeam.$version.dylib soname=libtiebeam.$abi.dylib
    argument=-Wl,-install_name,@rpath/$soname
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
    full=libtiebeam.so.$version soname=libtiebeam.so.$abi
    argument=-Wl,-soname,$soname
    ;;
esac

lib=${DESTDIR:-}$prefix/$libdir
include=${DESTDIR:-}$prefix/include

case ${1:-install} in
install) ;;
uninstall)
    rm -f "$lib/$full" "$lib/$soname" "$lib/$built" "$lib/pkgconfig/tiebeam.pc" "$include/tiebeam.h"
    exit
    ;;
*) fail "'$1': give install or uninstall" ;;
esac

# Made below a temporary folder, so that a failure leaves nothing half installed.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# cargo says where the library lies, whatever its settings are. Its own messages still go to the terminal.
"$cargo" rustc --manifest-path "$root/Cargo.toml" --profile "$profile" -p tiebeam --lib --crate-type cdylib \
    --features capi --message-format json-render-diagnostics -- -C "link-arg=$argument" >"$work/messages"
library=$(sed -n "s/.*\"filenames\":\[\"\([^\"]*$built\)\".*/\1/p" "$work/messages" | tail -n 1)
[ -f "$library" ] || fail "cargo built no $built"

# The file finds its own folder, so that the whole prefix can be moved.
up=$(printf '%s\n' "$libdir/pkgconfig" | sed 's|/*$||; s|//*|/|g; s|[^/][^/]*|..|g')
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
install -m 644 "$work/tiebeam.pc" "$lib/pkgconfig/tiebeam.pc"
install -m 644 "$root/include/tiebeam.h" "$include/tiebeam.h"

echo "installed $lib/$full, its links $soname and $built,"
echo "          $include/tiebeam.h and $lib/pkgconfig/tiebeam.pc"
