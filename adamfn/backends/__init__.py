"""What runs a fused step."""
