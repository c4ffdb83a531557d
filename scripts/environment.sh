# shellcheck shell=bash
# Sourced by the other scripts: creates .venv in the checkout if it is missing or out of date, and sets PYTHON.
# HISVD_VENV names another place for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV="${HISVD_VENV:-.venv}"
PYTHON="$VENV/bin/python"
REQUIREMENTS="${REQUIREMENTS:-requirements.txt}"

install_environment() { # arguments: what to install besides $REQUIREMENTS
  local stamp
  stamp="$VENV/.installed-$(cat "$REQUIREMENTS" pyproject.toml <(echo "$@") | cksum | cut -d' ' -f1)"
  if [ ! -x "$PYTHON" ]; then
    "${HISVD_PYTHON:-python3}" -m venv "$VENV"
  fi
  if [ ! -f "$stamp" ]; then
    echo "Installing into $VENV, which takes minutes (the variable HISVD_VENV names another environment) …"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$REQUIREMENTS" "$@"
    touch "$stamp"
  fi
}
