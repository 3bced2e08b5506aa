"""What of this machine's files a program gets to see: Python's standard library and the libraries below it, no more."""

from __future__ import annotations

import os
import sys
import sysconfig
from functools import cache
from pathlib import Path


def interpreter() -> Path:
    """The Python that runs programs: this one, out of its virtual environment."""
    return Path(os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable))


@cache
def visible_paths() -> tuple[str, ...]:
    """Folders and files to show, read-only, at their own paths."""
    prefix = Path(sys.base_prefix)
    paths = {interpreter(), *libraries()}
    library = prefix / "lib" / str(sysconfig.get_config_var("INSTSONAME"))
    paths |= {library} if library.is_file() else set()
    if (prefix / "conda-meta").is_dir():  # there Python's own libraries lie among all others
        paths.add(prefix / "lib")
    multiarch = sysconfig.get_config_var("MULTIARCH")
    names = ["lib64", "usr/lib64", *(f"{lib}/{multiarch}" for lib in ("lib", "usr/lib") if multiarch)]
    system = [Path("/", name) for name in names]
    paths |= {path for path in system if path.is_dir()} or {Path("/lib"), Path("/usr/lib")}
    return tuple(sorted(str(path) for path in paths if not any(parent in paths for parent in path.parents)))


@cache
def hidden_paths() -> tuple[str, ...]:
    """Folders below the visible ones to be seen empty: installed packages."""
    names = ("site-packages", "dist-packages")
    return tuple(str(path) for library in libraries() for name in names if (path := library / name).is_dir())


def libraries() -> list[Path]:
    """Where the standard library lies, its compiled part perhaps elsewhere; not what a virtual environment says."""
    bases = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    return [Path(path) for path in dict.fromkeys(sysconfig.get_path(n, vars=bases) for n in ("stdlib", "platstdlib"))]
