"""What a run can continue from (floor 8)."""
