#!/usr/bin/env bash
# Prints the path of a Python that can run octprobe, for `make setup`.
#
#   scripts/python.sh                       # 3.11, 3.12 or 3.13: the first that is there, in this order
#   scripts/python.sh 3.13                  # this version alone; also as python3.13
#   scripts/python.sh /path/to/python       # this one, if it can
#
# Looks for pythonX.Y on PATH, in pyenv, among those of uv, and at last at what `python3` is.
set -euo pipefail

is_path=
case ${1:-} in
"") versions=(3.11 3.12 3.13) ;;
3.11 | 3.12 | 3.13 | python3.11 | python3.12 | python3.13) versions=("${1#python}") ;;
*) is_path=1 ;;
esac

# prints the path of the interpreter, if it runs, is of one of the versions, and can make environments
check() {
    local found
    found=$("$1" - "${versions[@]}" 2> /dev/null <<'END'
import sys
if f"{sys.version_info[0]}.{sys.version_info[1]}" not in sys.argv[1:]:
    sys.exit(1)
import ensurepip, venv
print(sys.executable)
END
    ) && [ -n "$found" ] && echo "$found"
}

if [ "$is_path" ]; then
    versions=(3.11 3.12 3.13)
    check "$1" && exit
    echo "error: PYTHON=$1 is no Python 3.11, 3.12 or 3.13 that can make environments (with venv and ensurepip)" >&2
    exit 1
fi

candidates() { # one a line; what does not run is passed over by check
    for version in "${versions[@]}"; do
        echo "python$version"
        ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python 2> /dev/null || true
        uv python find --no-python-downloads "$version" 2> /dev/null || true
    done
    echo python3
}

while read -r candidate; do
    check "$candidate" && exit
done < <(candidates)

[ ${#versions[@]} = 1 ] && named=${versions[0]} || named="3.11, 3.12 or 3.13"
cat >&2 <<END
error: no Python $named that can make environments was found. Install one, for example
  Debian, Ubuntu:  sudo apt-get install python3 python3-venv
  macOS:           brew install python@3.12
  without root:    uv python install 3.12      (uv: pip install uv)
or name one: make setup PYTHON=/path/to/python
END
exit 1
