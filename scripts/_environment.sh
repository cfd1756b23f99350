# Sourced by the scripts beside it: makes a virtual environment with the package installed.

# Prints the first Python that is new enough; $PYTHON goes before the usual names.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "no Python 3.11 or newer was found as python3, python3.13, python3.12 or python3.11" >&2
    echo "  hint: install one, or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

# make_environment FOLDER [EXTRA]: FOLDER gets a virtual environment with the package in editable
# form, with the dependencies of setup.cfg in the versions of constraints.txt. Nothing is done if
# neither file has changed since the last time.
make_environment() {
    local folder=$1 package=".${2:+[$2]}" python stamp
    python=$(find_python) || return
    stamp="$PWD $("$python" --version) $(cat setup.cfg pyproject.toml constraints.txt | cksum)"
    if [ "$(cat "$folder/installed" 2>/dev/null)" = "$stamp" ] && "$folder/bin/python" -c ''; then
        return
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "$python cannot make virtual environments: it lacks its venv module" >&2
        echo "  hint: on Debian and Ubuntu, apt install python3-venv" >&2
        return 1
    fi
    echo "installing merge_kit into $folder (torch is large: the first time takes minutes)"
    "$python" -m venv --clear "$folder" || return
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable "$package" || return
    echo "$stamp" >"$folder/installed"
}
