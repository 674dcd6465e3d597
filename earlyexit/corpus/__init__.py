"""Text becomes ids: documents are read, tokenised, split, and cut into windows."""
