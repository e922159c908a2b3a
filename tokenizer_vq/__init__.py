"""Pictures to discrete tokens and back. Knows nobody: import what you need from its modules."""
