"""The batch script of a submission."""

from __future__ import annotations

import sys

from launcher.submission.code_snapshot import has_own_code
from launcher.submission.render_script import render
from launcher.submission.submission import Submission


def script_of(submission: Submission) -> str:
    """Return the submission's batch script, for the Python that this process runs in and the copy of its code."""
    code = submission.paths.code if has_own_code(submission.spec) else None
    return render(
        submission.spec, submission.topology, submission.paths, sys.executable, code, candidate=submission.candidate
    )
