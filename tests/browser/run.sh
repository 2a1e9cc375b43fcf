#!/usr/bin/env bash
# Test the gallery page in a browser: tests/browser/run.sh PYTHON [FOLDER FOR SCREENSHOTS]
# Needs node 20, npm, Chromium (CHROMIUM names it if it is not /usr/bin/chromium) and a Python with evolink-mcp's needs.
set -euo pipefail
python=${1:?which Python has the dependencies of evolink-mcp}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
shots=${2:-$(mktemp -d)}
mkdir -p "$shots"
shots=$(cd "$shots" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")"
if ! node -e 'for (const [name, wish] of Object.entries(require("./package.json").dependencies)) {
  const has = JSON.parse(require("fs").readFileSync(`node_modules/${name}/package.json`)).version;
  if (/^\d/.test(wish) && wish !== has) process.exit(1); }' 2>/dev/null; then
  npm install --no-audit --no-fund --no-package-lock --loglevel=error >&2
fi
exec node checks.mjs "$python" "$shots"
