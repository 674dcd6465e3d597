"""Each function takes tidy tables and draws them, on given axes or in a new figure.

``figures.pareto(curves, "speedup_layers", "speedup")`` makes a new figure;
``figures.pareto(…, ax=ax)`` draws on the axes of a larger one. A picture of several panels takes
as many axes, row by row; each panel has a function as well, plain ones :func:`lines`. A function
returns the axes that it drew on; ``ax.figure`` is the figure.
"""

# ruff: noqa: F401, I001 – the names are imported for others, several in a line.
# fmt: off

from earlyexit.figures.build import (
    ablation, cost_shares, depth_and_memory, depth_curve, leak, memory_curve, position_curve,
    trained_exits, training_curves, training_nll)
from earlyexit.figures.calibration import confidence_shares, reliability, reliability_diagram
from earlyexit.figures.decoding import (
    decoding, decoding_parts, decoding_speeds, draft_break_even)
from earlyexit.figures.guarantees import (
    bound_widths, price_of_certainty, target_achieved, violation_rate, violation_rates)
from earlyexit.figures.memory_profiling import memory
from earlyexit.figures.speedup_breakdown import (
    break_even, break_even_map, compaction, compaction_efficiency, compaction_speedups,
    layer_equivalents, left_behind, output_head_times, output_heads, over_batch_sizes, part_times,
    predicted_measured, propagation, propagation_by, run_parts, speedups, throughput, time_by_part)
from earlyexit.figures.study import (
    coloured_html, coloured_text, coloured_words, depth_by_class, depth_by_position, front,
    loss_against, rivals, rivals_at)
from earlyexit.figures.style import label_of, layer_colours, lines, setting_of, use_style
from earlyexit.figures.sweep import (
    equal_cost, exit_distribution, exit_distributions, exit_quality, over_threshold, pareto,
    recipes, threshold_sweep)
from earlyexit.figures.systems import (
    act_conversion, claimed_measured, combination_curves, combinations, sparse_limits)
