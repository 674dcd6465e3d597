"""What the original claims, to be set beside what is measured.

Source: the early-exit design note of the open-source ResNet-BK project (neko-jpg/Project-ResNet-BK-
An-O-N-Language-Model-Architecture on GitHub, commit 6182361). Its tables come from no run.
"""

from __future__ import annotations

from importlib.resources import files

import pandas as pd

CHECK_SHARE = 0.01  # of a layer's time: the exit check, as documented


CONFIDENCE_SHARE = 0.02  # of a layer's time: softmax and maximum, as documented


MEMORY_SAVED = 0.30  # of activation memory, as documented


EFFICIENCY = 0.85  # measured over theoretical speedup, as documented


def original_claims() -> pd.DataFrame:
    """The document's result tables.

    Returns:
        Columns source, table, setting, threshold ("none": no exits), avg_exit_as_printed, speedup,
        perplexity, quality_loss; NaN where the document gives no number.
    """
    with files("earlyexit").joinpath("data/original_claims.csv").open() as file:
        return pd.read_csv(file)


def claimed_test_rows() -> pd.DataFrame:
    """The rows of the WikiText-2 test table with a numeric threshold."""
    claims = original_claims()
    claims = claims[claims["table"] == "WikiText-2 test"].assign(
        threshold=lambda t: pd.to_numeric(t["threshold"], errors="coerce")
    )
    return claims.dropna(subset="threshold").reset_index(drop=True)


# Of combinations, as documented: each factor, and their product.
MULTI_SCALE, SPARSE, EXITS = 4.0, 1.8, 2.0


MULTI_SCALE_AND_EXITS, SPARSE_AND_EXITS = 8.0, 3.6
