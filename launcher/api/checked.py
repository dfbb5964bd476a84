"""validate: a config with every check behind it, which is what can be submitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.contract.leaves import Source
    from launcher.contract.spec import RunSpec
    from launcher.contract.topology import Topology
    from launcher.submission.submission import Submission
    from launcher.sweeps.groups import Group
    from launcher.sweeps.sweep import Sweep


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidRun:
    """What `validate --json` prints of a config for one run."""

    config: RunSpec
    """Every value of the config."""
    sources: Mapping[str, Source]
    """Key to where its value comes from."""
    topology: Topology
    """The parallel sizes."""
    versions: Mapping[str, str] | None
    """Package to version, of the ranks' Python; null where the launcher cannot know them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidSweep:
    """What `validate --json` prints of a config with a sweep."""

    group: str
    """The sweep's name."""
    runs: dict[str, dict[str, str]]
    """Run to what the sweep sets in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedRun:
    """A config for one run that passed every check."""

    submission: Submission
    parent_run: str | None = None
    """Directory of the run whose lockfile the config is, or whose checkpoint it goes on from."""
    note: str = ""
    """What differs from the time when the lockfile was written."""
    race: tuple[Submission, ...] = ()
    """The run on each of several clusters or partitions, where the first to start shall have it."""

    @property
    def submissions(self) -> tuple[Submission, ...]:
        """The run, as a sweep has several."""
        return (self.submission,)

    @property
    def script(self) -> str:
        """The batch script, exactly as it would be submitted."""
        from launcher.submission.script import script_of

        return script_of(self.submission)

    def each(self) -> tuple[CheckedRun, ...]:
        """Return the run on each cluster or partition of its race, or itself where there is none."""
        return tuple(CheckedRun(submission=one) for one in self.race) or (self,)

    def expected_start(self) -> str:
        """Ask the scheduler when and where the job would start, and submit nothing."""
        from launcher.scheduler.factory import scheduler_of

        spec = self.submission.spec
        scheduler = scheduler_of(spec.cluster.scheduler)
        return scheduler.expected_start(self.script, scheduler.clusters_of(spec.resources))

    def answer(self) -> ValidRun:
        """Return what programs are told."""
        from launcher.contract.versions import ranks_versions

        spec = self.submission.spec
        return ValidRun(
            config=spec,
            sources=self.submission.config.sources,
            topology=self.submission.topology,
            versions=ranks_versions(spec.cluster.runtime),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedSweep:
    """A config with a sweep, every run of which passed every check."""

    group: Group
    submissions: tuple[Submission, ...]
    sweep: Sweep

    def first(self) -> CheckedRun:
        """Return the sweep's first run, which stands for all where one is looked at."""
        return CheckedRun(submission=self.submissions[0])

    def answer(self) -> ValidSweep:
        """Return what programs are told."""
        return ValidSweep(group=self.group.name, runs=self.group.points)


def validate(
    config: Path | str, overrides: Sequence[str] = (), *, cluster: str | None = None, first_of: Sequence[str] = ()
) -> CheckedRun | CheckedSweep:
    """Check a run's YAML file, or a run's lockfile, with `KEY=VALUE` overrides and perhaps another cluster.

    `first_of` are clusters or partitions, each of which shall get a job of the run; the first to start will have it.
    Raise ConfigError with all that is wrong: nothing was written, and a scheduler was not asked.
    """
    from launcher.submission.lockfile import code_note, is_lockfile, submission_of_lockfile
    from launcher.submission.submission import make_submission
    from launcher.sweeps.submit import sweep_submissions
    from launcher.sweeps.sweep import read_sweep

    path = Path(config)
    sweep = read_sweep(path)
    if first_of:
        return _race(path, overrides, cluster, first_of, is_one_run=sweep is None and not is_lockfile(path))
    if sweep is not None:
        group, submissions = sweep_submissions(path, sweep, overrides, cluster)
        return CheckedSweep(group=group, submissions=tuple(submissions), sweep=sweep)
    if not is_lockfile(path):
        return CheckedRun(submission=make_submission(path, overrides, cluster))
    submission, parent = submission_of_lockfile(path, overrides, cluster)
    return CheckedRun(submission=submission, parent_run=parent, note=code_note(path))


def _race(
    path: Path, overrides: Sequence[str], cluster: str | None, words: Sequence[str], *, is_one_run: bool
) -> CheckedRun:
    from launcher.contract.errors import ConfigError
    from launcher.submission.first_of import candidates

    if not is_one_run:
        raise ConfigError("--first-of is for the config of a single run, and this one is a sweep or a lock file")
    found = candidates(path, overrides, cluster, words)
    return CheckedRun(submission=found[0], race=found)
