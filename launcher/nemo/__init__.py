"""Configs of NeMo 1.x and of trlx's NeMo trainers (`trainer`, `exp_manager`, `model`) in this launcher's own keys.

`document` reads the file with its interpolations and line numbers, `rules` says of every key what becomes of it,
`model_config` turns the architecture it spells out into a Hugging Face config.json, `convert` puts them together.
"""
