"""The plugin section of README.md: its code runs in the tests as readers copy it."""
import os
import re

_README = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "README.md")
MOST_LINES = 6  # for each framework


def snippet(module):
    """The lines that begin with an import of the module, among others."""
    with open(_README, encoding="utf-8") as file:
        section = file.read().split("## In your own pipeline\n")[1].split("\n## ")[0]
    blocks = section.split("```python\n")[1].split("```")[0].strip().split("\n\n")
    (code,) = [block for block in blocks if re.match(rf"import (\w+, )*{re.escape(module)}\s", block)]
    assert len(code.splitlines()) <= MOST_LINES, code
    return code
