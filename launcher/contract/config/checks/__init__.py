"""Rules on a typed RunSpec that take several values, or files.

Rules for one value are annotations of its field (`launcher.contract.spec.rules`). Each check yields the dotted key and
the message; `launcher.contract.config.load` adds where the value was written. Rules between parallel sizes are in
`launcher.contract.topology`.
"""

from launcher.contract.config.checks.run import file_problems, spec_problems

__all__ = ["file_problems", "spec_problems"]
