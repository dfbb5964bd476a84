"""What the commands do, as functions: from a config to a job, and from runs to what is known of them.

    from launcher import api

    checked = api.validate("cfg.yaml", ["train.max_steps=100"])
    job = api.submit(checked)
    (ended,) = api.wait([job.directory], timeout=3600)
    if ended.exit_code:
        print(api.why([job.directory])[0].history)

Each function returns frozen dataclasses or raises a LauncherError, whose `exit_code` is what the command would exit
with. Nothing is printed to standard output, and nobody is asked. All of it is about this machine: a cluster behind ssh
is for the commands. Nothing heavy is imported before a function needs it.
"""

from launcher.api.checked import CheckedRun, CheckedSweep, ValidRun, ValidSweep, validate
from launcher.api.jobs import Cancelled, Resubmitted, SubmittedRun, SubmittedSweep, cancel, resubmit, resubmit_failed
from launcher.api.jobs import submit as submit
from launcher.api.live import Usage, stacks, usage
from launcher.api.meanings import Explained, explain
from launcher.api.plans import Layout, Plan, PlannedSize, plan
from launcher.api.runs import Report, States, Why, list_runs, logs, report, results, status, wait, why
from launcher.views.logs import Logs
from launcher.views.stacks import Stacks

__all__ = [
    "Cancelled",
    "CheckedRun",
    "CheckedSweep",
    "Explained",
    "Layout",
    "Logs",
    "Plan",
    "PlannedSize",
    "Report",
    "Resubmitted",
    "Stacks",
    "States",
    "SubmittedRun",
    "SubmittedSweep",
    "Usage",
    "ValidRun",
    "ValidSweep",
    "Why",
    "cancel",
    "explain",
    "list_runs",
    "logs",
    "plan",
    "report",
    "results",
    "resubmit",
    "resubmit_failed",
    "stacks",
    "status",
    "submit",
    "usage",
    "validate",
    "wait",
    "why",
]
