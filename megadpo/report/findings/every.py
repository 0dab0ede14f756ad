"""Every check, and what they find in a run."""

from __future__ import annotations

from megadpo.pages.page import LEVELS
from megadpo.report.findings import generalisation, learning, stability
from megadpo.report.findings.finding import Check, Finding
from megadpo.report.run_files import RunFiles

CHECKS: tuple[Check, ...] = (*stability.CHECKS, *learning.CHECKS, *generalisation.CHECKS)


def findings_of(run: RunFiles) -> list[Finding]:
    """What is to be said of a run, the gravest first."""
    found = [finding for check in CHECKS if (finding := check.find(run)) is not None]
    levels = list(LEVELS)
    return sorted(found, key=lambda finding: (levels.index(finding.level), finding.step or 0))
