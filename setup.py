"""repr_det needs torch and Detectron2 but asks for neither: Detectron2 is not on PyPI under its own name and the
torch build is the user's choice. Importing the package without them says what to install."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "repr_det" / "__init__.py").read_text()).group(1)

setup(
    name="repr_det",
    version=VERSION,
    description="RePr training (drop, train, re-initialise filters) for Detectron2 object detectors",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["repr_det", "repr_det.*"]),
    package_data={"repr_det.studies.comparison": ["*.html.j2"]},
    python_requires=">=3.10",
    install_requires=[
        "numpy",
        "fvcore",
        "pycocotools>=2.0.8",
        "opencv-python",
        "scipy>=1.9",
        "Jinja2>=3.0",
        "matplotlib>=3.6",
        "rich>=12",
        "tabulate",
    ],
)
