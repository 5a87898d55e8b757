#!/usr/bin/env bash
# Installs this package the way a user of Detectron2 does: into an environment that has a Detectron2 of its own, which must
# stay, and uses it from another folder: a training run with a cycle of RePr, resumed, and the analysis of its checkpoint.
#
#   tools/test_own_detectron2.sh                    after `make install`, whose copy of Detectron2 plays the user's
#
# The environment stays in build/own-detectron2 (several GB), so that a second run takes a minute.
set -euo pipefail
cd "$(dirname "$0")/.."

ENV=$PWD/build/own-detectron2
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
pip() { "$ENV/bin/python" -m pip -q --disable-pip-version-check "$@"; }

if [ ! -e "$ENV/.installed" ]; then
    "${PYTHON:-python3}" -m venv "$ENV"
    pip install torch torchvision
    pip install omegaconf hydra-core termcolor tabulate cloudpickle tensorboard matplotlib tqdm Pillow iopath yacs 'setuptools<81'
    mkdir -p "$ENV/user"
    cp -r .venv/lib/python3.*/site-packages/detectron2 "$ENV/user/"
    echo 'THE_USERS_OWN = True' >> "$ENV/user/detectron2/__init__.py"
    "$ENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > "$ENV/site"
    echo "$ENV/user" > "$(cat "$ENV/site")/own_detectron2.pth"
    touch "$ENV/.installed"
fi
git archive HEAD | (mkdir "$WORK/source" && tar -x -C "$WORK/source")
pip install --force-reinstall --no-deps "$WORK/source"
pip install "$WORK/source[studies]"
pip install opencv-python-headless # of the same version; loads where there is no libGL

cd "$WORK"
"$ENV/bin/python" -c '
import detectron2, repr_det
assert detectron2.THE_USERS_OWN
assert "build/own-detectron2" in repr_det.__file__, repr_det.__file__
print("Detectron2:", detectron2.__file__, "repr_det:", repr_det.__version__, repr_det.__file__)'
"$ENV/bin/repr-det" --version
run() {
    "$ENV/bin/repr-det" train --config-file shapes_r18_fpn.yaml "$@" SOLVER.MAX_ITER 12 SOLVER.STEPS "(10,)" TEST.EVAL_PERIOD 0 \
        SOLVER.CHECKPOINT_PERIOD 5 REPR.S1_ITERS 3 REPR.S2_ITERS 3 REPR.NUM_CYCLES 1 OUTPUT_DIR run > log.txt 2>&1 || { tail -20 log.txt; exit 1; }
}
run
rm run/model_final.pth run/model_0000009.pth
echo -n model_0000004.pth > run/last_checkpoint # in the sub-network phase
run --resume
"$ENV/bin/repr-det" analyze run/model_final.pth > analysis.txt
tail -2 analysis.txt
echo "over a Detectron2 of the user's own: trained, resumed, analysed"
