"""Prints the test files of which a run skipped something, from its JUnit report: what to run again with more installed.

    python .ci/skipped_files.py report.xml
"""

import sys
from xml.etree import ElementTree

modules = set()
for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
    if case.find("skipped") is not None:
        # A module that skips itself is a case without a class, named after the module.
        modules.add(case.get("classname") or case.get("name"))
files = {"/".join(module.split(".")[:2]) + ".py" for module in modules}
assert files, "nothing was skipped: the comparisons with the originals would never run"
print("\n".join(sorted(files)))
