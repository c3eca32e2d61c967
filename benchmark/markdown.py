"""Markdown tables, by pandas."""

from collections.abc import Iterable
from typing import Any

import pandas as pd


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; the first column is a name, the others are aligned to the right."""
    table = pd.DataFrame([list(map(str, row)) for row in rows], columns=list(header))
    alignment = ("left", *["right"] * (table.shape[1] - 1))
    return table.to_markdown(index=False, disable_numparse=True, colalign=alignment) + "\n"
