#!/usr/bin/env bash
# Test this server with other MCP clients: one line per client and transport, then "N passed, N failed".
#
#   tests/clients/run.sh PYTHON [NAME...]    PYTHON has the package's dependencies; NAME: only clients so named
#
# Needs npm and the package registries. All files are below $WORK (default: a new temporary folder).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${1:?usage: tests/clients/run.sh PYTHON [NAME...]}
shift
if [ -z "${WORK:-}" ]; then
  WORK=$(mktemp -d)
  trap 'rm -rf "$WORK"' EXIT
fi
mkdir -p "$WORK"
[ -x "$WORK/uv/bin/uv" ] || { "$python" -m venv "$WORK/uv" && "$WORK/uv/bin/python" -m pip install -q 'uv>=0.9'; }
"$python" "$here/drive.py" "$python" "$WORK" "$@"
