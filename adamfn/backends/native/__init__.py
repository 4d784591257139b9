"""Native code of the step on CPU: its sources, and their building, keeping and loading."""
