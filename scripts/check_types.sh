#!/usr/bin/env bash
# mypy over the package as it is installed, with component/ and utils/ inside hisvd: a folder of links stands for it.
# Arguments go to mypy. Needs the environment that test.sh makes.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

PYTHON="$(realpath -s "$PYTHON")"
CONFIG="$PWD/pyproject.toml"
CACHE="$PWD/.mypy_cache"
LINKS=build/types/hisvd
rm -rf "$LINKS"
mkdir -p "$LINKS"
ln -s "$PWD"/hisvd/* "$PWD/component" "$PWD/utils" "$LINKS"
cd "$LINKS/.." # the checkout's own hisvd/, without the two, would be found first
"$PYTHON" -m mypy --config-file "$CONFIG" --cache-dir "$CACHE" -p hisvd "$@"
