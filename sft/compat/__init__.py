"""Interfaces of trainers that this project succeeds, for programs written against them."""
