#!/usr/bin/env python3
"""Runs the JAX plugin's tests in build/venv (`launch/setup.sh --python`); skipped (exit 77) where that is missing.

usage: run.py [pytest arguments]    DATTN_BUILD names the build whose lib/libdattn_jax.so is loaded; DATTN_VENV=PLACE: another
                                    environment, with other versions"""
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(HERE)))
PYTHON = os.path.join(os.environ.get("DATTN_VENV", os.path.join(ROOT, "build", "venv")), "bin", "python")


def skip(why):
    print(f"skipped: {why}")
    sys.exit(77)


def main():
    if not os.path.exists(PYTHON) or subprocess.run([PYTHON, "-c", "import jax, pytest"], capture_output=True).returncode != 0:
        skip("no build/venv with JAX; launch/setup.sh --python makes it")
    folder = os.path.join(os.environ.get("DATTN_BUILD", os.path.join(ROOT, "build", "release")), "lib")
    library = os.environ.get("DATTN_LIBRARY", os.path.join(folder, "libdattn.so"))
    handlers = os.environ.get("DATTN_JAX_LIBRARY", os.path.join(folder, "libdattn_jax.so"))
    if not os.path.exists(handlers):
        skip(f"no {os.path.relpath(handlers, ROOT)}: the build was configured before JAX was there; launch/setup.sh --python,"
             " then cmake --preset release and build")
    environment = dict(os.environ, DATTN_LIBRARY=library, DATTN_JAX_LIBRARY=handlers, JAX_PLATFORMS="cpu",
                       PYTHONPATH=os.pathsep.join([os.path.join(ROOT, "plugins", "python"), os.path.dirname(HERE)]))
    arguments = sys.argv[1:] or [HERE]
    command = [PYTHON, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", HERE, *arguments]
    sys.exit(subprocess.run(command, env=environment, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
