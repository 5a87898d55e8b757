#!/usr/bin/env bash
# Makes .venv and puts torch, torchvision, Detectron2 and this package in it. Run by `make install`.
#
#   PYTHON=python3.12 tools/install.sh      another interpreter (3.10 or newer)
#
# A second run costs seconds: the stamp file holds a hash of everything that decides what gets installed.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=.venv
STAMP=$VENV/.installed
# The PyPI re-upload of upstream Detectron2 commit a59f0563 (2024-04-17); see docs/start.md.
DETECTRON2='sal-detectron2==0.7.2 --hash=sha256:491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561'
DETECTRON2_NEEDS='fvcore iopath>=0.1.9 pycocotools>=2.0.8 omegaconf>=2.3 hydra-core>=1.3 yacs>=0.1.8 termcolor tabulate
    cloudpickle tensorboard matplotlib tqdm black packaging setuptools<81 Pillow'
DEVELOPMENT='pytest pytest-xdist pytest-cov ruff import-linter scikit-learn mypy build'
# What tests of other libraries and `make docs` need; where it is not to be had, those tests skip.
OTHERS='timm lightning wandb'
DOCS='mkdocs mkdocs-material mkdocstrings[python]'

say() { printf '[install] %s\n' "$*"; }
fail() { printf '[install] FAILED at: %s\n[install] What to do: %s\n' "$1" "$2" >&2; exit 1; }

wanted=$({ cat tools/install.sh setup.py; pwd; } | cksum | cut -d' ' -f1)
if [ -x "$VENV/bin/python" ] && [ "$(cat $STAMP 2>/dev/null)" = "$wanted" ]; then
    say "$VENV is up to date"
    exit 0
fi

command -v "$PYTHON" >/dev/null || fail "looking for $PYTHON" "install Python 3.10 or newer, or set PYTHON=/path/to/python3"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || fail "checking $("$PYTHON" --version 2>&1)" "Python 3.10 or newer is needed; set PYTHON=/path/to/python3"
rm -f $STAMP
if [ ! -x $VENV/bin/pip ]; then
    say "1/5 making $VENV with $("$PYTHON" --version 2>&1)"
    "$PYTHON" -m venv $VENV || fail "python -m venv $VENV" "install the venv module (Debian/Ubuntu: apt-get install python3-venv)"
fi
py=$PWD/$VENV/bin/python
pip() { "$py" -m pip --disable-pip-version-check "$@"; }
network="check the network and the free disk space (about 6 GB with a CUDA build of torch), then run make install again"

say "2/5 torch and torchvision (several GB where pip picks a CUDA build)"
# Whatever is there already stays: people bring the torch that fits their driver.
"$py" -c 'import torch, torchvision' 2>/dev/null || pip install torch torchvision || fail "pip install torch torchvision" "$network"

say "3/5 what Detectron2 needs"
# shellcheck disable=SC2086
pip install -q 'setuptools<81' wheel || fail "pip install setuptools wheel" "$network"
# shellcheck disable=SC2086
pip install -q $DETECTRON2_NEEDS $DEVELOPMENT || fail "pip install of Detectron2's dependencies" "$network"
# With what is there named beside them, so that pip leaves torch and setuptools alone; 2.14.1 is 2.14.1+cu130 too.
torch=$("$py" -c 'import torch; print("torch==" + torch.__version__.partition("+")[0])')
for optional in "$OTHERS" "$DOCS"; do
    # shellcheck disable=SC2086
    pip install -q $optional "$torch" 'setuptools<81' \
        || say "$optional: not to be had here; the tests that need it skip, and so does make docs"
done

say "4/5 Detectron2 (hash checked)"
if ! "$py" -c 'import detectron2' 2>/dev/null; then
    site=$("$py" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    printf '%s\n' "$DETECTRON2" > "$work/detectron2.txt"
    # The wheel is tagged cp310; all of its Python code runs on later versions, so it is unpacked rather than resolved.
    pip install -q --no-deps --require-hashes --only-binary=:all: --python-version 3.10 --platform linux_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --platform any \
        --target "$work/wheel" -r "$work/detectron2.txt" \
        || fail "unpacking $DETECTRON2" "if the hash differs, do not use that file: report it; otherwise $network"
    # It carries a top-level package "tools" that would shadow other people's, and a compiled _C for one ABI only.
    rm -rf "$work/wheel/tools" "$work"/wheel/detectron2/_C*.so "$work/wheel/bin"
    cp -r "$work/wheel/." "$site/" || fail "copying Detectron2 to $site" "check that the folder is writable"
fi

say "5/5 repr_det, in editable mode"
pip install -q --no-build-isolation -e '.[studies]' || fail "pip install -e ." "$network"
if ! "$py" -c 'import cv2' 2>/dev/null; then
    say "opencv-python does not load here (usually a missing libGL): taking the build without a GUI"
    pip uninstall -q -y opencv-python
    pip install -q opencv-python-headless || fail "pip install opencv-python-headless" "$network"
fi
"$py" -c 'import cv2, detectron2.engine, repr_det' || fail "importing detectron2 and repr_det" "the lines above name what is missing"
echo "$wanted" > $STAMP
say "done: $VENV/bin/python has $("$py" -c 'import torch; print("torch", torch.__version__)') and Detectron2"
