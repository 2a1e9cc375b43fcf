#!/usr/bin/env bash
# The official conformance suite and the MCP Inspector against this server, one line per check, then "N passed, N failed".
#
#   tests/conformance/run.sh PYTHON    PYTHON has the package's dependencies
#
# Needs npm and its registry. All files, including Node >= 22, are below $WORK (default: a new temporary folder).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${1:?usage: tests/conformance/run.sh PYTHON}
if [ -z "${WORK:-}" ]; then
  WORK=$(mktemp -d)
  trap 'rm -rf "$WORK"' EXIT
fi
mkdir -p "$WORK"
"$python" "$here/checks.py" "$python" "$WORK"
