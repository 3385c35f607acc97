"""The examples run as written, and README.md's lines."""
import os
import subprocess
import sys

import reference
from readme import snippet

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))


def test_long_context():
    script = os.path.join(ROOT, "plugins", "jax", "examples", "long_context.py")
    done = subprocess.run([sys.executable, script, "--seq", "128", "--steps", "12", "--compare"], text=True, capture_output=True,
                          timeout=300)  # with conftest.py's XLA_FLAGS
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] - 0.3, done.stdout
    assert "same losses on one device" in done.stdout


def test_readme():
    q, k, v, _ = reference.inputs()
    names = {"q": q, "k": k, "v": v}
    exec(snippet("dattn.jax"), names)
    reference.close(names["out"], reference.attention(q, k, v))
