"""How wide a LaTeX table is on paper, measured in the font that LaTeX sets it in."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font, LoadFlags

from earlyexit.runs.tables import GAP

FONT = FT2Font(str(Path(matplotlib.get_data_path()) / "fonts/ttf/cmr10.ttf"))
FONT.set_size(9 * 1.028, 72)  # Computer Modern of 9 points is drawn that much wider than of 10
SIGNS = {r"\%": "%", r"\_": "_", r"\&": "&", r"$\times$": "x", "$-$": "+", "--": "-"}


def width(tex: str) -> float:
    """Points that the widest cell of each column takes together, in Computer Modern at 9 points."""
    for sign, drawn in SIGNS.items():
        tex = tex.replace(sign, drawn)
    body = [line for line in tex.splitlines() if line.endswith(r"\\")]
    cells = [line.removesuffix(r"\\").split(" & ") for line in body]

    def points(text: str) -> float:
        FONT.set_text(text.strip(), 0, flags=LoadFlags.NO_HINTING)
        return FONT.get_width_height()[0] / 64

    return sum(max(map(points, column)) + GAP for column in zip(*cells, strict=True))
