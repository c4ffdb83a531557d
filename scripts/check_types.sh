#!/usr/bin/env bash
# mypy on the package as it is installed, with component/ and utils/ inside hisvd, reproduced by a folder of links.
# Arguments go to mypy. Needs the environment that test.sh creates.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

PYTHON="$(realpath -s "$PYTHON")"
CONFIG="$PWD/pyproject.toml"
CACHE="$PWD/.mypy_cache"
LINKS=build/types/hisvd
rm -rf "$LINKS"
mkdir -p "$LINKS"
ln -s "$PWD"/hisvd/* "$PWD/component" "$PWD/utils" "$LINKS"
ln -sf "$PWD/hisvd_autoload.py" "$LINKS/.."
cd "$LINKS/.." # in the checkout, its own hisvd/ without the two would be found first
"$PYTHON" -m mypy --config-file "$CONFIG" --cache-dir "$CACHE" -p hisvd -m hisvd_autoload "$@"
