"""The order, the limits and the summary of scripts/gpu_check.sh, with a stand-in for Python that runs nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """#!/usr/bin/env bash
for last; do :; done
case "$1 $2" in
    "- "*) exit 0 ;;
    "-c import importlib"*) exit 1 ;;  # imagen_pytorch is not installed
    scripts/gpu_check_summary.py*) exec {python} "$@" ;;
esac
tr '\\0\\n' '  ' </proc/$PPID/cmdline >>{calls}
echo >>{calls}
if [[ $1 == -c ]]; then
    echo '<testsuite><testcase classname="a" name="b" time="1"/><testcase classname="a" name="c" time="2">
        <failure message="1 is&#10;not 2"/></testcase></testsuite>' >"${{last#--junitxml=}}"
    exit 1
fi
while [[ $1 != --output_dir ]]; do shift; done
case $2 in
    */deepfloyd) exit 3 ;;
    */cascade) exit 124 ;;
esac
mkdir -p "$2"
echo '{{"rows": [{{"error": null, "left_out": null}}, {{"error": "no", "left_out": null}}]}}' >"$2/benchmark.json"
"""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/cmdline").exists() or shutil.which("timeout") is None, reason="needs Linux and coreutils"
)


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def python(tmp_path):
    path = tmp_path / "python"
    path.write_text(STAND_IN.format(python=sys.executable, calls=tmp_path / "calls"))
    path.chmod(0o755)
    return str(path)


def test_a_part_that_fails_does_not_keep_the_next_from_running(python, tmp_path):
    out = tmp_path / "out"
    ended = check(str(out), "cpu", PYTHON=python, MINUTES="5")
    assert ended.returncode == 1
    parts = {part["part"]: part for part in json.loads((out / "summary.json").read_text())}
    assert {name: part["state"] for name, part in parts.items()} == {
        "tests": "failed with status 1",
        "all": "done",
        "deepfloyd": "failed with status 3",
        "cascade": "ended after its time",
        "compiled": "done",
    }
    assert parts["tests"]["results"] == {"passed": 1, "failure": 1}
    assert parts["all"]["results"] == {"measured": 1, "failed": 1} and parts["deepfloyd"]["results"] == {}
    assert json.loads((out / "tests.json").read_text()) == {
        "a::b": {"result": "passed", "seconds": 1.0, "reason": None},
        "a::c": {"result": "failure", "seconds": 2.0, "reason": "1 is not 2"},
    }
    assert "| all | done |" in ended.stdout and "| cascade | ended after its time |" in ended.stdout


@pytest.mark.parametrize("minutes", [1, 10])
def test_every_part_ends_within_the_limit_of_everything(python, tmp_path, minutes):
    check(str(tmp_path / "out"), "cpu", PYTHON=python, MINUTES=str(minutes))
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == 5 and {call[0] for call in calls} == {"timeout"}
    allowed = 60 * minutes - int(calls[0][2])  # a part may take as long again as it is given to end
    limits = [int(call[3]) for call in calls]
    assert limits[0] <= 0.4 * allowed and max(limits) <= allowed
    for call, limit in list(zip(calls, limits))[1:]:
        assert float(call[call.index("--minutes") + 1]) == pytest.approx(0.8 * limit / 60, rel=1e-4)


@pytest.mark.parametrize("arguments", [[], ["out", "gpu"]])
def test_bad_arguments(arguments):
    ended = check(*arguments)
    assert ended.returncode == 2 and "usage" in ended.stderr


@pytest.mark.parametrize("minutes", ["0", "-1", "1.5", "many"])
def test_bad_limits(tmp_path, minutes):
    ended = check(str(tmp_path / "out"), MINUTES=minutes)
    assert ended.returncode == 2 and f"MINUTES is '{minutes}'" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_results_of_tests_that_were_killed(tmp_path):
    (tmp_path / "parts.tsv").write_text("tests\t137\t9\t8\n")
    log = "tests/a.py::test_b[c d] PASSED [ 20%]\ntests/a.py::test_e SKIPPED (no) [ 40%]\ntests/a.py::test_f "
    (tmp_path / "gpu_check.log").write_text(log)
    ended = subprocess.run([sys.executable, str(ROOT / "scripts" / "gpu_check_summary.py"), str(tmp_path)])
    assert ended.returncode == 1
    found = json.loads((tmp_path / "tests.json").read_text())
    assert {name: test["result"] for name, test in found.items()} == {
        "tests/a.py::test_b[c d]": "passed",
        "tests/a.py::test_e": "skipped",
    }
    assert json.loads((tmp_path / "summary.json").read_text())[0]["state"] == "ended after its time"
