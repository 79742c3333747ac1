"""Shared test helpers: tiny checkpoints, made with transformers, and their tokenizers."""
