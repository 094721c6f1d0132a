"""What moves: wires over torch process groups and MPI, and between ranks of one host."""
