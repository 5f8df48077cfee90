#!/usr/bin/env bash
# lib/setup.sh FILE [flags of pip]: make .venv where there is none that works, install a requirements file. For run.sh.
set -euo pipefail

kit=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv="$kit/.venv"
base=${PYTHON:-python3}
file=$1
shift

die() {
    printf 'run.sh: %s\n' "$*" >&2
    exit 2
}

# Print version and place of an interpreter. Fails if it doesn't start or is older than 3.11.
identify() {
    "$1" -c 'import os, sys
if sys.version_info < (3, 11): sys.exit(1)
print(*sys.version_info[:2], os.path.realpath(sys.base_prefix))' 2>/dev/null
}

# .venv is made again where half of it is missing, where its Python is gone, and where PYTHON is another one now.
if ! found=$(identify "$venv/bin/python") || ! "$venv/bin/python" -c 'import pip' 2>/dev/null ||
    { [ -n "${PYTHON:-}" ] && [ "$found" != "$(identify "$base")" ]; }; then
    command -v "$base" >/dev/null || die "no $base here: install Python 3.11 or newer, or set PYTHON"
    identify "$base" >/dev/null || die "$base doesn't start or is older than Python 3.11: set PYTHON to a newer one"
    printf '\n== making %s\n' "$venv" >&2
    rm -rf "$venv"
    "$base" -m venv "$venv" || die "could not make $venv: see above; on Debian and Ubuntu: apt install python3-venv"
    found=$(identify "$venv/bin/python")
fi

# So that the scripts find common.py under PYTHONSAFEPATH, too. A relative path is right wherever .venv is, and linked.
for site in "$venv"/lib/python3*/site-packages; do
    [ -f "$site/kit.pth" ] || echo ../../../.. >"$site/kit.pth" || true # someone else's .venv may be read-only
done

# Nothing to do if this interpreter has installed the same file before.
stamp="$found
$(cat "$kit/$file")"
if [ "$stamp" != "$(cat "$venv/$file" 2>/dev/null)" ]; then
    printf '\n== installing %s (the first time this takes minutes)\n' "$file" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-user "$@" -r "$kit/$file" ||
        die "pip could not install $file: see above; behind a slow network set PIP_INDEX_URL to a mirror"
    [ -n "$("$venv/bin/python" -m pip freeze)" ] ||
        die "pip put the packages elsewhere: look for target, prefix or dry-run in: $venv/bin/python -m pip config list"
    printf '%s\n' "$stamp" >"$venv/$file"
fi
