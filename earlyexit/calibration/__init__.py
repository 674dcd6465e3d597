"""This wing fits policies to traces, and certifies them on units that nothing was fitted on."""
