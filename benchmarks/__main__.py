"""Run benchmarks and write their results: ``python -m benchmarks [NAME...]``."""

import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import gammabeta
from benchmarks import _page

HERE = Path(__file__).parent


def main(wanted: list[str]) -> int:
    names = sorted(path.stem for path in HERE.glob("[!_]*.py"))
    unknown = [name for name in wanted if name not in names]
    if unknown:
        print(
            f"There is no benchmark {unknown[0]!r}; there are: {', '.join(names)}.", file=sys.stderr
        )
        return 2
    # One thread, as the workers of a study have.
    torch.set_num_threads(1)
    for name in wanted or names:
        module = importlib.import_module(f"benchmarks.{name}")
        result = module.measure()
        print(module.show(result))
        path = HERE / "results" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**provenance(name), **result}, indent=1) + "\n")
        print(f"written: {path.relative_to(HERE.parent)}")
    if not {"kernels", "end_to_end"}.isdisjoint(wanted or names):
        _page.write()
        print(f"written: {_page.PAGE.relative_to(HERE.parent)}")
    return 0


def provenance(name: str) -> dict[str, Any]:
    """What a reader needs in order to judge or repeat the numbers."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks", name]),
        "device": device(),
        "threads": torch.get_num_threads(),
        # Other work on the machine slows a core down even by its own clock.
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": {
            "gammabeta": gammabeta.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": commit(),
    }


def device() -> str:
    """The processor in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores" if models else platform.machine()


def commit() -> str | None:
    """The commit, with "+" if the package differs from it; None outside a repository."""
    try:
        head = git("rev-parse", "--short=12", "HEAD").strip()
        return head + ("+" if git("status", "--porcelain", "--", "src", "benchmarks/*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def git(*args: str) -> str:
    done = subprocess.run(
        ["git", *args], cwd=HERE.parent, check=True, capture_output=True, text=True
    )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
