"""This wing holds the layers of the models, about one in a file, each with its mathematics."""
