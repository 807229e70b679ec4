"""The proof from outside: the real broker, callers that misbehave, kills, and a checker of everything that was said.

``python -m tests.torture --seconds 60``; ``make torture`` runs it once as it is and once for every mutant.
"""
