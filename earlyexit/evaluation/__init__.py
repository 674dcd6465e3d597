"""This wing runs models and policies, and tabulates their quality, speed and guarantees."""
