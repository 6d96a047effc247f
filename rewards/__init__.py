"""Rewards: callables `(prompt, completion, answer, **fields) -> float | Verdict`. They know nothing of the engine."""
