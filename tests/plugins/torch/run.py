#!/usr/bin/env python3
"""Runs the PyTorch plugin's tests in build/venv (`launch/setup.sh --python`); skipped (exit 77) where that is missing.

usage: run.py [parts or pytest arguments]    DATTN_LIBRARY, or DATTN_BUILD's lib/libdattn.so, is what is loaded; DATTN_VENV=PLACE:
                                             another environment, with other versions"""
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(HERE)))
PYTHON = os.path.join(os.environ.get("DATTN_VENV", os.path.join(ROOT, "build", "venv")), "bin", "python")
PARTS = {"attention": ["attention", "errors"], "sharded": ["sharded", "sharding"], "use": ["sdpa", "modules", "examples"],
         "failures": ["failures"], "transformers": ["transformers", "transformers_generate", "transformers_examples"],
         "megatron": ["megatron", "megatron_core_attention", "megatron_examples"]}


def files_of(argument):
    return [os.path.join(HERE, f"test_{name}.py") for name in PARTS[argument]] if argument in PARTS else [argument]


def main():
    if not os.path.exists(PYTHON) or subprocess.run([PYTHON, "-c", "import torch, pytest"], capture_output=True).returncode != 0:
        print("skipped: no build/venv with PyTorch; launch/setup.sh --python makes it")
        sys.exit(77)
    library = os.path.join(os.environ.get("DATTN_BUILD", os.path.join(ROOT, "build", "release")), "lib", "libdattn.so")
    environment = dict(os.environ, DATTN_LIBRARY=os.environ.get("DATTN_LIBRARY", library), OMP_NUM_THREADS="1")
    arguments = [path for argument in sys.argv[1:] or PARTS for path in files_of(argument)]
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", HERE, *arguments]
    sys.exit(subprocess.run(command, env=environment, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
