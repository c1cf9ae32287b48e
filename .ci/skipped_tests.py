"""Prints the tests that a run skipped, from its JUnit report: what to run again with more installed.

    python .ci/skipped_tests.py report.xml

One pytest id a line: a whole file where it skipped itself, else a function with all its parameters.
"""

import sys
from xml.etree import ElementTree

found = set()
for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
    if case.find("skipped") is not None:
        # A module that skips itself is a case without a class, named after the module.
        module = case.get("classname") or case.get("name")
        test = f"::{case.get('name').partition('[')[0]}" if case.get("classname") else ""
        found.add(module.replace(".", "/") + ".py" + test)
assert found, "nothing was skipped: the comparisons with the originals would never run"
print("\n".join(sorted(found)))
