"""This wing turns text into ids: documents are read, tokenised, split, and cut into windows."""
