"""The mathematics of one kernel's update."""
