"""What the checks on a GPU found: one file to send back, text with the same in JSON below it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_box import INSTALLED, JSON_BELOW, REPORT, ROOT

WHERE = "DENSEPURE_GPU_REPORT"  # the environment variable that names the file
REASON = 1000  # characters of a failure that are kept


def densepure_rt(*arguments: str, timeout: float = 3600) -> subprocess.CompletedProcess[str]:
    """`densepure-rt ARGUMENTS` in a fresh interpreter."""
    command = [sys.executable, "-c", "from densepure_rt.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


class Report:
    """A pytest plugin from the moment it is registered: it notes how every check ends.

    The file is written anew at each finding, so that a crash leaves what was found before it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        doctor = densepure_rt("doctor", "--json")
        self.machine: Any = json.loads(doctor.stdout) if doctor.stdout else doctor.stderr
        self.installed: Any = json.loads(os.environ.get(INSTALLED, "{}"))
        self.findings: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []

    @classmethod
    def begin(cls) -> Report:
        return cls(Path(os.environ.get(WHERE, ROOT / REPORT)))

    def add(self, about: str, **found: Any) -> None:
        self.findings.append({"about": about} | found)
        self.write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr or ""
            self.checks.append(
                {
                    "check": report.nodeid.partition("::")[2],
                    "outcome": report.outcome,
                    "seconds": round(report.duration, 1),
                    "reason": str(reason)[-REASON:],
                }
            )
            self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"platform": platform.platform(), "machine": self.machine, "installed": self.installed}
        content |= {"findings": self.findings, "checks": self.checks}
        below = json.dumps(content, indent=1, default=str)
        self.path.write_text("\n".join([*self.lines(), "", JSON_BELOW, below, ""]), encoding="utf-8")

    def lines(self) -> list[str]:
        machine = self.machine["findings"] if isinstance(self.machine, dict) else []
        lines = ["Machine", f"  {platform.platform()}"]
        lines += [f"  {finding['what']}: {finding['found']}" for finding in machine]
        lines += [f"  [{extras}]: {outcome}" for extras, outcome in self.installed.items()]
        for about in dict.fromkeys(finding["about"] for finding in self.findings):
            lines += ["", about]
            for finding in self.findings:
                if finding["about"] == about:
                    lines.append(
                        "  " + ", ".join(f"{name} {text(x)}" for name, x in finding.items() if name != "about")
                    )
        lines += ["", "Checks"]
        for check in self.checks:
            reason = check["reason"].strip().splitlines()
            lines.append(f"  {check['outcome']:<8}{check['check']}" + (f": {reason[-1]}" if reason else ""))
        return lines


def text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
