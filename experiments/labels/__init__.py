"""Classes told apart with all, some or few labels, and found with none."""
