#!/bin/sh
# Writes the King James Bible, a public-domain text of 4 MB with one verse per line, to a file outside the repository. The text is
# that of Debian's package bible-kjv-text, printed by its program bible-kjv.
# Usage: scripts/fetch-kjv.sh [FILE]   (default: kjv.txt in the cache folder)
set -eu

out=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/tiebeam/kjv.txt}
if [ -s "$out" ]; then
    echo "$out"
    exit 0
fi
fail() {
    echo "fetch-kjv: $1" >&2
    exit 1
}
command -v apt-get >/dev/null && command -v dpkg >/dev/null ||
    fail "this needs apt-get and dpkg (Debian, Ubuntu); or give any other text with --text"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get download -qq bible-kjv bible-kjv-text 2>/dev/null || {
    echo "fetch-kjv: reading the list of packages" >&2
    apt-get update -qq 2>/dev/null || fail "apt-get update failed; run it as root once"
    apt-get download -qq bible-kjv bible-kjv-text || fail "the packages bible-kjv and bible-kjv-text are not to be had"
}
for package in ./*.deb; do dpkg -x "$package" .; done
program=$PWD/usr/bin/bible
[ -x "$program" ] && [ -r usr/lib/bible.data ] || fail "the packages do not hold usr/bin/bible and usr/lib/bible.data"
# -f prints one verse per line after its reference (Ge1:1), which is dropped. The program first looks for its data file in the
# current folder.
(cd usr/lib && "$program" -f gen1:1-rev22:21 </dev/null) | cut -d ' ' -f 2- >verses
[ "$(wc -c <verses)" -gt 4000000 ] || fail "the program printed $(wc -c <verses) bytes, not the whole text"
mkdir -p "$(dirname "$out")"
mv verses "$out"
echo "$out"
