"""The answer of a probe is one page of text."""

from __future__ import annotations

import time

import pandas as pd

from earlyexit.calibration.certify import Refused
from earlyexit.cost.memory import MIB, largest_peak_bytes
from earlyexit.evaluation.existing import CLOSE, TIMES
from earlyexit.runs.probe import Probe

EXITS = ["model_layers", "perplexity", "quality_loss", "kl", "agreement", "close", "close_so_far"]
POLICIES = ["criterion", "epsilon", "quality_loss", "trace_loss", "speedup_layers", "speedup_flops"]
PEERS = ["system", "basis", "tokens_per_second", "agreement"]


def page(probe: Probe, epsilon: float) -> str:
    """Return what a probe found, with the verdict at ``epsilon`` last."""
    c, started = probe.model.config, time.perf_counter()
    fitted, exits = probe.exits["tokens"].iloc[0], probe.exit_table()[EXITS]
    parts = [
        f"{c.family}, {c.n_layers * c.stage_layers} layers of width {c.d_model}, {c.vocab_size:,}"
        f" words, {c.n_layers} exits; windows of {c.n_seq} tokens",
        f"exits fitted on {fitted:,} tokens; test trace of {probe.trace('test').n_tokens:,},"
        f" certified on {probe.split('certify').n_documents} documents of at most"
        f" {probe.config.document_tokens} tokens",
        "",
        f"Each exit, test split (close: share of tokens within {CLOSE:g} nats of the last layer):",
        exits.to_string(index=False, float_format=lambda v: f"{v:.4g}"),
        f"{exits['close_so_far'].iloc[-2]:.0%} of the tokens have such an exit before the last layer.",
        "",
        "Policies, run compacted on the test split; hindsight and random exits off its trace:",
        _plain(probe.policies[POLICIES].assign(speedup_time=_with_interval(probe.policies))),
        *(
            f"  not certified at {e:.0%}: {found}"
            for e, found in probe.certificates.items()
            if isinstance(found, Refused)
        ),
    ]
    if len(probe.peers):
        parts += ["", "Greedy decoding, with drafts by exits, here and by other libraries:"]
        peers = probe.peers[PEERS].assign(speedup_time=_with_interval(probe.peers))
        parts += [_plain(peers), *_sources(probe.peers)]
    parts += [
        "",
        probe.sentence(epsilon),
        f"{(time.perf_counter() - started) / 60:.1f} minutes now, kept steps not counted; peak memory"
        f" {largest_peak_bytes() / MIB:,.0f} MiB.",
    ]
    return "\n".join(parts)


def _plain(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format=lambda v: f"{v:.3f}", na_rep="")


def _with_interval(table: pd.DataFrame) -> list[str]:
    """Return times as text, the ratio and its interval, where there are such."""
    said = []
    for at, low, high in table[list(TIMES)].itertuples(index=False):
        ends = "" if pd.isna(low) else f" [{low:.2f}, {high:.2f}]"
        said.append("" if pd.isna(at) else f"{at:.2f}{ends}")
    return said


def _sources(peers: pd.DataFrame) -> list[str]:
    known = peers.dropna(subset="source")
    return [f"  {row.system}: {row.source}" for row in known.itertuples()]
