"""Profiles, the cache of costly steps, the running of notebooks and the publishing of results."""
