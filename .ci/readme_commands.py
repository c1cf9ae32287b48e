"""Prints the n-th command of the README: the n-th block fenced as bash, so that CI runs what a newcomer reads."""

import pathlib
import re
import sys

blocks = re.findall(r"^```bash\n(.*?)^```", pathlib.Path("README.md").read_text(encoding="utf-8"), re.M | re.S)
print(blocks[int(sys.argv[1]) - 1], end="")
