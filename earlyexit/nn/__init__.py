"""The layers of the models stand here, about one in a file, each with its mathematics."""
