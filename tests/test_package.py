"""The package as others get it: the commands of the installed package, and a wheel used from another folder."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import repr_det
from repr_det.commands.arguments import CONFIGS, config_path
from repr_det.commands.console import main
from repr_det.method.errors import UserError


def test_shipped_configs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_path("repr_r50_fpn.yaml") == str(CONFIGS / "repr_r50_fpn.yaml") and CONFIGS == ROOT / "configs"
    assert config_path("lazy/repr_faster_rcnn_r50_fpn.py").endswith("configs/lazy/repr_faster_rcnn_r50_fpn.py")
    (tmp_path / "repr_r50_fpn.yaml").touch()
    assert config_path("repr_r50_fpn.yaml") == "repr_r50_fpn.yaml"  # one's own comes first
    with pytest.raises(UserError, match=r"^--config-file 'repr_r50\.yaml' is not a file, .*, repr_r50_fpn\.yaml"):
        config_path("repr_r50.yaml")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("trian", "repr-det: error: argument COMMAND: invalid choice: 'trian'"),
        ("train", "repr-det train: error: --config-file is missing"),
        ("compare --config-file nope.yaml --seeds 1", "repr-det compare: error: --config-file 'nope.yaml' is not a "),
        ("analyze nope.pth", "repr-det analyze: error: "),
    ],
)
def test_commands_say_what_is_wrong(monkeypatch, capsys, arguments, line):
    monkeypatch.setattr(sys, "argv", ["repr-det"])
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2 and line in capsys.readouterr().err


def test_help_and_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(re.search(rf"^    {name} ", shown, re.M) for name in ("train", "compare", "analyze"))
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"repr_det {repr_det.__version__}\n"
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert changes.index(f"## {repr_det.__version__}") == changes.index("## ")  # what is new stands first
    assert f"version: {repr_det.__version__}" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize(
    ("command", "missing", "wanted"),
    [
        ("compare", "jinja2", "repr-det compare needs jinja2: pip install 'repr_det[studies]'"),
        ("train", "scipy.stats", "repr-det train needs scipy: pip install scipy"),
        ("benchmark", "", "benchmark is a program of the source tree: python tools/benchmark.py --help"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, capsys, command, missing, wanted):
    def lacking(module):
        raise ModuleNotFoundError(name=missing)

    monkeypatch.setattr("importlib.import_module", lacking)
    monkeypatch.setattr(sys, "argv", ["repr-det"])
    with pytest.raises(SystemExit):
        main([command])
    assert capsys.readouterr().err == f"repr-det: error: {wanted}\n"


USE_WITH_DETECTRON2 = """
import repr_det, sys, torch
assert "site-packages" in repr_det.__file__, repr_det.__file__
from importlib import resources
assert (resources.files("repr_det") / "py.typed").is_file()
assert (resources.files("repr_det.studies.comparison") / "report.html.j2").is_file()
from repr_det.commands.arguments import build_config
from repr_det.commands.lazy import load_lazy_config
cfg = build_config("repr_r50_fpn.yaml", [])
assert cfg.REPR.ENABLED and cfg.SOLVER.MAX_ITER == 90000  # the second from its _BASE_
assert load_lazy_config("lazy/repr_faster_rcnn_r50_fpn.py", []).repr._target_
torch.save({"model": {"conv1.weight": torch.randn(8, 3, 3, 3)}}, "weights.pth")
import repr_det.commands.console as commands
commands.main(["analyze", "weights.pth"])
from repr_det.studies.comparison.report import write_report
"""
USE_WITHOUT_DETECTRON2 = """
import sys
sys.modules.update(dict.fromkeys("detectron2 fvcore cv2 pycocotools yaml torchvision".split()))
import repr_det
repr_det.RePr  # examples/quickstart.py runs without them too
try:
    repr_det.RePrHook
except ImportError as error:
    print(error)
import repr_det.commands.console as commands
commands.main(["train", "--config-file", "repr_r50_fpn.yaml"])
"""


def test_without_detectron2():
    shown = run([sys.executable, "-c", USE_WITHOUT_DETECTRON2], ROOT, 2)
    assert shown.startswith("repr_det.RePrHook needs Detectron2, which is not installed")
    assert "repr-det: error: repr-det train needs detectron2: https://" in shown


@pytest.mark.slow
def test_the_wheel_from_another_folder(tmp_path):
    pytest.importorskip("build", reason="the package build is not installed")
    source = tmp_path / "source"
    for folder in ("repr_det", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, source)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)], tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name == f"repr_det-{repr_det.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    configs = (source / "configs").rglob("*.*")
    assert {f"repr_det/{path.relative_to(source)}" for path in configs} <= set(names)
    assert all(name.startswith("repr_det") and "benchmark" not in name for name in names)

    # An environment that sees torch and Detectron2 of this one, but not its repr_det.
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], tmp_path).strip())
    run([sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index", wheel], tmp_path)
    (site / "theirs.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    assert "conv1" in run([python, "-c", USE_WITH_DETECTRON2], tmp_path)
    assert run([python.with_name("repr-det"), "--version"], tmp_path) == f"repr_det {repr_det.__version__}\n"
    assert run([python, "-c", USE_WITHOUT_DETECTRON2], tmp_path, 2).startswith("repr_det.RePrHook needs")


def run(command: list, folder: Path, status: int = 0) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(x) for x in command], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + (done.stderr if status else "")
