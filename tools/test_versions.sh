#!/usr/bin/env bash
# Runs the tests of the method (no Detectron2 in them) against other versions of torch, each in an environment of its own.
#
#   tools/test_versions.sh                          the oldest and the newest that are claimed (docs/start.md)
#   tools/test_versions.sh 2.6.0 2.9.1              others
#   PYTHON=python3.10 tools/test_versions.sh 2.4.1  with another interpreter
#
# The environments stay in build/torch-VERSION (several GB each), so that a second run takes seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TESTS='tests/test_loop.py tests/test_schedule.py tests/test_criteria.py tests/test_held_filters.py'

for version in "${@:-2.4.1 2.14.1}"; do
    for torch in $version; do
        env=build/torch-$torch
        if [ ! -e "$env/.installed" ]; then
            "$PYTHON" -m venv "$env"
            "$env/bin/python" -m pip -q --disable-pip-version-check install "torch==$torch" torchvision numpy scipy pytest
            touch "$env/.installed"
        fi
        echo "== torch $torch, $("$env/bin/python" --version)"
        # Without conftest.py, which needs Detectron2; torch has Adafactor from 2.5 on.
        # shellcheck disable=SC2086
        PYTHONPATH=. "$env/bin/python" -m pytest -q --noconftest -p no:cacheprovider -k 'not Adafactor' $TESTS
    done
done
