"""Calibration: a checkpoint run block by block in torch, on samples that stay in bounded memory.

`checkpoint` reads one layer at a time, `samples` are what is run (text, or prompts with frames),
`blocks` and `visual` are the forward passes (engine/CONTRACT.md, 1.1), `rows` keeps the rows
between layers. Needs torch (the extra `convert`); nothing here knows the name of a model family.
"""
