"""The command ``slimkern``; each command lives in its own module and imports what it needs."""
