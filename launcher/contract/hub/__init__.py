"""Models and data sets of the Hugging Face hub that a config names by id.

Ids become paths of a snapshot in the user's own cache while the config is read, pinned to a commit, so that everything
behind it knows files only. `launcher prepare` and `submit` fetch what is missing, on the machine they run on: a job
never asks the hub. Only `client` imports huggingface_hub, and only when the hub has to be asked.
"""
