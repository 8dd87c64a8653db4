"""The packages to install: all of hpd_verl, and configs/ as hpd_verl.configs (the rest is in pyproject.toml)."""

from setuptools import find_namespace_packages, find_packages, setup

CONFIGS = "hpd_verl.configs"

setup(
    packages=[
        *find_packages(include=["hpd_verl", "hpd_verl.*"]),
        CONFIGS,
        *(f"{CONFIGS}.{name}" for name in find_namespace_packages("configs")),
    ],
    package_dir={CONFIGS: "configs"},
)
