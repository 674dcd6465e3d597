"""This wing counts the operations of a run, measures its time and memory, and predicts its time."""
