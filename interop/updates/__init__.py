"""ΔW of one module, in numpy."""
