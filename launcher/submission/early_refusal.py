"""Refuse before submission what `prepare` would refuse at the beginning of the job, as far as heads of files tell it.

This module and the two beside it, `early_model` and `early_resume`, are the places where the launcher uses modules of
`sft`: those that read models' configs, data files and what checkpoints record, which need neither torch nor
transformers. So both refuse the same, in the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.contract.errors import ConfigError
from launcher.contract.hub.found import Fetch, fetch_now
from launcher.contract.spec import RunSpec
from launcher.submission.early_model import model_problems, tokenizer_directory, vocab_size
from launcher.submission.early_resume import check_resume_from


def fetch_and_check(spec: RunSpec, fetches: Sequence[Fetch]) -> None:
    """Fetch what is still on the hub, and check the first rows of what has come. HubError or ConfigError."""
    fetch_now(fetches)
    if fetches:
        check_early(spec)


def check_early(spec: RunSpec, fetches: Sequence[Fetch] = ()) -> None:
    """Raise ConfigError with everything that the model's config.json and the first rows of the data already tell.

    While something is still to be fetched, neither the tokenizer nor what a run resumes with is looked at: `submit`
    does so again once everything is there.
    """
    from sft.data.reading.head import head_problems, prompt_problems

    template = None if fetches else _template_problem(spec)
    problems = [*model_problems(spec), *head_problems(spec.data, vocab_size(spec), template)]
    problems += prompt_problems(spec.evaluation.prompts, spec.data)
    if template is not None and spec.evaluation.prompts is not None and template not in problems:
        problems.append(template)
    if problems:
        raise ConfigError(problems)
    if spec.checkpoint.resume_from is not None and not fetches:
        check_resume_from(spec, Path(spec.checkpoint.resume_from))


def _template_problem(spec: RunSpec) -> str | None:
    from sft.data.encoding.stored_template import template_problem

    directory = tokenizer_directory(spec)
    return None if directory is None else template_problem(directory, spec.data)
