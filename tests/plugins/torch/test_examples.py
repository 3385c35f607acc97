"""The examples, under torchrun as their users run them: the same losses as one process; and README.md's lines."""
import os
import subprocess
import sys

import pytest

from ranks import ROOT, on_ranks
import dattn.torch
import reference
from readme import snippet

EXAMPLES = os.path.join(ROOT, "plugins", "torch", "examples")


def printed(path, ranks, *arguments):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = dict(os.environ, PYTHONPATH=os.path.join(ROOT, "plugins", "python"), OMP_NUM_THREADS="1")
    result = subprocess.run([sys.executable, *launch, path, *arguments], capture_output=True, text=True, timeout=170, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.splitlines()


def losses(name, ranks, *arguments):
    lines = printed(os.path.join(EXAMPLES, name), ranks, *arguments)
    return [float(line.split()[-1]) for line in lines if line.startswith("step")]


@pytest.mark.parametrize("name, ranks, arguments", [
    ("long_context.py", 4, ["--ring", "2", "--ulysses", "2"]),
    ("tensor_parallel.py", 8, ["--ring", "2", "--ulysses", "2", "--tensor", "2"])])
def test_example(name, ranks, arguments):
    one = losses(name, 1)
    many = losses(name, ranks, *arguments)
    assert len(one) == len(many) >= 3 and one[-1] < one[0]
    for left, right in zip(one, many):
        assert abs(left - right) < 2e-4, (one, many)


ENDING = """
import os, runpy, sys
runpy.run_path(sys.argv.pop(1))["main"]()
threads = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print("ended" if not any("gloo" in name for name in threads) else threads)
"""


def test_groups_end_before_the_interpreter(tmp_path):
    """A thread of a group that still lives then may abort the process."""
    script = tmp_path / "ending.py"
    script.write_text(ENDING)
    lines = printed(str(script), 2, os.path.join(EXAMPLES, "long_context.py"), "--ring", "2", "--steps", "2")
    assert [line for line in lines if not line.startswith("step")] == ["ended"] * 2


@on_ranks(4)
def test_readme():
    q, k, v, _ = (tensor.detach() for tensor in reference.inputs(seq=40))
    names = {"q": q, "k": k, "v": v}
    exec(snippet("dattn.torch"), names)
    assert names["out"].shape[1] == 10
    reference.close(dattn.torch.unshard(names["out"], names["mesh"]), reference.attention(q, k, v)[0])
