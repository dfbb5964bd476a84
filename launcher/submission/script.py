"""The batch script of a plan."""

from __future__ import annotations

import sys

from launcher.submission.code_snapshot import has_own_code
from launcher.submission.plan import Plan
from launcher.submission.render import render


def script_of(plan: Plan) -> str:
    """Return the plan's batch script, for the Python that this process runs in and the copy of its code."""
    code = plan.paths.code if has_own_code(plan.spec) else None
    return render(plan.spec, plan.topology, plan.paths, sys.executable, code)
