"""Whether what is installed goes together: the ranges of setup.py against the versions here, each package imported."""

from __future__ import annotations

import ast
import importlib
import platform
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from megadpo.doctor.check import Check
from megadpo.errors import reason

OLDEST_PYTHON = (3, 10)
MODULES = {"megatron-core": "megatron.core", "pyyaml": "yaml", "protobuf": "google.protobuf"}
"""By the name of a package, what it is imported as where that is another name."""
EXTRAS = {"deepspeed": "deepspeed", "mpi": "mpi4py"}
"""Of setup.py's extras, those that a run may use, and the package."""
NOT_IMPORTED = ("deepspeed", "mpi4py")
"""Packages that do something when they are imported: these are looked at by their version only."""


def check_versions() -> Iterator[Check]:
    """Python and every package that setup.py asks for; those of its extras where they are installed."""
    version = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        yield Check("python", "failed", version, "Use Python 3.10 or newer.")
    else:
        yield Check("python", "ok", version)
    try:
        import packaging.requirements  # noqa: F401
    except ImportError as error:
        yield Check("package packaging", "failed", f"cannot be imported: {reason(error)}", "pip install packaging")
        return
    needed, extras = requirements()
    good = []
    for text in needed:
        check = check_package(text)
        if check.status == "ok":
            good.append(check.found)
        else:
            yield check
    yield Check("packages", "ok", f"{len(good)} of {len(needed)} in their ranges: {', '.join(good)}")
    for extra in EXTRAS:
        for text in extras.get(extra, []):
            if _installed(_name(text)) is not None:
                check = check_package(text)
                status = "warning" if check.status == "failed" else check.status
                yield Check(check.name, status, check.found, check.fix)


def check_package(requirement: str) -> Check:
    """Whether a package of setup.py, "torch>=2.6", is here in that range and can be imported."""
    from packaging.requirements import Requirement

    needed = Requirement(requirement)
    label = f"package {needed.name}"
    version = _installed(needed.name)
    if version is None:
        return Check(label, "failed", "not installed", f'pip install "{needed.name}{needed.specifier}"')
    found = f"{needed.name} {version}"
    if not needed.specifier.contains(version, prereleases=True):
        fix = f'pip install "{needed.name}{needed.specifier}"'
        return Check(label, "failed", f"{found}, which is not {needed.specifier}", fix)
    if needed.name not in NOT_IMPORTED:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what could be installed, too, is said elsewhere
                importlib.import_module(MODULES.get(needed.name.lower(), needed.name.replace("-", "_")))
        except Exception as error:  # whatever a broken installation does
            fix = f'Install it anew: pip install --force-reinstall "{needed.name}{needed.specifier}"'
            return Check(label, "failed", f"{found} cannot be imported: {type(error).__name__}: {reason(error)}", fix)
    return Check(label, "ok", found)


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """What setup.py asks for, and by extra: from the file in a checkout, else from the installed package."""
    file = Path(__file__).parents[2] / "setup.py"
    if file.is_file():
        return _of_setup(file)
    needed: list[str] = []
    extras: dict[str, list[str]] = {}
    for text in metadata.requires("megadpo") or []:
        requirement, _, marker = text.partition(";")
        extra = marker.partition("extra == ")[2].strip(" \"')(")
        (extras.setdefault(extra, []) if extra else needed).append(requirement.strip())
    return needed, extras


def _of_setup(file: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The literals of a setup.py, which is read and not run."""
    found: dict[str, object] = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg in ("install_requires", "extras_require"):
            found[node.arg] = ast.literal_eval(node.value)
    needed, extras = found["install_requires"], found["extras_require"]
    assert isinstance(needed, list) and isinstance(extras, dict)
    return needed, extras


def _name(requirement: str) -> str:
    from packaging.requirements import Requirement

    return Requirement(requirement).name


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
