"""`python -m sft audit CONFIG`: report what a run would train on, on one CPU, and check the limits of a run.

The report is written before the limits are checked, so that one can look at data that are refused. Trained text is
green on a terminal, and between double brackets elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.contract.errors import ConfigError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.hub_cache import is_id
from launcher.contract.spec import RunSpec, read_resolved
from launcher.contract.spec.fields import path_fields
from sft.data.audit.audit import Sample, audit_data, summary
from sft.data.audit.html import write_report
from sft.data.encoding.same_split import unlike_its_file
from sft.data.prepared.ignored_keys import check_ignored_keys
from sft.data.prepared.report import check_lost, report
from sft.model_source import resolve_model_dir

_PRINTED_EXAMPLES = 2
_PRINTED_CHARACTERS = 1500


def audit(config: Path, output: Path | None = None) -> ExitCode:
    """Print a summary and examples, write the HTML report to `output` or beside the config, and check the limits.

    Raise DataError if the data lose more than data.max_lost_percent, or have no key that data.ignore_keys names.
    """
    spec = read_config(config)
    tokenizer_dir = Path(spec.model.tokenizer) if spec.model.tokenizer else resolve_model_dir(spec, convert=True)
    audits = audit_data(spec, tokenizer_dir)
    target = output or config.with_name(f"{config.stem}.audit.html")
    try:
        write_report(audits, spec, target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}; name another file with --output") from error
    remark = unlike_its_file(tokenizer_dir)
    if remark is not None:
        print(remark)
    for each in audits:
        print("\n".join([report(each.name, each.cache), *summary(each)]))
    print(coloured(audits[0].samples[:_PRINTED_EXAMPLES], colours=sys.stdout.isatty()))
    print(f"report: {target}", flush=True)
    for each in audits:
        check_lost(each.cache.counts, each.key, spec.data)
    if not spec.data.validation_sets:  # these are not audited, and may have keys of their own
        check_ignored_keys(spec, [each.cache for each in audits])
    return ExitCode.OK


def read_config(path: Path) -> RunSpec:
    """Return the spec of a run directory's config.yaml, or of a config as a user writes it."""
    try:
        spec = read_resolved(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ConfigError:
        return _as_written(path)
    return _as_written(path) if _names_hub(spec) else spec


def _as_written(path: Path) -> RunSpec:
    """Return the spec of a config as a user writes it, what it names of the hub fetched."""
    # This reader needs OmegaConf, which ranks do not have; a machine that audits a user's config does.
    from launcher.contract.config.load import load_config
    from launcher.contract.hub.found import fetch_now, without_weights

    loaded = load_config(path)
    fetch_now(without_weights(loaded.fetches))
    return loaded.spec


def _names_hub(spec: RunSpec) -> bool:
    """Return whether a path in a config may be the id of a model or data set on the hub."""
    texts = [field.path for field in path_fields(spec)]
    return any(is_id(text.partition(":")[0]) and not Path(text).exists() for text in texts)


def coloured(samples: Sequence[Sample], *, colours: bool) -> str:
    """Return examples as text with their trained parts marked."""
    before, after = ("\x1b[32m", "\x1b[0m") if colours else ("[[", "]]")
    texts = []
    for sample in samples:
        parts = []
        for segment in sample.segments:
            # Control characters in the data could do anything to a terminal: they are shown, not sent.
            text = "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in segment.text)
            parts.append(f"{before}{text}{after}" if segment.weight else text)
        shown = "".join(parts)
        cut = (
            f"{shown[:_PRINTED_CHARACTERS]}{after if colours else ''} ..."
            if len(shown) > _PRINTED_CHARACTERS
            else shown
        )
        texts.append(f"{sample.where}:\n{cut.rstrip()}")
    return "\n".join(texts)
