#!/usr/bin/env bash
# Builds the documentation in both languages; docs/_build/html/index.html is
# the start. Neither the package nor PyTorch is needed, only what
# requirements/docs.txt names: it is installed into the active environment, or
# into .venv, where it lacks.
# Usage: bash tools/build_docs.sh [OUTPUT_DIR [options of sphinx-build]]
# LORS_PLUGIN_HOME=WEB-ADDRESS-WITH-BRANCH links files of the repository there.
set -euo pipefail

LORS_NEED_GB=1
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
out="${1:-$LORS_ROOT/docs/_build/html}"
[[ "$out" == /* ]] || out="$PWD/$out"
[ $# -eq 0 ] || shift
cd "$LORS_ROOT"

_lors_start=$SECONDS
_lors_find_python
_lors_enter_env
_lors_prefix="$(_lors_python 'import sys; print(sys.prefix)')"
missing="$(_lors_missing sphinx myst_parser autoapi sphinx_book_theme \
    sphinx_copybutton jieba)"
[ -z "$missing" ] || _lors_pip -r requirements/docs.txt

mkdir -p "$out"
for language in en zh_cn; do
    _lors_say "building $language"
    # Every warning is an error, a link that leads nowhere too.
    # Collecting garbage among so many nodes takes a fifth of the time.
    "$PYTHON" -c 'import gc, sys
from sphinx.cmd.build import main
gc.disable()
sys.exit(main(sys.argv[1:]))' \
        -W -n --keep-going -q -c docs -t "$language" \
        -d "$out/.doctrees/$language" "$@" "docs/$language" "$out/$language"
done
rm -rf "$out/.doctrees"
cat >"$out/index.html" <<'HTML'
<!doctype html>
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url=en/index.html">
<title>lors_plugin</title>
<p><a href="en/index.html">English</a>, <a href="zh_cn/index.html">简体中文</a></p>
HTML
_lors_say "the documentation is in $out"
