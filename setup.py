"""Which folders make up the distribution; everything else stands in pyproject.toml.

``plugins/`` is installed as ``tokenreduce_plugins`` and ``conf/`` as ``tokenreduce_conf``. Packages are found by
looking, never listed by hand.
"""

from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

ROOT = Path(__file__).parent

setup(
    packages=[
        *find_packages(str(ROOT), include=["tokenreduce", "tokenreduce.*"]),
        "tokenreduce_plugins",
        "tokenreduce_conf",
        *(f"tokenreduce_conf.{name}" for name in find_namespace_packages(str(ROOT / "conf"))),
    ],
    package_dir={"tokenreduce_plugins": "plugins", "tokenreduce_conf": "conf"},
    package_data={"tokenreduce": ["py.typed", "assets/**", "catalog/template/**"], "": ["*.yaml"]},
)
