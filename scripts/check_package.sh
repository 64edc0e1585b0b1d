#!/usr/bin/env bash
# Builds the sdist and the wheel, checks them, and edits with the wheel from an empty folder.
# `make package` runs it. The files stay in dist/.
#
# build and twine are installed into .package/. The wheel and what it needs, among them PyTorch, are
# installed into an environment that is removed again.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=.package
[ -x $tools/bin/twine ] || {
    "${PYTHON:-python3}" -m venv $tools
    $tools/bin/pip install --quiet build twine
}
rm -f dist/step1x_edit-*
$tools/bin/python -m build --outdir dist . > /dev/null
$tools/bin/twine check --strict dist/step1x_edit-*

root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --constraint constraints.txt dist/step1x_edit-*.whl
echo "installed: $(du -sm "$work/venv" | cut -f1) MB"
mkdir "$work/empty"
cd "$work/empty"
cp "$root/src/step1x_edit/interfaces/assets/coffee.jpg" .
HOME=$work/empty "$work/venv/bin/step1x-edit" --version
HOME=$work/empty "$work/venv/bin/step1x-edit" edit coffee.jpg "change to night scene" --size-level 512 --num-steps 10
