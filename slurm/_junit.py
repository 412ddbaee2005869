"""`_junit.py FILE`: a JUnit file as one line of JSON, with the counts of all test cases and the names of the failed."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as xml
from collections import Counter


def main(path: str) -> None:
    counts: Counter[str] = Counter()
    failed = []
    for case in xml.parse(path).iter("testcase"):
        ends = {child.tag for child in case} & {"failure", "error", "skipped"}
        end = "skipped" if ends == {"skipped"} else "failed" if ends else "passed"
        counts[end] += 1
        if end == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    print(json.dumps({**{end: counts[end] for end in ("passed", "failed", "skipped")}, "failures": failed}))


if __name__ == "__main__":
    main(sys.argv[1])
