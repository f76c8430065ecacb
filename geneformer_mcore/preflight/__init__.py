"""What can be known of a job before it trains: nodes, folders, room, clocks, network (floor 10)."""
