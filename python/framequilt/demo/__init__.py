"""Framequilt's demo model: generated videos, questions about them, training and evaluation.

Nothing heavy is imported here; `scenes` needs numpy only, `train`, `evaluate` and `export` need
the extra `[train]` (torch, tokenizers, safetensors, pillow, av).
"""
