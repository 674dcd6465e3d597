"""Other computations behind the same exits: ACT, several scales, a sparse BK-Core."""
