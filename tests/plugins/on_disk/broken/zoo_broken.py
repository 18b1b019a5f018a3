"""A plugin that raises when it is imported."""

raise RuntimeError("the flux capacitor is missing")
