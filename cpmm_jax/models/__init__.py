"""What is trained; every model answers `mixture(times)` with a `HierarchicalMFA`."""
