"""Recurrent operators: every form against the oracles, states, packed sequences, extreme gates, refusals."""
