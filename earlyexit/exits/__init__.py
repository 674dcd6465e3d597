"""This wing decides when tokens exit, and runs models with exits.

It knows a model through the contract in :mod:`earlyexit.exits.protocol` alone.
"""
