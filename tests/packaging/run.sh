#!/usr/bin/env bash
# Build the wheel, the source distribution and the bundle, and test each in its own environment.
#
#   tests/packaging/run.sh PYTHON    PYTHON has the package's dependencies
#
# Needs npm and the package registries. All files are below $WORK (default: a new temporary folder).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=$(realpath -s "${1:?usage: tests/packaging/run.sh PYTHON}")
if [ -z "${WORK:-}" ]; then
  WORK=$(mktemp -d)
  trap 'rm -rf "$WORK"' EXIT
fi
say() { printf -- '-- %s\n' "$1"; }

say "tools"
"$python" -m venv "$WORK/tools"
release="$root/.github/release"
"$WORK/tools/bin/pip" install -q --require-hashes --only-binary :all: -r "$release/requirements.txt"
# The publishing action has this version. A newer twine accepts metadata that the action rejects.
"$WORK/tools/bin/pip" install -q twine==6.1.0
mkdir "$WORK/mcpb"
cp "$release/package.json" "$WORK/mcpb"
npm install --silent --ignore-scripts --no-package-lock --no-audit --no-fund --prefix "$WORK/mcpb"

say "wheel and source distribution"
"$WORK/tools/bin/python" -m build -q --no-isolation --outdir "$WORK/dist" "$root" >/dev/null
"$WORK/tools/bin/twine" check --strict "$WORK"/dist/*

wheel=$(unzip -l "$WORK"/dist/*.whl)
case $wheel in *startup-*) echo "the wheel contains recorded startup answers"; exit 1 ;; esac
case $wheel in *evolink_mcp/server/skills/evolink-images/SKILL.md*) ;; *) echo "the wheel lacks the skill"; exit 1 ;; esac

say "the packages of the image, with hashes"
"$python" -m venv "$WORK/image"
"$WORK/image/bin/pip" install -q --require-hashes --only-binary :all: -r "$release/image[teams].txt"
"$WORK/image/bin/pip" install -q --no-deps --no-build-isolation "$root[teams]"
"$WORK/image/bin/pip" check

say "the wheel in an empty environment"
"$python" -m venv "$WORK/empty"
"$WORK/empty/bin/pip" install -q "$WORK"/dist/*.whl
(cd / && HOME="$WORK" "$WORK/empty/bin/evolink-mcp" --version && { HOME="$WORK" "$WORK/empty/bin/evolink-mcp" doctor || test $? -eq 1; } | tail -1)
"$python" "$here/drive.py" "$WORK/empty/bin/evolink-mcp"

say "the wheel with the oldest versions that pyproject.toml allows"
"$python" -m venv "$WORK/oldest"
"$WORK/tools/bin/uv" pip install -q --python "$WORK/oldest/bin/python" --resolution lowest-direct "$WORK"/dist/*.whl
"$python" "$here/drive.py" "$WORK/oldest/bin/evolink-mcp"

say "the packaging tests in the source distribution"
mkdir "$WORK/source" && tar xzf "$WORK"/dist/*.tar.gz -C "$WORK/source" --strip-components 1
(cd "$WORK/source" && "$python" -m pytest -q -p no:cacheprovider tests/packaging/test_packaging.py | tail -1)

say "the bundle"
mcpb="$WORK/mcpb/node_modules/.bin/mcpb"
(cd "$WORK" && "$mcpb" validate "$root/manifest.json" 2>/dev/null && "$mcpb" pack "$root" "$WORK/evolink-mcp.mcpb" 2>/dev/null | grep -E 'size|total')
"$python" "$here/drive.py" --bundle "$WORK/evolink-mcp.mcpb" --uv "$WORK/tools/bin/uv" --into "$WORK/else where"
