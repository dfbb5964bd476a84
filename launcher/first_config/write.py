"""Write a first config that `submit` takes: it is checked, with a layout of the planner, before it is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.contract.config.load import LoadedConfig, load_config
from launcher.contract.errors import ConfigError, RunStateError
from launcher.contract.hub.found import Fetch, fetch_now, without_weights
from launcher.first_config.answers import Answers
from launcher.first_config.survey import Survey, survey_data, template_for
from launcher.first_config.text import config_text
from launcher.planning.run_plan import gpu_of
from launcher.submission.early_model import longest_row
from launcher.submission.submission import Submission, make_submission, model_shape_of

_MOST_DATA = 1_000_000_000
"""Bytes of a data set on the hub that are fetched to look at them; of a larger one the rows are not counted."""


def write_first_config(answers: Answers, target: Path) -> Submission:
    """Write the config and return what it would submit.

    Raise ConfigError with what is wrong with the answers, RunStateError where the file exists.
    """
    if target.exists():
        raise RunStateError(f"{target} exists already; remove it, or name another file with --output")
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch) / target.name
        config = _loaded(_first_draft(answers), draft)
        survey = _survey(config)
        layout, why = _layout(answers, survey, config, draft)
        text = config_text(answers, survey, layout, why)
        submission = _submission(text, draft)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"--output: {target} cannot be written: {error.strerror}") from None
    return submission


def _first_draft(answers: Answers) -> str:
    """Return a config with just enough in it to find model and data."""
    nodes, per_node = answers.nodes()
    lines = [
        f"name: {answers.run_name}",
        f"cluster: {answers.cluster}",
        f"resources: {{nodes: {nodes}, gpus_per_node: {per_node}}}",
        "train: {max_steps: 1}",
    ]
    return "\n".join(
        [*lines, f"model: {{path: {_quoted(answers.model)}}}", f"data: {{train: {_list(answers.data)}}}\n"]
    )


def _survey(config: LoadedConfig) -> Survey:
    """Look at the model and the data, after fetching what of the hub is small."""
    fetch_now(_small(config.fetches))
    spec = config.spec
    files = [Path(path) for path in spec.data.train]
    data = survey_data(files if all(file.exists() for file in files) else [])
    model = Path(spec.model.path)
    return Survey(
        shape=model_shape_of(spec), data=data, template=template_for(model, data), longest_row=longest_row(model)
    )


def _small(fetches: Sequence[Fetch]) -> list[Fetch]:
    return [
        wanted
        for wanted in without_weights(fetches)
        if wanted.snapshot.repository.kind == "model" or wanted.size <= _MOST_DATA
    ]


def _layout(answers: Answers, survey: Survey, config: LoadedConfig, draft: Path) -> tuple[Mapping[str, object], str]:
    """Return the layout that `topology: auto` takes, as dotted keys, and what is predicted of it."""
    if gpu_of(config.spec) is None:
        return {}, ""
    text = config_text(answers, survey, {}, "") + "topology: auto\n"
    best = _submission(text, draft).prediction
    assert best is not None  # the kind of GPU is known, so there is a prediction
    shown = ("topology.tensor_parallel", "topology.pipeline_parallel", "train.micro_batch_size", "train.recompute")
    kept = {key: value for key, value in best.overrides.items() if key in shown or value not in (1, False)}
    free = best.memory.total - best.missing
    return kept, f"planned: {best.memory.total:.0f} of {free:.0f} GiB a GPU, {best.tokens_per_second:,.0f} tokens/s"


def _loaded(text: str, draft: Path) -> LoadedConfig:
    draft.write_text(text, encoding="utf-8")
    try:
        return load_config(draft)
    except ConfigError as error:
        raise ConfigError([_without(problem, draft) for problem in error.problems]) from None


def _submission(text: str, draft: Path) -> Submission:
    draft.write_text(text, encoding="utf-8")
    try:
        return make_submission(draft)
    except ConfigError as error:
        raise ConfigError([_without(problem, draft) for problem in error.problems]) from None


def _without(problem: str, draft: Path) -> str:
    """Return a problem without the place in a draft that nobody has seen."""
    where, colon, rest = problem.partition(": ")
    return rest if colon and where.startswith(str(draft)) else problem


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _list(texts: Sequence[str]) -> str:
    return f"[{', '.join(map(_quoted, texts))}]"
