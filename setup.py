"""repr_det needs torch and Detectron2 but asks for neither: Detectron2 is not on PyPI under its own name and the
torch build is the user's choice. Importing the package without them says what to install."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
# Address of the repository, "https://github.com/...", from which the package page's links and picture are made. None is
# known yet, so that page has their text alone.
REPOSITORY = ""
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "repr_det" / "__init__.py").read_text()).group(1)


class BuildWithConfigs(build_py):
    """Puts configs/ into the package; an editable install reads it where it is."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "repr_det" / "configs"
            shutil.copytree(HERE / "configs", target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def package_page() -> str:
    """README.md with links that work outside the repository."""
    text = (HERE / "README.md").read_text()
    if not REPOSITORY:
        return re.sub(r"!?\[([^\]]*)\]\((?!http)[^)]*\)", r"\1", text)
    text = re.sub(r"(!\[[^\]]*\]\()(?!http)", rf"\1{REPOSITORY}/raw/main/", text)
    return re.sub(r"(\]\()(?!http)", rf"\1{REPOSITORY}/blob/main/", text)


setup(
    name="repr_det",
    version=VERSION,
    description="RePr training (drop, train, re-initialise filters) for PyTorch loops and Detectron2 object detectors",
    long_description=package_page(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    project_urls={"Paper": "https://arxiv.org/abs/1811.07275", **({"Source": REPOSITORY} if REPOSITORY else {})},
    keywords=["object detection", "convolutional filters", "detectron2", "pytorch", "RePr"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["repr_det", "repr_det.*"]),
    package_data={"repr_det": ["py.typed"], "repr_det.studies.comparison": ["*.html.j2"]},
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["repr-det = repr_det.commands.console:main"]},
    python_requires=">=3.10",
    install_requires=[
        "numpy",
        "scipy>=1.9",
        "filelock",
        "fvcore",
        "pycocotools>=2.0.8",
        "pydantic>=2.8",
        "opencv-python",
    ],
    extras_require={
        # compare, analyze, benchmark
        "studies": ["Jinja2>=3.0", "matplotlib>=3.6", "pandas>=1.5", "tabulate"],
        "wandb": ["wandb"],
        "examples": ["accelerate", "lightning", "scikit-learn", "timm", "torchvision", "transformers", "ultralytics"],
    },
)
