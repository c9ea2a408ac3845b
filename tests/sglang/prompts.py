"""What the engines are asked; apart from `engine_run`, whose import changes the process."""

from __future__ import annotations

PROMPTS = [[3, 14, 15, 92, 6], [2, 71, 82, 81]]
NEW_TOKENS = 6
