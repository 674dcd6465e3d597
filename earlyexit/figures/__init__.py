"""Figures: each function takes tidy tables and draws one picture."""

from earlyexit.figures.answer import front, depth_by_class, depth_by_position, coloured_text, coloured_html
from earlyexit.figures.build import training_curves, leak, cost_shares
from earlyexit.figures.calibration import reliability
from earlyexit.figures.combinations import sparse_limits, combinations, claimed_measured, act_conversion
from earlyexit.figures.guarantees import target_achieved, violation_rates, bound_widths, price_of_certainty
from earlyexit.figures.memory import memory
from earlyexit.figures.prices import predicted_measured, break_even
from earlyexit.figures.speedup import part_times, speedups, layer_equivalents, run_parts, compaction, throughput, propagation, output_heads
from earlyexit.figures.style import label_of, lines, layer_colours
from earlyexit.figures.sweep import pareto, exit_distributions, threshold_sweep, exit_quality, recipes, equal_cost

__all__ = ['act_conversion', 'bound_widths', 'break_even', 'claimed_measured', 'coloured_html', 'coloured_text', 'combinations', 'compaction', 'cost_shares', 'depth_by_class', 'depth_by_position', 'equal_cost', 'exit_distributions', 'exit_quality', 'front', 'label_of', 'layer_colours', 'layer_equivalents', 'leak', 'lines', 'memory', 'output_heads', 'pareto', 'part_times', 'predicted_measured', 'price_of_certainty', 'propagation', 'recipes', 'reliability', 'run_parts', 'sparse_limits', 'speedups', 'target_achieved', 'threshold_sweep', 'throughput', 'training_curves', 'violation_rates']
