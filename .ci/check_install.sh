#!/usr/bin/env bash
# Install a wheel into an empty environment and use it away from the checkout, as a user would.
#     .ci/check_install.sh dist/tinysr_kernels-0.1.0-py3-none-any.whl
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wheel=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
    echo "check_install: $*" >&2
    exit 1
}

"${PYTHON:-python3}" -m venv "$work/env"
pip=("$work/env/bin/python" -m pip install --quiet -c "$checkout/constraints.txt")
"${pip[@]}" torch
"${pip[@]}" "$wheel"
cp "$checkout/docs/photos/chelsea.jpg" "$work"
cd "$work"
PATH=$work/env/bin:$PATH

# The size of an image, as WIDTHxHEIGHT, read by the library the package depends on.
size() {
    python -c 'import sys; from PIL import Image; print("{}x{}".format(*Image.open(sys.argv[1]).size))' "$1"
}

python -c 'import tinysr_kernels; print("installed:", tinysr_kernels.__file__, tinysr_kernels.__version__)'
case $(python -c 'import tinysr_kernels; print(tinysr_kernels.__file__)') in
"$work"/env/*) ;;
*) fail "the package was not imported from the empty environment" ;;
esac

tinysr --help >help.txt
grep -q upscale help.txt || fail "tinysr --help does not name upscale"
tinysr env
tinysr info demo

tinysr upscale chelsea.jpg -o chelsea.png --model demo
[ "$(size chelsea.png)" = 448x300 ] || fail "chelsea.jpg (112x75) became $(size chelsea.png), expected 448x300"

# A folder of every kind of picture, broken files among them: the rest is written, each broken one named, exit code 1.
python "$checkout/.ci/mixed_folder.py" make mixed
status=0
tinysr upscale mixed -o out --model demo 2>errors.txt || status=$?
cat errors.txt >&2
[ "$status" = 1 ] || fail "a folder with broken files ended with $status, expected 1"
python "$checkout/.ci/mixed_folder.py" check out errors.txt

status=0
tinysr upscale chelsea.jpg -o other.png --model missing.safetensors 2>errors.txt || status=$?
[ "$status" = 2 ] || fail "a missing checkpoint ended with $status, expected 2"
[ ! -e other.png ] || fail "a missing checkpoint left an output"
echo "check_install: the wheel works in an empty environment"
