# shellcheck shell=bash
# What the scripts beside this file share; they source it. It works before there is any Python: bash, awk and dpkg only.
# Which packages are needed is written in src/berth/packages.txt and nowhere else.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV="$ROOT/.venv"

say() {
    printf 'berth: %s\n' "$*" >&2
}

die() {
    say "$*"
    exit 1
}

# as_root COMMAND ARGUMENT...: runs it as root, by sudo where we are not.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# quoted WORD...: writes the words as one would type them.
quoted() {
    local word line=
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
    done
    printf '%s' "${line# }"
}

is_debian_like() {
    command -v apt-get >/dev/null && command -v dpkg-query >/dev/null
}

# packages_for USE...: the Debian packages that packages.txt lists for these uses, one a line.
packages_for() {
    awk -v uses="$*" '
        BEGIN { split(uses, list, " "); for (i in list) wanted[list[i]] = 1 }
        /^#/ || NF < 3 { next }
        { n = split($2, own, ","); for (i = 1; i <= n; i++) if (own[i] in wanted && $3 != "-") print $3 }
    ' "$ROOT/src/berth/packages.txt" | sort -u
}

is_installed() {
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# find_python: the first interpreter that is new enough (3.11), on standard output; fails where there is none.
find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# python_packages: what is missing to make a virtual environment, one package a line.
python_packages() {
    local python name
    if ! python=$(find_python); then
        # Ubuntu 22.04 has 3.10 as python3, and 3.11 beside it.
        if [ "$(. /etc/os-release && echo "$ID$VERSION_ID")" = ubuntu22.04 ]; then
            printf '%s\n' python3.11 python3.11-venv
        else
            printf '%s\n' python3 python3-venv
        fi
    elif ! "$python" -c 'import ensurepip' 2>/dev/null; then
        name=$(basename "$python")
        printf '%s\n' "$name-venv"
    fi
}

# missing_packages USE...: the packages that are not installed yet, one a line; nothing where apt does not rule.
missing_packages() {
    local package
    is_debian_like || return 0
    while read -r package; do
        is_installed "$package" || printf '%s\n' "$package"
    done < <(packages_for "$@")
    python_packages
}

# install_packages PACKAGE...: installs them; those that this release does not have are left out and named.
install_packages() {
    local package available=() absent=()
    export DEBIAN_FRONTEND=noninteractive
    as_root apt-get update -q >&2
    for package in "$@"; do
        if apt-cache show "$package" >/dev/null 2>&1; then available+=("$package"); else absent+=("$package"); fi
    done
    [ ${#absent[@]} = 0 ] || say "not in this release, so left out: ${absent[*]}"
    [ ${#available[@]} = 0 ] ||
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -q -y --no-install-recommends "${available[@]}" >&2
}

# can_be_root: whether we are root, or sudo lets us (it may ask for the password on a terminal).
can_be_root() {
    [ "$(id -u)" = 0 ] && return 0
    command -v sudo >/dev/null || return 1
    if [ -t 0 ]; then sudo -v; else sudo -n true 2>/dev/null; fi
}

# make_venv: ensures .venv with a working interpreter.
make_venv() {
    local python
    if [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c 'import pip' 2>/dev/null; then return; fi
    [ -w "$ROOT" ] || die "$ROOT can't be written by $(id -un): clone berth into a folder of your own"
    python=$(find_python) || die "Python 3.11 or later is not installed"
    say "making a virtual environment in $VENV"
    "$python" -m venv --clear "$VENV"
}

# is_fresh KIND: whether .venv holds this very berth, installed as KIND (wheel, editable).
is_fresh() {
    local stamp="$VENV/.installed-$1" sources=(pyproject.toml hatch_build.py)
    [ "$1" = editable ] || sources+=(src guest README.md)
    [ -x "$VENV/bin/berth" ] && [ -e "$stamp" ] || return 1
    (cd "$ROOT" && [ -z "$(find "${sources[@]}" -name __pycache__ -prune -o -name _agent -prune -o -newer "$stamp" -type f -print -quit)" ])
}

# pip_install KIND ARGUMENT...: installs berth into .venv unless that is done.
pip_install() {
    local kind=$1
    shift
    if is_fresh "$kind"; then return; fi
    say "installing berth into $VENV"
    rm -f "$VENV"/.installed-*
    touch "$VENV/.installing"
    (cd "$ROOT" && "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2)
    mv "$VENV/.installing" "$VENV/.installed-$kind"  # as old as the start: what changed meanwhile counts
}
