#!/usr/bin/env python
"""Summarize the parts of `scripts/gpu_check.sh`: writes tests.json and summary.json, and prints a table.

    python scripts/gpu_check_summary.py OUT

The exit status is 0 only if every part ended by itself without an error.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


ENDED_BY_TIMEOUT = (124, 137)  # of coreutils' timeout, by TERM and by KILL
IN_LOG = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)  # of pytest -v


def read_tests(out: Path) -> dict[str, dict[str, Any]]:
    """Return the results of pytest's JUnit file, or of the log if there is none, because pytest was killed."""
    tests = {}
    if not (out / "tests.xml").is_file():
        log = out / "gpu_check.log"
        for name, result in IN_LOG.findall(log.read_text(errors="replace") if log.is_file() else ""):
            tests[name] = {"result": result.lower(), "seconds": None, "reason": None}
        return tests
    for case in ElementTree.parse(out / "tests.xml").iter("testcase"):
        states = [child for child in case if child.tag in ("failure", "error", "skipped")]
        reason = " ".join((states[0].get("message") or "").split())[:300] if states else None
        tests[f"{case.get('classname')}::{case.get('name')}"] = {
            "result": states[0].tag if states else "passed",
            "seconds": float(case.get("time") or 0),
            "reason": reason,
        }
    return tests


def read_rows(path: Path) -> Counter[str]:
    """Count the systems of a benchmark.json that were measured, that failed, and that were left out."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return Counter(
        "failed" if row["error"] is not None else "left out" if row["left_out"] is not None else "measured"
        for row in rows
    )


def read_parts(out: Path) -> Iterator[dict[str, Any]]:
    """Yield the parts in order: name, state, seconds, limit and counts of results."""
    for line in (out / "parts.tsv").read_text().splitlines():
        name, status, seconds, limit = line.split("\t")
        if int(status) in ENDED_BY_TIMEOUT:
            state = "ended after its time"
        else:
            state = "done" if status == "0" else f"failed with status {status}"
        if name == "tests":
            counts = Counter(test["result"] for test in read_tests(out).values())
        else:
            counts = read_rows(out / name / "benchmark.json")
        yield {"part": name, "state": state, "seconds": int(seconds), "limit": int(limit), "results": dict(counts)}


def main(folder: str) -> int:
    out = Path(folder)
    (out / "tests.json").write_text(json.dumps(read_tests(out), indent=2) + "\n")
    parts = list(read_parts(out))
    (out / "summary.json").write_text(json.dumps(parts, indent=2) + "\n")
    print("\n| part | state | seconds | limit | results |\n|---|---|---|---|---|")
    for part in parts:
        results = ", ".join(f"{count} {name}" for name, count in sorted(part["results"].items())) or "none"
        print(f"| {part['part']} | {part['state']} | {part['seconds']} | {part['limit']} | {results} |")
    return int(any(part["state"] != "done" for part in parts))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: scripts/gpu_check_summary.py OUT")
    sys.exit(main(sys.argv[1]))
