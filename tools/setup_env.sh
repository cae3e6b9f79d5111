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

_lors_say() { printf '[setup %4ss] %s\n' "$((SECONDS - _lors_start))" "$*"; }

_lors_fail() {
    printf '\nerror: %s\n' "$1" >&2
    shift
    local line
    for line in "$@"; do printf '       %s\n' "$line" >&2; done
    return 1
}

# 0 if the interpreter $1 runs and is one of Python 3.10 to 3.13.
_lors_python_fits() {
    "$1" -c 'import sys
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

_lors_find_python() {
    local candidate version
    if [ -n "${PYTHON:-}" ]; then
        candidate="$PYTHON"
    elif [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
        candidate="$VIRTUAL_ENV/bin/python"
    elif [ -n "${CONDA_PREFIX:-}" ] && [ -x "$CONDA_PREFIX/bin/python" ]; then
        candidate="$CONDA_PREFIX/bin/python"
    elif [ -x "$LORS_ROOT/.venv/bin/python" ] &&
        _lors_python_fits "$LORS_ROOT/.venv/bin/python"; then
        PYTHON="$LORS_ROOT/.venv/bin/python"
        return 0
    else
        for candidate in python3 python3.12 python3.11 python3.13 \
            python3.10 python; do
            if _lors_python_fits "$candidate"; then
                PYTHON="$(command -v "$candidate")"
                return 0
            fi
        done
        version="$(python3 -c 'import platform
print(platform.python_version())' 2>/dev/null || echo 'none found')"
        _lors_fail "Python 3.10 to 3.13 is needed (python3: $version)." \
            "Install one (Debian: apt install python3 python3-venv) or say" \
            "which to use: PYTHON=/path/to/python3.12 bash $0"
        return 1
    fi
    if ! _lors_python_fits "$candidate"; then
        version="$("$candidate" -c 'import platform
print(platform.python_version())' 2>/dev/null || echo 'does not run')"
        _lors_fail "$candidate is not Python 3.10 to 3.13 ($version)." \
            "Leave that environment, or say which interpreter to use:" \
            "PYTHON=/path/to/python3.12 bash $0"
        return 1
    fi
    PYTHON="$(command -v "$candidate")"
}

# Make .venv unless the interpreter in PYTHON belongs to an environment.
_lors_enter_env() {
    local free_kb
    if ! "$PYTHON" -c 'import os, sys
conda = os.path.isdir(os.path.join(sys.prefix, "conda-meta"))
sys.exit(not (conda or sys.prefix != sys.base_prefix))'; then
        if ! "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null; then
            _lors_fail "$PYTHON cannot make an environment: its venv or" \
                "ensurepip module is missing." \
                "Debian and Ubuntu: apt install python3-venv" \
                "Or activate an environment of your own and start again."
            return 1
        fi
        free_kb="$(df -Pk "$LORS_ROOT" | awk 'NR == 2 {print $4}')"
        if [ "$free_kb" -lt "$((LORS_NEED_GB * 1024 * 1024))" ]; then
            _lors_fail "an environment takes about $LORS_NEED_GB GB, but" \
                "only $((free_kb / 1024)) MB are free in $LORS_ROOT." \
                "Make room, or activate an environment that is elsewhere."
            return 1
        fi
        _lors_say "making $LORS_ROOT/.venv with $PYTHON"
        "$PYTHON" -m venv --clear "$LORS_ROOT/.venv" || return 1
        PYTHON="$LORS_ROOT/.venv/bin/python"
    fi
    export PYTHON
    PATH="$(dirname "$PYTHON"):$PATH"
    export PATH
}

# pip with its own progress on a terminal and a line a package elsewhere.
_lors_pip() {
    local log="$_lors_prefix/lors_plugin-setup.log" code=0 beat=''
    if [ -t 1 ]; then
        "$PYTHON" -m pip install "$@" && return 0 || code=$?
    else
        local parent=$BASHPID
        while sleep 30 >/dev/null 2>&1 && kill -0 "$parent" 2>/dev/null; do
            _lors_say '  ... still at it'
        done &
        beat=$!
        (
            set -o pipefail
            "$PYTHON" -m pip install --progress-bar off "$@" 2>&1 |
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
    (cd / && "$PYTHON" - "$@" <<'PY'
import importlib.util
import sys

print(' '.join(n for n in sys.argv[1:] if not importlib.util.find_spec(n)))
PY
    )
}

# Print `fork`, `original` or `none`: which kind of host packages is there.
_lors_host_kind() {
    (cd / && "$PYTHON" - <<'PY'
from importlib import metadata

names = {(d.metadata['Name'] or '').lower() for d in metadata.distributions()}
forks = {f'onedl-{n}' for n in ('mmengine', 'mmcv', 'mmdetection')}
originals = {'mmengine', 'mmengine-lite', 'mmcv', 'mmcv-lite', 'mmdet'}
print('fork' if names & forks else
      'original' if names & originals else 'none')
PY
    )
}

_lors_install_torch() {
    local missing free_kb
    missing="$(_lors_missing torch torchvision)"
    [ -n "$missing" ] || return 0
    free_kb="$(df -Pk "$_lors_prefix" | awk 'NR == 2 {print $4}')"
    if [ "$missing" != torchvision ] &&
        [ "$free_kb" -lt "$(((LORS_NEED_GB - 1) * 1024 * 1024))" ]; then
        _lors_fail "torch takes about $((LORS_NEED_GB - 1)) GB, but only" \
            "$((free_kb / 1024)) MB are free in $_lors_prefix."
        return 1
    fi
    _lors_say "installing $missing (the largest part: some minutes)"
    if [ "$missing" = torchvision ]; then
        # The release that fits the torch that is there.
        _lors_pip torchvision "torch==$("$PYTHON" -c \
            'from importlib.metadata import version; print(version("torch"))')"
    else
        _lors_pip 'torch>=2.4' 'torchvision>=0.19'
    fi
}

_lors_install_hosts() {
    local missing name kind wanted=()
    missing="$(_lors_missing mmengine mmcv mmdet mmpretrain)"
    [ -n "$missing" ] || return 0
    kind="$(_lors_host_kind)"
    if [ "$kind" = original ]; then
        if [[ " $missing " == *' mmcv '* ]]; then
            _lors_fail "this environment has original OpenMMLab packages" \
                "but no mmcv, and the forks would overwrite them." \
                "Either: pip install openmim && mim install 'mmcv>=2.0'" \
                "or start again with no environment active, which makes" \
                "$LORS_ROOT/.venv with the forks."
            return 1
        fi
        read -r -a wanted <<<"$missing"
    else
        for name in $missing; do
            [ "$name" = mmdet ] && name=mmdetection
            wanted+=("$(grep "^onedl-$name" \
                "$LORS_ROOT/requirements/mminstall.txt")")
        done
    fi
    _lors_say "installing $missing (a few minutes)"
    # With build isolation, which is pip's default: mmcv then builds without
    # compiled operators, and nothing here needs them.
    _lors_pip "${wanted[@]}"
}

# opencv-python wants a graphics library that servers often lack.
_lors_mend_opencv() {
    local reason
    reason="$(cd / && "$PYTHON" -c 'import cv2' 2>&1)" && return 0
    if [[ "$reason" == *libGL* || "$reason" == *libgthread* ]]; then
        _lors_say 'no graphics library here: taking the headless OpenCV'
        _lors_pip --force-reinstall --no-deps "opencv-python-headless==$(
            "$PYTHON" -c 'from importlib.metadata import version
print(version("opencv-python"))')"
    else
        _lors_fail 'cv2 cannot be imported:' "${reason##*$'\n'}"
    fi
}

# Hash of all that decides what gets installed.
_lors_stamp() {
    "$PYTHON" - "$LORS_ROOT" "$@" <<'PY'
import hashlib
import pathlib
import sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256('\0'.join([sys.version, *sys.argv[1:]]).encode())
for path in [
        root / 'setup.py', root / 'pyproject.toml',
        root / 'lors_plugin' / 'version.py',
        *sorted(root.glob('lors_plugin/csrc/*')),
        *sorted(root.glob('requirements/*.txt'))
]:
    digest.update(path.read_bytes())
print(digest.hexdigest())
PY
}

# 0 if `import lors_plugin` from elsewhere finds this checkout.
_lors_is_installed() {
    (cd / && "$PYTHON" - "$LORS_ROOT" <<'PY'
import importlib.util
import pathlib
import sys

spec = importlib.util.find_spec('lors_plugin')
found = spec and spec.origin and pathlib.Path(spec.origin).resolve()
root = pathlib.Path(sys.argv[1]).resolve()
sys.exit(found != root / 'lors_plugin' / '__init__.py')
PY
    )
}

# setup_env [EXTRA ...]
setup_env() {
    local stamp stamp_file extras missing
    _lors_start=$SECONDS
    extras="$(IFS=,; echo "$*")"
    _lors_find_python || return 1
    _lors_enter_env || return 1
    _lors_prefix="$("$PYTHON" -c 'import sys; print(sys.prefix)')"
    stamp_file="$_lors_prefix/lors_plugin-setup-${extras:-none}.sha256"
    stamp="$(_lors_stamp "$extras")" || return 1
    if [ "$(cat "$stamp_file" 2>/dev/null || true)" = "$stamp" ] &&
        _lors_is_installed &&
        [ -z "$(_lors_missing torch mmengine mmcv mmdet)" ]; then
        _lors_say "environment $_lors_prefix is ready"
        return 0
    fi
    _lors_say "setting up $_lors_prefix ($("$PYTHON" --version))"
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        "$PYTHON" -m ensurepip >/dev/null 2>&1 ||
            _lors_fail "$PYTHON has no pip." \
                "Debian: apt install python3-pip" || return 1
    fi
    if "$PYTHON" -c 'import sys, pip
sys.exit(int(pip.__version__.split(".")[0]) >= 22)'; then
        _lors_say 'updating pip'
        _lors_pip --upgrade 'pip>=22' || return 1
    fi
    _lors_install_torch || return 1
    _lors_install_hosts || return 1
    _lors_mend_opencv || return 1
    _lors_say "installing lors_plugin${extras:+ with [$extras]}"
    _lors_pip -e "$LORS_ROOT${extras:+[$extras]}" || return 1
    missing="$(_lors_missing torch torchvision mmengine mmcv mmdet \
        mmpretrain)" || return 1
    if [ -n "$missing" ]; then
        _lors_fail "still missing after the installation: $missing"
        return 1
    fi
    echo "$stamp" >"$stamp_file"
    _lors_say "environment $_lors_prefix is ready"
}
