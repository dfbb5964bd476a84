"""What shells complete besides commands and files: runs, clusters, states and config keys.

Runs and clusters are looked up by the shell itself, which takes no time; keys and states are written into the script.
"""

from __future__ import annotations

import argparse

from launcher.contract.job_state import JobState

FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
RUN = {"bash": "_launcher_runs", "zsh": "_launcher_runs"}
CLUSTER = {"bash": "_launcher_clusters", "zsh": "_launcher_clusters"}
STATE = {"bash": "_launcher_states", "zsh": "_launcher_states"}
KEY = {"bash": "_launcher_keys", "zsh": "_launcher_keys"}

_RUNS = """\
_launcher_list_runs() {
  local file
  for file in "${SFT_RUN_ROOT:-runs}"/*/manifest.json; do
    [ ! -e "$file" ] || { file=${file%/manifest.json}; echo "${file##*/}"; }
  done
  for file in "${SFT_RUN_ROOT:-runs}"/.groups/*.json; do
    [ ! -e "$file" ] || { file=${file%.json}; echo "${file##*/}"; }
  done
}
_launcher_list_clusters() {
  local folder file
  for folder in @FOLDERS@; do
    for file in "$folder"/*.yaml; do
      [ ! -e "$file" ] || { file=${file%.yaml}; echo "${file##*/}"; }
    done
  done
}
"""
_BASH = """\
_launcher_runs() { compgen -W "$(_launcher_list_runs)" -- "$1"; }
_launcher_clusters() { compgen -W "$(_launcher_list_clusters)" -- "$1"; }
_launcher_states() { compgen -W "@STATES@" -- "$1"; }
_launcher_keys() { compgen -W "@KEYS@" -- "$1"; }
"""
_ZSH = """\
_launcher_runs() { compadd -- ${(f)"$(setopt null_glob; _launcher_list_runs)"} }
_launcher_clusters() { compadd -- ${(f)"$(setopt null_glob; _launcher_list_clusters)"} }
_launcher_states() { compadd -- ${=:-"@STATES@"} }
_launcher_keys() { compadd -S '' -- ${=:-"@KEYS@"} }
"""


def completed(argument: argparse.Action, how: dict[str, str]) -> None:
    """Have shells complete the values of an argument. `how` is shell -> its function that does so."""
    argument.complete = how  # type: ignore[attr-defined]  # read by shtab


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script of the command line for `shell`."""
    import shlex

    import shtab

    from launcher.contract.resources import search_path
    from launcher.contract.spec import RunSpec
    from launcher.contract.spec.fields import ANY_NAME, leaf_types

    keys = [key.partition(ANY_NAME)[0] if ANY_NAME in key else f"{key}=" for key, _ in leaf_types(RunSpec)]
    filled = {
        "@FOLDERS@": shlex.join(map(str, search_path("cluster_configs"))),
        "@STATES@": " ".join(state.value.lower() for state in JobState),
        "@KEYS@": " ".join(dict.fromkeys(keys)),
    }

    preamble = {"bash": _RUNS + _BASH, "zsh": _RUNS + _ZSH}.get(shell, "")
    for mark, value in filled.items():
        preamble = preamble.replace(mark, value)
    return str(shtab.complete(parser, shell=shell, preamble=preamble))
