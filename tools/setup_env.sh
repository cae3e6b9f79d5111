#!/usr/bin/env bash
# Makes an environment with everything that this package needs. To be sourced:
#
#   . tools/setup_env.sh
#   setup_env tests optional      # extras of setup.py, any number
#   "$PYTHON" tools/train.py ...
#
# `setup_env` takes the interpreter in PYTHON, else the active environment
# (VIRTUAL_ENV or CONDA_PREFIX), else a suitable Python on the PATH. If that
# interpreter belongs to no environment, it makes one: .venv in the root of
# the checkout. It installs what cannot be imported and nothing else, so a
# compiled mmcv or the original OpenMMLab packages stay as they are. A second
# run takes a second. Afterwards PYTHON is the interpreter of the environment
# and its bin directory stands first on the PATH.

LORS_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
LORS_NEED_GB="${LORS_NEED_GB:-7}"
# Waiting threads spin for a tenth of a millisecond, then they sleep. Where they
# spin on, as by default, a step beside another busy process takes many times
# as long; where they sleep at once (PASSIVE), one on an idle machine takes
# half as long again.
[ -n "${OMP_WAIT_POLICY:-}" ] || export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"

_lors_say() { printf '[setup %4ss] %s\n' "$((SECONDS - _lors_start))" "$*"; }

# An error with further lines below it.
_lors_fail() {
    printf '\nerror: %s\n' "$1" >&2
    [ $# -eq 1 ] || printf '       %s\n' "${@:2}" >&2
    return 1
}

# _lors_python CODE [arguments]: by the interpreter, outside of the checkout.
_lors_python() { (cd / && "$PYTHON" -c "$@"); }

# 0 if $3 has $1 GB of room for $2; further arguments: what to do if not.
_lors_room() {
    local free
    free="$(df -Pk "$3" | awk 'NR == 2 {print int($4 / 1024)}')"
    [ "$free" -ge "$(($1 * 1024))" ] ||
        _lors_fail "$2 takes about $1 GB, but only $free MB are free in $3." \
            "${@:4}"
}

_lors_find_python() {
    local candidate chosen="${PYTHON:-}"
    local version='import platform; print(platform.python_version())'
    local candidates=("$LORS_ROOT/.venv/bin/python" python3 python3.12
        python3.11 python3.13 python3.10 python)
    for candidate in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        if [ -z "$chosen" ] && [ -n "$candidate" ] &&
            [ -x "$candidate/bin/python" ]; then
            chosen="$candidate/bin/python"
        fi
    done
    [ -z "$chosen" ] || candidates=("$chosen")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
            PYTHON="$(command -v "$candidate")"
            [[ "$PYTHON" == /* ]] || PYTHON="$PWD/$PYTHON"
            return 0
        fi
    done
    if [ -n "$chosen" ]; then
        version="$("$chosen" -c "$version" 2>/dev/null || echo 'does not run')"
        _lors_fail "$chosen is not Python 3.10 to 3.13 ($version)." \
            "Leave that environment, or say which interpreter to use:" \
            "PYTHON=/path/to/python3.12 bash $0"
    else
        version="$(python3 -c "$version" 2>/dev/null || echo 'none found')"
        _lors_fail "Python 3.10 to 3.13 is needed (python3: $version)." \
            "Install one (Debian: apt install python3 python3-venv) or say" \
            "which to use: PYTHON=/path/to/python3.12 bash $0"
    fi
}

# Make .venv unless the interpreter in PYTHON belongs to an environment.
_lors_enter_env() {
    if ! _lors_python 'import os, sys
conda = os.path.isdir(os.path.join(sys.prefix, "conda-meta"))
sys.exit(not (conda or sys.prefix != sys.base_prefix))'; then
        _lors_python 'import venv, ensurepip' 2>/dev/null ||
            _lors_fail "$PYTHON cannot make an environment: its venv or" \
                "ensurepip module is missing." \
                "Debian and Ubuntu: apt install python3-venv" \
                "Or activate an environment of your own and start again." ||
            return 1
        _lors_room "$LORS_NEED_GB" 'an environment' "$LORS_ROOT" \
            "Make room, or activate an environment that is elsewhere." ||
            return 1
        _lors_say "making $LORS_ROOT/.venv with $PYTHON"
        "$PYTHON" -m venv --clear "$LORS_ROOT/.venv" || return 1
        PYTHON="$LORS_ROOT/.venv/bin/python"
    fi
    export PYTHON PATH="$(dirname "$PYTHON"):$PATH"
}

# pip with its own progress on a terminal and a line per package elsewhere.
# Python compiles what is imported; all of it would take more than a minute.
_lors_pip() {
    local log="$_lors_prefix/lors_plugin-setup.log" code=0 beat
    if [ -t 1 ]; then
        "$PYTHON" -m pip install --no-compile "$@" && return 0
    else
        local parent=$BASHPID
        while sleep 30 >/dev/null 2>&1 && kill -0 "$parent" 2>/dev/null; do
            _lors_say '  ... still at it'
        done &
        beat=$!
        (
            set -o pipefail
            "$PYTHON" -m pip install --no-compile --progress-bar off "$@" 2>&1 |
                tee "$log" | awk '
                    /^ *(Collecting|Processing|Building wheel|Installing)/ ||
                    /^ *Downloading .* MB\)/ {
                        print "    " substr($0, 1, 75); fflush() }'
        ) || code=$?
        kill "$beat" 2>/dev/null || true
        wait "$beat" 2>/dev/null || true
        [ "$code" -eq 0 ] && return 0
        tail -n 20 "$log" >&2
    fi
    _lors_fail "pip could not install: $*" \
        "Look at the lines above. Usual causes: no connection to the package" \
        "index (behind a proxy: set HTTPS_PROXY), a full disk, no wheel for" \
        "this Python version. Start the same command again to go on."
}

# Print what of the arguments cannot be found by import name.
_lors_missing() {
    _lors_python 'import importlib.util as util, sys
print(*(n for n in sys.argv[1:] if not util.find_spec(n)))' "$@"
}

# Print the version of an installed package.
_lors_version() {
    _lors_python 'import importlib.metadata as m, sys
print(m.version(sys.argv[1]))' "$1"
}

# Print `fork`, `original` or `none`: which kind of host packages is there.
_lors_host_kind() {
    _lors_python 'from importlib import metadata
names = {(d.metadata["Name"] or "").lower() for d in metadata.distributions()}
forks = {f"onedl-{n}" for n in ("mmengine", "mmcv", "mmdetection")}
originals = {"mmengine", "mmengine-lite", "mmcv", "mmcv-lite", "mmdet"}
print("fork" if names & forks else "original" if names & originals else "none")'
}

_lors_install_torch() {
    local missing
    missing="$(_lors_missing torch torchvision)"
    [ -n "$missing" ] || return 0
    if [ "$missing" != torchvision ]; then
        _lors_room $((LORS_NEED_GB - 1)) torch "$_lors_prefix" || return 1
    fi
    _lors_say "installing $missing (the largest part: some minutes)"
    if [ "$missing" = torchvision ]; then
        # The release that fits the torch that is there.
        _lors_pip torchvision "torch==$(_lors_version torch)"
    else
        _lors_pip 'torch>=2.4' 'torchvision>=0.19'
    fi
}

_lors_install_hosts() {
    local missing name wanted=()
    missing="$(_lors_missing mmengine mmcv mmdet mmpretrain)"
    [ -n "$missing" ] || return 0
    if [ "$(_lors_host_kind)" != original ]; then
        for name in ${missing/mmdet/mmdetection}; do
            wanted+=("$(grep "^onedl-$name" \
                "$LORS_ROOT/requirements/mminstall.txt")")
        done
    elif [[ " $missing " == *' mmcv '* ]]; then
        _lors_fail "this environment has original OpenMMLab packages" \
            "but no mmcv, and the forks would overwrite them." \
            "Either: pip install openmim && mim install 'mmcv>=2.0'" \
            "or start again with no environment active, which makes" \
            "$LORS_ROOT/.venv with the forks."
        return 1
    else
        read -r -a wanted <<<"$missing"
    fi
    _lors_say "installing $missing (a few minutes)"
    # With build isolation, which is pip's default: mmcv then builds without
    # compiled operators, and nothing here needs them.
    _lors_pip "${wanted[@]}"
}

# opencv-python wants a graphics library that servers often lack.
_lors_mend_opencv() {
    local reason
    reason="$(_lors_python 'import cv2' 2>&1)" && return 0
    if [[ "$reason" == *libGL* || "$reason" == *libgthread* ]]; then
        _lors_say 'no graphics library here: taking the headless OpenCV'
        _lors_pip --force-reinstall --no-deps \
            "opencv-python-headless==$(_lors_version opencv-python)"
    else
        _lors_fail 'cv2 cannot be imported:' "${reason##*$'\n'}"
    fi
}

# Checksum of all that decides what gets installed.
_lors_stamp() {
    {
        _lors_python 'import sys; print(sys.version)' &&
            printf '%s\n' "$LORS_ROOT" "$@" &&
            cd "$LORS_ROOT" && cat setup.py pyproject.toml \
            lors_plugin/version.py lors_plugin/csrc/* requirements/*.txt
    } | cksum | tr ' ' -
}

# 0 if `import lors_plugin` from elsewhere finds this checkout.
_lors_is_installed() {
    [ "$(_lors_python 'import importlib.util as util
spec = util.find_spec("lors_plugin")
print(spec and spec.origin)')" -ef "$LORS_ROOT/lors_plugin/__init__.py" ]
}

# setup_env [EXTRA ...]
setup_env() {
    local stamp stamp_file extras missing
    local needed=(torch torchvision mmengine mmcv mmdet mmpretrain)
    _lors_start=$SECONDS
    extras="$(IFS=,; echo "$*")"
    _lors_find_python && _lors_enter_env || return 1
    _lors_prefix="$(_lors_python 'import sys; print(sys.prefix)')"
    stamp_file="$_lors_prefix/lors_plugin-setup-${extras:-none}.cksum"
    stamp="$(_lors_stamp "$extras")" || return 1
    if [ "$(cat "$stamp_file" 2>/dev/null || true)" = "$stamp" ] &&
        _lors_is_installed && [ -z "$(_lors_missing "${needed[@]}")" ]; then
        _lors_say "environment $_lors_prefix is ready"
        return 0
    fi
    _lors_say "setting up $_lors_prefix ($("$PYTHON" --version))"
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        "$PYTHON" -m ensurepip >/dev/null 2>&1 ||
            _lors_fail "$PYTHON has no pip." \
                "Debian: apt install python3-pip" || return 1
    fi
    if _lors_python 'import sys, pip
sys.exit(int(pip.__version__.split(".")[0]) >= 22)'; then
        _lors_say 'updating pip'
        _lors_pip --upgrade 'pip>=22' || return 1
    fi
    _lors_install_torch && _lors_install_hosts && _lors_mend_opencv || return 1
    _lors_say "installing lors_plugin${extras:+ with [$extras]}"
    _lors_pip -e "$LORS_ROOT${extras:+[$extras]}" || return 1
    missing="$(_lors_missing "${needed[@]}")" || return 1
    [ -z "$missing" ] ||
        _lors_fail "still missing after the installation: $missing" || return 1
    echo "$stamp" >"$stamp_file"
    _lors_say "environment $_lors_prefix is ready"
}
