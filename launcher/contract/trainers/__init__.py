"""The words of TRL, axolotl and LLaMA-Factory: what each means here, for hints and for `launcher import`.

NeMo's are in `launcher.contract.nemo`, whose rules these share.
"""
