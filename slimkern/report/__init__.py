"""The HTML report of a run: one self-contained page, and the results behind it as JSON."""
